// group_norm_act, backward: the launches of a plan (group_norm_plan.h), and the gradients of the
// parameters.
#include "group_norm_gradients.cuh"

namespace dx {
namespace {

using namespace norm_backward;

struct Cuda {
  OnDevice device;
  Tensor like;
  explicit Cuda(const Tensor& x) : device(x), like(x) {}

  static Layout layout(const Tensor& x, int64_t groups) { return norm_layout(x, groups); }

  Tensor floats(int64_t count) const { return fresh(like, {count}, aoti_torch_dtype_float32()); }

  template <class T>
  void backward(const GroupNorm& g, const T* dy, const T* x, const double* mean, const float* rstd,
                T* dx, const Gradients& gradients) const {
    if (g.channels == 0) return;
    const NormPlan plan = plan_of(g, device, {x, dy, dx}, sizeof(T), true);
    const bool post = g.post_scale.given() || g.post_shift.given();
    const int kinds = post || g.pre_shift.given() ? int(kSums) : kFewSums;
    const int64_t stride = g.elements() == 0 ? 0 : g.samples * g.channels * plan.pieces;
    const Tensor sums_scratch = floats(kinds * stride);
    const Tensor means_scratch = floats(2 * g.samples * g.groups);
    auto* sums_data = static_cast<float*>(sums_scratch.mutable_data_ptr());
    const PartialSums sums{sums_data, g.channels, stride == 0 ? 0 : plan.pieces, stride};
    auto* means = static_cast<GroupMeans*>(means_scratch.mutable_data_ptr());
    if (stride > 0) {
      const Call<T> call{device, g, plan, {x, dy, mean, rstd, sums, means, dx}};
      if (kinds == kSums)
        input<kSums>(call);
      else
        input<kFewSums>(call);
    }
    const bool wanted = std::any_of(gradients.of, gradients.of + kParameters,
                                    [](const Gradient& p) { return p.wanted(); });
    if (!wanted) return;
    const int lanes = plan::power_of_two_up_to(sums.pieces, kWarp);
    Launch how{"group_norm_act_backward: parameters", g.channels, 1, kParameterThreads};
    how.follows_ours = stride > 0;
    launch(device, how, gradient_parameters, g, rstd, sums, stride == 0 ? 0 : kinds,
           static_cast<const GroupMeans*>(means), lanes, gradients);
  }

  template <int kinds, class T>
  static void input(const Call<T>& c) {
    if (c.plan.on_chip) return launch_on_chip<kinds>(c);
    launch_sums<kinds>(c);
    Launch how{"group_norm_act_backward: means", c.g.samples * c.g.groups, 1, kMeansThreads};
    how.follows_ours = true;
    launch(c.device, how, gradient_means, c.g, c.b.sums, c.b.means);
    launch_apply(c);
  }
};

}  // namespace

DX_REGISTER_KERNELS(m) {
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<Cuda>));
}

}  // namespace dx
