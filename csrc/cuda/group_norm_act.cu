// group_norm_act, forward: the launches of a plan (group_norm_plan.h).
#include "group_norm_act_forward.cuh"

namespace dx {
namespace {

using namespace norm_forward;

// A warp for each group adds up its parts. A group without elements has mean 0 and variance 0.
DX_GLOBAL DX_BOUNDED(128, 1) void norm_statistics(const Moments* moments, const int parts,
                                                  const int64_t groups, const double eps,
                                                  double* mean, float* rstd) {
  let_next_launch();
  await_last_launch();
  const int64_t group = block() * warps() + warp();
  if (group >= groups) return;
  Moments all = {0, 0, 0};
  for (int i = lane(); i < parts; i += kWarp) all = combine(all, moments[group * parts + i]);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    all = combine(all, {shuffle_xor(all.count, mask), shuffle_xor(all.mean, mask),
                        shuffle_xor(all.m2, mask)});
  if (lane() != 0) return;
  mean[group] = all.mean;
  rstd[group] = rstd_of(all, eps);
}

struct Cuda {
  OnDevice device;
  Tensor like;
  explicit Cuda(const Tensor& x) : device(x), like(x) {}

  static Layout layout(const Tensor& x, int64_t groups) { return norm_layout(x, groups); }

  template <class T>
  void forward(const GroupNorm& g, double eps, const T* x, T* y, double* mean, float* rstd) const {
    const NormPlan plan = plan_of(g, device, {x, y}, sizeof(T), false);
    const Call<T> call{device, g, plan, eps, x, y, mean, rstd};
    const int64_t groups = g.samples * g.groups;
    if (groups == 0) return;
    if (g.elements() == 0) return statistics(call, nullptr);
    if (plan.on_chip) return launch_on_chip(call);
    const Tensor scratch =
        fresh(like, {groups * plan.parts * int64_t{sizeof(Moments) / sizeof(double)}},
              aoti_torch_dtype_float64());
    auto* moments = static_cast<Moments*>(scratch.mutable_data_ptr());
    launch_moments(call, moments);
    statistics(call, moments);
    launch_apply(call);
  }

  // moments: null where x has no elements.
  template <class T>
  static void statistics(const Call<T>& c, const Moments* moments) {
    const int64_t groups = c.g.samples * c.g.groups;
    Launch how{"group_norm_act: statistics", (groups + 3) / 4, 1, 4 * kWarp};
    how.follows_ours = moments != nullptr;
    const int parts = moments == nullptr ? 0 : c.plan.parts;
    launch(c.device, how, norm_statistics, moments, parts, groups, c.eps, c.mean, c.rstd);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) { m.impl("group_norm_act", TORCH_BOX(&group_norm_act<Cuda>)); }

}  // namespace dx
