#include "../group_norm_act_backward.cuh"

namespace dx::norm_backward {
DX_SUMS_LAUNCHES(, kFewSums, BFloat16)
DX_APPLY_LAUNCH(, BFloat16)
}  // namespace dx::norm_backward
