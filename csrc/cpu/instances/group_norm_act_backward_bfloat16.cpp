#include "../group_norm_act_backward.h"

namespace dx::norm_backward {
DX_ADD(kFewSums, BFloat16);
DX_WRITE(BFloat16);
}  // namespace dx::norm_backward
