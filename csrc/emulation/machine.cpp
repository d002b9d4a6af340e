// The order that threads run in, what they wait for, and what a GPU would make of it.
#include "../cuda/device.cuh"

#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "random.h"

namespace dx::emulation {

Thread* running = nullptr;

namespace {

// One launch at a time, whichever thread of the host it comes from.
struct Machine {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;

  // Of the launch.
  Fiber* host;
  Call call;
  Random random{0};
  std::vector<Thread*> ready;  // to start or to go on, in no order
  int unfinished;              // threads of the cluster
  std::exception_ptr failure;
};
Machine machine;

std::string name_of(const Block& block) {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ")";
}

std::string name_of(const Thread& thread) {
  return name_of(*thread.block) + ", thread " + std::to_string(thread.index);
}

std::string name_of(const Place& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

[[noreturn]] void fail(const Block& block, const std::string& message) {
  throw std::runtime_error(std::string(block.cluster->how.name) + ", " + name_of(block) + ": " +
                           message);
}

[[noreturn]] void fail(const Thread& thread, const std::string& message) {
  throw std::runtime_error(std::string(thread.block->cluster->how.name) + ", " + name_of(thread) +
                           ": " + message);
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

std::string waits(const Thread& thread) {
  return std::string("waits at ") + thread.awaited->name + " of " + name_of(thread.place);
}

// Nobody can go on: somebody waits for a thread that has ended, or that waits elsewhere.
[[noreturn]] void fail_deadlocked(const Cluster& cluster) {
  const Thread* waiting = nullptr;
  const Thread* absent = nullptr;
  for (const Thread& thread : cluster.threads) {
    if (thread.awaited == nullptr) continue;
    for (const Thread& other : thread.awaited->members) {
      if (other.awaited == thread.awaited) continue;
      if (absent == nullptr || (other.ended && !absent->ended)) waiting = &thread, absent = &other;
      break;
    }
  }
  fail(*waiting, waits(*waiting) + ", but " + name_of(*absent) +
                     (absent->ended ? " has ended" : " " + waits(*absent)));
}

// A thread whose turn it is, or null where none can go on.
Thread* choose() {
  if (machine.ready.empty()) return nullptr;
  Thread*& chosen = machine.ready[machine.random.below(machine.ready.size())];
  Thread* thread = chosen;
  chosen = machine.ready.back();
  machine.ready.pop_back();
  return thread;
}

void work();

Fiber* take_fiber() {
  if (machine.idle.empty()) {
    machine.fibers.push_back(std::make_unique<Fiber>(work));
    return machine.fibers.back().get();
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
  return fiber;
}

// Between launches, where all fibers are idle: Linux gives a process 65,530 mappings, two for each
// fiber, which the libraries of many variants together would use up.
void keep_few_fibers() {
  constexpr size_t kKept = 512;
  if (machine.fibers.size() <= kKept) return;
  machine.fibers.resize(kKept);
  machine.idle.clear();
  for (const auto& fiber : machine.fibers) machine.idle.push_back(fiber.get());
}

void go_on_with(Thread* thread, Fiber& from) {
  if (thread->fiber == nullptr) thread->fiber = take_fiber();
  running = thread;
  from.switch_to(*thread->fiber);
}

// All have come: those that wait go on.
void complete(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.turns;
  Cluster& cluster = *meeting.members.front().block->cluster;
  if (&meeting == &cluster.barrier) cluster.reader = {};
  for (Thread& member : meeting.members) {
    if (member.awaited != &meeting) continue;
    member.awaited = nullptr;
    machine.ready.push_back(&member);
  }
}

void arrive(Meeting& meeting, Place place) {
  running->place = place;
  if (meeting.arrived == 0) meeting.place = place;
  if (!same(meeting.place, place))
    fail(*running, std::string("waits at ") + meeting.name + " of " + name_of(place) +
                       ", but others wait at that of " + name_of(meeting.place));
  if (++meeting.arrived == int(meeting.members.size())) complete(meeting);
}

void go_on() {
  Thread* const self = running;
  Thread* const next = choose();
  if (next == nullptr) fail_deadlocked(*self->block->cluster);
  if (next != self) go_on_with(next, *self->fiber);
}

void meet(Meeting& meeting, Place place) {
  running->awaited = &meeting;
  arrive(meeting, place);
  go_on();
}

void end(Block& block) {
  const auto check = [&](const SharedMemory& memory, const char* kind) {
    if (!memory.intact())
      fail(block, std::string("a thread has written outside the ") +
                      std::to_string(memory.bytes()) + " bytes of " + kind + " shared memory");
  };
  check(block.dynamic, "dynamic");
  for (const auto& [type, memory] : block.statics) check(memory, "static");
  if (block.cluster->how.cluster == 1) return;
  block.dynamic.poison();  // for another block that still reads it
  for (auto& [type, memory] : block.statics) memory.poison();
}

void end(Thread& thread) {
  if (thread.arrived) fail(thread, "ends between cluster_arrive and cluster_wait");
  if (thread.block->cluster->how.follows_ours && !thread.awaited_last_launch)
    fail(thread, "ends without await_last_launch, which its launch asks for");
  thread.ended = true;
  thread.fiber = nullptr;
  --machine.unfinished;
  if (--thread.block->running == 0) end(*thread.block);
}

// What every fiber does: threads from their start to their end, one after another. One that waits
// keeps its fiber, and another fiber goes on; so a kernel in which none waits needs but one.
void work() {
  for (;;) {
    Fiber* const self = running->fiber;
    Thread* next = nullptr;
    try {
      for (;;) {
        machine.call.kernel(machine.call.arguments);
        end(*running);
        next = choose();
        if (next == nullptr && machine.unfinished > 0) fail_deadlocked(*running->block->cluster);
        if (next == nullptr || next->fiber != nullptr) break;
        next->fiber = self;
        running = next;
      }
    } catch (...) {
      machine.failure = std::current_exception();
      next = nullptr;
    }
    if (running->fiber == self) running->fiber = nullptr;
    machine.idle.push_back(self);
    if (next != nullptr) {
      go_on_with(next, *self);
    } else {
      self->switch_to(*machine.host);
    }
  }
}

void check(const Launch& how, const DeviceLimits& limits) {
  const auto wanted = [&](bool right, const char* what) {
    if (!right) throw std::runtime_error(std::string(how.name) + ": launch: wanted " + what);
  };
  wanted(how.threads >= kWarp && how.threads <= 1024 && how.threads % kWarp == 0,
         "32 to 1024 threads, a multiple of 32");
  wanted(how.cluster >= 1 && how.cluster <= 8 && how.cluster <= limits.max_cluster,
         "clusters that the device has");
  wanted(how.blocks >= 1 && how.blocks < int64_t(1) << 31 && how.blocks % how.cluster == 0,
         "1 to 2^31-1 blocks, a multiple of the cluster");
  wanted(how.blocks_y >= 1 && how.blocks_y <= 65535, "1 to 65535 blocks_y");
  wanted(how.shared_bytes >= 0 && how.shared_bytes <= std::max(limits.shared_bytes, kLeastShared),
         "no more shared memory than the device has");
}

// Each part knows where the others are, so nothing moves from here on.
void set_up(Cluster& cluster) {
  const size_t size = cluster.how.cluster, threads = cluster.how.threads, warps = threads / kWarp;
  cluster.threads.resize(size * threads);
  cluster.warps.resize(size * warps);
  cluster.blocks.reserve(size);
  cluster.barrier = {"cluster_barrier", cluster.threads, 0, {}};
  for (size_t rank = 0; rank < size; ++rank) {
    const std::span its_threads(&cluster.threads[rank * threads], threads);
    const std::span its_warps(&cluster.warps[rank * warps], warps);
    cluster.blocks.push_back({&cluster,
                              int(rank),
                              0,
                              0,
                              its_threads,
                              its_warps,
                              {"block_barrier", its_threads, 0, {}},
                              0,
                              SharedMemory(cluster.how.shared_bytes),
                              {}});
    for (size_t w = 0; w < warps; ++w)
      its_warps[w].shuffle = {"shuffle_xor", its_threads.subspan(w * kWarp, kWarp), 0, {}};
    for (size_t t = 0; t < threads; ++t)
      its_threads[t] = {.index = int(t), .block = &cluster.blocks[rank]};
  }
}

void begin(Cluster& cluster, int64_t x, int64_t y) {
  for (Block& block : cluster.blocks) {
    block.x = x + block.rank;
    block.y = y;
    block.running = int(block.threads.size());
    block.dynamic.poison();
    for (auto& [type, memory] : block.statics) memory.poison();
  }
  machine.unfinished = int(cluster.threads.size());
  machine.ready.clear();
  for (Thread& thread : cluster.threads) {
    thread.ended = thread.arrived = thread.awaited_last_launch = false;
    machine.ready.push_back(&thread);
  }
}

// After a failure: the threads that wait shall never go on.
void abandon(Cluster& cluster) {
  for (Thread& thread : cluster.threads) {
    if (thread.fiber == nullptr) continue;
    thread.fiber->restart();
    machine.idle.push_back(thread.fiber);
  }
}

void run_one(Cluster& cluster, int64_t x, int64_t y) {
  begin(cluster, x, y);
  go_on_with(choose(), *machine.host);
  if (machine.failure != nullptr) {
    abandon(cluster);
    std::rethrow_exception(std::exchange(machine.failure, nullptr));
  }
  if (const Reader& reader = cluster.reader; reader.thread != nullptr)
    fail(*reader.thread, "no cluster_barrier follows of_rank of " + name_of(reader.place) +
                             ": the block that it reads may have ended");
}

}  // namespace

void run(const Launch& how, const DeviceLimits& limits, const Call& call) {
  check(how, limits);
  const std::lock_guard<std::mutex> lock(machine.mutex);
  Fiber host;
  machine.host = &host;
  machine.call = call;
  machine.random = Random(configuration.seed);
  Cluster cluster{how, limits, {}, {}, {}, {}, {}};
  set_up(cluster);
  // All clusters from a random one on, by a random step that has no divisor in common with their
  // number.
  const uint64_t across = how.blocks / how.cluster, count = across * how.blocks_y;
  const auto any = [&] { return machine.random.next() % count; };
  uint64_t at = any(), step = any();
  while (std::gcd(step, count) != 1) step = any();
  for (uint64_t i = 0; i < count; ++i, at = (at + step) % count)
    run_one(cluster, int64_t(at % across) * how.cluster, int64_t(at / across));
  keep_few_fibers();
}

void block_barrier(Place place) { meet(running->block->barrier, place); }

void cluster_barrier(Place place) {
  cluster_arrive(place);
  cluster_wait();
}

void cluster_arrive(Place place) {
  if (running->arrived) fail("cluster_arrive of " + name_of(place) + ": it has arrived already");
  Meeting& barrier = running->block->cluster->barrier;
  running->arrived = true;
  running->turn = barrier.turns;
  arrive(barrier, place);
}

void cluster_wait() {
  if (!running->arrived) fail("cluster_wait without cluster_arrive");
  Meeting& barrier = running->block->cluster->barrier;
  running->arrived = false;
  if (barrier.turns != running->turn) return;
  running->awaited = &barrier;
  go_on();
}

uint64_t shuffle_xor(uint64_t value, int mask, Place place) {
  if (mask < 0 || mask >= kWarp)
    fail("shuffle_xor of " + name_of(place) + ": no lane has " + std::to_string(mask));
  const int lane = running->index % kWarp;
  Warp& warp = running->block->warps[running->index / kWarp];
  if (warp.shuffle.arrived == 0) warp.turn ^= 1;
  uint64_t (&offered)[kWarp] = warp.offered[warp.turn];
  offered[lane] = value;
  meet(warp.shuffle, place);
  return offered[lane ^ mask];
}

char* static_shared(const void* type, size_t bytes) {
  Block& block = *running->block;
  size_t all = bytes;
  for (const auto& [known, memory] : block.statics) {
    if (known == type) return memory.begin();
    all += memory.bytes();
  }
  const size_t dynamic = block.dynamic.bytes();
  if (all > 48 * 1024 ||
      all + dynamic >
          size_t(std::max(block.cluster->limits.shared_bytes, kLeastShared)) + kStaticShared)
    fail("the device does not have " + std::to_string(all) + " bytes of static shared memory and " +
         std::to_string(dynamic) + " of dynamic");
  return block.statics.emplace_back(type, SharedMemory(bytes)).second.begin();
}

const char* of_rank(const char* mine, int rank, Place place) {
  const Block& block = *running->block;
  Cluster& cluster = *block.cluster;
  const std::string here = "of_rank of " + name_of(place) + ": ";
  if (running->arrived) fail(here + "after cluster_arrive nothing keeps the block that it reads");
  if (rank < 0 || rank >= cluster.how.cluster) fail(here + "no rank " + std::to_string(rank));
  Block& other = cluster.blocks[rank];
  if (other.running == 0) fail(here + name_of(other) + " has ended");
  if (&other != &block) cluster.reader = {running, place};
  if (block.dynamic.holds(mine)) return other.dynamic.begin() + (mine - block.dynamic.begin());
  for (const auto& [type, memory] : block.statics) {
    if (!memory.holds(mine)) continue;
    for (const auto& [known, theirs] : other.statics)
      if (known == type) return theirs.begin() + (mine - memory.begin());
    auto& theirs = other.statics.emplace_back(type, SharedMemory(memory.bytes())).second;
    return theirs.begin() + (mine - memory.begin());
  }
  fail(here + "not a pointer into the block's shared memory");
}

void fail(const std::string& message) { fail(*running, message); }

}  // namespace dx::emulation
