// table_builder.h -- makes a device's table of a bundle: loads its code, checks its rows, freezes it.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cubin_launcher.h"
#include "device_table.h"
#include "runtime.h"

namespace hdispatch {

/// Makes one device's table. All or nothing: until `publish` nothing is served, and a builder that is abandoned before
/// `finish` unloads.
class TableBuilder {
 public:
  /// `device` is a CUDA device index, or -1 for the null driver, which serves CPU tensors. `pdl` = false: plain
  /// launches. `early_reads` = false: plain launches of what reads before it waits, so that it never does.
  TableBuilder(int device, int device_count, bool pdl, bool early_reads = true);
  ~TableBuilder();
  TableBuilder(const TableBuilder&) = delete;
  TableBuilder& operator=(const TableBuilder&) = delete;

  /// Begins with the ladders and rows of a finished table of the same device; rows of the same key take their place.
  void extend(std::shared_ptr<const DeviceTable> base);

  /// `second`: edges of the op's integer argument with a ladder; empty where it has none.
  void set_ladder(const Op& op, const std::vector<int64_t>& edges, const std::vector<int64_t>& second = {});
  /// Loads a cubin's image under its file name. `digest` names its content: the module of a finished table with the
  /// same one is shared. Empty: it is loaded for this table alone.
  void add_module(const std::string& file, std::span<const char> image, const std::string& digest = {});
  /// Opens a shared library's image under its file name; the null driver only notes it.
  void add_library(const std::string& file, std::span<const char> image);
  uint32_t add_record(Record record);
  /// A function of a library that was added.
  uint32_t add_record(FfiRecord record);
  /// A function of this process. It is called with the null driver too.
  uint32_t add_record(FfiRecord record, const FfiFunction& function);
  void add_row(const Op& op, uint16_t variant, int64_t k, int64_t n, uint32_t bucket, uint32_t record);
  /// The table, frozen, but not published yet.
  std::shared_ptr<const DeviceTable> finish();
  void publish() { Runtime::get().publish(finish()); }

 private:
  uint32_t add_launcher(std::unique_ptr<Launcher> launcher);
  CUfunction find_function(const Cubin& cubin, const std::vector<uint32_t>& param_bytes);
  void set_masks();

  const Driver& driver_;
  bool pdl_;
  bool early_reads_;
  std::unique_ptr<DeviceTable> made_;
  struct Module {
    CUmodule handle;
    std::string digest;
    bool is_shared;  ///< with a table that is finished: not ours to unload
  };
  bool starts_early(const RecordHead& record) const noexcept { return pdl_ && (early_reads_ || record.early.empty()); }
  std::map<std::string, Module> modules_;
  std::map<std::string, const FfiLibrary*> libraries_;  ///< null with the null driver
  std::vector<Row> base_;
  std::vector<Row> rows_;
};

}  // namespace hdispatch
