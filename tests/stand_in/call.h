// A call of one of torch's operators on the stand-in's tensors: as the CPU sees it, and back.
#pragma once

#include <ATen/SparseTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <map>
#include <optional>
#include <set>
#include <string>

#include "stand_in.h"

namespace stand_in {

// Those that take tensors of both kinds of device on a GPU too.
inline const std::set<std::string> kMixed = {
    "aten::copy_",         "aten::_copy_from",        "aten::index",
    "aten::index_put",     "aten::index_put_",        "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::_copy_from_and_resize"};

// The tensors of a device that a call has, as tensors of the CPU on the same memory.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op)
      : name_(op.schema().name()), pointwise_(op.hasTag(at::Tag::pointwise)) {}

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

  const std::string name_;
  const bool pointwise_;
  bool in_list_ = false, to_cpu_ = false;
  std::optional<DeviceIndex> found_, wanted_;
  std::map<c10::StorageImpl*, c10::Storage> storages_;  // device -> host
  std::map<c10::StorageImpl*, Base> back_;              // host -> device
  std::map<c10::TensorImpl*, at::Tensor> aliases_;      // device -> host
  std::map<c10::TensorImpl*, at::Tensor> originals_;    // host -> device
};

}  // namespace stand_in
