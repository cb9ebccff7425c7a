// test_runtime.cpp -- ops, tables per device, misses in words, contexts, and threads that dispatch while tables change.
#include "runtime.h"

#include <chrono>
#include <functional>
#include <thread>

#include "calls.h"
#include "table_builder.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

Runtime& runtime() { return Runtime::get(); }

/// A toy op of its own, so that tests do not share counters.
const Op& new_op() {
  static int made = 0;
  return runtime().define_op("toy" + std::to_string(made++), "", toy_args(), toy_variants());
}

CUstream no_stream(DeviceSlot) { return nullptr; }

const std::vector<int64_t> kEdges = {1, 2, 4, 8, 16};

/// Grid (tag, M, 1): the tag says which record launched.
Record tagged(int64_t tag) {
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
void publish(const Op& op, const std::vector<int64_t>& ks, Record record = tagged(1)) {
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

Served dispatch(const Op& op, Call call) {
  Served out{};
  out.outcome = runtime().dispatch(op, call, no_stream, out.found);
  return out;
}

std::string reason(const Op& op, Call call) {
  const Served served = dispatch(op, call);
  return Runtime::reason(served.outcome, served.found);
}

std::string described(const Op& op, Call call) {
  Served out{};
  out.outcome = runtime().dispatch(op, call, no_stream, out.found);
  return Runtime::describe(op, call, out.outcome, out.found);
}

TEST(ops_are_defined_once) {
  const Op& op = new_op();
  CHECK(runtime().find_op(op.name()) == &op);
  CHECK(runtime().find_op("nobody") == nullptr);
  CHECK_FAULT(kBundle, "is defined already", runtime().define_op(op.name(), "", toy_args(), toy_variants()));
  const Op& other = new_op();
  CHECK(other.id() != op.id());
}

TEST(a_call_before_any_table) {
  const Op& op = new_op();
  CHECK(dispatch(op, toy_call(4, 64)).outcome == Outcome::kNoTable);
  CHECK_EQ(reason(op, toy_call(4, 64)), "no table");
  CHECK_CONTAINS(described(op, toy_call(4, 64)),
                 "(bfloat16, M=4, K=64, N=0): no bundle with this op is loaded for the tensors' device");
}

TEST(hits_empty_calls_and_bad_calls) {
  const Op& op = new_op();
  publish(op, {64, 512});
  for (const int64_t m : {1, 2, 3, 16, 17, 8192}) {
    const Served served = dispatch(op, toy_call(m, 512));
    CHECK(served.outcome == Outcome::kLaunched);
    CHECK_EQ(key_k(served.found.row->key), 512u);
    CHECK_EQ(uint32_t{key_bucket(served.found.row->key)}, Ladder(kEdges).bucket(m));
  }
  CHECK_EQ(op.counters().hits.load(), 6u);
  CHECK(dispatch(op, toy_call(0, 512)).outcome == Outcome::kEmpty);
  CHECK(dispatch(op, toy_call(0, 513)).outcome == Outcome::kEmpty);
  CHECK_EQ(op.counters().empty.load(), 2u);
  Call bad = toy_call(4, 64);
  bad.tensors[kWeight].sizes[0] = 63;
  CHECK(dispatch(op, bad).outcome == Outcome::kBadCall);
  CHECK_EQ(op.counters().hits.load(), 6u);
}

TEST(k_513_is_not_served_by_k_512) {
  const Op& op = new_op();
  publish(op, {512});
  CHECK(dispatch(op, toy_call(4, 512)).outcome == Outcome::kLaunched);
  for (const int64_t k : {511, 513, 0, 1024}) CHECK(dispatch(op, toy_call(4, k)).outcome == Outcome::kNoRow);
  CHECK(dispatch(op, toy_call(4, 512, false, DType::kFloat16)).outcome == Outcome::kNoRow);
  CHECK(dispatch(op, toy_call(4, 512, true)).outcome == Outcome::kNoRow);
  CHECK_EQ(reason(op, toy_call(4, 513)), "no row");
}

TEST(nearest_rows) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges);
  builder.add_module("a.cubin", {});
  const uint32_t record = builder.add_record(tagged(1));
  for (const int64_t k : {64, 4096, 512, 2048})
    for (const uint32_t bucket : {1u, 4u}) builder.add_row(op, 0, k, 0, bucket, record);
  builder.add_row(op, 1, 513, 0, 1, record);
  builder.publish();
  // One per shape, same variant first, then the sizes; of one shape, the nearest bucket.
  const std::string shape = op.name() + "(bfloat16, M=2, K=513, N=0)";
  CHECK_CONTAINS(described(op, toy_call(2, 513)),
                 shape +
                     ": the launch table has no row for it; nearest rows: (bfloat16, K=512, N=0, M 2..2), "
                     "(bfloat16, K=64, N=0, M 2..2), (bfloat16, K=2048, N=0, M 2..2); build a bundle with this shape");
  CHECK_CONTAINS(described(op, toy_call(9, 5000)), "nearest rows: (bfloat16, K=4096, N=0, M 9..), (bfloat16, K=2048");
  // No row for this bucket of M, but for its neighbours.
  CHECK_CONTAINS(described(op, toy_call(7, 512)), "nearest rows: (bfloat16, K=512, N=0, M 9..)");
  CHECK_CONTAINS(described(op, toy_call(2, 514, false, DType::kFloat16)), "nearest rows: (float16, K=513");
}

