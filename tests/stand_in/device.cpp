// What torch asks of CUDA itself: devices, streams, events, generators.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "stand_in.h"

namespace stand_in {
namespace {

thread_local DeviceIndex device_of_thread = 0;
thread_local std::array<StreamId, kDevices> stream_of_thread{};
std::atomic<StreamId> last_stream{0};

std::atomic<int64_t> waits{0};
std::atomic<bool> waits_are_errors{false}, faulted{false};

using Clock = std::chrono::steady_clock;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static DeviceIndex index_of(c10::Device d) {
    return d.has_index() ? d.index() : current_device();
  }

  c10::DeviceType type() const override { return at::kCUDA; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {at::kCUDA, device_of_thread}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() < kDevices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(d);
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.has_index()) device_of_thread = d.index();
  }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }

  static c10::Stream stream(c10::Device d, StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, {at::kCUDA, index_of(d)}, id);
  }
  c10::Stream getStream(c10::Device d) const override {
    return stream(d, stream_of_thread.at(index_of(d)));
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override { return stream(d, ++last_stream); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override {
    return getNewStream(d, 0);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const c10::Stream before = getStream(s.device());
    stream_of_thread.at(s.device_index()) = s.id();
    return before;
  }
  bool queryStream(const c10::Stream& s) const override {
    let_copies_arrive(s.device_index(), s.id());
    return true;
  }
  void synchronizeStream(const c10::Stream& s) const override {
    wait("synchronize a stream");
    let_copies_arrive(s.device_index(), s.id());
  }
  void synchronizeDevice(DeviceIndex device) const override {
    wait("synchronize a device");
    let_copies_arrive(device, std::nullopt);
  }
  bool isStreamCapturing(const c10::Stream& s) const override {
    return capturing(s.device_index(), s.id());
  }

  struct Event {
    Clock::time_point time;
    c10::Stream stream;
    int64_t copies;  // that had begun before
  };
  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    delete static_cast<Event*>(*event);
    *event = new Event{Clock::now(), stream, copies_begun()};
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    const Event& recorded = *static_cast<Event*>(event);
    let_copies_arrive(recorded.stream.device_index(), recorded.stream.id(), recorded.copies);
    return true;
  }
  // A GPU's sync debug mode lets it pass: a program that waits for an event says what it waits for.
  void synchronizeEvent(void* event) const override {
    check_alive();
    TORCH_CHECK(!this_thread_captures(), "CUDA error: an event is waited for in a capture");
    ++waits;
    queryEvent(event);
  }
  double elapsedTime(void* from, void* to, DeviceIndex) const override {
    const auto time = [](void* event) { return static_cast<Event*>(event)->time; };
    return std::chrono::duration<double, std::milli>(time(to) - time(from)).count();
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// A generator of the CPU that says that it is on a device; operators.cpp takes the one inside.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;

  Generator(DeviceIndex device, at::Generator inner)
      : GeneratorImpl({at::kCUDA, device}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), inner.clone()); }
};

struct PinnedAllocator final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::unordered_set<const void*> pinned;

  static void release(void* pointer) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(pointer);
    }
    c10::GetAllocator(at::kCPU)->raw_deallocate(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = c10::GetAllocator(at::kCPU)->raw_allocate(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    pinned.insert(pointer);
    return {pointer, pointer, release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};

PinnedAllocator pinned_allocator;

}  // namespace
}  // namespace stand_in

