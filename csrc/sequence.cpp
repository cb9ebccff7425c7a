// sequence.cpp -- checking a sequence's description and calls; lifetimes, offsets, chunks and views.
#include "sequence.h"

#include <algorithm>

#include "check.h"

namespace hdispatch {
namespace {

std::string print(const RowDim& dim) {
  if (dim.any) return "*";
  if (!dim.per_row) return std::to_string(dim.constant);
  std::string out = dim.per_row == 1 ? "M" : std::to_string(dim.per_row) + "*M";
  return dim.constant ? out + (dim.constant > 0 ? "+" : "") + std::to_string(dim.constant) : out;
}

std::string print(const std::vector<RowDim>& dims) {
  std::string out = "[";
  for (size_t d = 0; d < dims.size(); ++d) out += (d ? ", " : "") + print(dims[d]);
  return out + "]";
}

std::string print_sizes(const TensorView& view) {
  std::string out = "[";
  for (uint32_t d = 0; d < std::min(view.rank, kMaxRank); ++d) out += (d ? ", " : "") + std::to_string(view.sizes[d]);
  return out + (view.rank > kMaxRank ? ", ...]" : "]");
}

uintptr_t round_up(uintptr_t bytes) noexcept {
  return (bytes + Sequence::kAlignment - 1) / Sequence::kAlignment * Sequence::kAlignment;
}

/// Of what a view's strides count.
int64_t item_bytes(const TensorView& view) noexcept { return kDTypeBytes[static_cast<size_t>(view.dtype)]; }

}  // namespace

bool narrow(TensorView& view, uint32_t dimension, int64_t start, int64_t length) noexcept {
  // Not `start + length > size`: integers of a caller might overflow there.
  if (dimension >= view.rank || start < 0 || length < 0 || start > view.sizes[dimension] - length) return false;
  view.data += static_cast<uintptr_t>(start * view.strides[dimension] * item_bytes(view));
  view.sizes[dimension] = length;
  return true;
}

bool transpose(TensorView& view, uint32_t first, uint32_t second) noexcept {
  if (first >= view.rank || second >= view.rank) return false;
  std::swap(view.sizes[first], view.sizes[second]);
  std::swap(view.strides[first], view.strides[second]);
  return true;
}

/// From the last dimension on, each run of old dimensions that lie behind one another becomes a run of new ones.
bool reshape(TensorView& view, const int64_t* sizes, uint32_t rank) noexcept {
  if (rank > kMaxRank) return false;
  int64_t count = 1, wanted = 1;
  for (uint32_t d = 0; d < view.rank; ++d) count *= view.sizes[d];
  for (uint32_t d = 0; d < rank; ++d) wanted *= sizes[d];
  if (count != wanted) return false;
  int64_t strides[kMaxRank];
  uint32_t next = rank;  // new dimensions from here on have their strides
  int64_t run = 1, taken = 1, base = 1;
  for (uint32_t d = view.rank; d-- > 0 && count;) {
    if (run == 1) base = view.strides[d];
    run *= view.sizes[d];
    const bool ends = d == 0 || (view.sizes[d - 1] != 1 && view.strides[d - 1] != run * base);
    if (!ends) continue;
    while (next > 0 && (taken < run || sizes[next - 1] == 1)) {
      strides[--next] = taken * base;
      taken *= sizes[next];
    }
    if (taken != run) return false;
    run = taken = 1;
  }
  while (next > 0) {  // sizes of 1, or no element at all
    --next;
    strides[next] = next + 1 < rank ? strides[next + 1] * std::max<int64_t>(sizes[next + 1], 1) : 1;
  }
  view.rank = rank;
  std::copy_n(sizes, rank, view.sizes);
  std::copy_n(strides, rank, view.strides);
  return true;
}

Sequence::Sequence(std::string name, std::vector<SequenceSlot> slots, std::vector<SequenceTemp> temps,
                   std::vector<SequenceStep> steps, int64_t max_rows)
    : name_(std::move(name)),
      slots_(std::move(slots)),
      temps_(std::move(temps)),
      steps_(std::move(steps)),
      max_rows_(max_rows) {
  const std::string where = text("sequence ", name_, ": ");
  // Described once, called often: what can be said without sizes is checked here.
  if (steps_.empty()) fail(Fault::kCaller, where, "it has no step");
  if (max_rows_ < 1 || max_rows_ > kMaxRows)
    fail(Fault::kCaller, where, "max_rows is ", max_rows_, "; it takes 1 to ", kMaxRows);
  const auto carries_m = [](const SequenceSlot& slot) {
    return std::any_of(slot.dims.begin(), slot.dims.end(), [](const RowDim& dim) { return dim.per_row > 0; });
  };
  if (std::none_of(slots_.begin(), slots_.end(),
                   [&](const SequenceSlot& slot) { return carries_m(slot) && !slot.is_optional; }))
    fail(Fault::kCaller, where, "no slot has a dimension of M that every call gives");
  for (size_t i = 0; i < temps_.size(); ++i)
    if (temps_[i].dims.empty() || temps_[i].dims.size() > kMaxRank)
      fail(Fault::kCaller, where, "temporary ", i, " has rank ", temps_[i].dims.size(), "; it takes 1 to ", kMaxRank);
  for (uint32_t i = 0; i < steps_.size(); ++i) check_step(i);
  for (uint32_t i = 0; i < steps_.size(); ++i) {
    // Runs of steps by rows go together: a call in chunks makes each chunk through a whole run.
    if (!groups_.empty() && steps_[i].by_rows && steps_[groups_.back().first].by_rows)
      ++groups_.back().second;
    else
      groups_.emplace_back(i, i + 1);
  }
  find_lives();
  std::vector<uint32_t> all(temps_.size());
  for (uint32_t i = 0; i < all.size(); ++i) all[i] = i;
  arena_bytes_ = arrange(all, lives_, max_rows_, offsets_);
}

std::string Sequence::place(uint32_t step) const {
  return text("sequence ", name_, ", step ", step, " (", steps_[step].name, "): ");
}

/// What works by rows can have its tensors cut: of those that have rows, by rows alone.
void Sequence::check_step(uint32_t step) const {
  for (const StepTensor& tensor : steps_[step].tensors) {
    const std::vector<RowDim>& dims = tensor.is_temp ? temps_[tensor.index].dims : slots_[tensor.index].dims;
    if (!tensor.is_temp && !slots_[tensor.index].has_shape && (steps_[step].op || !tensor.views.empty()))
      fail(Fault::kCaller, place(step), "slot ", slots_[tensor.index].name,
           " has no declared dims; an op's argument and a view need them");
    if (!steps_[step].by_rows) continue;
    const auto has_rows = [](const RowDim& dim) { return dim.per_row > 0; };
    // 2*M + 1 cannot be cut: the chunks' parts would not add up to the whole.
    const auto plain = [](const RowDim& dim) { return dim.per_row > 0 && dim.constant == 0; };
    const auto count = std::count_if(dims.begin(), dims.end(), has_rows);
    if (count > 1 || count != std::count_if(dims.begin(), dims.end(), plain))
      fail(Fault::kCaller, place(step), "it is to work by rows, and takes a tensor ", print(dims),
           ", which cannot be cut by rows; add it with by_rows=False");
  }
}

void Sequence::find_lives() {
  lives_.resize(temps_.size());
  whole_lives_.resize(temps_.size());
  is_whole_.resize(temps_.size());
  for (const auto& [first, past] : groups_)
    for (uint32_t step = first; step < past; ++step)
      for (const StepTensor& tensor : steps_[step].tensors) {
        if (!tensor.is_temp) continue;
        Life& life = lives_[tensor.index];
        Life& whole = whole_lives_[tensor.index];
        // A step that needs all rows needs them in one place; so does what an earlier run of steps has left.
        if (!steps_[step].by_rows || (life.first != ~0u && life.first < first)) is_whole_[tensor.index] = true;
        life = {std::min(life.first, step), step};
        whole = {std::min(whole.first, first), past - 1};
      }
}

uintptr_t Sequence::bytes_of(uint32_t temp, int64_t m) const {
  int64_t count = kDTypeBytes[static_cast<size_t>(temps_[temp].dtype)];
  bool is_too_large = false;
  for (const RowDim& dim : temps_[temp].dims) {
    int64_t size = 0;
    // Without a branch for each: the message is the same.
    is_too_large |= __builtin_mul_overflow(dim.per_row, m, &size) ||
                    __builtin_add_overflow(size, dim.constant, &size) ||
                    __builtin_mul_overflow(count, std::max<int64_t>(size, 0), &count);
  }
  if (is_too_large || count > kMaxBytes)
    fail(Fault::kCaller, "sequence ", name_, ": temporary ", temp, ", ", print(temps_[temp].dims),
         ", takes more than 2**48 bytes with M = ", m, "; give it smaller sizes, or the sequence a smaller max_rows");
  return round_up(static_cast<uintptr_t>(count));
}

/// Largest first, each as low as it can be; what is never used takes nothing. Returns the bytes of all.
uintptr_t Sequence::arrange(const std::vector<uint32_t>& temps, const std::vector<Life>& lives, int64_t m,
                            std::vector<uintptr_t>& offsets) const {
  std::vector<uint32_t> order = temps;
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return bytes_of(a, m) > bytes_of(b, m); });
  offsets.assign(temps_.size(), 0);
  struct Placed {
    uintptr_t begin, end;
    Life life;
  };
  std::vector<Placed> placed;  // by `begin`
  uintptr_t total = 0;
  for (const uint32_t temp : order) {
    const Life& life = lives[temp];
    if (life.first == ~0u) continue;
    const uintptr_t bytes = bytes_of(temp, m);
    uintptr_t offset = 0;
    for (const Placed& other : placed)
      if (other.life.first <= life.last && life.first <= other.life.last && other.begin < offset + bytes &&
          other.end > offset)
        offset = other.end;
    const auto at = std::upper_bound(placed.begin(), placed.end(), offset,
                                     [](uintptr_t value, const Placed& other) { return value < other.begin; });
    placed.insert(at, {offset, offset + bytes, life});
    offsets[temp] = offset;
    total = std::max(total, offset + bytes);
  }
  return total;
}

