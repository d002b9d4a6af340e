// Small kernels for test_planted_bugs.py. Each is correct with bug 0, and has a bug with 1, 2, ...:
// the emulation has to find it. An op NAME(out, x, bug) launches the kernel on float32 vectors.
#include "../../csrc/cuda/device.cuh"

namespace dx {
namespace {

constexpr int kThreads = 128, kBlocks = 6;

// out[b]: the sum of the block's 128 of x, in shared memory. Bugs: 1 no barrier after the loads,
// 2 none between two steps of the sum.
DX_GLOBAL void block_sum(float* out, const float* x, int bug) {
  float (&all)[kThreads] = shared<float[kThreads]>();
  all[thread()] = x[block() * kThreads + thread()];
  if (bug != 1) block_barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread() < half) all[thread()] += all[thread() + half];
    if (bug != 2) block_barrier();
  }
  if (thread() == 0) out[block()] = all[0];
}

// out[w]: the sum of a warp's 32 of x. Bugs: 1 a wrong lane, 2 an absent one, 3 no such lane,
// 4 half of the lanes are at another shuffle.
DX_GLOBAL void warp_sum(float* out, const float* x, int bug) {
  float sum = x[thread()];
  if (bug == 2 && thread() == 39) return;
  if (bug == 4 && lane() < 16)
    sum += shuffle_xor(sum, 16);
  else
    sum += shuffle_xor(sum, 16);
  for (int mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, bug == 1 && mask == 2 ? 4 : mask);
  if (bug == 3) sum += shuffle_xor(sum, 32);
  if (lane() == 0) out[warp()] = sum;
}

// out = 2 x, four at a time, then the tail. Bugs: 1 one too many, 2 one too few, 3 the vectors
// begin at an element that is not aligned.
DX_GLOBAL void twice(float* out, const float* x, int64_t n, int bug) {
  const int64_t vectors = n / 4, first = bug == 3 ? 1 : 0;
  for (int64_t i = block() * threads() + thread(); i < vectors; i += blocks() * threads()) {
    Vec<float, 4> four = load<4>(x + first + 4 * i);
    for (float& value : four.at) value *= 2;
    store(out + first + 4 * i, four);
  }
  if (block() > 0) return;
  const int64_t end = bug == 1 ? n + 1 : bug == 2 ? n - 1 : n;
  for (int64_t i = 4 * vectors + thread(); i < end; i += threads()) out[i] = 2 * x[i];
}

// out: each block's part of x in reverse. Bugs: 1 some threads end before the barrier, 2 some
// wait at another one, 3 half of a warp at a shuffle instead.
DX_GLOBAL void reverse(float* out, const float* x, int bug) {
  float (&all)[kThreads] = shared<float[kThreads]>();
  all[thread()] = x[block() * kThreads + thread()];
  if (bug == 1 && thread() == 77 && block() == 4) return;
  if (bug == 2 && thread() >= 64)
    block_barrier();
  else if (bug == 3 && warp() == 2 && lane() < 16)
    all[thread()] += shuffle_xor(0.0f, 1);
  else
    block_barrier();
  out[block() * kThreads + thread()] = all[kThreads - 1 - thread()];
}

// out: x by way of shared memory. Bugs: 1 a write past dynamic memory, 2 before it, 3 past static
// memory, 4 a read past dynamic memory.
DX_GLOBAL void by_shared(float* out, const float* x, int bug) {
  float* all = dynamic_shared<float>();
  float* own = shared<float[kThreads]>();
  const int t = thread();
  const int64_t at = block() * kThreads + t;
  const bool last = t == kThreads - 1 && block() == 2;
  all[t] = own[t] = x[at];
  if (bug == 1 && last) all[t + 1] = 0;
  if (bug == 2 && t == 0) all[-1] = 0;
  if (bug == 3 && last) own[t + 1] = 0;
  block_barrier();
  out[at] = all[bug == 4 ? t + 1 : t];
}

// out[b]: the sum of the cluster's four blocks' x[b]. Bugs: 1 the others are read without waiting,
// 2 the block may end while another reads it, 3 no such rank, 4 not a pointer to shared memory,
// 5 a thread skips the cluster's barrier, 6 one block ends before another reads it.
DX_GLOBAL void cluster_sum(float* out, const float* x, int bug) {
  float& own = shared<float>();
  if (thread() == 0) own = x[block()];
  if (bug == 1) block_barrier();
  if (bug == 5 && thread() == 3 && cluster_rank() == 2) return;
  if (bug == 6 && cluster_rank() == 2) return;
  for (int i = 0; bug == 6 && i < 20; ++i) block_barrier();
  if (bug != 1 && bug != 6) cluster_barrier();
  if (thread() == 0) {
    float sum = 0;
    for (int rank = 0; rank < cluster_size(); ++rank)
      sum += *of_rank(bug == 4 ? x : &own, bug == 3 ? rank + 1 : rank);
    out[block()] = sum;
  }
  if (bug != 2) cluster_barrier();
}

