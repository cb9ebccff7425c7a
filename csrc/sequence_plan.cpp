// sequence_plan.cpp -- resolving the steps of a sequence, patching them, launching them.
#include "sequence_plan.h"

#include <algorithm>

#include "check.h"

namespace hdispatch {
namespace {

/// The slot of each tensor argument; -1 for any other argument, and for the workspace after them.
std::array<int, kMaxArgs + 1> slots_of(const SequenceStep& step) {
  std::array<int, kMaxArgs + 1> slots;
  slots.fill(-1);
  for (const StepTensor& tensor : step.tensors)
    if (!tensor.is_temp) slots[tensor.arg] = static_cast<int>(tensor.index);
  return slots;
}

bool is_same_layout(const TensorView& a, const TensorView& b) noexcept {
  if (a.dtype != b.dtype || a.rank != b.rank) return false;
  if (a.dtype == DType::kNone) return true;
  for (uint32_t d = 0; d < std::min(a.rank, kMaxRank); ++d)
    if (a.sizes[d] != b.sizes[d] || a.strides[d] != b.strides[d]) return false;
  return a.slot == b.slot;
}

}  // namespace

void SequencePlan::begin(const SequenceInputs& inputs, CUstream stream) {
  const size_t slots = sequence_.slots().size();
  // Also what an attempt that met two tables has left.
  is_ready_ = is_mixed_ = false;
  table_ = nullptr;
  generation_ = 0;
  stream_ = stream;
  m_ = inputs.m;
  temps_.assign(inputs.temps, inputs.temps + sequence_.temps().size());
  slots_.assign(inputs.slots, inputs.slots + slots);
  integers_.assign(inputs.integers, inputs.integers + slots);
  // Chunks of one step are launches of their own.
  runs_ = sequence_.order(m_);
  fixed_.clear();
  launches_.clear();
  values_.clear();
  ranges_.clear();
  kept_.clear();
  by_integer_.clear();
  uses_.assign(slots, {});
  hits_.clear();
  empty_.clear();
  for (const SequenceStep& step : sequence_.steps()) {
    if (!step.op) continue;
    for (const StepTensor& tensor : step.tensors)
      if (!tensor.is_temp) uses_[tensor.index].by_op = true;
    for (size_t i = 0; i < step.op->args().size(); ++i)
      if (step.op->args()[i].is_tensor() && step.call.tensors[i].dtype != DType::kNone)
        fixed_.push_back(step.call.tensors[i].storage);
  }
  // Sorted for `is_alone`, which every call that moves a slot asks.
  std::sort(fixed_.begin(), fixed_.end());
  fixed_.erase(std::unique(fixed_.begin(), fixed_.end()), fixed_.end());
}

bool SequencePlan::resolve(const SequenceInputs& inputs, CUstream stream, Miss& miss, const CallerLock* lock) {
  // For workspaces that have to be made: the GPU is waited for without the caller's lock.
  lock_ = lock;
  do {  // again where another table has been published in between
    begin(inputs, stream);
    for (uint32_t run = 0; run < runs_.size(); ++run)
      if (!resolve_run(run, inputs, miss)) return false;
  } while (is_mixed_);
  finish();
  is_ready_ = true;
  return true;
}

/// The row of a step; false with the miss.
bool SequencePlan::look_up(const SequenceRun& run, const SequenceInputs& inputs, Call& call, Miss& miss) const {
  const SequenceStep& step = sequence_.steps()[run.step];
  miss.step = run.step;
  miss.found = {};
  uint32_t arg = 0;
  if (HD_UNLIKELY(!sequence_.make_call(run, inputs, call, arg))) {
    miss.outcome = Outcome::kBadCall;
    miss.view = step.op->args()[arg].name;
    return false;
  }
  miss.outcome = Runtime::get().lookup(*step.op, call, miss.found);
  if (HD_LIKELY(miss.outcome == Outcome::kLaunched)) return true;
  miss.call = call;
  return false;
}

bool SequencePlan::resolve_run(uint32_t index, const SequenceInputs& inputs, Miss& miss) {
  const SequenceRun& run = runs_[index];
  const SequenceStep& step = sequence_.steps()[run.step];
  Launch launch{};
  launch.run = index;
  launch.kind = Kind::kForeign;
  if (!step.op) {
    launches_.push_back(launch);
    return true;
  }
  Call call;
  if (!look_up(run, inputs, call, miss)) {
    if (miss.outcome != Outcome::kEmpty) return false;
    empty_.push_back(step.op);
    return true;
  }
  // Rows of two tables would be patched and checked as of one.
  is_mixed_ |= table_ && miss.found.table != table_;
  table_ = miss.found.table;
  generation_ = table_->generation;
  if (step.op->workspace() >= 0) {
    // The block may have to be allocated, which needs the device's context.
    const LaunchContext context(*table_);
    Runtime::give_workspace(*step.op, call, miss.found, stream_, lock_, false);
  }
  const Launcher& launcher = *miss.found.row->launcher;
  const auto* code = dynamic_cast<const CubinLauncher*>(&launcher);
  launch.launcher = &launcher;
  launch.kind = code ? Kind::kCubin : Kind::kFunction;
  const auto at = static_cast<uint32_t>(launches_.size());
  if (!code || !step.integers.empty() || code->has_maps(call.sizes[kM])) {
    launch.kept = kept_.emplace_back(std::make_unique<Kept>()).get();
    launch.kept->call = call;
    if (!fill_kept(launch, launcher, miss)) return false;
    for (const StepTensor& tensor : step.tensors)
      if (!tensor.is_temp) uses_[tensor.index].kept.push_back(at);
    if (!step.integers.empty()) by_integer_.push_back(at);
  } else {
    CubinLauncher::Block block;
    miss.found.result = code->fill(call, stream_, block);
    if (HD_UNLIKELY(miss.found.result.status != LaunchStatus::kLaunched)) {
      miss.outcome = Outcome::kRefused;
      miss.call = call;
      return false;
    }
    launch.config = block.config;
    launch.code = block.function;
    keep_values(launch, *code, call, block);
  }
  add_ranges(launch, call);
  launch.may_be_early = may_be_early(launch);
  launches_.push_back(launch);
  const auto same = [&step](const auto& each) { return each.first == step.op; };
  const auto found = std::find_if(hits_.begin(), hits_.end(), same);
  found == hits_.end() ? hits_.emplace_back(step.op, 1) : * found = {step.op, found->second + 1};
  return true;
}

bool SequencePlan::may_be_early(const Launch& launch) noexcept {
  if (!launch.launcher->is_tracked()) return false;
  if (launch.kind == Kind::kCubin)
    return static_cast<const CubinLauncher&>(*launch.launcher).begins_early(launch.config);
  return static_cast<const FfiLauncher&>(*launch.launcher).begins_early(launch.kept->function);
}

/// Fills what is launched from the call that is kept.
bool SequencePlan::fill_kept(Launch& launch, const Launcher& launcher, Miss& miss) {
  Kept& kept = *launch.kept;
  launch.launcher = &launcher;
  if (const auto* code = dynamic_cast<const CubinLauncher*>(&launcher)) {
    launch.kind = Kind::kCubin;
    miss.found.result = code->fill(kept.call, stream_, kept.cubin);
    launch.config = kept.cubin.config;
    launch.code = kept.cubin.function;
    launch.params = kept.cubin.params;
  } else {
    launch.kind = Kind::kFunction;
    miss.found.result = static_cast<const FfiLauncher&>(launcher).fill(kept.call, stream_, kept.function);
  }
  if (HD_LIKELY(miss.found.result.status == LaunchStatus::kLaunched)) return true;
  miss.outcome = Outcome::kRefused;
  miss.call = kept.call;
  return false;
}

void SequencePlan::keep_values(Launch& launch, const CubinLauncher& launcher, const Call& call,
                               const CubinLauncher::Block& block) {
  const SequenceStep& step = sequence_.steps()[runs_[launch.run].step];
  const std::array<int, kMaxArgs + 1> slots = slots_of(step);
  launch.value = static_cast<uint32_t>(values_.size());
  values_.insert(values_.end(), block.values, block.values + launcher.count_values(call.sizes[kM]));
  launcher.each_address(call.sizes[kM], [&](uint32_t value, uint32_t arg, uint64_t mask) {
    if (slots[arg] < 0) return;
    SlotUse& use = uses_[static_cast<size_t>(slots[arg])];
    // A later address is as good as this one where it has the same bits under the masks.
    use.mask |= mask;
    use.addresses.push_back({launch.value + value, block.values[value] - slots_[static_cast<size_t>(slots[arg])].data});
  });
}

/// What the launch reads early, then what it writes. Of a kept one this is set again with it.
void SequencePlan::add_ranges(Launch& launch, const Call& call) {
  launch.ranges = static_cast<uint32_t>(ranges_.size());
  launch.early = launch.outputs = 0;
  if (!launch.launcher->is_tracked()) return;
  const RecordHead& head = launch.launcher->head();
  launch.early = static_cast<uint32_t>(head.early.size());
  for (const Output& output : head.outputs)
    if (call.tensors[output.arg].dtype != DType::kNone) ++launch.outputs;
  // Present outputs alone: what is None has no range, and a layout with it is another plan.
  ranges_.resize(ranges_.size() + launch.early + launch.outputs);
  set_ranges(launch, call);
  // Its ranges are computed again with its call; others are moved by the slot's address.
  if (launch.kept) return;
  const std::array<int, kMaxArgs + 1> slots = slots_of(sequence_.steps()[runs_[launch.run].step]);
  uint32_t at = launch.ranges;
  const auto patch = [&](uint32_t arg) {
    const Range& range = ranges_[at];
    if (slots[arg] >= 0) {
      const uintptr_t base = slots_[static_cast<size_t>(slots[arg])].data;
      uses_[static_cast<size_t>(slots[arg])].ranges.push_back({at, range.lowest - base, range.highest - base});
    }
    ++at;
  };
  for (const uint8_t arg : head.early) patch(arg);
  for (const Output& output : head.outputs)
    if (call.tensors[output.arg].dtype != DType::kNone) patch(output.arg);
}

void SequencePlan::set_ranges(const Launch& launch, const Call& call) {
  Range* range = ranges_.data() + launch.ranges;
  for (const uint8_t arg : launch.launcher->head().early) *range++ = extent(call.tensors[arg]);
  for (const Output& output : launch.launcher->head().outputs)
    if (call.tensors[output.arg].dtype != DType::kNone) *range++ = Launcher::written(output, call.tensors[output.arg]);
}

/// Needs all launches: where their parameters lie, and which launch's writes a later one looks up.
void SequencePlan::finish() {
  params_.resize(values_.size());
  for (size_t i = 0; i < values_.size(); ++i) params_[i] = &values_[i];
  for (size_t i = 0; i < launches_.size(); ++i) {
    Launch& launch = launches_[i];
    if (launch.kind == Kind::kForeign) continue;
    if (!launch.kept) launch.params = params_.data() + launch.value;
    // Between launches that all wait first, only the last one's writes count; a foreign step may ask for them too.
    const Launch* next = i + 1 < launches_.size() ? &launches_[i + 1] : nullptr;
    const bool is_ours = next && next->kind != Kind::kForeign && next->launcher->only_launches();
    launch.is_noted =
        launch.launcher->is_tracked() && (!is_ours || launch.may_be_early || next->may_be_early || next->kept);
  }
}

bool SequencePlan::has_layout(const SequenceInputs& inputs) const noexcept {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (uses_[i].by_op && !is_same_layout(slots_[i], inputs.slots[i])) return false;
  return true;
}

/// Whether a slot's storage is no other argument's, so that moving it makes nothing overlap.
bool SequencePlan::is_alone(size_t slot, uintptr_t storage, const SequenceInputs& inputs) const noexcept {
  if (!storage || std::binary_search(fixed_.begin(), fixed_.end(), storage)) return false;
  for (size_t i = 0; i < slots_.size(); ++i)
    if (i != slot && uses_[i].by_op && (slots_[i].storage == storage || inputs.slots[i].storage == storage))
      return false;
  return true;
}

void SequencePlan::move(size_t slot, const TensorView& view) noexcept {
  const SlotUse& use = uses_[slot];
  for (const AddressPatch& patch : use.addresses) values_[patch.value] = view.data + patch.offset;
  for (const RangePatch& patch : use.ranges)
    ranges_[patch.range] = {view.data + patch.lowest, view.data + patch.highest};
  // What reads more of a slot than its address is filled again, by `update`, once all slots are in.
  for (const uint32_t at : use.kept) launches_[at].is_stale = true;
  slots_[slot].data = view.data;
  slots_[slot].storage = view.storage;
}

SequencePlan::Update SequencePlan::update(const SequenceInputs& inputs, Miss& miss) {
  if (!is_ready_ || inputs.m != m_ || !has_layout(inputs)) return Update::kOther;
  if (table_) {
    const DeviceTable* table = Runtime::get().table(inputs.device);
    if (!table || table->generation != generation_) return Update::kOther;
  }
  // Addresses of temporaries are not patched: they change only where the arena has grown.
  if (!std::equal(temps_.begin(), temps_.end(), inputs.temps)) return Update::kOther;
  bool is_stale = false;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const TensorView& view = inputs.slots[i];
    if (HD_LIKELY(!uses_[i].by_op || view.dtype == DType::kNone ||
                  (view.data == slots_[i].data && view.storage == slots_[i].storage)))
      continue;
    if (((view.data ^ slots_[i].data) & uses_[i].mask) || !is_alone(i, view.storage, inputs) ||
        !is_alone(i, slots_[i].storage, inputs)) {
      is_ready_ = false;  // some slots may have been moved
      return Update::kOther;
    }
    move(i, view);
    is_stale |= !uses_[i].kept.empty();
  }
  if (HD_UNLIKELY(!by_integer_.empty() && !std::equal(integers_.begin(), integers_.end(), inputs.integers))) {
    integers_.assign(inputs.integers, inputs.integers + integers_.size());
    for (const uint32_t at : by_integer_) launches_[at].is_stale = true;
    is_stale = true;
  }
  if (HD_LIKELY(!is_stale)) return Update::kReady;
  for (Launch& launch : launches_) {
    if (!launch.is_stale) continue;
    launch.is_stale = false;
    if (resolve_again(launch, inputs, miss)) continue;
    is_ready_ = false;
    return miss.outcome == Outcome::kLaunched ? Update::kOther : Update::kMissed;
  }
  return Update::kReady;
}

