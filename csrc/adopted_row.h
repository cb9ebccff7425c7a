// adopted_row.h -- one compiled kernel of somebody else's, ready to launch: function, configuration, parameters.
//
// Made from what Triton compiled and launched for the first call of a key (adopted_kernel.h), then frozen. A call
// brings its arguments as 64-bit values; the row knows which of them the code takes, and as what.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "launch_place.h"

namespace hdispatch {

/// What becomes of a value before the driver copies its low bytes. Floats come as doubles, integers as 64 bits.
enum class Conversion : uint8_t { kNone, kFloatToF32, kFloatToBF16, kIntToF32, kIntToBF16, kIntToF64 };

/// One parameter of the code.
struct AdoptedParam {
  uint16_t argument = 0;  ///< index of the value
  uint8_t bytes = 8;
  Conversion conversion = Conversion::kNone;
};

/// What Triton says of the code.
struct AdoptedCode {
  std::string name;
  CUfunction function = nullptr;  ///< of the driver; null with the null driver
  std::vector<AdoptedParam> params;
  uint32_t num_warps = 0;
  uint32_t shared_bytes = 0;
  uint32_t cluster = 1;
  bool cooperative = false;
  bool pdl = false;
  bool releases = false;  ///< its dependents, before it ends: what it writes is not known to have been written
};

class AdoptedRow {
 public:
  static constexpr uint32_t kMaxParams = 512;  ///< 4 KiB of parameters of 8 bytes: what every driver takes

  /// Throws kBundle if the loaded code does not take these parameters, or takes too many.
  AdoptedRow(const AdoptedCode& code, const LaunchPlace& place);
  AdoptedRow(const AdoptedRow&) = delete;
  AdoptedRow& operator=(const AdoptedRow&) = delete;

  /// Whether a launch of this thread will not block: the caller may then keep its lock.
  bool has_room(CUstream stream) const noexcept;

  /// Launches with the values, which it converts in place; each grid dimension is at least 1.
  CUresult launch(uint64_t* values, const std::array<uint32_t, 3>& grid, CUstream stream) const noexcept;

  /// ns per launch of the bare driver call, in a loop here: the floor that launches are measured against.
  double bench_ns(uint64_t* values, const std::array<uint32_t, 3>& grid, CUstream stream, uint32_t count) const;

  const LaunchPlace& place() const noexcept { return place_; }
  uint32_t cluster() const noexcept { return cluster_; }
  std::string describe() const;

 private:
  struct Converted {
    uint16_t argument;
    Conversion conversion;
  };

  /// Fills the parameters' addresses; `values` are converted in place.
  void fill(uint64_t* values, void** params) const noexcept;
  CUresult put(void** params, const std::array<uint32_t, 3>& grid, CUstream stream) const noexcept;
  void check_params(const AdoptedCode& code) const;

  LaunchPlace place_;
  CUfunction function_ = nullptr;
  uint32_t cluster_ = 1;
  bool releases_ = false;
  std::vector<uint16_t> arguments_;  ///< of each parameter
  std::vector<Converted> converted_;
  LaunchConfig config_{};
  std::array<LaunchAttribute, 4> attributes_{};
  std::unique_ptr<NullFunction> null_function_;
};

}  // namespace hdispatch
