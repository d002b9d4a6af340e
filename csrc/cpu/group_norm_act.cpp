// group_norm_act, forward.
#include "group_norm_act_forward.h"
#include "normalise.h"

namespace dx {
namespace {

// A group without elements has mean 0 and variance 0.
void fill_empty(const GroupNorm& g, double eps, double* mean, float* rstd) {
  std::fill_n(mean, g.samples * g.groups, 0.0);
  std::fill_n(rstd, g.samples * g.groups, float(1.0 / std::sqrt(eps)));
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static Layout layout(const Tensor& x, int64_t) { return layout_of(x); }

  template <class T>
  void forward(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) const {
    if (g.spatial == 0) fill_empty(g, eps, mean, rstd);
    norm_forward::run(g, eps, x, y, mean, rstd);
  }
};

}  // namespace

void normalise(const GroupNorm& g, double eps, const float* x, float* y, double* mean,
               float* rstd) {
  norm_forward::run(g, eps, x, y, mean, rstd);
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act<Cpu>));
}

}  // namespace dx
