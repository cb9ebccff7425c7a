// launch_place.h -- where a launch goes: the driver, the device and its context; making that context current.
#pragma once

#include "call.h"
#include "check.h"
#include "driver.h"

namespace hdispatch {

struct LaunchPlace {
  const Driver* driver = nullptr;
  DeviceSlot slot = kNoSlot;
  CUcontext context = nullptr;
  bool only_device = true;  ///< the process sees one GPU, so a thread's context cannot be another device's
};

/// The context that this thread is known to have made current; see `enter`.
extern __attribute__((tls_model("initial-exec"))) constinit thread_local CUcontext thread_context;

/// Whether `enter` is to be called before a launch.
inline bool needs_entering(const LaunchPlace& place) noexcept {
  return thread_context != place.context || !place.only_device;
}

/// Makes the place's context current where it is not. With one GPU a thread needs this once; with several, torch may
/// have switched devices since the last call, so the driver is asked every time. True: pop it after the launch.
bool enter(const LaunchPlace& place) noexcept;

/// The next launch of this thread asks which context is current.
inline void forget_context() noexcept { thread_context = nullptr; }

}  // namespace hdispatch
