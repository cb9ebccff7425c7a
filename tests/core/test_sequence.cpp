// test_sequence.cpp -- views, offsets and chunks; plans against the same calls made one by one.
#include "sequence.h"

#include <cstring>
#include <map>
#include <set>

#include "calls.h"
#include "sequence_plan.h"
#include "table_builder.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

constexpr DType kByte = DType::kFloat8E4M3FN;
constexpr int64_t kK = 64;
const std::vector<int64_t> kEdges = {1, 2, 4, 8, 16};

Runtime& runtime() { return Runtime::get(); }
RowDim rows(int64_t factor = 1, int64_t constant = 0) { return {factor, constant, false}; }
RowDim fixed(int64_t size) { return {0, size, false}; }

std::string shape(const TensorView& view) {
  std::string out;
  for (uint32_t d = 0; d < view.rank; ++d) out += text(d ? " " : "", view.sizes[d], "/", view.strides[d]);
  return out;
}

// ---- views ----

TEST(views_are_those_of_torch) {
  TensorView view = contiguous(1, DType::kBFloat16, {5, 6144});
  CHECK(narrow(view, 1, 4096, 1024));
  CHECK_EQ(shape(view), "5/6144 1024/1");
  CHECK_EQ(view.data, uintptr_t{4096 + 2 * 4096});
  const int64_t heads[] = {5, 8, 128};
  CHECK(reshape(view, heads, 3));
  CHECK_EQ(shape(view), "5/6144 8/128 128/1");
  CHECK(transpose(view, 0, 1));
  CHECK_EQ(shape(view), "8/128 5/6144 128/1");
  const int64_t flat[] = {40, 128};
  CHECK(!reshape(view, flat, 2));  // would be a copy
  CHECK(!narrow(view, 1, 4, 2) && !narrow(view, 1, -1, 1) && !narrow(view, 3, 0, 1) && !transpose(view, 0, 3));
  CHECK(narrow(view, 1, 5, 0));
}

/// Every element stays where it was: compared by walking both views.
TEST(reshapes_keep_every_element_in_place) {
  Random random(1);
  const auto addresses = [](const TensorView& view) {
    std::vector<int64_t> found = {0};
    for (uint32_t d = 0; d < view.rank; ++d) {
      std::vector<int64_t> next;
      for (const int64_t base : found)
        for (int64_t i = 0; i < view.sizes[d]; ++i) next.push_back(base + i * view.strides[d]);
      found = std::move(next);
    }
    return found;
  };
  int made = 0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<int64_t> sizes;
    for (int64_t d = random.in(1, 4); d > 0; --d) sizes.push_back(random.in(1, 4));
    TensorView view = contiguous(1, DType::kFloat32, sizes);
    for (uint32_t d = 0; d < view.rank; ++d)
      if (random.one_in(3)) narrow(view, d, 0, random.in(1, view.sizes[d]));
    if (view.rank > 1 && random.one_in(3)) transpose(view, 0, view.rank - 1);
    int64_t count = 1;
    for (uint32_t d = 0; d < view.rank; ++d) count *= view.sizes[d];
    std::vector<int64_t> wanted;
    while (wanted.size() < 3 && random.one_in(2)) {
      const int64_t by = random.in(1, 4);
      if (count % by) continue;
      wanted.push_back(by);
      count /= by;
    }
    wanted.push_back(count);
    TensorView changed = view;
    if (!reshape(changed, wanted.data(), static_cast<uint32_t>(wanted.size()))) continue;
    ++made;
    CHECK(addresses(changed) == addresses(view));
  }
  CHECK(made > 5000);
}

TEST(a_contiguous_tensor_takes_every_shape) {
  TensorView view = contiguous(1, DType::kFloat32, {6, 1, 4});
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{24}, {1, 24}, {2, 3, 4}, {4, 6}, {24, 1}}) {
    TensorView changed = view;
    CHECK(reshape(changed, sizes.data(), static_cast<uint32_t>(sizes.size())));
    CHECK_EQ(shape(changed).substr(0, 3), shape(contiguous(1, DType::kFloat32, sizes)).substr(0, 3));
  }
  const int64_t wrong[] = {5, 5};
  CHECK(!reshape(view, wrong, 2));
  TensorView empty = contiguous(1, DType::kFloat32, {0, 8});
  const int64_t none[] = {0, 2, 4};
  CHECK(reshape(empty, none, 3));
}

