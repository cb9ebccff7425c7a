// runtime.cpp -- serving calls, explaining misses, building tables.
#include "runtime.h"

#include <algorithm>
#include <set>
#include <tuple>

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

/// A table's context is current while this lives. Not as long as its builder: Python may keep that, in a traceback say,
/// and torch would go on in the wrong context.
class ContextScope {
 public:
  explicit ContextScope(const DeviceTable& table) : driver_(*table.driver) {
    HD_DRIVER(driver_, driver_.context_push(table.context), "cuCtxPushCurrent", "loading a bundle");
  }
  ~ContextScope() {
    CUcontext popped = nullptr;
    driver_.context_pop(&popped);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

std::string print_bucket(const Ladder& ladder, uint32_t bucket) {
  const bool last = bucket + 1 == ladder.size();
  return text(ladder.first(bucket), "..", last ? "" : std::to_string(ladder.edge(bucket)));
}

/// `M 9..16, max_seq_len 129..512`.
std::string print_buckets(const OpRows& rows, uint32_t bucket) {
  if (rows.second_arg < 0) return "M " + print_bucket(rows.ladder, bucket);
  const uint32_t width = rows.second.size();
  return text("M ", print_bucket(rows.ladder, bucket / width), ", ",
              rows.op->args()[static_cast<size_t>(rows.second_arg)].name, " ",
              print_bucket(rows.second, bucket % width));
}

std::string print_row(const OpRows& rows, const Row& row) {
  const Op& op = *rows.op;
  const auto size = [&op](uint32_t value, Symbol symbol) {
    return value || !op.has(symbol) ? std::to_string(value) : std::string("any");
  };
  return text("(", op.variants()[key_variant(row.key)].name, ", K=", size(key_k(row.key), kK),
              ", N=", size(key_n(row.key), kN), ", ", print_buckets(rows, key_bucket(row.key)), ")");
}

/// Elements of a workspace are bytes.
void set_workspace(const Op& op, Call& call, DeviceSlot slot, uintptr_t address, uint64_t bytes) {
  TensorView& view = call.tensors[op.workspace()];
  view.data = view.storage = address;
  view.sizes[0] = static_cast<int64_t>(bytes);
  view.strides[0] = 1;
  view.slot = slot;
  view.rank = 1;
  view.dtype = bytes ? DType::kUInt8 : DType::kNone;
}

/// Up to three rows of the op, same variant first, then by distance in K and N and in buckets, one per (variant, K, N).
/// Buckets of M count before those of the integer that has a ladder too.
std::string nearest_rows(const Op& op, const Call& call, const Dispatch& found) {
  std::vector<const Row*> rows;
  for (const Row& row : found.table->table.rows())
    if (key_op(row.key) == op.id()) rows.push_back(&row);
  const OpRows& found_rows = found.table->ops[op.id()];
  const uint32_t width = found_rows.second_arg < 0 ? 1 : found_rows.second.size();
  const auto distance = [&](const Row* row) {
    const auto apart = [](int64_t a, int64_t b) { return a < b ? b - a : a - b; };
    return std::make_tuple(key_variant(row->key) != key_variant(found.key),
                           apart(key_k(row->key), call.sizes[kK]) + apart(key_n(row->key), call.sizes[kN]),
                           apart(key_bucket(row->key) / width, key_bucket(found.key) / width),
                           apart(key_bucket(row->key) % width, key_bucket(found.key) % width));
  };
  std::stable_sort(rows.begin(), rows.end(), [&](const Row* a, const Row* b) { return distance(a) < distance(b); });
  if (rows.empty()) return "none: the bundle has no row of this op";
  std::string out;
  std::set<std::tuple<uint16_t, uint32_t, uint32_t>> named;
  for (const Row* row : rows) {
    if (!named.insert({key_variant(row->key), key_k(row->key), key_n(row->key)}).second) continue;
    out += (out.empty() ? "" : ", ") + print_row(found_rows, *row);
    if (named.size() == 3) break;
  }
  return out;
}

/// `max_seq_len=512` after a separator, where the op has an integer with a ladder.
std::string print_second(const Op& op, const Call& call, const char* separator) {
  if (op.second() < 0) return {};
  const auto arg = static_cast<size_t>(op.second());
  return text(separator, op.args()[arg].name, "=", call.integers[arg]);
}

std::string print_shape(const Op& op, const Call& call, const Dispatch& found) {
  return text(op.name(), "(", op.variants()[key_variant(found.key)].name, ", M=", call.sizes[kM],
              ", K=", call.sizes[kK], ", N=", call.sizes[kN], print_second(op, call, ", "), ")");
}

}  // namespace

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
  HD_CHECK_BUNDLE(!find_op(name), "op ", name, " is defined already");
  HD_CHECK_BUNDLE(ops_.size() < 0xffff, "too many ops");
  const auto id = static_cast<uint16_t>(ops_.size());
  ops_.push_back(std::make_unique<Op>(id, std::move(name), std::move(schema), std::move(args), std::move(variants),
                                      std::move(workspace)));
  return *ops_.back();
}

