// test_sequence_plan.cpp -- plans against the same calls made one by one, and when a plan is stale.
#include "sequence_plan.h"

#include <cstring>

#include "table_builder.h"
#include "testing.h"
#include "toy_sequences.h"

namespace hdispatch {
namespace {

using namespace testing;

Runtime& runtime() { return Runtime::get(); }

const Op& new_op() {
  static int made = 0;
  return runtime().define_op("sequence_toy" + std::to_string(made++), "", toy_args(), toy_variants());
}

/// Every kind of parameter; grid ceil(M / 4); the input is 16-byte aligned.
Record toy_record(bool early) {
  Record record;
  record.kernel = early ? "reads early" : "waits";
  record.grid = {expr("M", 3, "+", 4, "//"), expr(1), expr(1)};
  const auto pointer = [](int arg, uint32_t align) {
    Param param;
    param.arg = arg;
    param.align = align;
    return param;
  };
  Param input = pointer(kInput, 16), stride, epsilon;
  input.value = expr("input.stride(0)", 2, "*");  // an address that is computed
  stride.kind = ParamKind::kI32;
  stride.value = expr("input.stride(0)");
  epsilon.kind = ParamKind::kF32;
  epsilon.arg = kEpsilon;
  record.params = {pointer(kResult, 16), input, pointer(kWeight, 1), pointer(kScale, 4), stride, epsilon};
  for (const uint8_t arg : {kResult, kScale}) record.outputs.push_back({arg, true});
  if (early) record.early = {kWeight};
  for (Cubin& cubin : record.cubins) {
    cubin.file = "a.cubin";
    cubin.function = record.kernel;
    cubin.params = {0, 1, 2, 3, 4, 5};
    cubin.num_warps = 1;
    cubin.pdl = true;
  }
  return record;
}

void publish(const std::vector<const Op*>& ops, const std::vector<bool>& early) {
  TableBuilder builder(-1, 0, true);
  builder.add_module("a.cubin", {});
  for (size_t i = 0; i < ops.size(); ++i) {
    builder.set_ladder(*ops[i], kEdges);
    const uint32_t record = builder.add_record(toy_record(early[i]));
    for (uint32_t bucket = 0; bucket < kEdges.size(); ++bucket) builder.add_row(*ops[i], 0, kWidth, 0, bucket, record);
  }
  builder.publish();
}

/// What a launch is, to compare: function, grid, PDL, parameters.
std::string print(const std::vector<NullLaunch>& launches) {
  std::string out;
  for (const NullLaunch& launch : launches) {
    out += text(launch.function, " ", launch.config.grid[0], "x", launch.config.grid[1], " pdl ",
                launch.attributes.size());
    for (const auto& bytes : launch.params) {
      uint64_t value = 0;
      std::memcpy(&value, bytes.data(), bytes.size());
      out += text(" ", Hex{value});
    }
    out += "\n";
  }
  return out;
}

template <typename Body>
std::string recorded(Body body) {
  null_record(true);
  body();
  null_record(false);
  return print(null_launches());
}

struct Inputs {
  std::vector<TensorView> slots;
  std::vector<int64_t> integers;
  std::vector<uintptr_t> temps;
  SequenceInputs inputs{};
};

Inputs toy_inputs(const Sequence& sequence, int64_t m, uintptr_t page, uintptr_t shift = 0) {
  Inputs made;
  made.slots = {contiguous(page, kByte, {m, kWidth}), contiguous(page + 1, DType::kBFloat16, {m, kWidth}),
                contiguous(page + 2, DType::kFloat32, {m, 1})};
  made.slots[0].data += shift;
  made.integers.assign(3, 0);
  made.temps = sequence.addresses(m, 0x100000000, 0x200000000);
  return made;
}

const SequenceInputs& with(Inputs& made, int64_t m) {
  made.inputs = {made.slots.data(), made.integers.data(), made.temps.data(), m, kCpuSlot};
  return made.inputs;
}

/// Every step as a call of its own.
void one_by_one(const Sequence& sequence, const SequenceInputs& inputs) {
  for (const SequenceRun& run : sequence.order(inputs.m)) {
    Call call;
    uint32_t arg = 0;
    CHECK(sequence.make_call(run, inputs, call, arg));
    Dispatch found;
    CHECK(runtime().dispatch(
              *sequence.steps()[run.step].op, call, [](DeviceSlot) -> CUstream { return nullptr; }, found) ==
          Outcome::kLaunched);
  }
}

void launch(SequencePlan& plan) {
  size_t failed = 0;
  CHECK(plan.launch([](size_t) {}, failed).status == LaunchStatus::kLaunched);
}

TEST(a_plan_launches_what_single_calls_do_and_leaves_the_same_pending) {
  Random random(3);
  const Op &waits = new_op(), &reads = new_op();
  publish({&waits, &reads}, {false, true});
  for (int i = 0; i < 150; ++i) {
    std::vector<SequenceStep> steps;
    const std::vector<SequenceTemp> temps = {{{rows(), fixed(kWidth)}, kByte}, {{rows(), fixed(1)}, DType::kFloat32}};
    for (int64_t s = random.in(1, 9); s > 0; --s) {
      const bool to_temp = random.one_in(2);
      // Weights that nobody writes, and ones that a step's result may overlap.
      const uintptr_t weight = random.one_in(2) ? 100 : static_cast<uintptr_t>(random.in(10, 30));
      const auto place = [&](uint32_t arg, uint32_t temp, uint32_t given) {
        return to_temp ? of_temp(arg, temp) : of_slot(arg, given);
      };
      steps.push_back(toy_step(random.one_in(2) ? &reads : &waits,
                               {place(kResult, 0, 0), of_slot(kInput, 1), place(kScale, 1, 2)}, weight));
      steps.back().call.tensors[kWeight].storage = 1;  // whoever writes there has another storage
    }
    const Sequence sequence("s", toy_slots(), temps, steps, random.in(2, 40));
    SequencePlan plan(sequence);
    for (int call = 0; call < 6; ++call) {
      const int64_t m = random.of(std::vector<int64_t>{1, 2, 3, 4, 5, 16, 17, 40});
      Inputs made = toy_inputs(sequence, m, static_cast<uintptr_t>(random.in(10, 30)) * 3);
      const SequenceInputs& inputs = with(made, m);
      // A call in front that both find pending.
      const auto before = [&] {
        Call first = toy_call(4, kWidth);
        first.tensors[kResult] = contiguous(static_cast<uintptr_t>(20), kByte, {4, kWidth});
        Dispatch found;
        runtime().dispatch(waits, first, [](DeviceSlot) -> CUstream { return nullptr; }, found);
      };
      const auto after = [&] {  // reads early what may be pending: its attribute shows what is
        for (uintptr_t weight = 8; weight < 96; weight += 4) {
          Call last = toy_call(4, kWidth);
          last.tensors[kWeight] = contiguous(weight, DType::kBFloat16, {kWidth});
          last.tensors[kResult] = contiguous(5000, kByte, {4, kWidth});
          last.tensors[kScale] = contiguous(5001, DType::kFloat32, {4, 1});
          Dispatch found;
          runtime().dispatch(reads, last, [](DeviceSlot) -> CUstream { return nullptr; }, found);
        }
      };
      const TableReader reader;
      SequencePlan::Miss miss;
      const std::string single = recorded([&] { before(), one_by_one(sequence, inputs), after(); });
      const uint64_t hits = waits.counters().hits + reads.counters().hits;
      const std::string planned = recorded([&] {
        before();
        if (plan.update(inputs, miss) == SequencePlan::Update::kOther) CHECK(plan.resolve(inputs, nullptr, miss));
        launch(plan);
        after();
      });
      CHECK_EQ(planned, single);
      CHECK_EQ(waits.counters().hits + reads.counters().hits - hits, 1 + sequence.order(m).size() + 22);
    }
  }
}

const Sequence& two_steps(const Op& op) {
  static std::vector<std::unique_ptr<Sequence>> made;
  const std::vector<SequenceTemp> temps = {{{rows(), fixed(kWidth)}, kByte}, {{rows(), fixed(1)}, DType::kFloat32}};
  const std::vector<SequenceStep> steps = {
      toy_step(&op, {of_temp(kResult, 0), of_slot(kInput, 1), of_temp(kScale, 1)}),
      toy_step(&op, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)})};
  made.push_back(std::make_unique<Sequence>("two", toy_slots(), temps, steps, 64));
  return *made.back();
}

