// explain.cpp -- text about calls: why one was not launched, and each step of one.
//
// Off the hot path. op_faults.cpp has the messages for a call that breaks a rule, this file those for any other.
#include <algorithm>
#include <set>
#include <tuple>

#include "check.h"
#include "runtime.h"

namespace hdispatch {
namespace {

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
      return text(shape, ": ", found.row->launcher->describe(found.result, call), " of row ", found.row->index, " ",
                  print_row(found.table->ops[op.id()], *found.row));
    default:
      return shape;
  }
}

void Runtime::raise_failure(const Op& op, const Call& call, const Dispatch& found) {
  const Launcher& launcher = *found.row->launcher;
  const std::string what = text(print_shape(op, call, found), ", row ", found.row->index, ", ", launcher.head().kernel);
  launcher.raise(found.result, what);
  fail(Fault::kInternal, what,
       " failed without an error");  // the compiler knows no virtual function that never returns
}

std::string Runtime::explain(const Op& op, Call& call) const {
  Dispatch found;
  const Outcome outcome = lookup(op, call, found);
  if (outcome == Outcome::kBadCall) op.complain(call);
  if (outcome == Outcome::kUnserved) return "miss     " + describe(op, call, outcome, found);
  std::string out = text("op       ", op.name(), " (id ", op.id(), ")\nvariant  ",
                         op.variants()[key_variant(found.key)].name, "\nsizes    M=", call.sizes[kM],
                         " K=", call.sizes[kK], " N=", call.sizes[kN], op.has(kA) ? text(" A=", call.sizes[kA]) : "",
                         op.has(kB) ? text(" B=", call.sizes[kB]) : "", print_second(op, call, " "));
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
    op.set_workspace(call, found.table->slot, 0, bytes);  // whatever address it will have is as aligned
  }
  const std::string launch = launcher.explain(call, found.result);
  if (found.result.status != LaunchStatus::kLaunched)
    return out + "\nfallback " + describe(op, call, Outcome::kRefused, found);
  return text(out, "\n", launch, ", driver \"", found.table->driver->name, "\"");
}

}  // namespace hdispatch
