// What launch() asks of CUDA, for test_launches.py. Prints, for each of the GPUs of
// made_up_gpus.cpp, how often a kernel was given shared memory and whether launches overlap.
#include "../../csrc/cuda/device.cuh"

#include <cstdio>
#include <thread>

#include "made_up_gpus.h"

namespace dx {
namespace {

template <int>
DX_GLOBAL void follower() {
  await_last_launch();
}

void launch_on(int32_t index) {
  current = index;
  const OnDevice device{Tensor(reinterpret_cast<AtenTensorHandle>(&index))};
  Launch how{"follower", 1, 1, kWarp, 1, 60000};
  how.follows_ours = true;
  asked = 0;  // OnDevice has asked for a kernel of its own
  const auto launch_often = [&](auto kernel) {
    for (int i = 0; i < 100; ++i) launch(device, how, kernel);
  };
  std::thread other(launch_often, follower<0>);
  launch_often(follower<0>);
  launch_often(follower<1>);
  other.join();
  printf("%d %d\n", asked.load(), int(overlaps));
}

}  // namespace
}  // namespace dx

int main() {
  for (int index = 0; index < 3; ++index) dx::launch_on(index);
}
