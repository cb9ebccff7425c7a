// bench.cpp -- timing loops in C.
#include "bench.h"

#include <chrono>
#include <random>

#include "cubin_launcher.h"
#include "tensor_view.h"

namespace hdispatch {
namespace {

template <typename Body>
double time_ns(uint32_t count, Body body) {
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t i = 0; i < count; ++i) body(i);
  const auto end = std::chrono::steady_clock::now();
  return std::chrono::duration<double, std::nano>(end - start).count() / count;
}

/// Dispatches the call once and returns its row. Throws if none serves it.
Dispatch served(const Op& op, Call& call) {
  Dispatch found;
  const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found);
  if (outcome == Outcome::kBadCall) op.complain(call);
  if (outcome != Outcome::kLaunched) fail(Fault::kMiss, Runtime::describe(op, call, outcome, found));
  return found;
}

template <typename Wanted>
const Wanted& launcher_of(const Op& op, const Dispatch& found, const char* wanted) {
  const auto* launcher = dynamic_cast<const Wanted*>(found.row->launcher);
  if (!launcher) fail(Fault::kCaller, op.name(), ": row ", found.row->index, " does not launch ", wanted);
  return *launcher;
}

}  // namespace

double bench_launch_ns(const Op& op, Call& call, uint32_t count, bool pdl) {
  const TableReader reader;
  const Dispatch found = served(op, call);
  CubinLauncher::Block block;
  launcher_of<CubinLauncher>(op, found, "a cubin").fill(call, current_stream(found.table->slot), block);
  if (!pdl) block.config.attribute_count = 0;
  const Driver& driver = *found.table->driver;
  CUresult result = kCudaSuccess;
  const double ns =
      time_ns(count, [&](uint32_t) { result |= driver.launch(&block.config, block.function, block.params, nullptr); });
  HD_DRIVER(driver, result, "cuLaunchKernelEx", op.name());
  return ns;
}

double bench_dispatch_ns(const Op& op, Call& call, uint32_t count) {
  const TableReader reader;
  served(op, call);
  const Runtime& runtime = Runtime::get();
  bool ok = true;
  const double ns = time_ns(count, [&](uint32_t) {
    Dispatch found;
    ok &= runtime.dispatch(op, call, current_stream, found) == Outcome::kLaunched;
  });
  HD_CHECK(ok, op.name());
  return ns;
}

double bench_function_ns(const Op& op, Call& call, uint32_t count) {
  const TableReader reader;
  const Dispatch found = served(op, call);
  const auto& launcher = launcher_of<FfiLauncher>(op, found, "a function");
  FfiLauncher::Block block;
  launcher.fill(call, current_stream(found.table->slot), block);
  const FfiFunction& function = launcher.function();
  const auto args = static_cast<int32_t>(launcher.record().args.size());
  int failed = 0;
  const double ns = time_ns(count, [&](uint32_t) {
    ffi::Any result{};
    failed |= function.call(function.self, block.args, args, &result);
  });
  HD_CHECK(!failed, op.name());
  return ns;
}

uintptr_t bench_function() {
  static ffi::Function function = {
      {1, ffi::kTypeFunction, 0, nullptr}, [](void*, const ffi::Any*, int32_t, ffi::Any*) { return 0; }, nullptr};
  return reinterpret_cast<uintptr_t>(&function);
}

double bench_probe_ns(uint32_t rows, uint32_t count) {
  std::mt19937_64 random(rows);
  std::vector<Row> made(rows);
  for (uint32_t i = 0; i < rows; ++i)
    made[i] = {make_key(static_cast<uint16_t>(i % 16), static_cast<uint16_t>(i / 16 % 8), i / 128 * 128 + 2048, 0,
                        static_cast<uint16_t>(i % 14)),
               nullptr, i};
  // i % 16, i / 16 % 8 and i / 128 tell all rows apart.
  const LaunchTable table(made);
  std::vector<Key> keys(1 << 14);
  for (Key& key : keys) key = made[random() % rows].key;
  uint64_t last = 0;
  const double ns = time_ns(count, [&](uint32_t i) {
    Key key = keys[i & (keys.size() - 1)];
    key.word0 ^= last;  // always 0, which the compiler cannot know
    last = table.find(key)->index >> 31;
  });
  HD_CHECK(last == 0, last);
  return ns;
}

}  // namespace hdispatch
