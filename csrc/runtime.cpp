// runtime.cpp -- serving calls from published tables.
//
// `dispatch` is the hot path: no lock, no allocation, no message. What refuses a call leaves an Outcome and a Dispatch;
// explain.cpp puts them into words, if somebody asks.
#include "runtime.h"

#include <algorithm>
#include <iterator>
#include <mutex>

#include "check.h"
#include "launch_queue.h"
#include "workspace.h"

namespace hdispatch {
namespace {

/// Launches again what failed, if another context than the table's is current: somebody changed it since this thread's
/// last launch, and the driver refuses a function of one context in another (CUDA_ERROR_INVALID_HANDLE).
HD_COLD LaunchResult launch_in_context(const DeviceTable& table, const Launcher& launcher, const Call& call,
                                       CUstream stream, const LaunchResult& failed) noexcept {
  CUcontext current = nullptr;
  table.driver->context_get(&current);
  if (current == table.context || table.driver->context_push(table.context) != kCudaSuccess) return failed;
  forget_context();
  const LaunchResult result = launcher.launch(call, stream);
  table.driver->context_pop(&current);
  return result;
}

}  // namespace

/// `enter` says whether the driver's stack of contexts, which is this thread's, has one more: only then is it popped.
LaunchContext::LaunchContext(const DeviceTable& table) noexcept : table_(table), pop_(enter(table)) {}

LaunchContext::~LaunchContext() {
  CUcontext popped = nullptr;
  if (pop_) table_.driver->context_pop(&popped);
}

Runtime& Runtime::get() {
  // Never destroyed: threads may still launch while the process ends.
  static Runtime* runtime = new Runtime;
  return *runtime;
}

const Op& Runtime::define_op(std::string name, std::string schema, std::vector<ArgSpec> args,
                             std::vector<Variant> variants, std::string workspace) {
  // One op for a name for ever: keys have its id, doors and torch's dispatcher its address.
  HD_CHECK_BUNDLE(!find_op(name), "op ", name, " is defined already");
  // No id of all ones: that is what an empty slot of a table has (launch_table.h).
  HD_CHECK_BUNDLE(ops_.size() < 0xffff, "too many ops");
  const auto id = static_cast<uint16_t>(ops_.size());
  ops_.push_back(std::make_unique<Op>(id, std::move(name), std::move(schema), std::move(args), std::move(variants),
                                      std::move(workspace)));
  return *ops_.back();
}

const Op* Runtime::find_op(std::string_view name) const noexcept {
  // Linear: doors keep their op, so that no call asks.
  for (const auto& op : ops_)
    if (op->name() == name) return op.get();
  return nullptr;
}

Outcome Runtime::lookup(const Op& op, Call& call, Dispatch& found) const noexcept {
  uint16_t variant = 0;
  DeviceSlot slot = kNoSlot;
  // A wrong call is an error whether or not a bundle is loaded: it must not begin to fail the day that one is.
  const Bound bound = op.bind(call, variant, slot);
  if (HD_UNLIKELY(bound == Bound::kWrong || !op.has_memory(call))) return Outcome::kBadCall;
  if (HD_UNLIKELY(bound == Bound::kUnserved)) return Outcome::kUnserved;
  // Before the table is known, which has the ladder: a miss without a table is described by its key too.
  found.key = make_key(op.id(), variant, static_cast<uint32_t>(call.sizes[kK]), static_cast<uint32_t>(call.sizes[kN]),
                       /*bucket=*/0);
  // Before the table is asked: an empty call needs none, and no kernel takes a grid of 0 blocks.
  if (HD_UNLIKELY(call.sizes[kM] == 0)) return op.writes_without_rows() ? Outcome::kEmptyOutput : Outcome::kEmpty;
  // Asked of the tensors' device, not of torch's current one, which may be another.
  found.table = table(slot);
  const OpRows* rows = HD_LIKELY(found.table != nullptr) ? found.table->rows_of(op) : nullptr;
  if (HD_UNLIKELY(!rows)) return Outcome::kNoTable;
  // The ladder is the table's: another bundle of the same op may have other buckets.
  uint32_t bucket = rows->ladder.bucket(call.sizes[kM]);
  if (HD_UNLIKELY(rows->second_arg >= 0)) bucket = rows->with_second(bucket, call.integers[rows->second_arg]);
  found.key = with_bucket(found.key, bucket);
  found.row = found.table->find(*rows, found.key);
  return HD_LIKELY(found.row != nullptr) ? Outcome::kLaunched : Outcome::kNoRow;
}

/// The stream's memory, as a tensor after the arguments. Without the caller's lock where it has to be made: zeros are
/// waited for. `pop`: the table's context was pushed, and is popped again if this throws.
void Runtime::give_workspace(const Op& op, Call& call, const Dispatch& found, CUstream stream, const CallerLock* lock,
                             bool pop) {
  // Some variants ask for none; their call then has an absent tensor there, not what an earlier call left.
  const uint64_t bytes = op.variants()[key_variant(found.key)].workspace_bytes;
  const DeviceTable& table = *found.table;
  uintptr_t address = 0;
  if (bytes) {
    const bool may_block = lock && !Workspace::has(table.slot, stream, bytes);
    void* const released = may_block ? lock->release() : nullptr;
    try {
      address = Workspace::get(*table.driver, table.slot, stream, bytes);
    } catch (...) {
      CUcontext popped = nullptr;
      if (pop) table.driver->context_pop(&popped);
      if (may_block) lock->acquire(released);
      throw;
    }
    if (may_block) lock->acquire(released);
  }
  op.set_workspace(call, table.slot, address, bytes);
}

Outcome Runtime::dispatch(const Op& op, Call& call, StreamFn stream_of, Dispatch& found, const CallerLock* lock) const {
  const Outcome outcome = lookup(op, call, found);
  if (HD_UNLIKELY(outcome != Outcome::kLaunched)) {
    if (outcome == Outcome::kEmpty) op.counters().empty.fetch_add(1, std::memory_order_relaxed);
    return outcome;
  }
  const DeviceTable& table = *found.table;
  // A thread_local is compared with the table's context, so that the driver is not asked on every launch.
  const bool pop = HD_UNLIKELY(needs_entering(table)) && enter(table);
  // Torch has a current stream per device: that of the table's, whichever device torch is on.
  const CUstream stream = stream_of(table.slot);
  if (HD_UNLIKELY(op.workspace() >= 0)) give_workspace(op, call, found, stream, lock, pop);
  const Launcher& launcher = *found.row->launcher;
  const bool may_block =
      lock && !(launcher.only_launches() && LaunchQueue::has_room(*table.driver, table.slot, stream));
  // The lock goes only where the launch may block: for the GIL that costs 80 to 160 ns (launch_queue.h).
  void* const released = may_block ? lock->release() : nullptr;
  found.result = launcher.launch(call, stream);
  if (HD_UNLIKELY(is_failure(found.result.status)))
    found.result = launch_in_context(table, launcher, call, stream, found.result);
  if (HD_UNLIKELY(pop)) {
    CUcontext popped = nullptr;
    table.driver->context_pop(&popped);
  }
  // Last: this thread may end here, when the interpreter does, and the context must be popped by then.
  if (may_block) lock->acquire(released);
  // A guard that does not hold, or a launch that failed: `miss` tells them apart.
  if (HD_UNLIKELY(found.result.status != LaunchStatus::kLaunched)) return Outcome::kRefused;
  // Nothing is ordered by a counter; a relaxed add is one instruction.
  op.counters().hits.fetch_add(1, std::memory_order_relaxed);
  return Outcome::kLaunched;
}

namespace {

ForkMutex tables_mutex;  // guards which tables are published, retired, and the modules that they share

}  // namespace

/// Every replacement also frees what earlier ones have left behind: no thread of ours waits for calls to end.
void Runtime::replace(DeviceSlot slot, std::shared_ptr<const DeviceTable> table) {
  HD_CHECK(slot < kMaxSlots, "slot ", slot);
  std::vector<Retired> left;  // freed without the lock: a table has thousands of rows
  const std::lock_guard lock(tables_mutex);
  // The same table again, or none where there is none, only frees what is left.
  if (owners_[slot] != table) {
    tables_[slot].store(table.get(), std::memory_order_release);
    owners_[slot].swap(table);
    if (table) retired_.push_back({std::move(table), TableReader::advance()});
  }
  const auto first = std::partition(retired_.begin(), retired_.end(),
                                    [](const Retired& each) { return !TableReader::left(each.epoch); });
  std::move(first, retired_.end(), std::back_inserter(left));
  retired_.erase(first, retired_.end());
}

void Runtime::publish(std::shared_ptr<const DeviceTable> table) {
  const DeviceSlot slot = table->slot;
  replace(slot, std::move(table));
}

void Runtime::withdraw(DeviceSlot slot) { replace(slot, nullptr); }

CUmodule Runtime::find_module(DeviceSlot slot, const std::string& digest) const {
  const std::lock_guard lock(tables_mutex);
  const auto found = modules_.find({slot, digest});
  return found == modules_.end() ? nullptr : found->second;
}

void Runtime::share_module(DeviceSlot slot, const std::string& digest, CUmodule module) {
  const std::lock_guard lock(tables_mutex);
  // Of two that were loaded at once the first is shared; the other one's table keeps it.
  modules_.try_emplace({slot, digest}, module);
}

}  // namespace hdispatch