TEST(an_op_that_the_bundle_has_without_rows) {
  const Op& op = new_op();
  publish(op, {});
  CHECK_CONTAINS(described(op, toy_call(4, 64)), "nearest rows: none: the bundle has no row of this op");
  const Op& other = new_op();
  CHECK(dispatch(other, toy_call(4, 64)).outcome == Outcome::kNoTable);
}

TEST(a_failed_guard) {
  const Op& op = new_op();
  Record record = tagged(1);
  record.guards = {{expr("input.stride(0)", 16, "%", 0, "=="), "input.stride(0) % 16 == 0"}};
  publish(op, {64}, record);
  Call call = toy_call(4, 64);
  call.tensors[kInput].strides[0] = 72;
  CHECK(dispatch(op, call).outcome == Outcome::kRefused);
  CHECK_EQ(reason(op, call), "guard: input.stride(0) % 16 == 0");
  CHECK_CONTAINS(described(op, call),
                 "guard: input.stride(0) % 16 == 0 does not hold in kernel1 (M = 4, K = 64, N = 0) of row 2 (bfloat16, "
                 "K=64, N=0, M 3..4)");
  CHECK_EQ(op.counters().hits.load(), 0u);
  // With one row of data the stride means nothing.
  call = toy_call(1, 64);
  call.tensors[kInput].strides[0] = 72;
  CHECK(dispatch(op, call).outcome == Outcome::kLaunched);
}

TEST(explanations) {
  const Op& op = new_op();
  const auto explain = [&op](Call call) { return runtime().explain(op, call); };
  CHECK_CONTAINS(explain(toy_call(4, 64)), "miss     ");
  Record record = tagged(1);
  record.guards = {{expr("input.stride(0)", 16, "%", 0, "=="), "rows of 16"}};
  publish(op, {64}, record);
  const std::string hit = explain(toy_call(3, 64));
  for (const char* part : {"variant  bfloat16", "sizes    M=3 K=64 N=0", "bucket   2: M 3..4", "row      2: kernel1",
                           "guard    rows of 16: holds", "class    other", "code     kernel1 in a.cubin",
                           "grid 1x3x1, block 32", "params   1 + 2 hidden, driver \"null\""})
    CHECK_CONTAINS(hit, part);
  CHECK_CONTAINS(explain(toy_call(0, 64)), "nothing to launch: M is 0");
  CHECK_CONTAINS(explain(toy_call(3, 65)), "nearest rows: (bfloat16, K=64");
  CHECK_CONTAINS(explain(toy_call(17, 64)), "bucket   4: M 9..\n");
  Call call = toy_call(3, 64);
  call.tensors[kInput].strides[0] = 65;
  CHECK_CONTAINS(explain(call), "guard    rows of 16: FAILS\nfallback ");
  call.tensors[kWeight].rank = 7;
  CHECK_FAULT(kCaller, "weight has rank 7", explain(call));
  CHECK_EQ(op.counters().hits.load(), 0u);  // nothing was launched
}

