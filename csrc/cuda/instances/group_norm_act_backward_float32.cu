#include "../group_norm_act_backward.cuh"

namespace dx::norm_backward {
DX_SUMS_LAUNCHES(, kFewSums, float)
DX_APPLY_LAUNCH(, float)
}  // namespace dx::norm_backward
