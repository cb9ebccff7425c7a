// table_builder.cpp -- a bundle's modules, records and rows become one frozen table.
#include "table_builder.h"

#include <atomic>
#include <set>
#include <utility>

#include "check.h"

namespace hdispatch {
namespace {

/// A table's context is current while this lives. Not for the life of the builder: Python may keep one, in a traceback
/// say, and torch would continue in the wrong context.
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
                    arg, ", which ", op.name(), " does not have");
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
                    "row ", row, ": ", kernel, " reads integer ", arg, ", which ", op.name(), " does not have");
  for (const uint32_t arg : reads.floats)
    HD_CHECK_BUNDLE(arg < op.args().size() && op.args()[arg].kind == ArgKind::kFloat, "row ", row, ": ", kernel,
                    " reads float ", arg, ", which ", op.name(), " does not have");
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
  rows_.push_back(
      {make_key(op.id(), variant, static_cast<uint32_t>(k), static_cast<uint32_t>(n), static_cast<uint16_t>(bucket)),
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
  // A new row replaces the base's row of the same key: LaunchTable refuses a key twice.
  std::set<std::pair<uint64_t, uint64_t>> taken;
  for (const Row& row : rows_) taken.emplace(row.key.word0, row.key.word1);
  std::erase_if(base_, [&taken](const Row& row) { return taken.contains({row.key.word0, row.key.word1}); });
  rows_.insert(rows_.begin(), base_.begin(), base_.end());
  set_masks();
  made_->table = LaunchTable(rows_);
  // Shared only now: a builder that fails before this unloads its modules.
  for (const auto& [file, module] : modules_)
    if (!module.is_shared && !module.digest.empty())
      Runtime::get().share_module(made_->slot, module.digest, module.handle);
  return std::shared_ptr<const DeviceTable>(std::move(made_));
}

}  // namespace hdispatch