uintptr_t Sequence::arrange_whole(int64_t m, std::vector<uintptr_t>& offsets) const {
  std::vector<uint32_t> whole;
  for (uint32_t i = 0; i < temps_.size(); ++i)
    if (is_whole_[i]) whole.push_back(i);
  return arrange(whole, whole_lives_, m, offsets);
}

uintptr_t Sequence::whole_bytes(int64_t m) const {
  std::vector<uintptr_t> offsets;
  return is_chunked(m) ? arrange_whole(m, offsets) : 0;
}

std::vector<uintptr_t> Sequence::addresses(int64_t m, uintptr_t arena, uintptr_t whole) const {
  std::vector<uintptr_t> found = offsets_;
  for (uintptr_t& each : found) each += arena;
  // What is whole lies in the arena too where no call is cut.
  if (!is_chunked(m)) return found;
  std::vector<uintptr_t> offsets;
  arrange_whole(m, offsets);
  for (size_t i = 0; i < found.size(); ++i)
    if (is_whole_[i]) found[i] = whole + offsets[i];
  return found;
}

int64_t Sequence::check(const TensorView* views) const {
  int64_t m = -1;
  const auto where = [this](const SequenceSlot& slot) { return text("sequence ", name_, ": slot ", slot.name, " "); };
  for (size_t i = 0; i < slots_.size(); ++i) {
    const SequenceSlot& slot = slots_[i];
    const TensorView& view = views[i];
    if (!slot.is_tensor) continue;
    if (HD_UNLIKELY(view.dtype == DType::kNone)) {
      if (!slot.is_optional) fail(Fault::kCaller, where(slot), "is None; it takes a tensor ", print(slot.dims));
      continue;
    }
    if (HD_UNLIKELY(slot.dtype != DType::kNone && view.dtype != slot.dtype))
      fail(Fault::kCaller, where(slot), "has dtype ", hdispatch::name(view.dtype), "; it takes ",
           hdispatch::name(slot.dtype));
    if (!slot.has_shape) continue;
    if (HD_UNLIKELY(view.rank != slot.dims.size()))
      fail(Fault::kCaller, where(slot), "has rank ", view.rank, " (sizes ", print_sizes(view), "); it takes ",
           print(slot.dims));
    for (size_t d = 0; d < slot.dims.size() && m < 0; ++d) {
      const RowDim& dim = slot.dims[d];
      // The first dimension that gives a whole M settles it; all are compared with it below.
      if (dim.any || !dim.per_row || (view.sizes[d] - dim.constant) % dim.per_row) continue;
      m = (view.sizes[d] - dim.constant) / dim.per_row;
      if (HD_UNLIKELY(m < 0))
        fail(Fault::kCaller, where(slot), "has sizes ", print_sizes(view), "; it takes ", print(slot.dims),
             " with M of at least 0");
    }
    for (size_t d = 0; d < slot.dims.size(); ++d)
      if (HD_UNLIKELY(!slot.dims[d].any && view.sizes[d] != slot.dims[d].at(m)))
        fail(Fault::kCaller, where(slot), "has sizes ", print_sizes(view), "; it takes ", print(slot.dims),
             " with M = ", m);
  }
  if (m > kMaxRows) fail(Fault::kCaller, "sequence ", name_, ": M is ", m, "; it takes at most ", kMaxRows);
  return m;
}

