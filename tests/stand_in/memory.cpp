// The memory of the stand-in's devices: blocks of the host's, each of them known.
#include <mutex>
#include <unordered_set>

#include "stand_in.h"

namespace stand_in {
namespace {

// What a CUDA storage holds: the memory of a CPU storage.
struct Block {
  c10::Storage host;
  Memory memory;
};

std::mutex mutex;
std::unordered_set<Block*> blocks;

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.erase(block);
  }
  delete block;
}

void release_reference(void* context) { delete static_cast<c10::Storage*>(context); }

c10::DataPtr device_pointer(const c10::Storage& host, DeviceIndex device) {
  auto* block = new Block{host, {host.mutable_data(), host.data() ? host.nbytes() : 0}};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.insert(block);
  }
  return {block->memory.data, block, release, at::Device(at::kCUDA, device)};
}

// For what asks torch for CUDA's allocator: a storage that is resized.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Storage host(c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(at::kCPU),
                            true);
    return device_pointer(host, current_device());
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};

Allocator allocator;
const bool set = (c10::SetAllocator(at::kCUDA, &allocator), true);

}  // namespace

c10::Storage on_device(const c10::Storage& host, DeviceIndex device) {
  return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), device_pointer(host, device),
                      &allocator, true);
}

c10::Storage on_host(const c10::Storage& storage) {
  c10::DataPtr pointer(storage.mutable_data(), new c10::Storage(storage), release_reference,
                       at::kCPU);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer),
                      c10::GetAllocator(at::kCPU), true);
}

void every_block(const std::function<void(Memory)>& visit) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Block* block : blocks)
    if (block->memory.bytes > 0) visit(block->memory);
}

int64_t bytes_in_use() {
  int64_t bytes = 0;
  every_block([&](Memory memory) { bytes += int64_t(memory.bytes); });
  return bytes;
}

}  // namespace stand_in