const Op* Runtime::find_op(std::string_view name) const noexcept {
  for (const auto& op : ops_)
    if (op->name() == name) return op.get();
  return nullptr;
}

Outcome Runtime::lookup(const Op& op, Call& call, Dispatch& found) const noexcept {
  uint16_t variant = 0;
  DeviceSlot slot = kNoSlot;
  const Bound bound = op.bind(call, variant, slot);
  if (HD_UNLIKELY(bound == Bound::kWrong || !op.has_memory(call))) return Outcome::kBadCall;
  if (HD_UNLIKELY(bound == Bound::kUnserved)) return Outcome::kUnserved;
  found.key = make_key(op.id(), variant, static_cast<uint32_t>(call.sizes[kK]), static_cast<uint32_t>(call.sizes[kN]),
                       0, kDeviceClass);
  if (HD_UNLIKELY(call.sizes[kM] == 0)) return op.writes_without_rows() ? Outcome::kEmptyOutput : Outcome::kEmpty;
  found.table = table(slot);
  const OpRows* rows = HD_LIKELY(found.table != nullptr) ? found.table->rows_of(op) : nullptr;
  if (HD_UNLIKELY(!rows)) return Outcome::kNoTable;
  uint32_t bucket = rows->ladder.bucket(call.sizes[kM]);
  if (HD_UNLIKELY(rows->second_arg >= 0)) bucket = rows->with_second(bucket, call.integers[rows->second_arg]);
  found.key.word0 |= uint64_t{bucket} << 32;
  found.row = found.table->find(*rows, found.key);
  return HD_LIKELY(found.row != nullptr) ? Outcome::kLaunched : Outcome::kNoRow;
}

/// The stream's memory, as a tensor after the arguments. Without the caller's lock where it has to be made: zeros are
/// waited for. `pop`: the table's context was pushed, and is popped again if this throws.
void Runtime::give_workspace(const Op& op, Call& call, const Dispatch& found, CUstream stream, const CallerLock* lock,
                             bool pop) {
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
  set_workspace(op, call, table.slot, address, bytes);
}

Outcome Runtime::dispatch(const Op& op, Call& call, StreamFn stream_of, Dispatch& found, const CallerLock* lock) const {
  const Outcome outcome = lookup(op, call, found);
  if (HD_UNLIKELY(outcome != Outcome::kLaunched)) {
    if (outcome == Outcome::kEmpty) op.counters().empty.fetch_add(1, std::memory_order_relaxed);
    return outcome;
  }
  const DeviceTable& table = *found.table;
  const bool pop = HD_UNLIKELY(needs_entering(table)) && enter(table);
  const CUstream stream = stream_of(table.slot);
  if (HD_UNLIKELY(op.workspace() >= 0)) give_workspace(op, call, found, stream, lock, pop);
  const Launcher& launcher = *found.row->launcher;
  const bool may_block =
      lock && !(launcher.only_launches() && LaunchQueue::has_room(*table.driver, table.slot, stream));
  void* const released = may_block ? lock->release() : nullptr;
  found.result = launcher.launch(call, stream);
  if (HD_UNLIKELY(is_failure(found.result.status)))
    found.result = launch_in_context(table, launcher, call, stream, found.result);
  if (HD_UNLIKELY(pop)) {
    CUcontext popped = nullptr;
    table.driver->context_pop(&popped);
  }
  if (may_block) lock->acquire(released);
  if (HD_UNLIKELY(found.result.status != LaunchStatus::kLaunched)) return Outcome::kRefused;
  op.counters().hits.fetch_add(1, std::memory_order_relaxed);
  return Outcome::kLaunched;
}

