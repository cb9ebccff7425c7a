// tensor_view.h -- at::Tensor -> TensorView; which tensors the fast path may take; a device's current stream.
//
// With tensor_view.cpp the only place that reads ATen's tensors; empty_tensor.cpp makes new ones. Everything here is on
// the hot path and inline.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "call.h"
#include "check.h"
#include "driver.h"

namespace hdispatch {

/// ScalarType -> DType; kOther for what no op takes.
extern const std::array<DType, static_cast<size_t>(c10::ScalarType::NumOptions)> kDTypeOf;

/// Dispatch keys of a plain CPU or CUDA tensor. Any other key (Python, FuncTorch*, Functionalize, Conjugate, Negative,
/// ZeroTensor, Sparse*, Quantized*, Nested*, …) means that torch has something to do first: the torch door.
inline constexpr c10::DispatchKeySet kPlainKeys =
    c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
    c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) | c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) |
    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) | c10::DispatchKeySet(c10::DispatchKey::BackendSelect) |
    c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) | c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA);

inline bool is_plain(c10::DispatchKeySet keys) noexcept { return (keys.raw_repr() & ~kPlainKeys.raw_repr()) == 0; }

/// No dispatch mode, functorch transform or torch-function mode is active on this thread.
inline bool no_modes() noexcept {
  return is_plain(c10::impl::tls_local_dispatch_key_set().included_) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

inline DeviceSlot slot_of(c10::Device device) noexcept {
  if (device.type() == c10::DeviceType::CUDA) return static_cast<DeviceSlot>(device.index() + 1);
  return device.type() == c10::DeviceType::CPU ? kCpuSlot : kNoSlot;
}

/// Sizes, strides and dtype of a tensor.
/// A tensor of rank above kMaxRank keeps its rank, and no size beyond the fourth: every op refuses it.
inline void view_shape(const at::Tensor& tensor, TensorView& view) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::IntArrayRef sizes = impl->sizes();
  const c10::IntArrayRef strides = impl->strides();
  view.rank = static_cast<uint32_t>(sizes.size());
  for (uint32_t i = 0, n = std::min(view.rank, kMaxRank); i < n; ++i) {
    view.sizes[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  view.dtype = kDTypeOf[static_cast<size_t>(c10::typeMetaToScalarType(impl->dtype()))];
}

/// Where the storage of a tensor whose keys are plain begins. So there is a storage: TensorImpl::data would ask again,
/// 4 ns per tensor. Writing through `mutable_data` ends copy-on-write sharing; reading through `data` leaves it alone.
inline uintptr_t storage_of(c10::TensorImpl* impl, bool is_mutated) {
  const c10::Storage& storage = impl->unsafe_storage();
  return reinterpret_cast<uintptr_t>(is_mutated ? storage.mutable_data() : storage.data());
}

/// The address of its first element.
inline uintptr_t address_of(c10::TensorImpl* impl, bool is_mutated) {
  return storage_of(impl, is_mutated) + static_cast<uintptr_t>(impl->storage_offset()) * impl->itemsize();
}

/// Fills the view of a tensor whose keys are plain.
inline void view_of(const at::Tensor& tensor, bool is_mutated, TensorView& view) {
  view_shape(tensor, view);
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  view.slot = slot_of(impl->device());
  view.storage = storage_of(impl, is_mutated);
  view.data = view.storage + static_cast<uintptr_t>(impl->storage_offset()) * impl->itemsize();
}

inline void bump_version(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!impl->is_inference()) impl->bump_version();
}

/// torch's current stream of a device, on this thread. Slot 0 has none.
CUstream current_stream(DeviceSlot slot);

}  // namespace hdispatch
