// test_launch_queue.cpp -- when a stream is asked whether it is done, and when the caller's lock is let go of.
#include "launch_queue.h"

#include <chrono>
#include <thread>

#include "calls.h"
#include "cubin_launcher.h"
#include "runtime.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

int asked = 0, exchanged = 0, capture_status = kNotCapturing;
int thread_mode = 0;  // of captures: global
CUresult query_answer = kCudaSuccess;
constexpr CUresult kNotReady = 600;

CUresult query(CUstream) {
  ++asked;
  CHECK_EQ(thread_mode, kCaptureModeRelaxed);
  return query_answer;
}
CUresult is_capturing(CUstream, int* status) {
  *status = capture_status;
  return kCudaSuccess;
}
CUresult exchange(int* mode) {
  ++exchanged;
  std::swap(*mode, thread_mode);
  return kCudaSuccess;
}

const Driver& driver() {
  static const Driver made = [] {
    Driver driver = null_driver();
    driver.stream_query = query;
    driver.stream_is_capturing = is_capturing;
    driver.capture_mode_exchange = exchange;
    return driver;
  }();
  return made;
}

/// A stream that no test has used.
CUstream new_stream() {
  static uintptr_t made = 0;
  return reinterpret_cast<CUstream>(made += 64);
}

bool has_room(CUstream stream, DeviceSlot device = 1) { return LaunchQueue::has_room(driver(), device, stream); }

/// Launches until the stream is asked.
void turn_to(CUstream stream, DeviceSlot device = 1) {
  for (uint32_t i = 0; i <= LaunchQueue::kPatience; ++i) CHECK(!has_room(stream, device));
}

TEST(the_null_driver_never_blocks) { CHECK(LaunchQueue::has_room(null_driver(), 0, nullptr)); }

TEST(a_stream_that_is_done_has_room_for_a_while) {
  asked = 0, query_answer = kCudaSuccess;
  const CUstream stream = new_stream();
  turn_to(stream);
  CHECK_EQ(asked, 0);
  CHECK(has_room(stream));
  CHECK_EQ(asked, 1);
  query_answer = kNotReady;
  CHECK(has_room(stream));  // what was asked a moment ago still holds
  CHECK_EQ(asked, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(!has_room(stream));
  CHECK_EQ(asked, 2);
  CHECK_EQ(thread_mode, 0);  // as it was
}

TEST(a_stream_that_is_behind_is_asked_now_and_then) {
  asked = 0, query_answer = kNotReady;
  const CUstream stream = new_stream();
  turn_to(stream);
  for (uint32_t i = 0; i < 10 * (LaunchQueue::kPatience + 1); ++i) CHECK(!has_room(stream));
  CHECK_EQ(asked, 10);
  query_answer = kCudaSuccess;
  for (uint32_t i = 0; i < LaunchQueue::kPatience; ++i) has_room(stream);
  CHECK(has_room(stream));
}

TEST(another_stream_is_not_known) {
  query_answer = kCudaSuccess;
  const CUstream first = new_stream(), second = new_stream();
  turn_to(first);
  CHECK(has_room(first));
  CHECK(!has_room(second));
  CHECK(!has_room(first));
  turn_to(second);
  CHECK(has_room(second));
  CHECK(!has_room(second, 2));  // another device's stream of that handle
}

TEST(another_thread_knows_nothing) {
  query_answer = kCudaSuccess;
  const CUstream stream = new_stream();
  turn_to(stream);
  CHECK(has_room(stream));
  std::thread([stream] { CHECK(!has_room(stream)); }).join();
}

TEST(a_stream_that_is_captured_is_not_asked) {
  asked = 0, query_answer = kCudaSuccess, capture_status = 1;
  const CUstream stream = new_stream();
  turn_to(stream);
  CHECK(!has_room(stream));
  CHECK_EQ(asked, 0);
  capture_status = kNotCapturing;
}

// ---- in a call ----

int held = 1;
CUresult launch_with_room(const LaunchConfig*, CUfunction, void**, void**) {
  CHECK_EQ(held, query_answer == kCudaSuccess ? 1 : 0);
  return kCudaSuccess;
}
int released = 0;
constexpr CallerLock kLock = {[]() -> void* { return --held, ++released, &held; },
                              [](void* state) {
                                CHECK(state == &held);
                                ++held;
                              }};
CUstream call_stream;

TEST(a_call_lets_go_of_the_lock_where_its_launch_may_block) {
  static const Driver launching = [] {
    Driver made = driver();
    made.launch = launch_with_room;
    return made;
  }();
  Runtime& runtime = Runtime::get();
  const Op& op = runtime.define_op("toy_queue", "", toy_args(), toy_variants());
  auto table = std::make_unique<DeviceTable>();
  table->driver = &launching;
  table->slot = 1;
  table->ops.resize(op.id() + 1u);
  table->ops[op.id()] = {&op, -1, 1, {~0ull}, Ladder({16}), {}};
  Record record;
  record.kernel = "kernel";
  record.grid = {expr(1), expr(1), expr(1)};
  for (Cubin& cubin : record.cubins) cubin.file = cubin.function = "kernel", cubin.num_warps = 1;
  table->launchers.push_back(std::make_unique<CubinLauncher>(
      record, launching, [](const Cubin&, const std::vector<uint32_t>&) { return CUfunction{}; }));
  table->table = LaunchTable({{make_key(op.id(), 0, 64, 0, 0), table->launchers[0].get(), 0}});
  runtime.publish(std::move(table));
  const auto call = [&](const CallerLock* lock) {
    Call toy = toy_call(4, 64, false, DType::kBFloat16, 1);
    Dispatch found;
    CHECK(runtime.dispatch(op, toy, [](DeviceSlot) { return call_stream; }, found, lock) == Outcome::kLaunched);
    CHECK_EQ(held, 1);
  };
  call_stream = new_stream();
  query_answer = kNotReady;
  for (int i = 0; i < 40; ++i) call(&kLock);
  CHECK_EQ(released, 40);
  query_answer = kCudaSuccess;
  while (!has_room(call_stream)) {
  }
  for (int i = 0; i < 40; ++i) call(&kLock);
  CHECK_EQ(released, 40);
  call_stream = new_stream();
  query_answer = kCudaSuccess;
  call(nullptr);
  CHECK_EQ(released, 40);
  runtime.withdraw(1);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
