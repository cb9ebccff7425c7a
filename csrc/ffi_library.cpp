// ffi_library.cpp -- opening libraries, finding functions, taking errors.
#include "ffi_library.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "check.h"
#include "fork_mutex.h"

namespace hdispatch {
namespace {

ForkMutex open_mutex;  // guards the libraries that are open

/// A function of the libtvm_ffi that the process has loaded; null if it has none.
template <typename Symbol>
Symbol of_tvm_ffi(const char* name) {
  // By its soname: whatever loaded it, with or without RTLD_GLOBAL. It stays loaded, so the count does not matter.
  void* library = dlopen("libtvm_ffi.so", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  return reinterpret_cast<Symbol>(dlsym(library ? library : RTLD_DEFAULT, name));
}

std::string to_string(const ffi::Bytes& bytes) { return {bytes.data, bytes.size}; }

FfiError take_tvm_ffi_error() {
  const auto move = of_tvm_ffi<ffi::ErrorMoveFromRaised>("TVMFFIErrorMoveFromRaised");
  const auto drop = of_tvm_ffi<ffi::ObjectDecRef>("TVMFFIObjectDecRef");
  if (!move || !drop) return {"", "libtvm_ffi is not loaded, so its text is not known"};
  void* raised = nullptr;
  move(&raised);
  if (!raised) return {"", "no error is set"};
  const auto& error = *static_cast<const ffi::ErrorObject*>(raised);
  FfiError taken{to_string(error.kind), to_string(error.message)};
  drop(raised);
  return taken;
}

}  // namespace

FfiFunction live_function(uintptr_t handle) {
  HD_CHECK_BUNDLE(handle, "the TVM-FFI function is null");
  if (const auto get_version = of_tvm_ffi<ffi::GetVersion>("TVMFFIGetVersion")) {
    ffi::Version version{};
    get_version(&version);
    HD_CHECK_BUNDLE(version.major == 0 && version.minor == 1, "libtvm_ffi ", version.major, ".", version.minor, ".",
                    version.patch, " is loaded; functions are taken by the C ABI of 0.1: install apache-tvm-ffi<0.2");
  }
  const auto* object = reinterpret_cast<const ffi::Function*>(handle);
  HD_CHECK_BUNDLE(object->object.type == ffi::kTypeFunction, "the TVM-FFI object is of type ", object->object.type,
                  "; a function is of type ", static_cast<int>(ffi::kTypeFunction));
  return {object->safe_call, reinterpret_cast<void*>(handle), nullptr, nullptr};
}

FfiError take_error(const FfiFunction& function) {
  if (!function.error) return take_tvm_ffi_error();
  const char* kind = "";
  const char* message = function.error(&kind);
  return {kind, message};
}

void drop_result(ffi::Any& result) noexcept {
  if (result.type < ffi::kTypeObjectBegin) return;
  if (const auto drop = of_tvm_ffi<ffi::ObjectDecRef>("TVMFFIObjectDecRef")) drop(result.pointer);
}

ffi::EnvSetStream find_set_stream() {
  const auto found = of_tvm_ffi<ffi::EnvSetStream>("TVMFFIEnvSetStream");
  HD_CHECK_BUNDLE(found, "libtvm_ffi is not loaded, so no stream can be set in its environment: import tvm_ffi first");
  return found;
}

// ---- a bundle's library ----

const FfiLibrary& FfiLibrary::open(const std::string& file, std::span<const char> image) {
  static auto* opened = new std::map<std::string, std::unique_ptr<const FfiLibrary>, std::less<>>;  // by content
  const std::lock_guard lock(open_mutex);
  std::string content(image.data(), image.size());
  auto& found = (*opened)[std::move(content)];
  if (!found) found.reset(new FfiLibrary(file, image));
  return *found;
}

FfiLibrary::FfiLibrary(std::string file, std::span<const char> image) : file_(std::move(file)) {
  // From memory: what is opened is what was verified, and the bundle's folder may change while it serves. The
  // descriptor stays open: the loader knows libraries by name, and /proc/self/fd/N must not become another file.
  const int descriptor = memfd_create(file_.c_str(), MFD_CLOEXEC);
  HD_CHECK_BUNDLE(descriptor >= 0, file_, ": memfd_create failed: ", std::strerror(errno));
  size_t written = 0;
  while (written < image.size()) {
    const ssize_t more = write(descriptor, image.data() + written, image.size() - written);
    if (more <= 0) break;
    written += static_cast<size_t>(more);
  }
  if (written == image.size()) handle_ = dlopen(text("/proc/self/fd/", descriptor).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle_) {
    const char* why = written == image.size() ? dlerror() : std::strerror(errno);
    close(descriptor);
    fail(Fault::kBundle, file_, ": cannot be opened: ", why ? why : "no reason given");
  }
  const auto version = symbol<int (*)()>("hdispatch_ffi_version");
  HD_CHECK_BUNDLE(version() == kShimVersion, file_, ": its shim is of version ", version(), "; this hdispatch takes ",
                  kShimVersion, "; rebuild the bundle");
  prepare_ = symbol<decltype(prepare_)>("hdispatch_ffi_prepare");
  error_ = symbol<decltype(error_)>("hdispatch_ffi_error");
  set_stream_ = symbol<ffi::EnvSetStream>("hdispatch_ffi_set_stream");
}

template <typename Symbol>
Symbol FfiLibrary::symbol(const std::string& name) const {
  const auto found = reinterpret_cast<Symbol>(dlsym(handle_, name.c_str()));
  HD_CHECK_BUNDLE(found, file_, ": has no symbol ", name, "; rebuild the bundle");
  return found;
}

FfiFunction FfiLibrary::find(const std::string& name, int device, const Driver& driver) const {
  const FfiFunction function{symbol<ffi::SafeCall>("__tvm_ffi_" + name), nullptr, error_, set_stream_};
  void* module = nullptr;
  if (prepare_(handle_, name.c_str(), device, &module) != 0) {
    const FfiError error = take_error(function);
    fail(Fault::kDriver, file_, ": loading the kernels of ", name, " on device ", device, " failed: ", error.message);
  }
  // The runtime loads lazily even then: what is launched for the first time during a graph's capture must be there.
  if (!module || !driver.library_kernel_count || !driver.library_kernels || !driver.kernel_function) return function;
  const auto library = static_cast<CUlibrary>(module);
  const std::string what = text(file_, " ", name);
  unsigned count = 0;
  // The runtime's handles are the driver's, as of CUDA 12.8; should they not be, the first launch loads the kernels.
  if (driver.library_kernel_count(&count, library) != kCudaSuccess) return function;
  std::vector<CUkernel> kernels(count);
  HD_DRIVER(driver, driver.library_kernels(kernels.data(), count, library), "cuLibraryEnumerateKernels", what);
  for (const CUkernel kernel : kernels) {
    CUfunction loaded = nullptr;
    HD_DRIVER(driver, driver.kernel_function(&loaded, kernel), "cuKernelGetFunction", what);
    if (driver.function_load) HD_DRIVER(driver, driver.function_load(loaded), "cuFuncLoad", what);
  }
  return function;
}

}  // namespace hdispatch