/// False without a miss where the whole plan is to be resolved again: another table, or another number of ranges.
bool SequencePlan::resolve_again(Launch& launch, const SequenceInputs& inputs, Miss& miss) {
  Kept& kept = *launch.kept;
  const Op& op = *sequence_.steps()[runs_[launch.run].step].op;
  const TensorView workspace = kept.call.tensors[op.args().size()];  // a block stays as long as the process
  if (!look_up(runs_[launch.run], inputs, kept.call, miss)) {
    if (miss.outcome == Outcome::kEmpty) miss.outcome = Outcome::kLaunched;
    return false;
  }
  if (miss.found.table != table_) return false;
  if (op.workspace() >= 0) {
    const auto bytes = static_cast<int64_t>(op.variants()[key_variant(miss.found.key)].workspace_bytes);
    if (bytes != (workspace.dtype == DType::kNone ? 0 : workspace.sizes[0])) return false;
    kept.call.tensors[op.args().size()] = workspace;
  }
  const Launcher& launcher = *miss.found.row->launcher;
  const RecordHead& head = launcher.head();
  // `finish` decided for the earlier row which launches note their writes.
  if (&launcher != launch.launcher && (head.early.size() != launch.launcher->head().early.size() ||
                                       launcher.only_launches() != launch.launcher->only_launches()))
    return false;
  if (!fill_kept(launch, launcher, miss)) return false;
  if (launch.early + launch.outputs) set_ranges(launch, kept.call);
  launch.may_be_early = may_be_early(launch);
  return true;
}