namespace at {

struct StandInHooks final : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return stand_in::kDevices; }
  DeviceIndex deviceCount() const override { return stand_in::kDevices; }
  DeviceIndex current_device() const override { return stand_in::current_device(); }
  DeviceIndex getCurrentDevice() const override { return stand_in::current_device(); }
  void deviceSynchronize(DeviceIndex device) const override {
    stand_in::Guard().synchronizeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override {
    const std::lock_guard<std::mutex> lock(stand_in::PinnedAllocator::mutex);
    return stand_in::PinnedAllocator::pinned.count(data) > 0;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &stand_in::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return GetAllocator(kCUDA); }
  Generator getNewGenerator(DeviceIndex device) const override {
    return make_generator<stand_in::Generator>(stand_in::Guard::index_of({kCUDA, device}),
                                               detail::createCPUGenerator());
  }
  const Generator& getDefaultGenerator(DeviceIndex device) const override {
    static const std::array<Generator, stand_in::kDevices> generators = {getNewGenerator(0),
                                                                         getNewGenerator(1)};
    return generators.at(stand_in::Guard::index_of({kCUDA, device}));
  }
};

// Torch made its hooks, of no CUDA, while it was imported, and keeps them for good: these are built
// where they lie. Neither has any data.
static_assert(sizeof(StandInHooks) == sizeof(CUDAHooksInterface));
const auto* const hooks =
    new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) StandInHooks;

}  // namespace at

namespace stand_in {

DeviceIndex current_device() { return device_of_thread; }

StreamId current_stream(DeviceIndex device) { return stream_of_thread.at(device); }

at::Generator host_generator(const at::Generator& generator, DeviceIndex device) {
  TORCH_CHECK(generator.device().type() == at::kCUDA,
              "Expected a 'cuda' device type for generator but found '", generator.device().type(),
              "'");
  TORCH_CHECK(generator.device().index() == device, "Expected a generator of cuda:", int(device),
              " but found one of ", generator.device());
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

void check_alive() {
  TORCH_CHECK(!faulted, "CUDA error: an illegal memory access was encountered");
}

// STAND_IN_PLANTED=fault:perturb: after a launch of perturb every call of CUDA fails, as after a
// fault of a GPU. crash:perturb: the process ends there. hang:perturb: the launch never does.
void make_planted_fault(const std::string& kernel) {
  static const char* const planted = std::getenv("STAND_IN_PLANTED");
  if (planted == nullptr) return;
  if ("fault:" + kernel == planted) faulted = true;
  if ("crash:" + kernel == planted) std::raise(SIGSEGV);
  while ("hang:" + kernel == planted) std::this_thread::sleep_for(std::chrono::seconds(1));
}

void wait(const std::string& why) {
  check_alive();
  const bool captures = capturing(current_device(), current_stream(current_device()));
  TORCH_CHECK(!captures && !this_thread_captures(),  // autograd's own threads capture too
              "CUDA error: operation not permitted when stream is capturing: ", why);
  TORCH_CHECK(!waits_are_errors, "called a synchronizing CUDA operation: ", why);
  ++waits;
  let_copies_arrive(current_device(), current_stream(current_device()));
}

TORCH_LIBRARY_FRAGMENT(stand_in_gpu, m) {
  m.def("waits", [] { return waits.load(); });
  m.def("let_waits_be_errors", [](bool errors) { waits_are_errors = errors; });
  m.def("set_device", [](int64_t device) { Guard().setDevice({at::kCUDA, DeviceIndex(device)}); });
  m.def("device", [] { return int64_t(current_device()); });
  m.def("default_generator", [](int64_t device) {
    return at::detail::getCUDAHooks().getDefaultGenerator(DeviceIndex(device));
  });
  m.def("is_capturing",
        [] { return capturing(current_device(), current_stream(current_device())); });
}

}  // namespace stand_in

// What csrc/emulation asks for: a launch belongs to the stream of its tensors' device.
extern "C" {

int64_t stand_in_current_stream(int device) {
  return stand_in::current_stream(stand_in::DeviceIndex(device));
}

void stand_in_launched(int device, int64_t stream, const char* kernel,
                       std::function<void()>* again) {
  stand_in::check_alive();
  stand_in::make_planted_fault(kernel);
  stand_in::launched(stand_in::DeviceIndex(device), stream);
  stand_in::done(stand_in::DeviceIndex(device), stream, std::move(*again));
}
}