TEST(a_plan_serves_what_differs_in_addresses_alone) {
  const Op& op = new_op();
  publish({&op}, {false});
  const Sequence& sequence = two_steps(op);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Inputs first = toy_inputs(sequence, 4, 10);
  CHECK(plan.update(with(first, 4), miss) == SequencePlan::Update::kOther);  // nothing is resolved
  const auto resolve = [&] { CHECK(plan.resolve(with(first, 4), nullptr, miss)); };
  const auto update = [&](Inputs made, int64_t m = 4) { return plan.update(with(made, m), miss); };
  resolve();
  CHECK(update(toy_inputs(sequence, 4, 10)) == SequencePlan::Update::kReady);
  CHECK(update(toy_inputs(sequence, 4, 40)) == SequencePlan::Update::kReady);
  CHECK(update(toy_inputs(sequence, 5, 10), 5) == SequencePlan::Update::kOther);
  CHECK(update(toy_inputs(sequence, 4, 10, 16)) == SequencePlan::Update::kReady);
  CHECK(update(toy_inputs(sequence, 4, 10, 8)) == SequencePlan::Update::kOther);  // no longer aligned
  resolve();
  Inputs strided = toy_inputs(sequence, 4, 10);
  strided.slots[1].strides[0] = 2 * kWidth;
  CHECK(update(strided) == SequencePlan::Update::kOther);
  Inputs typed = toy_inputs(sequence, 4, 10);
  typed.slots[1].dtype = DType::kFloat16;
  CHECK(update(typed) == SequencePlan::Update::kOther);
  Inputs moved = toy_inputs(sequence, 4, 10);
  for (uintptr_t& temp : moved.temps) temp += 4096;
  CHECK(update(moved) == SequencePlan::Update::kOther);
  Inputs freed = toy_inputs(sequence, 4, 10);
  freed.slots[1].data = freed.slots[1].storage = 0;
  CHECK(update(freed) == SequencePlan::Update::kOther);
  CHECK(!plan.resolve(with(freed, 4), nullptr, miss) && miss.outcome == Outcome::kBadCall);
}