inline void SequencePlan::note(PendingWrites& pending, const Launch& launch, bool is_early) noexcept {
  const Range* range = ranges_.data() + launch.ranges + launch.early;
  if (!is_early) pending.clear();
  for (uint32_t i = 0; i < launch.outputs; ++i) is_early ? pending.join(range[i]) : pending.append(range[i]);
}

LaunchResult SequencePlan::launch(const Foreign& foreign, size_t& failed, Observer* observer) {
  // Read once: the compiler cannot know that a launch leaves it as it is.
  const LaunchFn make = table_ ? table_->driver->launch : nullptr;
  PendingWrites* pending = nullptr;
  for (Launch& each : launches_) {
    if (HD_UNLIKELY(observer != nullptr)) observer->begin(each.run);
    if (HD_UNLIKELY(each.kind == Kind::kForeign)) {
      pending = nullptr;
      // The set is this thread's until it asks for the next one, which a foreign step may do.
      foreign(each.run);
      if (HD_UNLIKELY(observer != nullptr)) observer->end();
      continue;
    }
    if (!pending && each.launcher->is_tracked()) pending = &PendingWrites::of(static_cast<int>(table_->slot), stream_);
    bool is_early = each.may_be_early && pending;
    if (is_early)
      for (uint32_t i = 0; i < each.early; ++i) is_early = is_early && !pending->overlaps(ranges_[each.ranges + i]);
    const bool leave_out = each.may_be_early && !is_early;
    LaunchResult result{LaunchStatus::kLaunched, 0};
    if (HD_LIKELY(each.kind == Kind::kCubin)) {
      const LaunchConfig* config = &each.config;
      LaunchConfig plain;
      if (HD_UNLIKELY(leave_out)) {
        plain = each.config;
        leave_out_pdl(plain);
        config = &plain;
      }
      const CUresult answer = make(config, each.code, each.params, nullptr);
      if (HD_UNLIKELY(answer != kCudaSuccess)) result = {LaunchStatus::kDriver, answer};
    } else {
      const auto& function = static_cast<const FfiLauncher&>(*each.launcher);
      FfiLauncher::Block& block = each.kept->function;
      const int answer = leave_out ? function.invoke_without_pdl(block, stream_) : function.invoke(block, stream_);
      if (HD_UNLIKELY(answer)) result = {LaunchStatus::kRaised, answer};
      if (!function.only_launches() && pending) pending = &PendingWrites::of(static_cast<int>(table_->slot), stream_);
    }
    if (HD_UNLIKELY(result.status != LaunchStatus::kLaunched)) {
      // Some launches were made and not noted: from here on everything may be written.
      if (pending) pending->forget();
      failed = static_cast<size_t>(&each - launches_.data());
      return result;
    }
    if (each.is_noted) note(*pending, each, is_early);
    if (HD_UNLIKELY(observer != nullptr)) observer->end();
  }
  for (const auto& [op, count] : hits_) op->counters().hits.fetch_add(count, std::memory_order_relaxed);
  for (const Op* op : empty_) op->counters().empty.fetch_add(1, std::memory_order_relaxed);
  return {LaunchStatus::kLaunched, 0};
}

