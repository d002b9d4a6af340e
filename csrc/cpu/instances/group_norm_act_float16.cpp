#include "../group_norm_act_forward.h"

template void dx::norm_forward::run(const dx::GroupNorm&, double, const dx::Half*, dx::Half*,
                                    double*, float*);
