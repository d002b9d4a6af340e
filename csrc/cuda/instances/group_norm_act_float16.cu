#include "../group_norm_act_forward.cuh"

namespace dx::norm_forward {
DX_FORWARD_LAUNCHES(, Half)
}
