// empty_tensor.cpp -- allocating tensors from the devices' allocators.
#include "empty_tensor.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <optional>

#include "python_errors.h"
#include "tensor_view.h"
#include "torch_python.h"

namespace hdispatch {
namespace {

/// torch's allocator of a device, as torch's own tensors have it; null before torch has allocated there.
std::array<std::atomic<c10::Allocator*>, kMaxSlots> allocators{};

/// Whether torch wants new memory filled.
bool is_filled() {
  const at::Context& context = at::globalContext();
  return HD_UNLIKELY(context.deterministicAlgorithms()) && context.deterministicFillUninitializedMemory();
}

/// The allocator, where the short way is right; else null.
c10::Allocator* find_allocator(DeviceSlot slot) {
  if (HD_UNLIKELY(slot >= kMaxSlots || is_filled())) return nullptr;
  return allocators[slot].load(std::memory_order_acquire);
}

at::Tensor noted(DeviceSlot slot, at::Tensor made) {
  if (slot < kMaxSlots) allocators[slot].store(made.storage().allocator(), std::memory_order_release);
  return made;
}

/// The allocator gives memory of the current device. Where there is one alone, it is not asked which that is.
bool has_one_gpu() {
  static const bool has_one = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).deviceCount() == 1;
  return has_one;
}

c10::DataPtr allocate_bytes(c10::Allocator* allocator, size_t bytes, c10::Device device) {
  if (device.type() == c10::DeviceType::CPU || HD_LIKELY(has_one_gpu())) return allocator->allocate(bytes);
  const c10::DeviceGuard guard(device);
  return allocator->allocate(bytes);
}

/// The bytes from the first element to the last; none where torch may have to refuse: a negative size or stride, more
/// than 64 bits hold.
std::optional<int64_t> span_of(c10::IntArrayRef sizes, const int64_t* strides, size_t itemsize) {
  int64_t span = 1;
  bool is_empty = false;
  bool is_odd = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    int64_t more = 0;
    is_odd |= sizes[i] < 0 || (strides && strides[i] < 0);
    is_empty |= sizes[i] == 0;
    if (!strides)
      is_odd |= __builtin_mul_overflow(span, sizes[i], &span);
    else if (sizes[i] > 0)
      is_odd |= __builtin_mul_overflow(sizes[i] - 1, strides[i], &more) || __builtin_add_overflow(span, more, &span);
  }
  int64_t bytes = 0;
  is_odd |= __builtin_mul_overflow(is_empty ? 0 : span, static_cast<int64_t>(itemsize), &bytes);
  return is_odd ? std::nullopt : std::optional(bytes);
}

/// One without sizes yet.
at::Tensor make_tensor(c10::Allocator* allocator, int64_t bytes, c10::ScalarType type, c10::Device device) {
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  constexpr c10::DispatchKeySet kCuda(c10::DispatchKey::CUDA);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), c10::SymInt(c10::SymInt::UNCHECKED, bytes),
      allocate_bytes(allocator, static_cast<size_t>(bytes), device), allocator, /*resizable=*/true);
  return at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), device.type() == c10::DeviceType::CPU ? kCpu : kCuda, c10::scalarTypeToTypeMeta(type));
}

}  // namespace

at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::ScalarType type, c10::Device device) {
  const DeviceSlot slot = slot_of(device);
  c10::Allocator* allocator = find_allocator(slot);
  const std::optional<int64_t> bytes = span_of(sizes, nullptr, c10::elementSize(type));
  if (HD_UNLIKELY(!allocator || !bytes))
    return noted(slot, at::empty(sizes, at::TensorOptions().dtype(type).device(device)));
  at::Tensor made = make_tensor(allocator, *bytes, type, device);
  made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return made;
}

at::Tensor empty_tensor(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType type, c10::Device device) {
  const DeviceSlot slot = slot_of(device);
  c10::Allocator* allocator = find_allocator(slot);
  const std::optional<int64_t> bytes = span_of(sizes, strides.data(), c10::elementSize(type));
  if (HD_UNLIKELY(!allocator || !bytes))
    return noted(slot, at::empty_strided(sizes, strides, at::TensorOptions().dtype(type).device(device)));
  at::Tensor made = make_tensor(allocator, *bytes, type, device);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

double bench_empty_ns(PyObject* object, std::string_view stage, uint32_t count, PyObject* before,
                      const std::vector<PyObject*>& args) {
  if (!is_tensor_object(object)) fail(Fault::kCaller, "like is a ", Py_TYPE(object)->tp_name, "; give a tensor");
  const at::Tensor& like = tensor_of(object);
  const auto make = [&] { return empty_tensor(like.sizes(), like.scalar_type(), like.device()); };
  c10::Allocator* allocator = make().storage().allocator();
  const auto drop = [](PyObject* made) {
    if (!made) throw_python_error();
    Py_DECREF(made);
  };
  const auto time = [&](const auto& once) {
    const auto begin = std::chrono::steady_clock::now();
    for (uint32_t i = 0; i < count; ++i) {
      if (before) drop(PyObject_Vectorcall(before, args.data(), args.size(), nullptr));
      once();
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
    return taken.count() / count;
  };
  if (stage == "nothing") return time([] {});
  if (stage == "allocator") return time([&] { allocate_bytes(allocator, like.nbytes(), like.device()); });
  if (stage == "tensor") return time(make);
  if (stage == "wrapped") return time([&] { drop(wrap_tensor(make())); });
  fail(Fault::kCaller, "stage: ", stage, "; give nothing, allocator, tensor or wrapped");
}

}  // namespace hdispatch