TEST(slots_that_come_to_share_memory_are_looked_at_again) {
  const Op& op = new_op();
  publish({&op}, {false});
  const Sequence& sequence = two_steps(op);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Inputs first = toy_inputs(sequence, 4, 10);
  CHECK(plan.resolve(with(first, 4), nullptr, miss));
  Inputs shared = toy_inputs(sequence, 4, 10);
  shared.slots[0].data = shared.slots[1].data;  // the result is written over the input
  shared.slots[0].storage = shared.slots[1].storage;
  CHECK(plan.update(with(shared, 4), miss) == SequencePlan::Update::kOther);
  CHECK(!plan.resolve(with(shared, 4), nullptr, miss));
  CHECK(miss.outcome == Outcome::kBadCall && miss.step == 1);
  CHECK_FAULT(kCaller, "result is written and shares memory with input", op.complain(miss.call));
  // A storage of a constant.
  CHECK(plan.resolve(with(first, 4), nullptr, miss));
  Inputs constant = toy_inputs(sequence, 4, 10);
  constant.slots[0].data = constant.slots[0].storage = 100 * 4096;
  CHECK(plan.update(with(constant, 4), miss) == SequencePlan::Update::kOther);
  CHECK(!plan.resolve(with(constant, 4), nullptr, miss));
}

TEST(another_table_makes_a_plan_stale) {
  const Op& op = new_op();
  publish({&op}, {false});
  const Sequence& sequence = two_steps(op);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  Inputs made = toy_inputs(sequence, 4, 10);
  {
    const TableReader reader;
    CHECK(plan.resolve(with(made, 4), nullptr, miss));
  }
  publish({&op}, {true});  // the old table is freed
  const TableReader reader;
  CHECK(plan.update(with(made, 4), miss) == SequencePlan::Update::kOther);
  CHECK(plan.resolve(with(made, 4), nullptr, miss));
  const std::string planned = recorded([&] { launch(plan); });
  CHECK_CONTAINS(planned, "reads early");
  runtime().withdraw(kCpuSlot);
  CHECK(plan.update(with(made, 4), miss) == SequencePlan::Update::kOther);
  CHECK(!plan.resolve(with(made, 4), nullptr, miss) && miss.outcome == Outcome::kNoTable && miss.step == 0);
}

TEST(nothing_is_launched_where_a_step_has_no_row) {
  const Op &op = new_op(), &other = new_op();
  publish({&op}, {false});
  const std::vector<SequenceStep> steps = {
      toy_step(&op, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)}),
      toy_step(&other, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)})};
  const Sequence sequence("s", toy_slots(), {}, steps, 64);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Inputs made = toy_inputs(sequence, 4, 10);
  CHECK_EQ(recorded([&] { CHECK(!plan.resolve(with(made, 4), nullptr, miss)); }), "");
  CHECK(miss.step == 1 && miss.outcome == Outcome::kNoTable);
  CHECK_CONTAINS(explain(sequence, with(made, 4)), "step 0   toy: row 2, waits\nstep 1   toy: miss ");
}

