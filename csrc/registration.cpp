// The schema of every op. The kernels register themselves: csrc/cpu for "CPU", csrc/cuda for
// "CUDA".
#include "common.h"

// A macro of its own, so that DX_NAMESPACE is replaced before torch's makes a string of it.
#define DX_DEFINE_OPS(ns, m) STABLE_TORCH_LIBRARY(ns, m)

DX_DEFINE_OPS(DX_NAMESPACE, m) {
  m.def(
      "sampler_step(Tensor x, Tensor model_output, Tensor coefficients, Tensor timesteps, "
      "Tensor row, Tensor? noise, Tensor? seeds, Tensor? history, float? clip, float guidance, "
      "bool return_x0) -> (Tensor, Tensor)");
  m.def(
      "sampler_step_of_row(Tensor x, Tensor model_output, Tensor row, int timestep, Tensor? noise, "
      "Tensor? seeds, Tensor[] slots, float? clip, bool return_x0) -> Tensor[]");
  m.def(
      "sampler_step_with_slots(Tensor x, Tensor model_output, Tensor coefficients, "
      "Tensor timesteps, Tensor row, Tensor? noise, Tensor? seeds, Tensor(a!) slots, float? clip, "
      "float guidance, bool return_x0) -> (Tensor, Tensor)");
  m.def(
      "sampler_step_(Tensor(a!) x, Tensor model_output, Tensor coefficients, Tensor timesteps, "
      "Tensor row, Tensor? noise, Tensor? seeds, Tensor(b!)? slots, float? clip, "
      "float guidance) -> ()");
  m.def(
      "perturb(Tensor x0, Tensor t, Tensor signal, Tensor sigma, Tensor? noise, Tensor? seeds, "
      "int learned) -> (Tensor, Tensor)");
  m.def(
      "denoising_loss(Tensor model_output, Tensor t, Tensor of_x0, Tensor of_noise, Tensor? x0, "
      "Tensor? noise, Tensor? seeds, Tensor? upstream, float? delta) -> (Tensor, Tensor)");
  m.def("philox_normal_(Tensor(a!) out, Tensor seeds, int step, int stream) -> ()");
  m.def(
      "group_norm_act(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, int act, "
      "Tensor? scale, Tensor? shift, Tensor? post_scale, Tensor? post_shift, Tensor? pre_shift) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_act_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, int num_groups, "
      "Tensor? weight, Tensor? bias, int act, Tensor? scale, Tensor? shift, Tensor? post_scale, "
      "Tensor? post_shift, Tensor? pre_shift) -> (Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dscale, Tensor dshift, Tensor dpost_scale, Tensor dpost_shift, Tensor dpre_shift)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor");
  m.def("has_code(int device) -> bool");
  m.def("conv3x3_filters(Tensor weight) -> Tensor");
  m.def("conv2d_filters(Tensor weight, bool transposed) -> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor? skip, Tensor filters, Tensor? bias, Tensor? residual, "
      "int out_channels, int stride_high, int stride_wide, int padding_high, int padding_wide, "
      "int repeat, int side, int act, float scale) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor filters, Tensor? bias, Tensor? residual, int out_channels, int act, "
      "bool gated) -> Tensor");
  m.def(
      "conv3d(Tensor x, Tensor filters, Tensor? bias, Tensor? residual, int out_channels, "
      "int stride_time, int stride_high, int stride_wide, int padding_time, int padding_high, "
      "int padding_wide, int act, float scale, bool contiguous) -> Tensor");
  m.def(
      "context_unet(Tensor x, Tensor scale1, Tensor shift1, Tensor scale2, Tensor shift2, "
      "Tensor[] filters, Tensor[] biases, Tensor[] norms, int groups, float eps, int shortcut, "
      "int window) -> Tensor");
  m.def("conv3x3_once(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor x, Tensor dy, Tensor weight) -> Tensor");
}
