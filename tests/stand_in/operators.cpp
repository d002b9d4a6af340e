// Torch's operators on the stand-in's tensors: run by the CPU on the same memory.
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <set>
#include <string>

#include "stand_in.h"

namespace stand_in {

at::Generator host_generator(const at::Generator& generator, DeviceIndex device);

namespace {

using Stack = torch::jit::Stack;

// Those that take tensors of both kinds of device on a GPU too.
const std::set<std::string> kMixed = {
    "aten::copy_",         "aten::_copy_from",        "aten::index",
    "aten::index_put",     "aten::index_put_",        "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::_copy_from_and_resize"};

// One call: its tensors of a device, as tensors of the CPU on the same memory, and back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op)
      : op_(op), name_(op.schema().name()), pointwise_(op.hasTag(at::Tag::pointwise)) {}

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return tensor_to_host(value.toTensor());
    if (value.isStorage()) return storage_to_host(value.toStorage(), {});
    if (value.isGenerator()) return host_generator(value.toGenerator(), device());
    if (value.isDevice()) return at::Device(value.toDevice().is_meta() ? at::kMeta : at::kCPU);
    if (value.isList()) {
      const auto list = value.toList();
      auto copy = c10::impl::GenericList(list.elementType());
      in_list_ = true;
      for (const c10::IValue& item : list) copy.push_back(to_host(item));
      in_list_ = false;
      return copy;
    }
    return value;
  }

  // What an operator makes is on the device that it is given, else on that of its tensors.
  void look_at(const c10::IValue& value) {
    if (value.isTensor() && value.toTensor().defined()) {
      const at::Tensor& t = value.toTensor();
      if (!t.is_cuda()) return;
      TORCH_CHECK(!found_ || *found_ == t.get_device() || kMixed.count(name_),
                  "Expected all tensors to be on the same device, but found at least two devices, "
                  "cuda:",
                  int(*found_), " and cuda:", int(t.get_device()), "! (", name_, ")");
      if (!found_) found_ = t.get_device();
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      if (!found_) found_ = value.toStorage().device().index();
    } else if (value.isDevice()) {
      const at::Device wanted = value.toDevice();
      if (wanted.is_cuda()) wanted_ = wanted.has_index() ? wanted.index() : current_device();
      to_cpu_ = wanted.is_cpu();
    } else if (value.isList()) {
      for (const c10::IValue& item : value.toList()) look_at(item);
    }
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return tensor_to_device(value.toTensor());
    if (value.isList()) {
      const auto list = value.toList();
      auto copy = c10::impl::GenericList(list.elementType());
      for (const c10::IValue& item : list) copy.push_back(to_device(item));
      return copy;
    }
    return value;
  }

