// toy_tables.h -- toy ops of their own, records that a launch can tell apart, and tables of them for the null driver.
#pragma once

#include "calls.h"
#include "runtime.h"
#include "table_builder.h"

namespace hdispatch::testing {

inline Runtime& runtime() { return Runtime::get(); }

/// A toy op of its own, so that tests do not share counters.
inline const Op& new_op() {
  static int made = 0;
  return runtime().define_op("toy" + std::to_string(made++), "", toy_args(), toy_variants());
}

inline CUstream no_stream(DeviceSlot) { return nullptr; }

inline const std::vector<int64_t> kEdges = {1, 2, 4, 8, 16};

/// Grid (tag, M, 1): the tag says which record launched.
inline Record tagged(int64_t tag) {
  Record record;
  record.kernel = "kernel" + std::to_string(tag);
  record.grid = {expr(tag), expr("M"), expr(1)};
  Param result;
  result.arg = kResult;
  record.params = {result};
  for (uint32_t i = 0; i < kMClasses; ++i) {
    record.cubins[i].file = "a.cubin";
    record.cubins[i].function = record.kernel;
    record.cubins[i].params = {0};
    record.cubins[i].num_warps = 1;
  }
  return record;
}

/// Publishes for the null driver: variant 0 of the op, these Ks, every bucket, one record.
inline void publish(const Op& op, const std::vector<int64_t>& ks, Record record = tagged(1)) {
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges);
  builder.add_module("a.cubin", {});
  const uint32_t index = builder.add_record(std::move(record));
  for (const int64_t k : ks)
    for (uint32_t bucket = 0; bucket < kEdges.size(); ++bucket) builder.add_row(op, 0, k, 0, bucket, index);
  builder.publish();
}

struct Served {
  Outcome outcome;
  Dispatch found;
};

inline Served dispatch(const Op& op, Call call) {
  Served out{};
  out.outcome = runtime().dispatch(op, call, no_stream, out.found);
  return out;
}

inline std::string reason(const Op& op, Call call) {
  const Served served = dispatch(op, call);
  return Runtime::reason(served.outcome, served.found);
}

inline std::string described(const Op& op, Call call) {
  Served out{};
  out.outcome = runtime().dispatch(op, call, no_stream, out.found);
  return Runtime::describe(op, call, out.outcome, out.found);
}

}  // namespace hdispatch::testing
