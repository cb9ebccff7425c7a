// bench.cpp -- timing loops in C.
#include "bench.h"

#include <chrono>
#include <random>

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

}  // namespace

double bench_launch_ns(const Op& op, Call& call, uint32_t count, bool pdl) {
  Dispatch found;
  const Outcome outcome = Runtime::get().dispatch(op, call, current_stream, found);
  if (outcome == Outcome::kBadCall) op.complain(call);
  if (outcome != Outcome::kLaunched) fail(Fault::kMiss, Runtime::describe(op, call, outcome, found));
  const auto* launcher = dynamic_cast<const CubinLauncher*>(found.row->launcher);
  if (!launcher) fail(Fault::kCaller, op.name(), ": row ", found.row->index, " is no cubin; the bare launch is of one");
  CubinLauncher::Block block;
  launcher->fill(call, current_stream(found.table->slot), block);
  if (!pdl) block.config.attribute_count = 0;
  const Driver& driver = *found.table->driver;
  CUresult result = kCudaSuccess;
  const double ns =
      time_ns(count, [&](uint32_t) { result |= driver.launch(&block.config, block.function, block.params, nullptr); });
  HD_DRIVER(driver, result, "cuLaunchKernelEx", op.name());
  return ns;
}

double bench_probe_ns(uint32_t rows, uint32_t count) {
  std::mt19937_64 random(rows);
  std::vector<Row> made(rows);
  for (uint32_t i = 0; i < rows; ++i)
    made[i] = {make_key(static_cast<uint16_t>(i % 16), static_cast<uint16_t>(i / 16 % 8), i / 128 * 128 + 2048, 0,
                        static_cast<uint16_t>(i % 14), kDeviceClass),
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
