// test_pending_writes.cpp -- extents, sets per device and stream, and which launches of a chain keep the PDL attribute.
#include "pending_writes.h"

#include <memory>
#include <thread>

#include "calls.h"
#include "cubin_launcher.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

/// One that no set is about yet.
int next_device() {
  static int last = 1000;
  return ++last;
}

CUstream stream(uintptr_t handle) { return reinterpret_cast<CUstream>(handle); }

/// The bytes of a range, and where it begins.
std::string words(const Range& range, const TensorView& view) {
  return text(range.lowest - view.data, "..", range.highest - view.data);
}

TEST(extents) {
  TensorView view = contiguous(1, DType::kBFloat16, {4, 64});
  CHECK_EQ(words(extent(view), view), "0..511");
  CHECK_EQ(words(extent_by_rows(view), view), "0..511");
  view.strides[0] = 100;  // rows of a wider tensor: all but what follows the last one
  CHECK_EQ(words(extent(view), view), "0..727");
  CHECK_EQ(words(extent_by_rows(view), view), "0..799");
  view = contiguous(1, DType::kFloat8E4M3FN, {64, 3});  // columns, 80 apart
  view.strides[0] = 1;
  view.strides[1] = 80;
  CHECK_EQ(words(extent(view), view), "0..223");
  view = contiguous(1, DType::kFloat32, {7});  // one element for all
  view.strides[0] = 0;
  CHECK_EQ(words(extent(view), view), "0..3");
  CHECK_EQ(words(extent(contiguous(1, DType::kInt64, {})), view), "0..7");
  CHECK_EQ(words(extent(contiguous(1, DType::kFloat32, {0, 8})), view), "0..31");
  CHECK_EQ(words(extent(contiguous(1, DType::kFloat16, {2, 3, 4, 5})), view), "0..239");
}

TEST(ranges_overlap_where_they_share_a_byte) {
  const Range range{16, 31};
  for (const Range& other : {Range{0, 16}, Range{31, 40}, Range{20, 21}, Range{0, 100}, range}) {
    CHECK(range.overlaps(other));
    CHECK(other.overlaps(range));
  }
  for (const Range& other : {Range{0, 15}, Range{32, 40}}) {
    CHECK(!range.overlaps(other));
    CHECK(!other.overlaps(range));
  }
}

TEST(a_set_is_unknown_until_it_is_cleared) {
  PendingWrites& set = PendingWrites::of(next_device(), stream(0));
  CHECK(set.overlaps({1, 1}));
  set.clear();
  CHECK(!set.overlaps({1, 1}));
  set.append({1, 2});
  set.join({8, 9});
  CHECK(set.overlaps({2, 8}) && set.overlaps({9, 9}) && !set.overlaps({3, 7}));
  set.clear();
  CHECK(!set.overlaps({2, 8}));
}

TEST(a_full_set_is_unknown) {
  PendingWrites& set = PendingWrites::of(next_device(), stream(0));
  set.clear();
  for (int pass = 0; pass < 3; ++pass)  // what is in the set takes no room
    for (uintptr_t i = 0; i < PendingWrites::kRanges; ++i) set.join({16 * i, 16 * i + 7});
  CHECK(!set.overlaps({8, 15}) && set.overlaps({16 * (PendingWrites::kRanges - 1), ~uintptr_t{0}}));
  set.join({1 << 20, 1 << 20});
  CHECK(set.overlaps({8, 15}));
  set.clear();
  CHECK(!set.overlaps({0, ~uintptr_t{0}}));
}

TEST(sets_per_device_and_stream) {
  const int devices[2] = {next_device(), next_device()};
  const auto of = [&devices](int index, uintptr_t handle) -> PendingWrites& {
    return PendingWrites::of(devices[index], stream(handle));
  };
  of(0, 0).clear();
  of(0, 0).append({1, 1});
  of(1, 0).clear();  // the same handle on another device
  of(0, 7).clear();
  CHECK(of(0, 0).overlaps({1, 1}) && !of(0, 0).overlaps({2, 2}));
  CHECK(!of(1, 0).overlaps({1, 1}) && !of(0, 7).overlaps({1, 1}));
  std::thread([&of] {
    CHECK(of(0, 7).overlaps({5, 5}));  // a thread knows nothing of the others
    of(0, 7).clear();
    CHECK(!of(0, 7).overlaps({5, 5}));
  }).join();
  // More streams than sets: those that were thrown out are unknown when they return.
  for (uintptr_t handle = 100; handle < 100 + PendingWrites::kStreams; ++handle) of(0, handle).clear();
  CHECK(of(0, 0).overlaps({2, 2}));
  CHECK(!of(0, 100 + PendingWrites::kStreams - 1).overlaps({2, 2}));
}