// ---- sequences ----

SequenceSlot slot(std::string name, std::vector<RowDim> dims, DType dtype, bool written = false) {
  SequenceSlot made;
  made.name = std::move(name);
  made.dims = std::move(dims);
  made.dtype = dtype;
  made.is_written = written;
  return made;
}

StepTensor of_slot(uint32_t arg, uint32_t index) { return {arg, false, index, {}}; }
StepTensor of_temp(uint32_t arg, uint32_t index) { return {arg, true, index, {}}; }

/// A toy op's step: result, scale and input as given, the weight at a page.
SequenceStep toy_step(const Op* op, std::vector<StepTensor> tensors, uintptr_t weight = 100, bool by_rows = true) {
  SequenceStep step;
  step.op = op;
  step.name = "toy";
  step.by_rows = by_rows;
  step.call = toy_call(1, kK);
  step.call.tensors[kWeight] = contiguous(weight, DType::kBFloat16, {kK});
  step.tensors = std::move(tensors);
  return step;
}

std::vector<SequenceSlot> toy_slots() {
  return {slot("result", {rows(), fixed(kK)}, kByte, true), slot("input", {rows(), fixed(kK)}, DType::kBFloat16),
          slot("scale", {rows(), fixed(1)}, DType::kFloat32, true)};
}

SequenceStep foreign_step(std::vector<StepTensor> tensors, bool by_rows = false) {
  SequenceStep step;
  step.name = "foreign";
  step.by_rows = by_rows;
  step.tensors = std::move(tensors);
  return step;
}

TEST(temporaries_share_bytes_only_where_they_are_not_needed_at_once) {
  Random random(2);
  for (int i = 0; i < 200; ++i) {
    const auto count = static_cast<uint32_t>(random.in(1, 12));
    std::vector<SequenceTemp> temps;
    for (uint32_t t = 0; t < count; ++t) temps.push_back({{rows(random.in(1, 3)), fixed(random.in(1, 300))}, kByte});
    std::vector<SequenceStep> steps;
    std::vector<std::set<uint32_t>> used(count);
    for (uint32_t s = 0, n = static_cast<uint32_t>(random.in(1, 10)); s < n; ++s) {
      std::vector<StepTensor> tensors;
      for (uint32_t t = 0; t < count; ++t)
        if (random.one_in(4)) tensors.push_back(of_temp(static_cast<uint32_t>(tensors.size()), t)), used[t].insert(s);
      steps.push_back(foreign_step(tensors, random.one_in(2)));
    }
    const int64_t max_rows = random.in(1, 40);
    const Sequence sequence("s", {slot("x", {rows()}, kByte)}, temps, steps, max_rows);
    // Which steps are made between which, in order, for both ways.
    for (const int64_t m : {max_rows, 3 * max_rows + 1}) {
      const uintptr_t arena = 1 << 20, whole = uintptr_t{1} << 40;
      const std::vector<uintptr_t> at = sequence.addresses(m, arena, whole);
      const std::vector<SequenceRun> order = sequence.order(m);
      // Walk the order: who wrote each byte last must be who reads it. A use is a write of the use's temporary.
      std::vector<std::pair<size_t, size_t>> life(count, {order.size(), 0});
      for (size_t r = 0; r < order.size(); ++r)
        for (const StepTensor& tensor : steps[order[r].step].tensors) {
          life[tensor.index].first = std::min(life[tensor.index].first, r);
          life[tensor.index].second = r;
        }
      for (uint32_t a = 0; a < count; ++a)
        for (uint32_t b = 0; b < a; ++b) {
          if (used[a].empty() || used[b].empty()) continue;
          const auto is_whole = [&](uint32_t t) { return at[t] >= whole; };
          if (is_whole(a) != is_whole(b)) continue;
          // Of one run alone, a chunk's content ends with the chunk: compared within the first chunk.
          const auto within = [&](uint32_t t) {
            std::pair<size_t, size_t> first = {order.size(), 0};
            for (size_t r = 0; r < order.size(); ++r)
              for (const StepTensor& tensor : steps[order[r].step].tensors)
                if (tensor.index == t && order[r].first == 0) first = {std::min(first.first, r), r};
            return first;
          };
          const auto [a0, a1] = is_whole(a) || m == max_rows ? life[a] : within(a);
          const auto [b0, b1] = is_whole(b) || m == max_rows ? life[b] : within(b);
          if (a1 < b0 || b1 < a0) continue;
          const auto bytes = [&](uint32_t t) {
            const int64_t n = is_whole(t) ? m : max_rows;
            return static_cast<uintptr_t>(temps[t].dims[0].per_row * n * temps[t].dims[1].constant);
          };
          CHECK(at[a] + bytes(a) <= at[b] || at[b] + bytes(b) <= at[a]);
        }
      for (uint32_t t = 0; t < count; ++t) {
        CHECK(at[t] % Sequence::kAlignment == 0);
        const uintptr_t n = static_cast<uintptr_t>(temps[t].dims[0].per_row * (at[t] >= whole ? m : max_rows) *
                                                   temps[t].dims[1].constant);
        if (used[t].empty()) continue;
        CHECK(at[t] >= whole ? at[t] + n <= whole + sequence.whole_bytes(m)
                             : at[t] + n <= arena + sequence.arena_bytes());
      }
    }
  }
}

