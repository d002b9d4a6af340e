// A stand-in for CUDA in a torch without it: tensors that say cuda:0 or cuda:1, whose memory is the
// host's, whose operators torch's CPU runs, and whose kernels of ours the emulated GPU runs.
// stand_in_gpu.py loads it and gives torch.cuda what a GPU would.
//
// As on a GPU: a CPU tensor or a CPU generator beside such a tensor is an error, and so is numpy();
// an op without a CUDA kernel; a wait, or a launch on another stream, while a graph is captured.
// What was computed during a capture is not there after it, before the first replay.
//
// What is copied to pinned memory without blocking arrives when the host has waited for it.
//
// Unlike a GPU: all else is done when a call returns, so that a stream that should have waited for
// another shows nowhere. A capture remembers and restores all memory, so that no other thread may
// compute meanwhile.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <limits>
#include <optional>

namespace stand_in {

using c10::DeviceIndex;
using StreamId = c10::StreamId;

constexpr DeviceIndex kDevices = 2;

DeviceIndex current_device();
StreamId current_stream(DeviceIndex device);  // of this thread

// Raises where a fault ended the device's context.
void check_alive();
// The host waits for a device: counted; an error in a capture and where sync debug mode says so.
void wait(const std::string& why);

// The CPU's generator inside one of a device. Raises for any other.
at::Generator host_generator(const at::Generator& generator, DeviceIndex device);

// memory.cpp

// The storage of a CUDA tensor that takes over the memory of `host`.
c10::Storage on_device(const c10::Storage& host, DeviceIndex device);
// The same memory as a storage of the CPU.
c10::Storage on_host(const c10::Storage& storage);

struct Memory {
  void* data;
  size_t bytes;
};
// Calls visit for each block of a device's memory that there is.
void every_block(const std::function<void(Memory)>& visit);
int64_t bytes_in_use();

// host_copies.cpp

// A copy to pinned memory that does not block, of values that a stream has reached.
void copy_later(const at::Tensor& to, const at::Tensor& values, DeviceIndex device,
                StreamId stream);
int64_t copies_begun();
// Lets the copies of one stream, or of all streams, arrive: those that began first, so many.
void let_copies_arrive(DeviceIndex device, std::optional<StreamId> stream,
                       int64_t first = std::numeric_limits<int64_t>::max());

// graphs.cpp

bool capturing(DeviceIndex device, StreamId stream);
bool this_thread_captures();
// Counts a kernel of ours.
void launched(DeviceIndex device, StreamId stream);
// What was just done on a stream: kept where that stream is captured, an error where this thread
// captures another one.
void done(DeviceIndex device, StreamId stream, std::function<void()> again);

}  // namespace stand_in