std::string Runtime::reason(Outcome outcome, const Dispatch& found) {
  switch (outcome) {
    case Outcome::kNoTable:
      return "no table";
    case Outcome::kNoRow:
      return "no row";
    case Outcome::kUnserved:
      return "no variant";
    case Outcome::kRefused:
      return found.row->launcher->reason(found.result);
    default:
      return "none";
  }
}

std::string Runtime::describe(const Op& op, const Call& call, Outcome outcome, const Dispatch& found) {
  if (outcome == Outcome::kUnserved)
    return text(op.name(), ": no variant has these values: ", op.unserved(call),
                "; leave strict mode to use the fallback");
  const std::string shape = print_shape(op, call, found);
  switch (outcome) {
    case Outcome::kNoTable:
      return shape + ": no bundle with this op is loaded for the tensors' device; call hdispatch.load(DIR)";
    case Outcome::kNoRow:
      return text(shape, ": the launch table has no row for it; nearest rows: ", nearest_rows(op, call, found),
                  "; build a bundle with this shape, or leave strict mode to use the fallback");
    case Outcome::kRefused:
      if (is_failure(found.result.status))
        found.row->launcher->raise(found.result,
                                   text(shape, ", row ", found.row->index, ", ", found.row->launcher->head().kernel));
      return text(shape, ": ", found.row->launcher->describe(found.result, call), " of row ", found.row->index, " ",
                  print_row(found.table->ops[op.id()], *found.row));
    default:
      return shape;
  }
}

std::string Runtime::explain(const Op& op, Call& call) const {
  Dispatch found;
  const Outcome outcome = lookup(op, call, found);
  if (outcome == Outcome::kBadCall) op.complain(call);
  if (outcome == Outcome::kUnserved) return "miss     " + describe(op, call, outcome, found);
  std::string out =
      text("op       ", op.name(), " (id ", op.id(), ")\nvariant  ", op.variants()[key_variant(found.key)].name,
           "\nsizes    M=", call.sizes[kM], " K=", call.sizes[kK], " N=", call.sizes[kN], print_second(op, call, " "));
  if (outcome == Outcome::kEmpty) return out + "\nnothing to launch: M is 0";
  if (outcome == Outcome::kEmptyOutput)
    return out + "\nnothing to launch: M is 0; the fallback writes what has no rows";
  if (outcome == Outcome::kNoTable) return out + "\nmiss     " + describe(op, call, outcome, found);
  const uint32_t bucket = key_bucket(found.key);
  out += text("\nbucket   ", bucket, ": ", print_buckets(found.table->ops[op.id()], bucket), "\nkey      ",
              Hex{found.key.word0}, " ", Hex{found.key.word1});
  if (outcome == Outcome::kNoRow) return out + "\nmiss     " + describe(op, call, outcome, found);
  const Launcher& launcher = *found.row->launcher;
  const RecordHead& record = launcher.head();
  out += text("\nrow      ", found.row->index, ": ", record.kernel, "\nvalid    ", record.m_min,
              " <= M <= ", record.m_max);
  for (const Guard& guard : record.guards) {
    int64_t holds = 0;
    const bool ok = guard.expr.evaluate(call, holds) && holds;
    out += text("\nguard    ", guard.text, ok ? ": holds" : ": FAILS");
  }
  for (const uint8_t arg : launcher.head().early)
    out += text("\nearly    ", op.args()[arg].name, " may be read before the wait");
  if (op.workspace() >= 0) {
    const uint64_t bytes = op.variants()[key_variant(found.key)].workspace_bytes;
    out += text("\nworkspace ", bytes, " bytes of the stream's");
    set_workspace(op, call, found.table->slot, 0, bytes);  // whatever address it will have is as aligned
  }
  const std::string launch = launcher.explain(call, found.result);
  if (found.result.status != LaunchStatus::kLaunched)
    return out + "\nfallback " + describe(op, call, Outcome::kRefused, found);
  return text(out, "\n", launch, ", driver \"", found.table->driver->name, "\"");
}

