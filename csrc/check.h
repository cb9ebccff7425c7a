// check.h -- how hdispatch reports faults: the caller's, ours, the driver's, a bundle's.
//
// Every failure is an `Error` with a `Fault`; the Python doors turn each fault into its own exception class
// (errors.py). Messages hold the actual and the expected value and what to do. They are built out of line, so that a
// check on the hot path costs one compare and one branch that is not taken.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace hdispatch {

#define HD_COLD __attribute__((cold, noinline))
#define HD_LIKELY(x) __builtin_expect(!!(x), 1)
#define HD_UNLIKELY(x) __builtin_expect(!!(x), 0)

enum class Fault : uint8_t {
  kCaller,    ///< an argument of a call is wrong                      -> ArgumentError
  kBundle,    ///< what is being loaded is wrong                       -> BundleError
  kMiss,      ///< no row serves the call, and strict mode is on       -> MissError
  kDriver,    ///< the CUDA driver refused                             -> DriverError
  kFunction,  ///< a row's host function or a foreign step raised an error -> FunctionError
  kInternal,  ///< hdispatch broke its own rule; please report         -> HdispatchError
};

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
  Fault fault() const noexcept { return fault_; }

 private:
  Fault fault_;
};

/// A number to print in hexadecimal.
struct Hex {
  uint64_t value;
};

// Not iostreams: they need one locale per process, and an extension that links its own copy of libstdc++ has a second.
inline void append(std::string& out, std::string_view part) { out += part; }
inline void append(std::string& out, std::integral auto part) { out += std::to_string(part); }
inline void append(std::string& out, double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  out += digits;
}
inline void append(std::string& out, Hex part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(part.value));
  out += digits;
}

/// The parts printed one after the other.
template <typename... Parts>
HD_COLD std::string text(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <typename... Parts>
[[noreturn]] HD_COLD void fail(Fault fault, const Parts&... parts) {
  throw Error(fault, text(parts...));
}

/// Our own rule: a failure is a bug in hdispatch.
#define HD_CHECK(condition, ...)                                                                     \
  do {                                                                                               \
    if (HD_UNLIKELY(!(condition)))                                                                   \
      ::hdispatch::fail(::hdispatch::Fault::kInternal, "hdispatch bug, please report: ", #condition, \
                        " does not hold: ", __VA_ARGS__);                                            \
  } while (0)

/// What a bundle or an op's declaration must satisfy.
#define HD_CHECK_BUNDLE(condition, ...)                                                         \
  do {                                                                                          \
    if (HD_UNLIKELY(!(condition))) ::hdispatch::fail(::hdispatch::Fault::kBundle, __VA_ARGS__); \
  } while (0)

}  // namespace hdispatch