TEST(a_table_with_early_reads_keeps_what_is_pending) {
  const Op& op = new_op();
  for (const bool pdl : {true, false}) {
    Record quantize = tagged(1);
    quantize.outputs = {{kResult, true}, {kScale, true}, {kResidual, true}};
    for (Cubin& cubin : quantize.cubins) cubin.pdl = true;
    Record multiply = quantize;
    multiply.early = {kWeight};
    TableBuilder builder(-1, 0, pdl);
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    builder.add_row(op, 0, 64, 0, 2, builder.add_record(quantize));
    builder.add_row(op, 0, 512, 0, 2, builder.add_record(multiply));
    builder.publish();
    Call second = toy_call(4, 512);
    second.tensors[kResult].data = 100 * 4096;
    second.tensors[kScale].data = 110 * 4096;
    null_record(true);
    for (const uintptr_t weight : {1u, 3u}) {  // page 1 is what the first call writes
      dispatch(op, toy_call(4, 64));
      second.tensors[kWeight].data = weight * 4096;
      dispatch(op, second);
    }
    dispatch(op, toy_call(0, 64));  // launches nothing, changes nothing
    dispatch(op, second);
    null_record(false);
    const auto launches = null_launches();
    CHECK_EQ(launches.size(), 5u);
    for (size_t i = 0; i < launches.size(); ++i) CHECK_EQ(launches[i].attributes.size(), size_t{pdl && i != 1});
    CHECK_CONTAINS(runtime().explain(op, second), "early    weight may be read before the wait");
  }
}

/// The toy op with an integer that has a ladder, in the place of epsilon.
const Op& new_op_with_ladder() {
  static int made = 0;
  std::vector<ArgSpec> args = toy_args();
  args[kEpsilon] = int_arg("length", {}, 1);
  args[kEpsilon].has_ladder = true;
  return runtime().define_op("long_toy" + std::to_string(made++), "", args, toy_variants());
}

TEST(two_ladders) {
  const Op& op = new_op_with_ladder();
  CHECK_EQ(op.second(), int{kEpsilon});
  const std::vector<int64_t> lengths = {128, 512, 4096};
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges, lengths);
  builder.add_module("a.cubin", {});
  for (uint32_t bucket = 0; bucket < kEdges.size() * lengths.size(); ++bucket)
    builder.add_row(op, 0, 64, 0, bucket, builder.add_record(tagged(bucket + 1)));
  const auto buckets = static_cast<uint32_t>(kEdges.size() * lengths.size());
  CHECK_FAULT(kBundle, "has no bucket 15", builder.add_row(op, 0, 64, 0, buckets, 0));
  builder.publish();
  const auto number = [](const std::vector<int64_t>& edges, int64_t value) {
    size_t i = 0;
    while (i + 1 < edges.size() && value > edges[i]) ++i;
    return i;
  };
  for (const int64_t m_edge : kEdges)
    for (const int64_t edge : lengths)
      for (const int64_t m : {m_edge - 1, m_edge, m_edge + 1})
        for (const int64_t length : {int64_t{1}, edge - 1, edge, edge + 1, INT64_MAX}) {
          if (m < 1) continue;
          Call call = toy_call(m, 64);
          call.integers[kEpsilon] = length;
          Dispatch found;
          CHECK(runtime().dispatch(op, call, no_stream, found) == Outcome::kLaunched);
          CHECK_EQ(key_bucket(found.key), number(kEdges, m) * lengths.size() + number(lengths, length));
          CHECK_EQ(found.row->index, uint32_t{key_bucket(found.key)});
        }
  Call call = toy_call(3, 64);
  call.integers[kEpsilon] = 600;
  CHECK_CONTAINS(runtime().explain(op, call), "bucket   8: M 3..4, length 513..");
  CHECK_CONTAINS(runtime().explain(op, call), "sizes    M=3 K=64 N=0 length=600");
  runtime().withdraw(kCpuSlot);
}

TEST(what_two_ladders_refuse) {
  TableBuilder builder(-1, 0, true);
  const Op& one = new_op();
  const Op& two = new_op_with_ladder();
  CHECK_FAULT(kBundle, "0 edges of a second ladder; length has one", builder.set_ladder(two, kEdges));
  CHECK_FAULT(kBundle, "1 edges of a second ladder; it has no integer", builder.set_ladder(one, kEdges, {4}));
  const auto define = [](auto change) {
    std::vector<ArgSpec> args = toy_args();
    args[kEpsilon] = int_arg("length", {}, 1);
    args[kEpsilon].has_ladder = true;
    change(args);
    Op(0, "bad", "", args, toy_variants());
  };
  CHECK_FAULT(kBundle, "one integer may, without values and of at least 1",
              define([](auto& args) { args[kEpsilon].least = 0; }));
  CHECK_FAULT(kBundle, "one integer may", define([](auto& args) { args[kEpsilon].values = {1}; }));
  CHECK_FAULT(kBundle, "one integer may", define([](auto& args) { args.push_back(args[kEpsilon]); }));
}

