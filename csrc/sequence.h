// sequence.h -- what a sequence of launches is: steps over slots, constants and temporaries; where temporaries lie.
//
// Described once, then frozen: any number of threads may read it. What depends on M and on what a call gives is made by
// sequence_plan.h. A step is a call of one of our ops, or a foreign one, which only the door can make.
//
// Temporaries live in an arena for `max_rows` rows, at offsets such that two of them share bytes only where one is
// needed no more before the other is. A call of more rows runs steps that work by rows in chunks. What crosses a step
// that does not, or goes from one run of such steps to another, is whole: it has all rows, in memory of that call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "call.h"
#include "op.h"

namespace hdispatch {

/// A size or a position in elements: per_row * M + constant.
struct RowDim {
  int64_t per_row = 0;
  int64_t constant = 0;
  bool any = false;  ///< of a slot: any size; nothing else is set

  int64_t at(int64_t m) const noexcept { return per_row * m + constant; }
};

/// How a view is made of a tensor; the same as the function of torch with that name.
struct ViewStep {
  enum class Kind : uint8_t { kNarrow, kReshape, kTranspose };
  Kind kind = Kind::kNarrow;
  uint32_t first = 0;         ///< kNarrow, kTranspose: dimension
  uint32_t second = 0;        ///< kTranspose: dimension
  RowDim start;               ///< kNarrow
  RowDim length;              ///< kNarrow
  std::vector<RowDim> sizes;  ///< kReshape
};

/// A tensor of a step that is no constant: a slot or a temporary, or a view of one.
struct StepTensor {
  uint32_t arg = 0;
  bool is_temp = false;
  uint32_t index = 0;  ///< of the slot or the temporary
  std::vector<ViewStep> views;
};

/// An integer of a step that is given per call.
struct StepInteger {
  uint32_t arg = 0;
  uint32_t slot = 0;
};

struct SequenceStep {
  const Op* op = nullptr;  ///< null: foreign
  std::string name;
  bool by_rows = false;  ///< each row of what it writes depends on that row of what it reads, and on constants
  Call call{};           ///< of an op: scalars, constants and what is absent; the rest is put in for each plan
  std::vector<StepTensor> tensors;
  std::vector<StepInteger> integers;
};

struct SequenceSlot {
  std::string name;
  bool is_tensor = true;  ///< else an integer
  bool has_shape = true;  ///< false: any rank and sizes; foreign steps alone take it
  std::vector<RowDim> dims;
  DType dtype = DType::kNone;
  bool is_written = false;
  bool is_optional = false;
};

struct SequenceTemp {
  std::vector<RowDim> dims;
  DType dtype = DType::kNone;
};

/// One step on some of the rows.
struct SequenceRun {
  uint32_t step = 0;
  int64_t first = 0;
  int64_t rows = 0;
};

/// What is given per call, and where temporaries lie. Owned by the caller.
struct SequenceInputs {
  const TensorView* slots = nullptr;  ///< by slot; of integers nothing is set
  const int64_t* integers = nullptr;  ///< by slot
  const uintptr_t* temps = nullptr;   ///< addresses by temporary: Sequence::addresses
  int64_t m = 0;
  DeviceSlot device = kNoSlot;
};

class Sequence {
 public:
  static constexpr uintptr_t kAlignment = 256;  ///< of temporaries: enough for TMA and vector loads
  static constexpr int64_t kMaxRows = int64_t{1} << 31;
  static constexpr int64_t kMaxBytes = int64_t{1} << 48;  ///< of a temporary: sums of them stay far from 64 bits
  static constexpr int64_t kChunkRows = 16;  ///< chunks have a multiple of it: 8 bytes a row are 128 at the next one

  /// Throws kCaller for a description that cannot be run; `name` begins every message.
  Sequence(std::string name, std::vector<SequenceSlot> slots, std::vector<SequenceTemp> temps,
           std::vector<SequenceStep> steps, int64_t max_rows);

  /// M of a call, from the sizes of its slots. Throws kCaller for sizes that are not those declared, or dtypes.
  int64_t check(const TensorView* slots) const;

  /// All steps in the order in which they are made: whole for up to `max_rows`, else those by rows in chunks.
  std::vector<SequenceRun> order(int64_t m) const;

  /// The tensor that a step has on some rows, as a plan for it sees it. False: its view cannot be made of the sizes.
  bool view(const StepTensor& tensor, const SequenceRun& run, const SequenceInputs& inputs,
            TensorView& out) const noexcept;
  /// A step's call on some rows, of one of our ops. False: `arg` is the argument whose view cannot be made.
  bool make_call(const SequenceRun& run, const SequenceInputs& inputs, Call& call, uint32_t& arg) const noexcept;

  /// Bytes of the arena, for `max_rows` rows.
  uintptr_t arena_bytes() const noexcept { return arena_bytes_; }
  /// Bytes of the temporaries that are whole, in a call of more than `max_rows`; 0 of fewer.
  uintptr_t whole_bytes(int64_t m) const;
  /// Where each temporary lies, given the addresses of `arena_bytes` and of `whole_bytes(m)`.
  std::vector<uintptr_t> addresses(int64_t m, uintptr_t arena, uintptr_t whole) const;

  bool is_chunked(int64_t m) const noexcept { return m > max_rows_; }
  const std::string& name() const noexcept { return name_; }
  const std::vector<SequenceSlot>& slots() const noexcept { return slots_; }
  const std::vector<SequenceTemp>& temps() const noexcept { return temps_; }
  const std::vector<SequenceStep>& steps() const noexcept { return steps_; }
  int64_t max_rows() const noexcept { return max_rows_; }
  /// "sequence NAME, step 3 (OP): "
  std::string place(uint32_t step) const;

 private:
  struct Life {  ///< in which steps a temporary matters, both ends included
    uint32_t first = ~0u;
    uint32_t last = 0;
  };
  void check_step(uint32_t step) const;
  void find_lives();
  uintptr_t bytes_of(uint32_t temp, int64_t m) const;
  uintptr_t arrange(const std::vector<uint32_t>& temps, const std::vector<Life>& lives, int64_t m,
                    std::vector<uintptr_t>& offsets) const;
  uintptr_t arrange_whole(int64_t m, std::vector<uintptr_t>& offsets) const;
  bool base_view(const StepTensor& tensor, const SequenceRun& run, const SequenceInputs& inputs,
                 TensorView& out) const noexcept;

  std::string name_;
  std::vector<SequenceSlot> slots_;
  std::vector<SequenceTemp> temps_;
  std::vector<SequenceStep> steps_;
  int64_t max_rows_;
  std::vector<Life> lives_;                            ///< by temporary
  std::vector<bool> is_whole_;                         ///< by temporary: needed by more than one of `groups_`
  std::vector<Life> whole_lives_;                      ///< by temporary, of whole groups
  std::vector<std::pair<uint32_t, uint32_t>> groups_;  ///< runs of steps by rows, and single ones: first, past the last
  std::vector<uintptr_t> offsets_;                     ///< by temporary, in the arena
  uintptr_t arena_bytes_ = 0;
};

/// What torch's functions do to sizes, strides and address. False where torch refuses, or would copy.
bool narrow(TensorView& view, uint32_t dimension, int64_t start, int64_t length) noexcept;
bool transpose(TensorView& view, uint32_t first, uint32_t second) noexcept;
bool reshape(TensorView& view, const int64_t* sizes, uint32_t rank) noexcept;

}  // namespace hdispatch