namespace {

ForkMutex tables_mutex;  // guards which tables are published, retired, and the modules that they share

}  // namespace

void Runtime::replace(DeviceSlot slot, std::shared_ptr<const DeviceTable> table) {
  HD_CHECK(slot < kMaxSlots, "slot ", slot);
  std::vector<Retired> left;  // freed without the lock
  const std::lock_guard lock(tables_mutex);
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
  modules_.try_emplace({slot, digest}, module);
}

// ---- TableBuilder ----

namespace {

constexpr const char* kPublished = "the builder's table is published";

/// A record may only read what every call of the row's variant has: anything else would be whatever was on the stack.
void check_reads(const Op& op, const Variant& variant, const Launcher& launcher, uint32_t row) {
  const std::string& kernel = launcher.head().kernel;
  const auto check_tensor = [&](uint32_t arg) {
    if (op.workspace() >= 0 && static_cast<int>(arg) == op.workspace()) {
      HD_CHECK_BUNDLE(variant.workspace_bytes, "row ", row, ": ", kernel, " reads ", op.workspace_name(),
                      ", of which variant ", variant.name, " asks for nothing");
      return;
    }
    HD_CHECK_BUNDLE(arg < op.args().size() && op.args()[arg].is_tensor(), "row ", row, ": ", kernel, " reads tensor ",
                    arg, ", which ", op.name(), " has not");
    HD_CHECK_BUNDLE(variant.signature.get(arg), "row ", row, ": ", kernel, " reads ", op.args()[arg].name,
                    ", which is None in variant ", variant.name);
  };
  const Reads reads = launcher.reads();
  for (const uint32_t arg : reads.tensors) check_tensor(arg);
  for (const uint8_t arg : launcher.head().early) check_tensor(arg);
  for (const auto& [arg, dimension] : reads.dimensions) {
    check_tensor(arg);
    if (arg == op.args().size()) continue;  // the workspace, of one dimension
    HD_CHECK_BUNDLE(dimension < op.args()[arg].dims.size(), "row ", row, ": ", kernel, " reads dimension ", dimension,
                    " of ", op.args()[arg].name, ", which has rank ", op.args()[arg].dims.size());
  }
  for (const uint32_t arg : reads.integers)
    HD_CHECK_BUNDLE(arg < op.args().size() && !op.args()[arg].is_tensor() && op.args()[arg].kind != ArgKind::kFloat,
                    "row ", row, ": ", kernel, " reads integer ", arg, ", which ", op.name(), " has not");
  for (const uint32_t arg : reads.floats)
    HD_CHECK_BUNDLE(arg < op.args().size() && op.args()[arg].kind == ArgKind::kFloat, "row ", row, ": ", kernel,
                    " reads float ", arg, ", which ", op.name(), " has not");
}

}  // namespace

TableBuilder::TableBuilder(int device, int device_count, bool pdl, bool early_reads)
    : driver_(device < 0 ? null_driver() : cuda_driver()),
      pdl_(pdl),
      early_reads_(early_reads),
      made_(std::make_unique<DeviceTable>()) {
  static std::atomic<uint64_t> generations{0};
  made_->driver = &driver_;
  made_->generation = ++generations;
  made_->slot = static_cast<DeviceSlot>(device + 1);
  HD_CHECK_BUNDLE(made_->slot < kMaxSlots, "device ", device, "; at most ", kMaxSlots - 1, " are supported");
  if (device < 0) return;
  const std::string what = text("loading a bundle on device ", device);
  CUdevice handle = 0;
  HD_DRIVER(driver_, driver_.init(0), "cuInit", what);
  HD_DRIVER(driver_, driver_.device_get(&handle, device), "cuDeviceGet", what);
  HD_DRIVER(driver_, driver_.primary_context_retain(&made_->context, handle), "cuDevicePrimaryCtxRetain", what);
  made_->only_device = device_count <= 1;
}

