#include "../group_norm_act_backward.cuh"

namespace dx::norm_backward {
DX_SUMS_LAUNCHES(, kFewSums, Half)
DX_APPLY_LAUNCH(, Half)
}  // namespace dx::norm_backward
