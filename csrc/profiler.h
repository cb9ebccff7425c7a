// profiler.h -- whether a profiler of torch's is on, and an op's name around its launch while one is.
//
// torch.profiler records what goes through torch's dispatcher by itself. The doors from Python do not go through it, so
// they ask. Only the thread's own observers are asked for, which is what torch.profiler sets up: two loads of the
// thread's memory, where torch's own question costs 5 to 17 ns. Process-wide observers (profile_all_threads) see
// kernels, and the ops that come through the dispatcher.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <string>

#include "check.h"

namespace hdispatch {

/// Where torch keeps this thread's observers: one object for as long as the thread lives. Null until it is asked for.
extern __attribute__((tls_model("initial-exec"))) constinit thread_local const at::RecordFunctionTLS* thread_observers;

HD_COLD inline void find_thread_observers() noexcept { thread_observers = &at::get_record_function_tls_(); }

/// Whether this thread is profiled.
inline bool is_profiled() noexcept {
  if (HD_UNLIKELY(!thread_observers)) find_thread_observers();
  return !thread_observers->sorted_tls_callbacks_.empty();
}

/// A range of the profile as long as it lives. `inputs` gives the arguments, as a vector of IValue, if the profiler
/// wants shapes.
class ProfiledRange {
 public:
  template <typename Inputs>
  ProfiledRange(const std::string& name, const Inputs& inputs) : record_(at::RecordScope::FUNCTION) {
    if (!record_.isActive()) return;
    if (record_.needsInputs()) {
      const std::vector<c10::IValue> given = inputs();
      record_.before(name, c10::ArrayRef<const c10::IValue>(given.data(), given.size()));
    } else {
      record_.before(name);
    }
  }
  explicit ProfiledRange(const std::string& name) : record_(at::RecordScope::FUNCTION) {
    if (record_.isActive()) record_.before(name);
  }
  ProfiledRange(const ProfiledRange&) = delete;
  ProfiledRange& operator=(const ProfiledRange&) = delete;

 private:
  at::RecordFunction record_;
};

}  // namespace hdispatch