  // Copies the new sizes and storage of what was resized or set back to the device's tensors.
  void update() {
    for (auto& [host, original] : originals_) {
      const at::Tensor& alias = aliases_.at(original.unsafeGetTensorImpl());
      const bool moved = alias.storage().data() != original.storage().data();
      if (!moved && alias.sizes() == original.sizes() && alias.strides() == original.strides())
        continue;
      if (moved) {
        const auto known = back_.find(alias.storage().unsafeGetStorageImpl());
        const bool there =  // unless it was resized
            known != back_.end() && known->second.storage.data() == alias.storage().data();
        original.unsafeGetTensorImpl()->set_storage_keep_dtype(
            there ? known->second.storage : on_device(alias.storage(), original.get_device()));
      }
      original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(),
                                                            alias.storage_offset());
    }
  }

  DeviceIndex device() const { return wanted_.value_or(found_.value_or(current_device())); }

 private:
  // A storage of a device, with the keys of the tensor that it was met in.
  struct Base {
    c10::Storage storage;
    c10::DispatchKeySet keys;
  };

  c10::Storage storage_to_host(const c10::Storage& given, c10::DispatchKeySet keys) {
    if (!given.device().is_cuda()) return given;
    c10::Storage& storage = storages_[given.unsafeGetStorageImpl()];
    if (!storage) {
      storage = on_host(given);
      back_.emplace(storage.unsafeGetStorageImpl(), Base{given, keys});
    }
    return storage;
  }

  at::Tensor tensor_to_host(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      check_host(t);
      return t;
    }
    TORCH_CHECK(t.layout() == at::kStrided, "the stand-in has no ", t.layout(),
                " tensors: ", name_);
    const auto known = aliases_.find(t.unsafeGetTensorImpl());
    if (known != aliases_.end()) return known->second;
    at::Tensor alias = as(t, storage_to_host(t.storage(), t.key_set()), c10::DispatchKey::CPU);
    aliases_.emplace(t.unsafeGetTensorImpl(), alias);
    originals_.emplace(alias.unsafeGetTensorImpl(), t);
    return alias;
  }

  // A number may be on the CPU beside tensors of a device, where an operator goes by elements.
  void check_host(const at::Tensor& t) const {
    const bool number = t.dim() == 0 && !in_list_;
    TORCH_CHECK(!found_ || kMixed.count(name_) || (number && pointwise_) || t.is_meta() ||
                    name_ == "aten::fill_" || name_ == "aten::masked_fill_",
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:",
                int(*found_), " and cpu! (", name_, ")");
  }

  at::Tensor tensor_to_device(const at::Tensor& t) {
    if (!t.defined() || to_cpu_ || t.is_meta()) return t;
    if (const auto known = originals_.find(t.unsafeGetTensorImpl()); known != originals_.end())
      return known->second;
    if (t.layout() == at::kSparse) return sparse_to_device(t);
    const auto source = back_.find(t.storage().unsafeGetStorageImpl());
    if (source != back_.end()) return view_of(source->second, t);
    const c10::Storage storage = on_device(t.storage(), device());
    at::Tensor made = as(t, storage, c10::DispatchKey::CUDA);
    back_.emplace(t.storage().unsafeGetStorageImpl(), Base{storage, made.key_set()});
    return made;
  }

  // In inference mode too a view is what its base is: an inference tensor or not.
  static at::Tensor view_of(const Base& base, const at::Tensor& t) {
    at::Tensor view = as(t, base.storage, c10::DispatchKey::CUDA);
    if (!view.is_inference() || !base.keys.has(c10::DispatchKey::ADInplaceOrView)) return view;
    auto normal = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage), base.keys, t.dtype());
    normal.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return normal;
  }

  at::Tensor sparse_to_device(const at::Tensor& t) {
    auto made = at::detail::make_tensor<at::SparseTensorImpl>(
        c10::DispatchKeySet(c10::DispatchKey::SparseCUDA), t.dtype());
    auto* impl = static_cast<at::SparseTensorImpl*>(made.unsafeGetTensorImpl());
    impl->resize_(t.sparse_dim(), t.dense_dim(), t.sizes());
    impl->set_indices_and_values_unsafe(tensor_to_device(t._indices()),
                                        tensor_to_device(t._values()));
    return made;
  }

  static at::Tensor as(const at::Tensor& t, c10::Storage storage, c10::DispatchKey key) {
    c10::DispatchKeySet keys(key);
    if (t._is_zerotensor()) keys = keys.add(c10::DispatchKey::ZeroTensor);  // without any memory
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, t.dtype());
    c10::TensorImpl* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) made._set_conj(true);
    if (t.is_neg()) made._set_neg(true);
    return made;
  }

  const c10::OperatorHandle& op_;
  const std::string name_;
  const bool pointwise_;
  bool in_list_ = false, to_cpu_ = false;
  std::optional<DeviceIndex> found_, wanted_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;  // device -> host
  std::map<c10::StorageImpl*, Base> back_;              // host -> device
  std::map<c10::TensorImpl*, at::Tensor> aliases_;      // device -> host
  std::map<c10::TensorImpl*, at::Tensor> originals_;    // host -> device
};

bool is_mask(const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& t = value.toTensor();
    return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
  }
  return false;
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

std::vector<c10::IValue> call_on_host(const c10::OperatorHandle& op,
                                      c10::ArrayRef<c10::IValue> arguments) {
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
  return results;
}

// Does a call again, with its results where they were.
void call_again(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments,
                const std::vector<c10::IValue>& results) {
  const std::vector<c10::IValue> fresh = call_on_host(op, arguments);
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
  const std::vector<c10::IValue> results = call_on_host(op, arguments);
  torch::jit::drop(*stack, count);
  for (const c10::IValue& result : results) stack->push_back(result);
  Call call(op);
  for (const c10::IValue& argument : arguments) call.look_at(argument);
  const DeviceIndex device = call.device();
  const StreamId stream = current_stream(device);
  if (is_copy_to_pinned(name, arguments)) {
    const at::Tensor& to = arguments[0].toTensor();
    copy_later(to, to.clone(), device, stream);
  }
  if (name.rfind("aten::empty", 0) == 0 && !capturing(device, stream)) return;  // memory, no work
  done(device, stream, [op, arguments, results] { call_again(op, arguments, results); });
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