// ---- launches ----

/// Launchers for one device, with the toy op's arguments: `quantize` writes result, scale and residual; `multiply` does
/// too, and reads weight and scale_ub early.
struct Table {
  const int device = next_device();  // before the launchers, which are tracked under it
  std::unique_ptr<CubinLauncher> quantize = make({});
  std::unique_ptr<CubinLauncher> multiply = make({kWeight, kScaleUb});
  std::unique_ptr<CubinLauncher> plain = make({}, false);
  std::unique_ptr<CubinLauncher> plain_multiply = make({kWeight}, false);
  CUresult answer = kCudaSuccess;
  bool pdl = false;  ///< of the last launch
  uint32_t others = 0;

  Table() { now = this; }

  std::unique_ptr<CubinLauncher> make(std::vector<uint8_t> early, bool is_pdl = true) {
    static const Driver driver = [] {
      Driver made = null_driver();
      made.launch = [](const LaunchConfig* config, CUfunction, void**, void**) {
        now->pdl = false;
        now->others = 0;
        for (uint32_t i = 0; i < config->attribute_count; ++i)
          if (config->attributes[i].id == kAttributeProgrammaticStreamSerialization)
            now->pdl = config->attributes[i].value.flag;
          else
            ++now->others;
        return now->answer;
      };
      return made;
    }();
    Record record;
    record.kernel = "kernel";
    record.grid = {expr("M"), expr(1), expr(1)};
    record.early = std::move(early);
    record.outputs = {{kResult, true}, {kScale, false}, {kResidual, true}};
    for (Cubin& cubin : record.cubins) {
      cubin.file = cubin.function = "code";
      cubin.num_warps = 1;
      cubin.pdl = is_pdl;
      cubin.cooperative = true;  // an attribute that stays
    }
    auto made = std::make_unique<CubinLauncher>(
        record, driver, [](const Cubin&, const std::vector<uint32_t>&) { return CUfunction{}; });
    made->track(static_cast<DeviceSlot>(device));
    return made;
  }

  /// Whether the launch had the PDL attribute.
  bool operator()(const CubinLauncher& launcher, const Call& call, uintptr_t handle = 0) {
    const LaunchResult result = launcher.launch(call, stream(handle));
    CHECK(result.status == (answer ? LaunchStatus::kDriver : LaunchStatus::kLaunched));
    CHECK_EQ(others, 1u);
    return pdl;
  }

  static inline Table* now = nullptr;
};

/// A call that writes to page `out` and the two after it, and reads `weight` and the page after it early.
Call call_of(uintptr_t out, uintptr_t weight, bool full = true) {
  Call call = toy_call(4, 64, full);
  call.sizes[kM] = 4;
  call.sizes[kK] = 64;
  const auto at = [&call](int arg, uintptr_t page) { call.tensors[arg].data = page * 4096; };
  at(kResult, out);
  at(kScale, out + 1);
  at(kResidual, out + 2);
  at(kWeight, weight);
  at(kScaleUb, weight + 1);
  return call;
}

TEST(what_was_just_written_is_not_read_early) {
  Table run;
  CHECK(run(*run.quantize, call_of(10, 90)));
  CHECK(run(*run.multiply, call_of(20, 80)));  // unrelated
  for (const uintptr_t weight : {8u, 9u, 10u, 11u, 12u}) {
    const bool is_free = weight == 8;
    CHECK(run(*run.quantize, call_of(10, 90)));
    CHECK_EQ(run(*run.multiply, call_of(20, weight)), is_free);
    CHECK(run(*run.multiply, call_of(20, weight)));  // the launch without the attribute ended all before it
    CHECK(!run(*run.multiply, call_of(30, 20)));     // which left what it writes itself
  }
  // The last byte, and the one after it: result is 256 bytes.
  for (const uintptr_t offset : {255u, 256u}) {
    Call call = call_of(20, 80);
    call.tensors[kWeight].data = 10 * 4096 + offset;
    run(*run.quantize, call_of(10, 90));
    CHECK_EQ(run(*run.multiply, call), offset == 256);
  }
}

