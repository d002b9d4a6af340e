#include "../group_norm_act_forward.h"

template void dx::norm_forward::run(const dx::GroupNorm&, double, const float*, float*, double*,
                                    float*);
