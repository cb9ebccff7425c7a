// test_runtime_devices.cpp -- a table per device, the context that a launch needs, and launches that fail.
#include <thread>

#include "testing.h"
#include "toy_tables.h"

namespace hdispatch {
namespace {

using namespace testing;

/// A driver with contexts, as `enter` uses them: one stack per thread.
thread_local std::vector<CUcontext> context_stack = {nullptr};
thread_local CUcontext launched_in = nullptr;
std::atomic<CUresult> launch_answer{kCudaSuccess};

CUresult context_get(CUcontext* out) {
  *out = context_stack.back();
  return kCudaSuccess;
}
CUresult context_set(CUcontext context) {
  context_stack.back() = context;
  return kCudaSuccess;
}
CUresult context_push(CUcontext context) {
  context_stack.push_back(context);
  return kCudaSuccess;
}
CUresult context_pop(CUcontext* out) {
  *out = context_stack.back();
  context_stack.pop_back();
  return kCudaSuccess;
}
CUresult launch_here(const LaunchConfig*, CUfunction, void**, void**) {
  launched_in = context_stack.back();
  return launch_answer;
}

const Driver& device_driver() {
  static const Driver driver = [] {
    Driver made = null_driver();
    made.name = "fake";
    made.launch = launch_here;
    made.context_get = context_get;
    made.context_set = context_set;
    made.context_push = context_push;
    made.context_pop = context_pop;
    return made;
  }();
  return driver;
}

CUcontext context_of(DeviceSlot slot) { return reinterpret_cast<CUcontext>(uintptr_t{slot} * 256); }

/// A table as TableBuilder makes it for a CUDA device.
void publish_device(const Op& op, DeviceSlot slot, bool only_device, int64_t tag,
                    const Driver& driver = device_driver()) {
  auto table = std::make_unique<DeviceTable>();
  table->driver = &driver;
  table->slot = slot;
  table->context = context_of(slot);
  table->only_device = only_device;
  table->ops.resize(op.id() + 1u);
  table->ops[op.id()] = {&op, -1, 1, {~0ull}, Ladder(kEdges), {}};
  table->launchers.push_back(std::make_unique<CubinLauncher>(
      tagged(tag), driver, [](const Cubin&, const std::vector<uint32_t>&) { return CUfunction{}; }));
  std::vector<Row> rows;
  for (uint16_t bucket = 0; bucket < kEdges.size(); ++bucket)
    rows.push_back({make_key(op.id(), 0, 64, 0, bucket), table->launchers[0].get(), bucket});
  table->table = LaunchTable(rows);
  runtime().publish(std::move(table));
}

Call call_on(DeviceSlot slot) { return toy_call(4, 64, false, DType::kBFloat16, slot); }

TEST(each_device_has_its_table) {
  const Op& op = new_op();
  for (const DeviceSlot slot : {1u, 2u, 64u}) publish_device(op, slot, false, slot);
  for (const DeviceSlot slot : {1u, 2u, 64u, 2u, 1u}) {
    const Served served = dispatch(op, call_on(slot));
    CHECK(served.outcome == Outcome::kLaunched);
    CHECK_EQ(served.found.row->launcher->head().kernel, "kernel" + std::to_string(slot));
    CHECK(launched_in == context_of(slot));
    CHECK_EQ(context_stack.size(), 1u);  // what was current is current again
    CHECK(context_stack.back() == nullptr);
  }
  CHECK(dispatch(op, call_on(3)).outcome == Outcome::kNoTable);
  CHECK(dispatch(op, call_on(65)).outcome == Outcome::kNoTable);
  CHECK(dispatch(op, call_on(kNoSlot)).outcome == Outcome::kNoTable);
  // The caller is on device 1, the tensors on device 2.
  context_stack.back() = context_of(1);
  CHECK(dispatch(op, call_on(2)).outcome == Outcome::kLaunched);
  CHECK(launched_in == context_of(2) && context_stack.back() == context_of(1));
  CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
  CHECK(launched_in == context_of(1));
  context_stack.back() = nullptr;
  for (const DeviceSlot slot : {1u, 2u, 64u}) runtime().withdraw(slot);
  CHECK(dispatch(op, call_on(1)).outcome == Outcome::kNoTable);
}

TEST(with_one_device_a_thread_enters_once) {
  const Op& op = new_op();
  publish_device(op, 1, true, 1);
  publish(op, {64});
  std::thread([&op] {
    for (int i = 0; i < 3; ++i) {
      CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
      CHECK(launched_in == context_of(1));
      CHECK(dispatch(op, call_on(kCpuSlot)).outcome == Outcome::kLaunched);
    }
    CHECK_EQ(context_stack.size(), 1u);
  }).join();
  runtime().withdraw(1);
}

/// Refuses, as the driver does, where another context than device 1's is current.
std::atomic<int> refused{0};
CUresult launch_in_context_1(const LaunchConfig* config, CUfunction function, void** params, void** extra) {
  if (context_stack.back() != context_of(1)) return ++refused, 400;
  return launch_here(config, function, params, extra);
}

TEST(another_context_is_current) {
  const Op& op = new_op();
  static const Driver driver = [] {
    Driver made = device_driver();
    made.launch = launch_in_context_1;
    return made;
  }();
  publish_device(op, 1, true, 1, driver);
  std::thread([&op] {
    CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
    // Somebody's own context, on top of the one that this thread is known to have.
    context_stack.push_back(context_of(9));
    for (int i = 0; i < 3; ++i) {
      CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
      CHECK(context_stack.back() == context_of(9));
    }
    CHECK_EQ(refused.load(), 1);  // from then on the driver is asked first
    context_stack.pop_back();
    CHECK(dispatch(op, call_on(1)).outcome == Outcome::kLaunched);
    CHECK_EQ(context_stack.size(), 1u);
  }).join();
  CHECK_EQ(op.counters().hits.load(), 5u);
  runtime().withdraw(1);
}

TEST(a_failed_launch_says_all) {
  const Op& op = new_op();
  publish_device(op, 1, true, 7);
  launch_answer = 719;
  Call call = call_on(1);
  Dispatch found;
  CHECK(runtime().dispatch(op, call, no_stream, found) == Outcome::kRefused);
  CHECK_FAULT(kDriver,
              op.name() + "(bfloat16, M=4, K=64, N=0), row 2, kernel7: cuLaunchKernelEx failed with 719 (null driver)",
              Runtime::raise_failure(op, call, found));
  launch_answer = kCudaSuccess;
  CHECK_EQ(op.counters().hits.load(), 0u);
  runtime().withdraw(1);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