TEST(a_launch_that_waits_first_ends_what_was_before) {
  Table run;
  run(*run.quantize, call_of(10, 90));
  run(*run.quantize, call_of(20, 90));
  CHECK(run(*run.multiply, call_of(30, 10)));
  run(*run.quantize, call_of(20, 90));
  run(*run.plain, call_of(40, 90));
  CHECK(run(*run.multiply, call_of(30, 20)));
  run(*run.plain, call_of(40, 90));
  CHECK(!run(*run.multiply, call_of(30, 40)));  // a plain launch may release its dependents too
}

TEST(a_chain_of_early_reads_hands_on_what_is_pending) {
  Table run;
  run(*run.quantize, call_of(10, 90));
  CHECK(run(*run.multiply, call_of(20, 80)));
  CHECK(run(*run.multiply, call_of(30, 80)));
  CHECK(!run(*run.multiply, call_of(40, 10)));  // three launches ago
  CHECK(run(*run.multiply, call_of(50, 10)));
  CHECK(run(*run.multiply, call_of(60, 20)));
  CHECK(!run(*run.multiply, call_of(70, 40)));
  CHECK(!run(*run.plain_multiply, call_of(80, 10)));  // never has the attribute, and ends all before it
  CHECK(run(*run.multiply, call_of(90, 70)));
}

TEST(a_long_chain_begins_anew_now_and_then) {
  Table run;
  run(*run.quantize, call_of(0, 990));
  int plain = 0;
  for (uintptr_t i = 1; i <= 100; ++i) plain += !run(*run.multiply, call_of(4 * i, 990));
  const int fillings = 100 / (PendingWrites::kRanges / 3 + 1);  // of a set, by three outputs a launch
  CHECK(plain >= fillings - 1 && plain <= fillings + 1);
  plain = 0;
  for (uintptr_t i = 1; i <= 100; ++i) plain += !run(*run.multiply, call_of(4 * (i % 8), 990));
  CHECK(plain <= 1);
}

TEST(the_first_launch_of_a_stream_reads_nothing_early) {
  Table run;
  CHECK(!run(*run.multiply, call_of(20, 80), 1));
  CHECK(run(*run.multiply, call_of(20, 80), 1));
  CHECK(run(*run.quantize, call_of(10, 90), 2));
  CHECK(run(*run.multiply, call_of(20, 10), 1));  // ordered by an event, if at all
  CHECK(!run(*run.multiply, call_of(20, 10), 2));
  std::thread([&run] { CHECK(!run(*run.multiply, call_of(20, 80), 1)); }).join();
  Table other;
  CHECK(!other(*other.multiply, call_of(20, 80), 1));
}

TEST(absent_outputs_are_not_written) {
  Table run;
  run(*run.quantize, call_of(10, 90, false));  // no residual, which would be at page 12
  Call call = call_of(20, 12);
  CHECK(run(*run.multiply, call));
}

TEST(a_launch_that_fails_ends_nothing) {
  Table run;
  run(*run.quantize, call_of(10, 90));
  run.answer = 719;
  run(*run.quantize, call_of(20, 90));
  CHECK(!run(*run.multiply, call_of(20, 10)));
  run.answer = kCudaSuccess;
  CHECK(!run(*run.multiply, call_of(30, 10)));
  CHECK(run(*run.multiply, call_of(30, 10)));
}

TEST(launchers_that_are_not_tracked_keep_the_attribute) {
  Record record;
  record.kernel = "kernel";
  record.grid = {expr("M"), expr(1), expr(1)};
  record.early = {kWeight};
  record.cubins[2].file = "code";
  record.cubins[2].num_warps = 1;
  record.cubins[2].pdl = true;
  NullFunction function;
  const CubinLauncher launcher(record, null_driver(), [&function](const Cubin&, const std::vector<uint32_t>&) {
    return reinterpret_cast<CUfunction>(&function);
  });
  null_record(true);
  Call call = call_of(10, 10);
  call.sizes[kM] = 5;
  for (int i = 0; i < 2; ++i) launcher.launch(call, nullptr);
  null_record(false);
  for (const NullLaunch& launch : null_launches()) CHECK_EQ(launch.attributes.size(), 1u);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
