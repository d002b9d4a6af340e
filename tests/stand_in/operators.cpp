// Torch's operators on the stand-in's tensors: run by the CPU on the same memory.
#include <torch/library.h>

#include "call.h"

namespace stand_in {
namespace {

using Stack = torch::jit::Stack;

bool is_mask(const c10::IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) return false;
  const at::ScalarType type = value.toTensor().scalar_type();
  return type == at::kBool || type == at::kByte;
}

// The host waits where a result depends on what is in device memory, and for copies to or from it
// that are not said to be non-blocking.
void wait_if_it_does(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  const std::string& name = op.schema().name();
  if (name.rfind("aten::index", 0) == 0 && arguments[1].isList()) {
    for (const c10::IValue& index : arguments[1].toList())
      if (is_mask(index)) return wait(name + " by a mask");
    return;
  }
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape))
    return wait(name);
  if (name != "aten::copy_" || arguments[2].toBool()) return;
  const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
  if (to.is_cuda() != from.is_cuda() && to.numel() > 0) wait("a copy between host and device");
}

struct Done {
  std::vector<c10::IValue> results;
  DeviceIndex device;
};

Done call_on_host(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  Call call(op);
  Stack stack;
  for (const c10::IValue& argument : arguments) call.look_at(argument);
  for (const c10::IValue& argument : arguments) stack.push_back(call.to_host(argument));
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    // What precedes a kernel was done for the call on the device.
    const c10::impl::ExcludeDispatchKeyGuard done(
        c10::autocast_dispatch_keyset.add(c10::DispatchKey::Tracer));
    op.callBoxed(stack);
  }
  call.update();
  std::vector<c10::IValue> results;
  for (const c10::IValue& result : stack) results.push_back(call.to_device(result));
  return {std::move(results), call.device()};
}

// Does a call again, with its results where they were.
void call_again(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments,
                const std::vector<c10::IValue>& results) {
  const std::vector<c10::IValue> fresh = call_on_host(op, arguments).results;
  const auto copy = [](const at::Tensor& to, const at::Tensor& from) {
    if (to.defined() && to.is_cuda() && to.storage().data() != from.storage().data())
      call_on_host(c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", ""),
                   {to, from, false});
  };
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].isTensor()) copy(results[i].toTensor(), fresh[i].toTensor());
    if (results[i].isTensorList())
      for (size_t k = 0; k < results[i].toTensorVector().size(); ++k)
        copy(results[i].toTensorVector()[k], fresh[i].toTensorVector()[k]);
  }
}

bool is_copy_to_pinned(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  if (name != "aten::copy_" || !arguments[2].toBool()) return false;
  const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
  return to.is_cpu() && from.is_cuda() && to.is_contiguous() && to.numel() > 0 && to.is_pinned();
}

// What torch.compile and torch.export trace with: a tensor without memory, whose keys are CUDA's.
bool is_fake(const c10::IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) return false;
  const at::Tensor& t = value.toTensor();
  return t.is_meta() && t.key_set().has_backend(c10::BackendComponent::CUDABit);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0, "Could not run '", name,
                              "' with arguments from the 'CUDA' backend.");
  check_alive();
  const size_t count = op.schema().arguments().size();
  const std::vector<c10::IValue> arguments = torch::jit::last(*stack, count).vec();
  if (std::any_of(arguments.begin(), arguments.end(), is_fake))
    return op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack);
  wait_if_it_does(op, arguments);
  const auto [results, device] = call_on_host(op, arguments);
  torch::jit::drop(*stack, count);
  for (const c10::IValue& result : results) stack->push_back(result);
  const StreamId stream = current_stream(device);
  if (is_copy_to_pinned(name, arguments)) {
    const at::Tensor& to = arguments[0].toTensor();
    copy_later(to, to.clone(), device, stream);
  }
  if (name.rfind("aten::empty", 0) == 0 && !capturing(device, stream)) return;  // memory, no work
  done(device, stream, [op, arguments, made = results] { call_again(op, arguments, made); });
}

void record_stream(at::Tensor&, c10::Stream) {}

// Torch's _to_copy makes a tensor and copies: a wait is then seen in the copy.
const std::set<std::string> kOwn = {"aten::record_stream", "aten::_to_copy"};

const auto kBoxed = [] { return torch::CppFunction::makeFromBoxedFunction<&fallback>(); };

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(kBoxed()); }

// Torch's own kernels for any device, which come before a fallback, ask for CUDA's code inside.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("record_stream", &record_stream);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (!op || !op->hasSchema() || name.name.rfind("aten::", 0) != 0) continue;
    if (kOwn.count(name.name)) continue;
    const bool any =
        op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
        op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
    if (!any) continue;
    const std::string full =
        name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    m.impl(full.c_str(), kBoxed());
  }
}

}  // namespace stand_in