void SequencePlan::raise(const LaunchResult& result, size_t failed) const {
  const Launch& launch = launches_[failed];
  const std::string where = sequence_.place(runs_[launch.run].step) + launch.launcher->head().kernel;
  launch.launcher->raise(result, where);
  fail(Fault::kInternal, where, " failed without an error");
}

std::string explain(const Sequence& sequence, const SequenceInputs& inputs) {
  const std::vector<SequenceRun> runs = sequence.order(inputs.m);
  std::string out =
      text("sequence ", sequence.name(), "\nM        ", inputs.m,
           sequence.is_chunked(inputs.m) ? text(", in chunks of at most ", sequence.max_rows()) : "", "\nmemory   ",
           sequence.arena_bytes(), " bytes of arena",
           sequence.is_chunked(inputs.m) ? text(", ", sequence.whole_bytes(inputs.m), " of this call") : "");
  for (const SequenceRun& run : runs) {
    const SequenceStep& step = sequence.steps()[run.step];
    out += text("\nstep ", run.step, run.step < 10 ? "   " : run.step < 100 ? "  " : " ", step.name);
    if (run.rows != inputs.m) out += text(" rows ", run.first, "..", run.first + run.rows);
    if (!step.op) {
      out += ": foreign";
      continue;
    }
    Call call;
    uint32_t arg = 0;
    if (!sequence.make_call(run, inputs, call, arg)) {
      out += text(": the view of ", step.op->args()[arg].name, " cannot be made of these sizes");
      continue;
    }
    Dispatch found;
    const Outcome outcome = Runtime::get().lookup(*step.op, call, found);
    if (outcome == Outcome::kBadCall) {
      try {
        step.op->complain(call);
      } catch (const Error& error) {
        out += text(": wrong   ", error.what());
        continue;
      }
    }
    if (outcome == Outcome::kEmpty || outcome == Outcome::kEmptyOutput) {
      out += ": nothing to launch: M is 0";
      continue;
    }
    if (outcome != Outcome::kLaunched) {
      out += ": miss    " + Runtime::describe(*step.op, call, outcome, found);
      continue;
    }
    found.row->launcher->explain(call, found.result);
    if (found.result.status == LaunchStatus::kLaunched)
      out += text(": row ", found.row->index, ", ", found.row->launcher->head().kernel);
    else
      out += ": miss    " + Runtime::describe(*step.op, call, Outcome::kRefused, found);
  }
  return out;
}

}  // namespace hdispatch