/// The toy op with a workspace, and an integer with a ladder in the place of epsilon: a record for each bucket of it.
const Op& publish_with_integer(const std::vector<int64_t>& lengths) {
  std::vector<ArgSpec> args = toy_args();
  args[kEpsilon] = int_arg("length", {}, 1);
  args[kEpsilon].has_ladder = true;
  std::vector<Variant> variants = toy_variants();
  for (Variant& variant : variants) variant.workspace_bytes = 4096;
  const Op& op = runtime().define_op("sequence_long", "", args, variants, "workspace");
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges, lengths);
  builder.add_module("a.cubin", {});
  const auto find = [&](std::string_view name) { return op.find_integer(name); };
  for (uint32_t bucket = 0; bucket < kEdges.size() * lengths.size(); ++bucket) {
    Record record = toy_record(false);
    record.kernel = "bucket" + std::to_string(bucket);
    record.grid[1] = Expr(tokens("length", 99, "+", 100, "//"), toy_tensor, find);
    record.guards.push_back({Expr(tokens("length", 1000, "<"), toy_tensor, find), "length < 1000"});
    Param length;
    length.kind = ParamKind::kI32;
    length.value = Expr(tokens("length"), toy_tensor, find);
    record.params[5] = length;
    Param workspace;
    workspace.arg = op.workspace();
    record.params.push_back(workspace);
    record.outputs.push_back({static_cast<uint8_t>(op.workspace()), true});
    for (Cubin& cubin : record.cubins) {
      cubin.function = record.kernel;
      cubin.params.push_back(6);
    }
    builder.add_row(op, 0, kWidth, 0, bucket, builder.add_record(std::move(record)));
  }
  builder.publish();
  return op;
}

TEST(integers_of_a_call_are_resolved_again) {
  const std::vector<int64_t> lengths = {100, 300};
  const Op& op = publish_with_integer(lengths);
  std::vector<SequenceSlot> slots = toy_slots();
  SequenceSlot integer;
  integer.name = "length";
  integer.is_tensor = false;
  slots.push_back(integer);
  SequenceStep changing = toy_step(&op, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)});
  changing.integers = {{kEpsilon, 3}};
  SequenceStep fixed_one = toy_step(&op, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)});
  fixed_one.call.integers[kEpsilon] = 7;
  const Sequence sequence("s", slots, {}, {changing, fixed_one, changing}, 64);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Random random(4);
  for (int i = 0; i < 300; ++i) {
    const int64_t m = random.in(1, 6);
    Inputs made = toy_inputs(sequence, m, static_cast<uintptr_t>(random.in(10, 12)) * 3);
    made.slots.push_back(absent());
    made.integers = {0, 0, 0, random.of(std::vector<int64_t>{1, 99, 100, 101, 299, 300, 301, 999, 1000, 0})};
    const int64_t length = made.integers[3];
    const SequenceInputs& inputs = with(made, m);
    const SequencePlan::Update update = plan.update(inputs, miss);
    const bool is_ready = update == SequencePlan::Update::kReady ||
                          (update == SequencePlan::Update::kOther && plan.resolve(inputs, nullptr, miss));
    CHECK_EQ(is_ready, length > 0 && length < 1000);
    if (!is_ready) {
      CHECK(miss.outcome == (length ? Outcome::kRefused : Outcome::kBadCall));
      CHECK_EQ(miss.step, 0u);
      continue;
    }
    CHECK_EQ(recorded([&] { launch(plan); }), recorded([&] { one_by_one(sequence, inputs); }));
  }
}

TEST(foreign_steps_are_called_in_their_place) {
  const Op& op = new_op();
  publish({&op}, {false});
  const auto own = toy_step(&op, {of_slot(kResult, 0), of_slot(kInput, 1), of_slot(kScale, 2)});
  const Sequence sequence("s", toy_slots(), {}, {foreign_step({}), own, foreign_step({}), own}, 64);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Inputs made = toy_inputs(sequence, 4, 10);
  CHECK(plan.resolve(with(made, 4), nullptr, miss));
  std::string order;
  null_record(true);
  size_t failed = 0;
  plan.launch([&](size_t run) { order += text(run, " after ", null_launches().size(), "; "); }, failed);
  null_record(false);
  CHECK_EQ(order, "0 after 0; 2 after 1; ");
}

TEST(a_failed_launch_says_which) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, kEdges);
  FfiRecord record;
  record.kernel = "fails";
  record.function = "fails";
  const FfiFunction fails{[](void*, const ffi::Any*, int32_t, ffi::Any*) { return -1; }, nullptr, nullptr, nullptr};
  const uint32_t index = builder.add_record(record, fails);
  for (uint32_t bucket = 0; bucket < kEdges.size(); ++bucket) builder.add_row(op, 0, kWidth, 0, bucket, index);
  builder.publish();
  const Sequence& sequence = two_steps(op);
  SequencePlan plan(sequence);
  SequencePlan::Miss miss;
  const TableReader reader;
  Inputs made = toy_inputs(sequence, 4, 10);
  CHECK(plan.resolve(with(made, 4), nullptr, miss));
  size_t failed = 7;
  const LaunchResult result = plan.launch([](size_t) {}, failed);
  CHECK(result.status == LaunchStatus::kRaised && failed == 0);
  CHECK_FAULT(kFunction, "sequence two, step 0 (toy): fails", plan.raise(result, failed));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