// The same, where the last barrier is waited for at the end. Bugs: 1 a thread arrives twice, 2
// waits without having arrived, 3 ends without waiting, 4 reads after it has arrived.
DX_GLOBAL void in_halves(float* out, const float* x, int bug) {
  float& own = shared<float>();
  if (thread() == 0) own = x[block()];
  cluster_barrier();
  float sum = 0;
  if (thread() == 0)
    for (int rank = 0; rank < cluster_size(); ++rank) sum += *of_rank(&own, rank);
  const bool wrong = thread() == 5 && cluster_rank() == 1;
  if (!(bug == 2 && wrong)) cluster_arrive();
  if (bug == 1 && wrong) cluster_arrive();
  if (bug == 4 && wrong) sum += *of_rank(&own, 2);
  if (thread() == 0) out[block()] = sum;
  if (!(bug == 3 && wrong)) cluster_wait();
}

// out = 2 x, in a launch that follows another. Bug 1: a thread does not wait for that.
DX_GLOBAL void follower(float* out, const float* x, int bug) {
  if (!(bug == 1 && thread() == 9)) await_last_launch();
  out[thread()] = 2 * x[thread()];
}

// out = sqrt(x)
DX_GLOBAL void root(float* out, const float* x) {
  const int64_t i = block() * threads() + thread();
  require(x[i] >= 0, "x is negative");
  out[i] = sqrtf(x[i]);
}

// out[i]: how many threads ran before thread i did.
DX_GLOBAL void order(float* out, float* count) { out[block() * threads() + thread()] = (*count)++; }

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void run_block_sum(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"block_sum", kBlocks, 1, kThreads}, block_sum, data(out), data(x), int(bug));
}
void run_warp_sum(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"warp_sum", 1, 1, kThreads}, warp_sum, data(out), data(x), int(bug));
}
void run_twice(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"twice", 2, 1, 64}, twice, data(out), data(x), out.numel(), int(bug));
}
void run_reverse(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"reverse", kBlocks, 1, kThreads}, reverse, data(out), data(x), int(bug));
}
void run_by_shared(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"by_shared", kBlocks, 1, kThreads, 1, kThreads * int(sizeof(float))},
         by_shared, data(out), data(x), int(bug));
}
void run_cluster_sum(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"cluster_sum", 8, 1, 64, 4}, cluster_sum, data(out), data(x), int(bug));
}
void run_in_halves(const Tensor& out, const Tensor& x, int64_t bug) {
  launch(OnDevice(x), {"in_halves", 8, 1, 64, 4}, in_halves, data(out), data(x), int(bug));
}
void run_follower(const Tensor& out, const Tensor& x, int64_t bug) {
  Launch how{"follower", 1, 1, kThreads};
  how.follows_ours = true;
  launch(OnDevice(x), how, follower, data(out), data(x), int(bug));
}
void run_root(const Tensor& out, const Tensor& x, int64_t) {
  launch(OnDevice(x), {"root", 1, 1, kThreads}, root, data(out), data(x));
}
void run_order(const Tensor& out, const Tensor& x, int64_t) {
  launch(OnDevice(x), {"order", kBlocks, 1, kThreads}, order, data(out), data(x));
}

// The grid is launch(blocks, blocks_y, threads, cluster, shared_bytes); the kernel does nothing.
DX_GLOBAL void nothing() {}
void run_launch(const Tensor& x, int64_t blocks, int64_t blocks_y, int64_t threads, int64_t cluster,
                int64_t shared_bytes) {
  const Launch how{"nothing", blocks, blocks_y, int(threads), int(cluster), int(shared_bytes)};
  launch(OnDevice(x), how, nothing);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DX_NAMESPACE, m) {
  m.def("block_sum(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("warp_sum(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("twice(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("reverse(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("by_shared(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("cluster_sum(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("in_halves(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("follower(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("root(Tensor(a!) out, Tensor x, int bug) -> ()");
  m.def("order(Tensor(a!) out, Tensor(b!) x, int bug) -> ()");
  m.def(
      "launch(Tensor x, int blocks, int blocks_y, int threads, int cluster, int shared_bytes) "
      "-> ()");
}

DX_REGISTER_KERNELS(m) {
  m.impl("block_sum", TORCH_BOX(&run_block_sum));
  m.impl("warp_sum", TORCH_BOX(&run_warp_sum));
  m.impl("twice", TORCH_BOX(&run_twice));
  m.impl("reverse", TORCH_BOX(&run_reverse));
  m.impl("by_shared", TORCH_BOX(&run_by_shared));
  m.impl("cluster_sum", TORCH_BOX(&run_cluster_sum));
  m.impl("in_halves", TORCH_BOX(&run_in_halves));
  m.impl("follower", TORCH_BOX(&run_follower));
  m.impl("root", TORCH_BOX(&run_root));
  m.impl("order", TORCH_BOX(&run_order));
  m.impl("launch", TORCH_BOX(&run_launch));
}

}  // namespace dx