TEST(steps_by_rows_run_in_chunks_between_those_that_see_all) {
  const auto step = [](bool by_rows) { return foreign_step({}, by_rows); };
  const Sequence sequence("s", {slot("x", {rows()}, kByte)}, {}, {step(true), step(true), step(false), step(true)}, 4);
  const auto print = [&](int64_t m) {
    std::string out;
    for (const SequenceRun& run : sequence.order(m)) out += text(run.step, ":", run.first, "+", run.rows, " ");
    return out;
  };
  CHECK_EQ(print(4), "0:0+4 1:0+4 2:0+4 3:0+4 ");
  CHECK_EQ(print(5), "0:0+3 1:0+3 0:3+2 1:3+2 2:0+5 3:0+3 3:3+2 ");
  CHECK_EQ(print(9), "0:0+3 1:0+3 0:3+3 1:3+3 0:6+3 1:6+3 2:0+9 3:0+3 3:3+3 3:6+3 ");
  for (int64_t m = 1; m < 200; ++m) {
    std::map<uint32_t, int64_t> next;
    for (const SequenceRun& run : sequence.order(m)) {
      CHECK(run.rows >= 1 && run.first == next[run.step]);
      CHECK(run.step == 2 || run.rows <= 4);
      next[run.step] += run.rows;
    }
    for (uint32_t s = 0; s < 4; ++s) CHECK_EQ(next[s], m);
  }
}

TEST(chunks_begin_at_aligned_rows) {
  for (const auto& [m, most] : {std::pair<int64_t, int64_t>{129, 128},
                                {300, 128},
                                {333, 256},
                                {4097, 4096},
                                {1025, 1024},
                                {8191, 1152},
                                {50, 24},
                                {97, 16}}) {
    const Sequence sequence("s", {slot("x", {rows()}, kByte)}, {}, {foreign_step({}, true)}, most);
    int64_t next = 0;
    for (const SequenceRun& run : sequence.order(m)) {
      CHECK(run.first == next && run.rows >= 1 && run.rows <= most);
      CHECK(most % Sequence::kChunkRows || run.first % Sequence::kChunkRows == 0);
      next += run.rows;
    }
    CHECK_EQ(next, m);
  }
}

