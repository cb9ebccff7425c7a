// test_workspace.cpp -- one zeroed block per device and stream: found again, grown, made under capture, by many
// threads.
#include "workspace.h"

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "table_builder.h"

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

DeviceSlot next_device() {
  static DeviceSlot device = 1;
  return device++;
}

CUstream stream(uintptr_t handle) { return reinterpret_cast<CUstream>(handle); }

uintptr_t get(DeviceSlot device, uintptr_t handle, uint64_t bytes) {
  return Workspace::get(null_driver(), device, stream(handle), bytes);
}

bool is_zero(uintptr_t address, uint64_t bytes) {
  const auto* memory = reinterpret_cast<const char*>(address);
  for (uint64_t i = 0; i < bytes; ++i)
    if (memory[i]) return false;
  return true;
}

TEST(a_stream_keeps_its_block) {
  const DeviceSlot device = next_device();
  const uintptr_t first = get(device, 7, 1000);
  CHECK(first % Workspace::kAlign == 0 && is_zero(first, 1000));
  std::memset(reinterpret_cast<void*>(first), 1, 1000);
  CHECK_EQ(get(device, 7, 1000), first);
  CHECK_EQ(get(device, 7, 10), first);  // one block for all ops
  CHECK_EQ(get(device, 7, 1), first);
  CHECK(Workspace::has(device, stream(7), 1000) && !Workspace::has(device, stream(7), 1001));
  CHECK(!Workspace::has(device, stream(8), 1) && !Workspace::has(device + 1, stream(7), 1));
}

TEST(streams_and_devices_have_their_own) {
  const DeviceSlot one = next_device(), two = next_device();
  const uintptr_t blocks[] = {get(one, 0, 64), get(one, 8, 64), get(two, 0, 64), get(two, 8, 64)};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) CHECK(blocks[i] != blocks[j]);
  CHECK_EQ(get(one, 0, 64), blocks[0]);
  CHECK_EQ(get(two, 8, 64), blocks[3]);
}

TEST(a_larger_one_takes_its_place_and_the_old_one_stays) {
  const DeviceSlot device = next_device();
  const uintptr_t small = get(device, 7, 256);
  std::memset(reinterpret_cast<void*>(small), 3, 256);
  const uintptr_t large = get(device, 7, 1 << 20);
  CHECK(large != small && is_zero(large, 1 << 20));
  CHECK_EQ(get(device, 7, 256), large);
  CHECK_EQ(*reinterpret_cast<const char*>(small), 3);  // a graph may hold it
}

TEST(a_stream_per_thread_is_one_of_each_thread) {
  const DeviceSlot device = next_device();
  const uintptr_t mine = get(device, 2, 64);
  uintptr_t other = 0, shared = 0;
  std::thread([&] {
    other = get(device, 2, 64);
    shared = get(device, 7, 64);
  }).join();
  CHECK(other != mine);
  CHECK_EQ(get(device, 7, 64), shared);
}

// A driver that notes what it is asked.
std::vector<std::string> said;
CUresult answer = kCudaSuccess;
int mode_now = 0;

Driver noting() {
  Driver driver = null_driver();
  driver.capture_mode_exchange = [](int* mode) {
    std::swap(*mode, mode_now);
    said.push_back("mode " + std::to_string(mode_now));
    return kCudaSuccess;
  };
  driver.stream_create = [](CUstream* out, unsigned flags) {
    *out = stream(99);
    said.push_back("create " + std::to_string(flags));
    return kCudaSuccess;
  };
  driver.memory_allocate = [](uintptr_t* out, size_t bytes) {
    said.push_back("allocate " + std::to_string(bytes));
    *out = 4096;
    return answer;
  };
  driver.memory_zero = [](uintptr_t, unsigned char value, size_t bytes, CUstream on) {
    said.push_back(text("zero ", int{value}, " ", bytes, " on ", reinterpret_cast<uintptr_t>(on)));
    return kCudaSuccess;
  };
  driver.stream_synchronize = [](CUstream on) {
    said.push_back(text("wait ", reinterpret_cast<uintptr_t>(on)));
    return kCudaSuccess;
  };
  driver.stream_destroy = [](CUstream on) {
    said.push_back(text("destroy ", reinterpret_cast<uintptr_t>(on)));
    return kCudaSuccess;
  };
  return driver;
}

TEST(made_while_a_stream_is_captured) {
  const Driver driver = noting();
  const DeviceSlot device = next_device();
  said.clear();
  CHECK_EQ(Workspace::get(driver, device, stream(7), 512), uintptr_t{4096});
  const std::vector<std::string> wanted = {"mode 2",  "create 1",   "allocate 512", "zero 0 512 on 99",
                                           "wait 99", "destroy 99", "mode 0"};
  CHECK(said == wanted);
  said.clear();
  CHECK_EQ(Workspace::get(driver, device, stream(7), 512), uintptr_t{4096});
  CHECK(said.empty());
}

TEST(no_memory_is_the_drivers_error_and_nothing_is_kept) {
  const Driver driver = noting();
  const DeviceSlot device = next_device();
  answer = kCudaOutOfMemory;
  CHECK_FAULT(kDriver, "a workspace of 512 bytes on cuda:", Workspace::get(driver, device, stream(7), 512));
  CHECK_FAULT(kDriver, "cuMemAlloc failed with 2", Workspace::get(driver, device, stream(7), 512));
  CHECK_EQ(mode_now, 0);
  answer = kCudaSuccess;
  CHECK_EQ(Workspace::get(driver, device, stream(7), 512), uintptr_t{4096});
}

