// ffi_library.h -- where functions with TVM FFI's ABI come from: a bundle's shared library, or a live object of the
// process.
//
// A bundle's library is opened when a table that needs it is built, from the bytes that were verified, and never
// closed. It links a shim (python/hdispatch/compile/ffi_shim.c) in the place of libtvm_ffi and the DSL's runtime:
//
//   int hdispatch_ffi_version(void)                      kShimVersion
//   int hdispatch_ffi_prepare(void* library, const char* function, int device, void** module)
//                                                        loads what the function's first call would load; a CUlibrary
//   const char* hdispatch_ffi_error(const char** kind)   the thread's last error; valid until its next one
//   int hdispatch_ffi_set_stream(int32_t device_type, int32_t device, void* stream, void** before)
//
// A live function comes from the module that has libtvm_ffi loaded, and errors are taken from there.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "driver.h"
#include "ffi_abi.h"

namespace hdispatch {

inline constexpr int kShimVersion = 1;

/// What there is to call, and to ask when it fails. `self` and the code outlive the process's last call.
struct FfiFunction {
  ffi::SafeCall call = nullptr;
  void* self = nullptr;
  /// The text of the error that this thread's last call raised, and its kind. Null: libtvm_ffi has it.
  const char* (*error)(const char** kind) = nullptr;
  ffi::EnvSetStream set_stream = nullptr;  ///< null: libtvm_ffi's
};

/// The function behind a handle of libtvm_ffi: `handle` is a Function object. Throws kBundle if it is another object.
FfiFunction live_function(uintptr_t handle);

/// What a call raised, taken away from the thread.
struct FfiError {
  std::string kind;  ///< "ValueError", "CUDADialectError", …; empty if nobody knows
  std::string message;
};
FfiError take_error(const FfiFunction& function);

/// Drops an object that a function returned.
void drop_result(ffi::Any& result) noexcept;

/// libtvm_ffi's, which somebody has loaded. Throws kBundle if nobody has.
ffi::EnvSetStream find_set_stream();

/// A bundle's shared library.
class FfiLibrary {
 public:
  /// Opens the image, once in a process however often it is asked for. Throws kBundle with what the loader says.
  static const FfiLibrary& open(const std::string& file, std::span<const char> image);

  /// The function of that name, with everything loaded that its first call would load on the device whose context is
  /// current. Throws kBundle if there is none, kDriver if loading fails.
  FfiFunction find(const std::string& name, int device, const Driver& driver) const;

 private:
  FfiLibrary(std::string file, std::span<const char> image);
  template <typename Symbol>
  Symbol symbol(const std::string& name) const;

  std::string file_;
  void* handle_ = nullptr;
  int (*prepare_)(void* library, const char* function, int device, void** module) = nullptr;
  const char* (*error_)(const char** kind) = nullptr;
  ffi::EnvSetStream set_stream_ = nullptr;
};

}  // namespace hdispatch
