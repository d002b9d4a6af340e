// How the kernels share their work among torch's threads.
#pragma once

#include <cstdint>

namespace dx {

// A body(begin, end), without its type.
struct RangeBody {
  const void* body;
  void (*call)(const void* body, int64_t begin, int64_t end);
  void operator()(int64_t begin, int64_t end) const { call(body, begin, end); }
};

void share(int64_t count, int64_t grain, const RangeBody& body);

// Calls body(begin, end) for ranges that cover [0, count), on all threads: each of at least `grain`
// numbers, where there are several.
template <class Body>
void share_work(int64_t count, int64_t grain, const Body& body) {
  share(count, grain, {&body, [](const void* b, int64_t begin, int64_t end) {
                         (*static_cast<const Body*>(b))(begin, end);
                       }});
}

}  // namespace dx
