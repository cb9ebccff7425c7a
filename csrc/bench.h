// bench.h -- what the microbenchmark cannot time from Python: the bare driver call and the table probe.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace hdispatch {

/// ns per call of a C loop of `count` bare driver calls with the function, grid and parameters of `call`, on torch's
/// current stream: the floor that every other path is compared with. `pdl` = false leaves the launch attributes out.
/// Throws kMiss if no row serves the call.
double bench_launch_ns(const Op& op, Call& call, uint32_t count, bool pdl);

/// ns per `Runtime::dispatch` of a call that is in C already: all that a door does besides reading Python's arguments.
/// Throws kMiss if no row serves the call.
double bench_dispatch_ns(const Op& op, Call& call, uint32_t count);

/// ns per bare call, by its pointer, of the TVM-FFI function of the row that serves `call`, with arguments that are
/// there: the floor of such a row. Throws kMiss if no row serves the call, kCaller if it is a cubin's.
double bench_function_ns(const Op& op, Call& call, uint32_t count);

/// The handle of a TVM-FFI function that does nothing.
uintptr_t bench_function();

/// ns per `LaunchTable::find` over a table of `rows` rows, `count` random hits; each probe's key depends on the last
/// probe's result, so that this is latency, not throughput.
double bench_probe_ns(uint32_t rows, uint32_t count);

}  // namespace hdispatch