TEST(a_description_that_cannot_be_run) {
  const SequenceSlot x = slot("x", {rows()}, kByte);
  CHECK_FAULT(kCaller, "sequence s: it has no step", Sequence("s", {x}, {}, {}, 4));
  CHECK_FAULT(kCaller, "no slot has a dimension of M",
              Sequence("s", {slot("x", {fixed(3)}, kByte)}, {}, {foreign_step({})}, 4));
  CHECK_FAULT(kCaller, "max_rows is 0", Sequence("s", {x}, {}, {foreign_step({})}, 0));
  CHECK_FAULT(kCaller, "temporary 0 has rank 0", Sequence("s", {x}, {{{}, kByte}}, {foreign_step({})}, 4));
  CHECK_FAULT(kCaller, "sequence s, step 0 (foreign): it is to work by rows, and takes a tensor [M+1]",
              Sequence("s", {x, slot("y", {rows(1, 1)}, kByte)}, {}, {foreign_step({of_slot(0, 1)}, true)}, 4));
}

TEST(calls_are_checked_by_slot) {
  const Sequence sequence("s", {slot("x", {rows(), fixed(8)}, kByte), slot("ends", {rows(1, 1)}, DType::kInt32)}, {},
                          {foreign_step({})}, 4);
  const auto check = [&](const std::vector<int64_t>& x, const std::vector<int64_t>& ends, DType dtype = kByte) {
    const TensorView views[] = {contiguous(1, dtype, x), contiguous(2, DType::kInt32, ends)};
    return sequence.check(views);
  };
  CHECK_EQ(check({5, 8}, {6}), 5);
  CHECK_EQ(check({0, 8}, {1}), 0);
  CHECK_FAULT(kCaller, "slot x has sizes [5, 9]; it takes [M, 8] with M = 5", check({5, 9}, {6}));
  CHECK_FAULT(kCaller, "slot ends has sizes [5]; it takes [M+1] with M = 5", check({5, 8}, {5}));
  CHECK_FAULT(kCaller, "slot x has rank 1 (sizes [5]); it takes [M, 8]", check({5}, {6}));
  CHECK_FAULT(kCaller, "slot x has dtype bfloat16; it takes float8_e4m3fn", check({5, 8}, {6}, DType::kBFloat16));
  const TensorView none[] = {absent(), contiguous(2, DType::kInt32, {6})};
  CHECK_FAULT(kCaller, "slot x is None; it takes a tensor [M, 8]", sequence.check(none));
}

// ---- plans ----

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
    for (uint32_t bucket = 0; bucket < kEdges.size(); ++bucket) builder.add_row(*ops[i], 0, kK, 0, bucket, record);
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
  made.slots = {contiguous(page, kByte, {m, kK}), contiguous(page + 1, DType::kBFloat16, {m, kK}),
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
    const std::vector<SequenceTemp> temps = {{{rows(), fixed(kK)}, kByte}, {{rows(), fixed(1)}, DType::kFloat32}};
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
        Call first = toy_call(4, kK);
        first.tensors[kResult] = contiguous(static_cast<uintptr_t>(20), kByte, {4, kK});
        Dispatch found;
        runtime().dispatch(waits, first, [](DeviceSlot) -> CUstream { return nullptr; }, found);
      };
      const auto after = [&] {  // reads early what may be pending: its attribute shows what is
        for (uintptr_t weight = 8; weight < 96; weight += 4) {
          Call last = toy_call(4, kK);
          last.tensors[kWeight] = contiguous(weight, DType::kBFloat16, {kK});
          last.tensors[kResult] = contiguous(5000, kByte, {4, kK});
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
  const std::vector<SequenceTemp> temps = {{{rows(), fixed(kK)}, kByte}, {{rows(), fixed(1)}, DType::kFloat32}};
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
  strided.slots[1].strides[0] = 2 * kK;
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
    builder.add_row(op, 0, kK, 0, bucket, builder.add_record(std::move(record)));
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
  for (uint32_t bucket = 0; bucket < kEdges.size(); ++bucket) builder.add_row(op, 0, kK, 0, bucket, index);
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
