// What a launch consists of while it runs: a cluster at a time, a fiber for every thread of it.
#pragma once

#include <cstdint>
#include <source_location>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace dx::emulation {

struct Cluster;
struct Block;
struct Meeting;

using Place = std::source_location;  // a line of a kernel

struct Thread {
  int index = 0;  // in its block
  Block* block = nullptr;
  Fiber* fiber = nullptr;            // from its start to its end
  const Meeting* awaited = nullptr;  // what it waits at, if it does
  Place place = {};                  // there, or where it arrived last
  bool ended = false;
  bool arrived = false;  // by cluster_arrive, and has not called cluster_wait
  int64_t turn = 0;      // of the cluster's barrier, then
  bool awaited_last_launch = false;
};

// Where some threads wait until all of them have come.
struct Meeting {
  const char* name;
  std::span<Thread> members;
  int arrived;
  Place place;        // of the first to arrive
  int64_t turns = 0;  // how often all of them have come
};

struct Warp {
  Meeting shuffle;
  // What the lanes offer. Two of them in turn: a lane may be at the next shuffle before another one
  // has read its partner's value of this one.
  uint64_t offered[2][kWarp];
  int turn;
};

struct Block {
  Cluster* cluster;
  int rank;  // in the cluster
  int64_t x, y;
  std::span<Thread> threads;
  std::span<Warp> warps;
  Meeting barrier;
  int running;  // threads that have not ended
  SharedMemory dynamic;
  std::vector<std::pair<const void*, SharedMemory>> statics;  // by type
};

// A thread that has had a pointer to another block's shared memory, and where.
struct Reader {
  const Thread* thread = nullptr;
  Place place;
};

struct Cluster {
  Launch how;
  DeviceLimits limits;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting barrier;
  Reader reader;  // the last since the last barrier
};

// A kernel with its arguments.
struct Call {
  void (*kernel)(const void* arguments);
  const void* arguments;
};

void run(const Launch& how, const DeviceLimits& limits, const Call& call);

// For the thread that runs.
extern Thread* running;

void block_barrier(Place place);
void cluster_barrier(Place place);
void cluster_arrive(Place place);
void cluster_wait();
uint64_t shuffle_xor(uint64_t value, int mask, Place place);
char* static_shared(const void* type, size_t bytes);
const char* of_rank(const char* mine, int rank, Place place);
[[noreturn]] void fail(const std::string& message);

}  // namespace dx::emulation