TEST(replacing_and_withdrawing) {
  const Op& op = new_op();
  publish(op, {64}, tagged(1));
  CHECK_EQ(dispatch(op, toy_call(4, 64)).found.row->launcher->head().kernel, "kernel1");
  publish(op, {512}, tagged(2));
  CHECK(dispatch(op, toy_call(4, 64)).outcome == Outcome::kNoRow);
  CHECK_EQ(dispatch(op, toy_call(4, 512)).found.row->launcher->head().kernel, "kernel2");
  runtime().withdraw(kCpuSlot);
  CHECK(dispatch(op, toy_call(4, 512)).outcome == Outcome::kNoTable);
  runtime().withdraw(kCpuSlot);
  publish(op, {512}, tagged(3));
  CHECK_EQ(dispatch(op, toy_call(4, 512)).found.row->launcher->head().kernel, "kernel3");
  CHECK_FAULT(kInternal, "slot 65", runtime().withdraw(kMaxSlots));
  CHECK_FAULT(kInternal, "slot ", runtime().withdraw(kNoSlot));
  auto nowhere = std::make_shared<DeviceTable>();
  nowhere->slot = kMaxSlots;
  CHECK_FAULT(kInternal, "slot 65", runtime().publish(nowhere));
}

TEST(an_abandoned_or_refused_builder_changes_nothing) {
  const Op& op = new_op();
  publish(op, {64}, tagged(1));
  {
    TableBuilder builder(-1, 0, true);
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    builder.add_row(op, 0, 512, 0, 0, builder.add_record(tagged(2)));
    builder.add_row(op, 0, 512, 0, 0, 0);
    CHECK_FAULT(kBundle, "rows 0 and 1 have the same key", builder.publish());
  }
  CHECK(dispatch(op, toy_call(1, 512)).outcome == Outcome::kNoRow);
  CHECK_EQ(dispatch(op, toy_call(4, 64)).found.row->launcher->head().kernel, "kernel1");
}

TEST(what_a_builder_refuses) {
  const Op& op = new_op();
  CHECK_FAULT(kBundle, "device 64; at most 64 are supported", {
    if (!cuda_driver_missing().empty()) fail(Fault::kBundle, "device 64; at most 64 are supported");
    TableBuilder(64, 65, true);
  });
  TableBuilder builder(-1, 0, true);
  builder.add_module("a.cubin", {});
  CHECK_FAULT(kBundle, "a.cubin is added twice", builder.add_module("a.cubin", {}));
  const uint32_t record = builder.add_record(tagged(1));
  CHECK_FAULT(kBundle, "has no bucket 0", builder.add_row(op, 0, 64, 0, 0, record));  // no ladder yet
  builder.set_ladder(op, kEdges);
  CHECK_FAULT(kBundle, "ladder edge 1 is 1", builder.set_ladder(op, {1, 1}));
  CHECK_FAULT(kBundle, "has no bucket 5", builder.add_row(op, 0, 64, 0, 5, record));
  CHECK_FAULT(kBundle, "names record 1; there are 1", builder.add_row(op, 0, 64, 0, 0, 1));
  CHECK_FAULT(kBundle, "has no variant 4", builder.add_row(op, 4, 64, 0, 0, record));
  CHECK_FAULT(kBundle, "K = -1, N = 0; sizes are below 2^32", builder.add_row(op, 0, -1, 0, 0, record));
  CHECK_FAULT(kBundle, "N = 4294967296", builder.add_row(op, 0, 64, int64_t{1} << 32, 0, record));
  Record missing = tagged(1);
  missing.cubins[1].file = "b.cubin";
  CHECK_FAULT(kBundle, "b.cubin is used by a record but was not added", builder.add_record(missing));
  builder.add_row(op, 0, 64, 0, 0, record);
  builder.publish();
  for (const auto& again : std::initializer_list<std::function<void()>>{
           [&] { builder.publish(); }, [&] { builder.add_row(op, 0, 65, 0, 0, record); },
           [&] { builder.add_record(tagged(1)); }, [&] { builder.add_module("c", {}); },
           [&] { builder.set_ladder(op, {1}); }})
    CHECK_FAULT(kInternal, "the builder's table is published", again());
  CHECK(dispatch(op, toy_call(1, 64)).outcome == Outcome::kLaunched);
}

