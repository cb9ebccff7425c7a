// launch_place.cpp -- asking which context is current.
#include "launch_place.h"

namespace hdispatch {

constinit thread_local CUcontext thread_context = nullptr;

HD_COLD bool enter(const LaunchPlace& place) noexcept {
  CUcontext current = nullptr;
  place.driver->context_get(&current);
  if (current == place.context) {
    thread_context = current;
    return false;
  }
  if (!current && place.only_device) {
    if (place.driver->context_set(place.context) == kCudaSuccess) thread_context = place.context;
    return false;
  }
  return place.driver->context_push(place.context) == kCudaSuccess;
}

}  // namespace hdispatch
