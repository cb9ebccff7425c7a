// profiler.cpp -- the thread's pointer to its observers.
#include "profiler.h"

namespace hdispatch {

constinit thread_local const at::RecordFunctionTLS* thread_observers = nullptr;

}  // namespace hdispatch