TEST(a_record_reads_only_what_its_variant_has) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges);
  builder.add_module("a.cubin", {});
  const auto row = [&](uint16_t variant, auto change) {
    Record record = tagged(1);
    change(record);
    builder.add_row(op, variant, 64, 0, 0, builder.add_record(record));
  };
  const auto residual = [](Record& record) { record.params[0].arg = kResidual; };
  CHECK_FAULT(kBundle, "kernel1 reads residual, which is None in variant bfloat16", row(0, residual));
  row(2, residual);
  CHECK_FAULT(kBundle, "reads scale_ub, which is None in variant float16",
              row(1, [](Record& record) { record.guards = {{expr("scale_ub.size(0)"), "one"}}; }));
  CHECK_FAULT(kBundle, "reads residual, which is None",
              row(0, [](Record& record) { record.grid[1] = expr("residual.stride(0)", 1, "+"); }));
  CHECK_FAULT(kBundle, "reads residual, which is None",
              row(0, [](Record& record) { record.params[0].value = expr("residual.stride(0)"); }));
  CHECK_FAULT(kBundle, "reads dimension 1 of weight, which has rank 1",
              row(0, [](Record& record) { record.grid[1] = expr("weight.size(1)"); }));
  CHECK_FAULT(kBundle, "reads tensor 4", row(0, [](Record& record) { record.params[0].arg = kEpsilon; }));
  CHECK_FAULT(kBundle, "reads tensor ", row(0, [](Record& record) { record.params[0].arg = -1; }));
  CHECK_FAULT(kBundle, "reads residual, which is None in variant bfloat16",
              row(0, [](Record& record) { record.early = {kWeight, kResidual}; }));
  CHECK_FAULT(kBundle, "reads float 1", row(0, [](Record& record) {
                record.params[0].kind = ParamKind::kF32;
                record.params[0].arg = kInput;
              }));
}

// ---- several devices ----

/// A driver with contexts, as `enter` uses them: one stack per thread.
thread_local std::vector<CUcontext> context_stack = {nullptr};
thread_local CUcontext launched_in = nullptr;
std::atomic<CUresult> launch_answer{kCudaSuccess};

CUresult context_get(CUcontext* out) {
  *out = context_stack.back();
  return kCudaSuccess;
}
CUresult context_set(CUcontext context) {
  context_stack.back() = context;
  return kCudaSuccess;
}
CUresult context_push(CUcontext context) {
  context_stack.push_back(context);
  return kCudaSuccess;
}
CUresult context_pop(CUcontext* out) {
  *out = context_stack.back();
  context_stack.pop_back();
  return kCudaSuccess;
}
CUresult launch_here(const LaunchConfig*, CUfunction, void**, void**) {
  launched_in = context_stack.back();
  return launch_answer;
}

const Driver& device_driver() {
  static const Driver driver = [] {
    Driver made = null_driver();
    made.name = "fake";
    made.launch = launch_here;
    made.context_get = context_get;
    made.context_set = context_set;
    made.context_push = context_push;
    made.context_pop = context_pop;
    return made;
  }();
  return driver;
}

CUcontext context_of(DeviceSlot slot) { return reinterpret_cast<CUcontext>(uintptr_t{slot} * 256); }

/// A table as TableBuilder makes it for a CUDA device.
void publish_device(const Op& op, DeviceSlot slot, bool only_device, int64_t tag,
                    const Driver& driver = device_driver()) {
  auto table = std::make_unique<DeviceTable>();
  table->driver = &driver;
  table->slot = slot;
  table->context = context_of(slot);
  table->only_device = only_device;
  table->ops.resize(op.id() + 1u);
  table->ops[op.id()] = {&op, -1, 1, {~0ull}, Ladder(kEdges), {}};
  table->launchers.push_back(std::make_unique<CubinLauncher>(
      tagged(tag), driver, [](const Cubin&, const std::vector<uint32_t>&) { return CUfunction{}; }));
  std::vector<Row> rows;
  for (uint16_t bucket = 0; bucket < kEdges.size(); ++bucket)
    rows.push_back({make_key(op.id(), 0, 64, 0, bucket), table->launchers[0].get(), bucket});
  table->table = LaunchTable(rows);
  runtime().publish(std::move(table));
}

