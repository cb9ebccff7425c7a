// adopted_learn.h -- from a launch that Triton made to a row: what it compiled, for the key of the call.
#pragma once

#include "adopted_kernel.h"

namespace hdispatch {

/// Adds the entry of a call's key, if there is none of these choices (AdoptedTuner): a row, or the reason why its calls
/// stay Triton's. `compiled` is what Triton's launch returned; its context is current. `config` is what the autotuner
/// has chosen for the call, or null.
void learn(AdoptedKernel& self, const AdoptedCall& call, const LaunchPlace& place, PyObject* compiled, uint32_t choices,
           PyObject* config);

}  // namespace hdispatch
