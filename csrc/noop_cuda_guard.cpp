// noop_cuda_guard.cpp -- the CUDA device guard that a CPU-only torch lacks; becomes _noop_cuda_guard.so beside _C.
//
// Slicing a fake CUDA tensor asks torch for the guard of its device. A torch built without CUDA has none and refuses,
// so the build wing's workers load this library, and only they do, and only under such a torch. It never touches a
// device.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)

}  // namespace c10::impl
