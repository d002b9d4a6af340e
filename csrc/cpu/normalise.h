// group_norm_act for other kernels of the CPU.
#pragma once

#include "../ops/group_norm_act.h"

namespace dx {

// y of x, [N, C, *spatial] in g's layout, and mean and rstd [N, G] of its groups.
void normalise(const GroupNorm& g, double eps, const float* x, float* y, double* mean, float* rstd);

}  // namespace dx
