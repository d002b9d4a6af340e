// Work on all threads, and on one where other programs hold the cores.
//
// The threads wait for one another at the end of each piece of work, and torch's OpenMP (GNU's)
// waits spinning. Where another program holds the core of one of them, all wait until its time is
// over, which takes Linux 4 ms and more, for pieces of 0.1 ms. So a caller that has lost more time
// so than the whole piece would have taken it works alone for a while.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "../common.h"

namespace dx {

namespace {

using Clock = std::chrono::steady_clock;

// Less is lost on a machine of one's own: a thread that sleeps is awake in 0.1 ms.
constexpr Clock::duration kNoticed = std::chrono::milliseconds(1);
// A caller works alone for up to so many times what it lost, so that it loses a small part of its
// time where it tries the others again.
constexpr int kMostTimes = 32;
// What stops a thread for longer is no program that shares its core: a debugger, a machine asleep.
constexpr Clock::duration kMostCost = std::chrono::milliseconds(100);

// The other threads, as a caller has met them lately.
struct Others {
  Clock::duration cost{};     // the time that it lost with them
  Clock::time_point until{};  // when it tries them again
  int times = 1;              // for how many times the cost it works alone

  // A single interruption is soon forgotten: twice the speed, lost for 80 ms after one of 4 ms,
  // made a network 1.4 times as slow on a machine with little else to do.
  void met(Clock::duration lost) {
    if (lost == Clock::duration()) {
      times = std::max(times / 2, 1);
    } else {
      cost = std::min(lost, kMostCost), until = Clock::now() + times * cost;
      times = std::min(times * 2, kMostTimes);
    }
  }
};

// The least of what is put to it, by several threads.
class Least {
  std::atomic<Clock::duration> least_{Clock::duration::max()};

 public:
  void put(Clock::duration time) {
    auto least = least_.load();
    while (time < least && !least_.compare_exchange_weak(least, time)) {
    }
  }
  Clock::duration get() const { return least_; }
};

// Calls body for the first `part` numbers, and for the others too where they take less time than
// is lost with the other threads. Returns how many are done.
int64_t work_alone(int64_t count, int64_t part, Clock::duration cost, const RangeBody& body) {
  const auto start = Clock::now();
  body(0, part);
  if ((Clock::now() - start) * (count - part) / part > cost) return part;
  if (part < count) body(part, count);
  return count;
}

// Calls body on all threads. Returns the time that was lost; 0 where that is less than the work's.
Clock::duration work_together(int64_t begin, int64_t count, int64_t grain, int64_t threads,
                              const RangeBody& body) {
  const int64_t part = (count - begin + threads - 1) / threads;
  Least least;  // that a part took: of a thread that kept its core
  const auto start = Clock::now();
  torch::stable::parallel_for(begin, count, grain, [&](int64_t first, int64_t last) {
    const auto start = Clock::now();
    body(first, last);
    least.put((Clock::now() - start) * part / (last - first));
  });
  const auto lost = Clock::now() - start - least.get();
  return lost > kNoticed && lost > least.get() * threads ? lost : Clock::duration();
}

}  // namespace

void share(int64_t count, int64_t grain, const RangeBody& body) {
  if (count <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || count <= grain) return body(0, count);

  thread_local Others others;
  int64_t done = 0;
  if (Clock::now() < others.until) {
    done = work_alone(count, std::max((count + threads - 1) / threads, grain), others.cost, body);
    if (done == count) return;
  }
  others.met(work_together(done, count, grain, threads, body));
}

}  // namespace dx
