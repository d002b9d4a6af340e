// What the ops of training share: noise of a stream of its own, and tables by timestep.
#pragma once

#include "../common.h"

namespace dx {

constexpr uint32_t kTrainingStream = 2;

// A table [T+1] of numbers by timestep, float32 on x's device.
inline const float* noising_table(const char* name, const Tensor& t, const Tensor& x) {
  check_same_device(name, t, x);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.is_contiguous(), name,
                  ": wanted a contiguous float32 table [T+1]");
  return data_of<float>(t);
}

}  // namespace dx