Call call_on(DeviceSlot slot) { return toy_call(4, 64, false, DType::kBFloat16, slot); }

TEST(each_device_has_its_table) {
  const Op& op = new_op();
  for (const DeviceSlot slot : {1u, 2u, 64u}) publish_device(op, slot, false, slot);
  for (const DeviceSlot slot : {1u, 2u, 64u, 2u, 1u}) {
    const Served served = dispatch(op, call_on(slot));
    CHECK(served.outcome == Outcome::kLaunched);
    CHECK_EQ(served.found.row->launcher->head().kernel, "kernel" + std::to_string(slot));
    CHECK(launched_in == context_of(slot));
    CHECK_EQ(context_stack.size(), 1u);  // what was current is current again
    CHECK(context_stack.back() == nullptr);
  }
  CHECK(dispatch(op, call_on(3)).outcome == Outcome::kNoTable);
  CHECK(dispatch(op, call_on(65)).outcome == Outcome::kNoTable);
  CHECK(dispatch(op, call_on(kNoSlot)).outcome == Outcome::kNoTable);
  // The caller is on device 1, the tensors on device 2.
  context_stack.back() = context_of(1);
  CHECK(dispatch(op, call_on(2)).outcome == Outcome::kLaunched);
  CHECK(launched_in == context_of(2) && context_stack.back() == context_of(1));
  CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
  CHECK(launched_in == context_of(1));
  context_stack.back() = nullptr;
  for (const DeviceSlot slot : {1u, 2u, 64u}) runtime().withdraw(slot);
  CHECK(dispatch(op, call_on(1)).outcome == Outcome::kNoTable);
}

TEST(with_one_device_a_thread_enters_once) {
  const Op& op = new_op();
  publish_device(op, 1, true, 1);
  publish(op, {64});
  std::thread([&op] {
    for (int i = 0; i < 3; ++i) {
      CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
      CHECK(launched_in == context_of(1));
      CHECK(dispatch(op, call_on(kCpuSlot)).outcome == Outcome::kLaunched);
    }
    CHECK_EQ(context_stack.size(), 1u);
  }).join();
  runtime().withdraw(1);
}

/// Refuses, as the driver does, where another context than device 1's is current.
std::atomic<int> refused{0};
CUresult launch_in_context_1(const LaunchConfig* config, CUfunction function, void** params, void** extra) {
  if (context_stack.back() != context_of(1)) return ++refused, 400;
  return launch_here(config, function, params, extra);
}

TEST(another_context_is_current) {
  const Op& op = new_op();
  static const Driver driver = [] {
    Driver made = device_driver();
    made.launch = launch_in_context_1;
    return made;
  }();
  publish_device(op, 1, true, 1, driver);
  std::thread([&op] {
    CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
    // Somebody's own context, on top of the one that this thread is known to have.
    context_stack.push_back(context_of(9));
    for (int i = 0; i < 3; ++i) {
      CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
      CHECK(context_stack.back() == context_of(9));
    }
    CHECK_EQ(refused.load(), 1);  // from then on the driver is asked first
    context_stack.pop_back();
    CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
    CHECK_EQ(context_stack.size(), 1u);
  }).join();
  CHECK_EQ(op.counters().hits.load(), 5u);
  runtime().withdraw(1);
}

TEST(a_failed_launch_says_all) {
  const Op& op = new_op();
  publish_device(op, 1, true, 7);
  launch_answer = 719;
  Call call = call_on(1);
  Dispatch found;
  CHECK(runtime().dispatch(op, call, no_stream, found) == Outcome::kRefused);
  CHECK_FAULT(kDriver,
              op.name() + "(bfloat16, M=4, K=64, N=0), row 2, kernel7: cuLaunchKernelEx failed with 719 (null driver)",
              Runtime::raise_failure(op, call, found));
  launch_answer = kCudaSuccess;
  CHECK_EQ(op.counters().hits.load(), 0u);
  runtime().withdraw(1);
}

// ---- what is freed, and what is shared ----