TEST(threads_on_streams_of_their_own_never_meet) {
  // Each thread counts up in its stream's block and finds what it left, whatever the others make meanwhile.
  const DeviceSlot device = next_device();
  std::vector<std::thread> threads;
  for (uintptr_t t = 0; t < 8; ++t)
    threads.emplace_back([device, t] {
      uintptr_t before = 0;
      uint64_t count = 0;
      for (uint64_t i = 0; i < 2000; ++i) {
        const uint64_t bytes = 64 << (i / 400);
        auto* const memory = reinterpret_cast<uint64_t*>(get(device, 100 + t, bytes));
        if (reinterpret_cast<uintptr_t>(memory) != before) count = 0;  // grown: a fresh one, which is zero
        before = reinterpret_cast<uintptr_t>(memory);
        CHECK_EQ(*memory, count);
        *memory = ++count;
        get(device, 200 + t, 64);  // another stream in between
      }
      CHECK_EQ(count, uint64_t{400});
    });
  for (std::thread& thread : threads) thread.join();
}

TEST(threads_on_one_stream_find_one_block_in_the_end) {
  const DeviceSlot device = next_device();
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([device, t] {
      for (uint64_t bytes = 64; bytes <= 1 << 16; bytes *= 2) {
        const uintptr_t found = get(device, 7, bytes + static_cast<uint64_t>(t));
        CHECK(found && found % Workspace::kAlign == 0);
      }
    });
  for (std::thread& thread : threads) thread.join();
  const uintptr_t block = get(device, 7, (1 << 16) + 7);
  std::thread([&] { CHECK_EQ(get(device, 7, 64), block); }).join();
}

// ---- an op with a workspace ----

CUstream current(DeviceSlot) { return stream(41); }

Record with_workspace() {
  Record record;
  record.kernel = "split";
  record.grid = {expr("M"), expr(1), expr(1)};
  Param result, workspace;
  result.arg = kResult;
  workspace.arg = kToyArgs;
  workspace.align = 16;
  workspace.value = expr(128);
  record.params = {result, workspace};
  record.outputs = {{kResult, true}, {kToyArgs, true}};
  for (Cubin& cubin : record.cubins) cubin = {"a.cubin", "split", {0, 1}, 1, 0, {1, 1, 1}, false, true};
  return record;
}

TEST(a_launch_gets_the_streams_block) {
  std::vector<Variant> variants = toy_variants();
  variants[0].workspace_bytes = 4096;
  const Op& op = Runtime::get().define_op("split_toy", "", toy_args(), variants, "workspace");
  CHECK_EQ(op.workspace(), int{kToyArgs});
  CHECK(op.find_memory("workspace") == kToyArgs && op.find_tensor("workspace") == -1);
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {16});
  builder.add_module("a.cubin", {});
  const uint32_t record = builder.add_record(with_workspace());
  builder.add_row(op, 0, 64, 0, 0, record);
  CHECK_FAULT(kBundle, "split reads workspace, of which variant float16 asks for nothing",
              builder.add_row(op, 1, 64, 0, 0, record));
  builder.publish();
  null_record(true);
  for (int i = 0; i < 2; ++i) {
    Call call = toy_call(4, 64);
    Dispatch found;
    const TableReader reader;
    CHECK(Runtime::get().dispatch(op, call, current, found) == Outcome::kLaunched);
  }
  null_record(false);
  const uintptr_t block = get(kCpuSlot, 41, 1);
  for (const NullLaunch& launch : null_launches()) {
    uint64_t address = 0;
    std::memcpy(&address, launch.params[1].data(), sizeof address);
    CHECK_EQ(address, block + 128);
  }
  CHECK_EQ(null_launches().size(), size_t{2});
  Call call = toy_call(4, 64);
  CHECK_CONTAINS(Runtime::get().explain(op, call), "workspace 4096 bytes");
  Runtime::get().withdraw(kCpuSlot);
}

TEST(what_was_written_to_it_is_pending) {
  // A kernel that would read the block early is launched without PDL after one that writes it.
  std::vector<Variant> variants = toy_variants();
  for (Variant& variant : variants) variant.workspace_bytes = 4096;
  const Op& op = Runtime::get().define_op("early_toy", "", toy_args(), variants, "workspace");
  Record early = with_workspace();
  early.early = {static_cast<uint8_t>(kToyArgs)};
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {16});
  builder.add_module("a.cubin", {});
  builder.add_row(op, 0, 64, 0, 0, builder.add_record(with_workspace()));
  builder.add_row(op, 1, 64, 0, 0, builder.add_record(std::move(early)));
  builder.publish();
  const auto run = [&op](DType dtype) {
    Call call = toy_call(4, 64, false, dtype);
    Dispatch found;
    const TableReader reader;
    CHECK(Runtime::get().dispatch(op, call, current, found) == Outcome::kLaunched);
  };
  null_record(true);
  run(DType::kBFloat16);
  run(DType::kFloat16);
  null_record(false);
  const std::vector<NullLaunch> launches = null_launches();
  CHECK_EQ(launches.size(), size_t{2});
  CHECK_EQ(launches[0].attributes.size(), size_t{1});
  CHECK(launches[1].attributes.empty());
  Runtime::get().withdraw(kCpuSlot);
}

TEST(a_variant_that_asks_for_memory_needs_a_name) {
  std::vector<Variant> variants = toy_variants();
  variants[0].workspace_bytes = 1;
  CHECK_FAULT(kBundle, "asks for 1 bytes of a workspace without a name", Op(0, "bad", "", toy_args(), variants));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
