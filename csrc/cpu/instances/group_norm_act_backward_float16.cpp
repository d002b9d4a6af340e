#include "../group_norm_act_backward.h"

namespace dx::norm_backward {
DX_ADD(kFewSums, Half);
DX_WRITE(Half);
}  // namespace dx::norm_backward
