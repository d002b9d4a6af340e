#include "../group_norm_act_backward.h"

namespace dx::norm_backward {
DX_ADD(kSums, Half);
}
