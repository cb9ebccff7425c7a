// test_runtime.cpp -- ops, tables of one device, misses in words, and what a builder refuses.
#include "runtime.h"

#include "testing.h"
#include "toy_tables.h"

namespace hdispatch {
namespace {

using namespace testing;

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

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
