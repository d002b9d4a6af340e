#include "../group_norm_act_backward.h"

template void dx::norm_backward::add<dx::kSums>(const Slab&, const Channels&, const Tensors&,
                                                int64_t, Sums&);