TableBuilder::~TableBuilder() {
  // Only what no finished table has is unloaded: a captured graph may hold the rest.
  if (!made_ || driver_.context_push(made_->context) != kCudaSuccess) return;
  for (const auto& [file, module] : modules_)
    if (!module.is_shared) driver_.module_unload(module.handle);
  CUcontext popped = nullptr;
  driver_.context_pop(&popped);
}

void TableBuilder::extend(std::shared_ptr<const DeviceTable> base) {
  HD_CHECK(made_, kPublished);
  HD_CHECK_BUNDLE(base->slot == made_->slot, "a table of device ", static_cast<int>(base->slot) - 1,
                  " cannot become one of device ", static_cast<int>(made_->slot) - 1);
  made_->ops = base->ops;
  base_ = base->table.rows();
  made_->base = std::move(base);
}

void TableBuilder::set_ladder(const Op& op, const std::vector<int64_t>& edges, const std::vector<int64_t>& second) {
  HD_CHECK(made_, kPublished);
  HD_CHECK_BUNDLE(second.empty() == (op.second() < 0), op.name(), ": ", second.size(), " edges of a second ladder; ",
                  op.second() < 0 ? "it has no integer argument with one"
                                  : op.args()[static_cast<size_t>(op.second())].name + " has one");
  if (made_->ops.size() <= op.id()) made_->ops.resize(op.id() + 1u);
  OpRows& rows = made_->ops[op.id()];
  rows.op = &op;
  rows.ladder = Ladder(edges);
  if (op.second() >= 0) rows.second = Ladder(second);
  rows.second_arg = op.second();
}

void TableBuilder::add_module(const std::string& file, std::span<const char> image, const std::string& digest) {
  HD_CHECK(made_, kPublished);
  HD_CHECK_BUNDLE(!modules_.contains(file), file, " is added twice");
  if (!digest.empty())
    if (const CUmodule shared = Runtime::get().find_module(made_->slot, digest)) {
      modules_[file] = {shared, digest, true};
      return;
    }
  const ContextScope scope(*made_);
  CUmodule module = nullptr;
  HD_DRIVER(driver_, driver_.module_load(&module, image.data()), "cuModuleLoadData", file);
  modules_[file] = {module, digest, false};
}

CUfunction TableBuilder::find_function(const Cubin& cubin, const std::vector<uint32_t>& param_bytes) {
  const auto module = modules_.find(cubin.file);
  HD_CHECK_BUNDLE(module != modules_.end(), cubin.file, " is used by a record but was not added");
  if (&driver_ == &null_driver()) {
    made_->null_functions.push_back(
        std::make_unique<NullFunction>(NullFunction{cubin.function, cubin.file, param_bytes}));
    return reinterpret_cast<CUfunction>(made_->null_functions.back().get());
  }
  CUfunction function = nullptr;
  HD_DRIVER(driver_, driver_.module_function(&function, module->second.handle, cubin.function.c_str()),
            "cuModuleGetFunction", cubin.file + " " + cubin.function);
  return function;
}

void TableBuilder::add_library(const std::string& file, std::span<const char> image) {
  HD_CHECK(made_, kPublished);
  HD_CHECK_BUNDLE(!libraries_.contains(file), file, " is added twice");
  libraries_[file] = &driver_ == &null_driver() ? nullptr : &FfiLibrary::open(file, image);
}

uint32_t TableBuilder::add_launcher(std::unique_ptr<Launcher> launcher) {
  if (pdl_) launcher->track(made_->slot);
  made_->launchers.push_back(std::move(launcher));
  return static_cast<uint32_t>(made_->launchers.size() - 1);
}

uint32_t TableBuilder::add_record(Record record) {
  HD_CHECK(made_, kPublished);
  const ContextScope scope(*made_);
  const auto find = [this](const Cubin& cubin, const std::vector<uint32_t>& param_bytes) {
    return find_function(cubin, param_bytes);
  };
  const bool pdl = starts_early(record);
  return add_launcher(std::make_unique<CubinLauncher>(std::move(record), driver_, find, pdl));
}

