// arena.cpp -- allocating, and checking memory that is given.
#include "arena.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include "torch_python.h"

namespace py = pybind11;

namespace hdispatch {

at::Tensor allocate(DeviceSlot device, size_t bytes) {
  const c10::InferenceMode normal(false);
  const c10::Device where = device == kCpuSlot
                                ? c10::Device(c10::DeviceType::CPU)
                                : c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device - 1));
  return at::empty({static_cast<int64_t>(bytes + Sequence::kAlignment)},
                   at::TensorOptions().dtype(c10::ScalarType::Byte).device(where));
}

Arena::Arena(at::Tensor memory) : given_(std::move(memory)) {
  if (given_.scalar_type() != c10::ScalarType::Byte || given_.dim() != 1 || !given_.is_contiguous() ||
      given_.storage_offset() != 0)
    fail(Fault::kCaller, "an arena's memory is ", given_.toString(), " of ", given_.dim(), " dimensions, from element ",
         given_.storage_offset(), " of its storage on; it takes all of a contiguous uint8 tensor of one dimension");
}

std::shared_ptr<Arena> make_arena(const py::object& memory) {
  if (memory.is_none()) return std::make_shared<Arena>();
  if (!is_tensor_object(memory.ptr()))
    fail(Fault::kCaller, "an arena's memory is a ", Py_TYPE(memory.ptr())->tp_name,
         "; it takes a torch.Tensor or None");
  return std::make_shared<Arena>(tensor_of(memory.ptr()));
}

const at::Tensor& Arena::get(const Lane& lane, size_t bytes) {
  if (given_.defined()) {
    const DeviceSlot device = given_.is_cpu() ? kCpuSlot : static_cast<DeviceSlot>(given_.device().index() + 1);
    if (device != lane.first)
      fail(Fault::kCaller, "the arena's memory is on ", given_.device().str(), "; the slots are on another device");
    const size_t wanted = bytes + Sequence::kAlignment;
    if (static_cast<size_t>(given_.numel()) < wanted)
      fail(Fault::kCaller, "the arena's memory has ", given_.numel(), " bytes; the sequence takes ", wanted,
           ", arena_bytes and ", Sequence::kAlignment, " to align them");
    return given_;
  }
  std::vector<at::Tensor>& made = made_[lane];
  if (made.empty() || static_cast<size_t>(made.back().numel()) < bytes + Sequence::kAlignment)
    made.push_back(allocate(lane.first, bytes));
  return made.back();
}

size_t Arena::bytes() const {
  size_t total = given_.defined() ? static_cast<size_t>(given_.numel()) : 0;
  for (const auto& [lane, made] : made_)
    for (const at::Tensor& each : made) total += static_cast<size_t>(each.numel());
  return total;
}

}  // namespace hdispatch