TEST(a_table_is_freed_when_nothing_serves_from_it) {
  const Op& op = new_op();
  const auto build = [&op](std::shared_ptr<const DeviceTable> base) {
    TableBuilder builder(-1, 0, true);
    if (base) builder.extend(std::move(base));
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    builder.add_row(op, 0, 64, 0, 0, builder.add_record(tagged(1)));
    return builder.finish();
  };
  std::shared_ptr<const DeviceTable> base = build(nullptr);
  std::shared_ptr<const DeviceTable> top = build(base);
  const std::weak_ptr<const DeviceTable> base_lives = base, top_lives = top;
  runtime().publish(std::move(top));
  base.reset();
  CHECK(!top_lives.expired());   // it serves
  CHECK(!base_lives.expired());  // rows of the one on top point to its launchers
  {
    const TableReader reader;  // a call that blocks
    runtime().withdraw(kCpuSlot);
    CHECK(!top_lives.expired());
  }
  runtime().withdraw(kCpuSlot);
  CHECK(top_lives.expired());
  CHECK(base_lives.expired());
}

TEST(tables_share_modules_of_one_content) {
  const auto build = [](const std::string& digest) {
    TableBuilder builder(-1, 0, true);
    builder.add_module("a.cubin", {}, digest);
    return builder.finish();
  };
  const auto handle = reinterpret_cast<CUmodule>(uintptr_t{1});
  CHECK(runtime().find_module(kCpuSlot, "one") == nullptr);
  runtime().share_module(kCpuSlot, "one", handle);
  runtime().share_module(kCpuSlot, "one", reinterpret_cast<CUmodule>(uintptr_t{2}));  // another was there first
  CHECK(runtime().find_module(kCpuSlot, "one") == handle);
  CHECK(runtime().find_module(1, "one") == nullptr);  // a device's own
  build("one");
  CHECK(runtime().find_module(kCpuSlot, "one") == handle);
}

TEST(without_early_reads_what_reads_early_has_no_pdl) {
  const Op& op = new_op();
  for (const bool early_reads : {true, false}) {
    TableBuilder builder(-1, 0, true, early_reads);
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    Record waits = tagged(1), early = tagged(2);
    for (Record* record : {&waits, &early})
      for (Cubin& cubin : record->cubins) cubin.pdl = true;
    early.early = {kWeight};
    builder.add_row(op, 0, 64, 0, 0, builder.add_record(waits));
    builder.add_row(op, 0, 512, 0, 0, builder.add_record(early));
    builder.publish();
    for (const int64_t k : {64, 512}) {
      dispatch(op, toy_call(1, k));  // what is pending is unknown at first
      null_record(true);
      CHECK(dispatch(op, toy_call(1, k)).outcome == Outcome::kLaunched);
      null_record(false);
      CHECK_EQ(null_launches().at(0).attributes.size(), size_t{k == 64 || early_reads});
    }
  }
}

// ---- threads ----

TEST(threads_dispatch_while_tables_are_replaced) {
  const Op& op = new_op();
  constexpr int kTables = 60, kThreads = 3;
  publish(op, {64, 512}, tagged(1));
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> launched{0}, without{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      int wrong = 0;
      for (int64_t m = 1; !stop; m = m % 40 + 1) {
        const TableReader reader;
        const Served served = dispatch(op, toy_call(m, t % 2 ? 64 : 512));
        if (served.outcome == Outcome::kLaunched)
          ++launched, wrong += key_bucket(served.found.row->key) != Ladder(kEdges).bucket(m);
        else
          ++without, wrong += served.outcome != Outcome::kNoTable;
      }
      CHECK_EQ(wrong, 0);
    });
  for (int i = 0; i < kTables; ++i) {
    publish(op, {64, 512}, tagged(i + 2));
    if (i % 8 == 7) runtime().withdraw(kCpuSlot);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(launched > 0);
  CHECK_EQ(op.counters().hits.load(), launched.load());
}

TEST(counters_add_up_over_threads_and_recording) {
  const Op& op = new_op();
  publish(op, {64});
  constexpr int kThreads = 4, kCalls = 2000;
  null_record(true);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&op] {
      for (int i = 0; i < kCalls; ++i) dispatch(op, toy_call(i % 20, 64));
    });
  for (std::thread& thread : threads) thread.join();
  null_record(false);
  CHECK_EQ(op.counters().empty.load(), uint64_t{kThreads * kCalls / 20});
  CHECK_EQ(op.counters().hits.load(), uint64_t{kThreads * kCalls * 19 / 20});
  CHECK_EQ(null_launches().size(), op.counters().hits.load());
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