uint32_t TableBuilder::add_record(FfiRecord record) {
  HD_CHECK(made_, kPublished);
  const auto library = libraries_.find(record.file);
  HD_CHECK_BUNDLE(library != libraries_.end(), record.file, " is used by a record but was not added");
  if (!library->second) {
    made_->null_functions.push_back(std::make_unique<NullFunction>(NullFunction{record.function, record.file, {}}));
    return add_record(std::move(record), {null_function, made_->null_functions.back().get(), nullptr, nullptr});
  }
  const ContextScope scope(*made_);
  const FfiFunction function = library->second->find(record.function, static_cast<int>(made_->slot) - 1, driver_);
  return add_record(std::move(record), function);
}

uint32_t TableBuilder::add_record(FfiRecord record, const FfiFunction& function) {
  HD_CHECK(made_, kPublished);
  const bool pdl = starts_early(record);
  return add_launcher(std::make_unique<FfiLauncher>(std::move(record), function, made_->slot, pdl));
}

void TableBuilder::add_row(const Op& op, uint16_t variant, int64_t k, int64_t n, uint32_t bucket, uint32_t record) {
  HD_CHECK(made_, kPublished);
  const auto index = static_cast<uint32_t>(base_.size() + rows_.size());
  HD_CHECK_BUNDLE(record < made_->launchers.size(), "row ", index, " names record ", record, "; there are ",
                  made_->launchers.size());
  HD_CHECK_BUNDLE(variant < op.variants().size(), "row ", index, ": ", op.name(), " has no variant ", variant);
  HD_CHECK_BUNDLE(fits(k, n), "row ", index, ": K = ", k, ", N = ", n, "; sizes are below 2^32");
  HD_CHECK_BUNDLE(op.id() < made_->ops.size() && bucket < made_->ops[op.id()].buckets(), "row ", index, ": ", op.name(),
                  " has no bucket ", bucket);
  check_reads(op, op.variants()[variant], *made_->launchers[record], index);
  rows_.push_back({make_key(op.id(), variant, static_cast<uint32_t>(k), static_cast<uint32_t>(n),
                            static_cast<uint16_t>(bucket), kDeviceClass),
                   made_->launchers[record].get(), index});
}

/// Which sizes the rows of each op leave open: a probe for each pattern that occurs, the exact one first.
void TableBuilder::set_masks() {
  constexpr uint64_t kLow = 0xffffffff;
  constexpr uint64_t kMasks[] = {~0ull, kLow, ~kLow, 0};  // exact; any N; any K; any of both
  for (OpRows& rows : made_->ops) rows.mask_count = 0;
  std::vector<uint32_t> patterns(made_->ops.size());
  for (const Row& row : rows_) {
    const Op& op = *made_->ops[key_op(row.key)].op;
    const uint32_t any_n = !key_n(row.key) && op.has(kN);
    const uint32_t any_k = !key_k(row.key) && op.has(kK);
    patterns[key_op(row.key)] |= 1u << (any_n + 2 * any_k);
  }
  for (size_t op = 0; op < patterns.size(); ++op)
    for (uint32_t i = 0; i < 4; ++i)
      if (patterns[op] >> i & 1) made_->ops[op].masks[made_->ops[op].mask_count++] = kMasks[i];
}

std::shared_ptr<const DeviceTable> TableBuilder::finish() {
  HD_CHECK(made_, kPublished);
  std::set<std::pair<uint64_t, uint64_t>> taken;
  for (const Row& row : rows_) taken.emplace(row.key.word0, row.key.word1);
  std::erase_if(base_, [&taken](const Row& row) { return taken.contains({row.key.word0, row.key.word1}); });
  rows_.insert(rows_.begin(), base_.begin(), base_.end());
  set_masks();
  made_->table = LaunchTable(rows_);
  for (const auto& [file, module] : modules_)
    if (!module.is_shared && !module.digest.empty())
      Runtime::get().share_module(made_->slot, module.digest, module.handle);
  return std::shared_ptr<const DeviceTable>(std::move(made_));
}

}  // namespace hdispatch
