#include "../group_norm_act_backward.cuh"

namespace dx::norm_backward {
DX_SUMS_LAUNCHES(, kSums, BFloat16)
}
