// CUDA graphs: what was done on a captured stream, to be done again.
#include <torch/library.h>

#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "stand_in.h"

namespace stand_in {
namespace {

using Stream = std::pair<DeviceIndex, StreamId>;

struct Graph {
  Stream stream;
  std::vector<std::function<void()>> work;
  std::unordered_map<void*, std::vector<char>> before;  // all memory as the capture found it
};

std::mutex mutex;
std::map<int64_t, Graph> graphs;
std::map<Stream, int64_t> captured;  // stream -> graph
std::map<Stream, int64_t> launches;  // stream -> of kernels of ours
thread_local std::optional<Stream> capture_of_this_thread;

int64_t capture_begin() {
  static int64_t count = 0;
  const DeviceIndex device = current_device();
  const Stream stream{device, current_stream(device)};
  TORCH_CHECK(stream.second != 0, "CUDA graphs must be captured on a non-default stream.");
  Graph graph{stream, {}, {}};
  every_block([&](Memory memory) {
    const char* begin = static_cast<const char*>(memory.data);
    graph.before[memory.data].assign(begin, begin + memory.bytes);
  });
  const std::lock_guard<std::mutex> lock(mutex);
  const int64_t id = ++count;
  graphs[id] = std::move(graph);
  captured[stream] = id;
  capture_of_this_thread = stream;
  return id;
}

// In a capture nothing is computed: memory is as before, and what is new holds no values yet.
void capture_end(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  Graph& graph = graphs.at(id);
  every_block([&](Memory memory) {
    const auto before = graph.before.find(memory.data);
    if (before != graph.before.end() && before->second.size() == memory.bytes)
      memcpy(memory.data, before->second.data(), memory.bytes);
    else
      memset(memory.data, 0xFF, memory.bytes);
  });
  graph.before.clear();
  captured.erase(graph.stream);
  capture_of_this_thread.reset();
}

void replay(int64_t id) {
  std::vector<std::function<void()>>* work;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    work = &graphs.at(id).work;
  }
  for (const auto& again : *work) again();
}

void release(int64_t id) {
  std::map<int64_t, Graph>::node_type graph;  // its tensors end after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  graph = graphs.extract(id);
}

}  // namespace

bool capturing(DeviceIndex device, StreamId stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  return captured.count({device, stream}) > 0;
}

bool this_thread_captures() { return capture_of_this_thread.has_value(); }

void launched(DeviceIndex device, StreamId stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches[{device, stream}];
}

void done(DeviceIndex device, StreamId stream, std::function<void()> again) {
  const Stream here{device, stream};
  TORCH_CHECK(
      !capture_of_this_thread || *capture_of_this_thread == here,
      "CUDA error: operation failed due to a previous error during capture: work on stream ",
      stream, " of cuda:", int(device), " while another stream is captured");
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = captured.find(here); found != captured.end())
    graphs.at(found->second).work.push_back(std::move(again));
}

TORCH_LIBRARY_FRAGMENT(stand_in_gpu, m) {
  m.def("capture_begin", &capture_begin);
  m.def("capture_end", &capture_end);
  m.def("replay", &replay);
  m.def("release", &release);
  m.def("launches", [](int64_t device, int64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    return launches[{DeviceIndex(device), stream}];
  });
  m.def("bytes_in_use", &bytes_in_use);
}

}  // namespace stand_in