std::vector<SequenceRun> Sequence::order(int64_t m) const {
  std::vector<SequenceRun> runs;
  for (const auto& [first, past] : groups_) {
    const bool is_cut = is_chunked(m) && steps_[first].by_rows;
    int64_t chunks = is_cut ? (m + max_rows_ - 1) / max_rows_ : 1;
    int64_t rows = (m + chunks - 1) / chunks;
    if (is_cut && max_rows_ >= kChunkRows) {  // chunks begin where tensors are aligned as at row 0
      rows = std::min(max_rows_, (rows + kChunkRows - 1) / kChunkRows * kChunkRows);
      chunks = (m + rows - 1) / rows;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (uint32_t step = first; step < past; ++step)
        runs.push_back({step, chunk * rows, std::min(rows, m - chunk * rows)});
  }
  return runs;
}

/// The slot or temporary itself, cut to the run's rows.
bool Sequence::base_view(const StepTensor& tensor, const SequenceRun& run, const SequenceInputs& inputs,
                         TensorView& out) const noexcept {
  const std::vector<RowDim>& dims = tensor.is_temp ? temps_[tensor.index].dims : slots_[tensor.index].dims;
  if (!tensor.is_temp) {
    out = inputs.slots[tensor.index];
  } else {
    // A temporary of one run alone has that run's rows.
    const bool is_cut = is_chunked(inputs.m) && !is_whole_[tensor.index];
    out.dtype = temps_[tensor.index].dtype;
    out.slot = inputs.device;
    out.data = out.storage = inputs.temps[tensor.index];
    out.rank = static_cast<uint32_t>(dims.size());
    int64_t stride = 1;
    for (uint32_t d = out.rank; d-- > 0;) {
      out.sizes[d] = dims[d].at(is_cut ? run.rows : inputs.m);
      if (out.sizes[d] < 0) return false;
      out.strides[d] = stride;
      stride *= std::max<int64_t>(out.sizes[d], 1);
    }
    if (is_cut) return true;
  }
  if (run.rows == inputs.m || out.dtype == DType::kNone) return true;
  for (uint32_t d = 0; d < dims.size(); ++d)
    if (dims[d].per_row && !narrow(out, d, dims[d].per_row * run.first, dims[d].per_row * run.rows)) return false;
  return true;
}

bool Sequence::view(const StepTensor& tensor, const SequenceRun& run, const SequenceInputs& inputs,
                    TensorView& out) const noexcept {
  if (!base_view(tensor, run, inputs, out)) return false;
  if (out.dtype == DType::kNone) return tensor.views.empty();
  for (const ViewStep& step : tensor.views) {
    int64_t sizes[kMaxRank];
    switch (step.kind) {
      case ViewStep::Kind::kNarrow:
        if (!narrow(out, step.first, step.start.at(run.rows), step.length.at(run.rows))) return false;
        break;
      case ViewStep::Kind::kTranspose:
        if (!transpose(out, step.first, step.second)) return false;
        break;
      case ViewStep::Kind::kReshape:
        if (step.sizes.size() > kMaxRank) return false;
        for (size_t d = 0; d < step.sizes.size(); ++d) sizes[d] = step.sizes[d].at(run.rows);
        if (!reshape(out, sizes, static_cast<uint32_t>(step.sizes.size()))) return false;
    }
  }
  return true;
}

bool Sequence::make_call(const SequenceRun& run, const SequenceInputs& inputs, Call& call,
                         uint32_t& arg) const noexcept {
  const SequenceStep& step = steps_[run.step];
  call = step.call;
  for (const StepTensor& tensor : step.tensors) {
    arg = tensor.arg;
    if (HD_UNLIKELY(!view(tensor, run, inputs, call.tensors[tensor.arg]))) return false;
  }
  for (const StepInteger& integer : step.integers) call.integers[integer.arg] = inputs.integers[integer.slot];
  return true;
}

}  // namespace hdispatch
