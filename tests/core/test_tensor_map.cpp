// test_tensor_map.cpp -- a call -> a TMA descriptor: what the driver is asked for, how often, and what is refused.
#include "tensor_map.h"

#include <cstring>
#include <thread>

#include "calls.h"
#include "cubin_launcher.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

/// The null driver's encoder, counting; and one that refuses.
std::atomic<int> encoded{0};
decltype(Driver::tensor_map_encode) null_encode;

CUresult count(TensorMap* out, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
               const uint32_t* box, const uint32_t* ones, int interleave, int swizzle, int promotion, int fill) {
  ++encoded;
  return null_encode(out, type, rank, address, dims, strides, box, ones, interleave, swizzle, promotion, fill);
}
CUresult refuse(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*,
                int, int, int, int) {
  return kCudaInvalidValue;
}
CUresult all_ones(TensorMap* out, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                  const uint32_t*, int, int, int, int) {
  for (uint64_t& word : out->words) word = ~uint64_t{0};
  return kCudaSuccess;
}

Driver counting() {
  encoded = 0;
  Driver driver = null_driver();
  null_encode = driver.tensor_map_encode;
  driver.tensor_map_encode = count;
  return driver;
}

/// The input of the toy op, bfloat16 [M, K] with free rows, in boxes of 128 x 64.
Param input_map() {
  Param param;
  param.kind = ParamKind::kTensorMap;
  param.arg = kInput;
  param.align = 16;
  param.value = expr(0);
  param.name = "input";
  param.map = {kMapBFloat16, {expr("M"), expr("K")}, {expr("input.stride(0)")}, {128, 64}, 128, false};
  return param;
}

Call bound(int64_t m, int64_t k) {
  Call call = toy_call(m, k);
  call.sizes[kM] = m;
  call.sizes[kK] = k;
  call.sizes[kN] = 0;
  return call;
}

NullTensorMap read(const TensorMap& map) {
  NullTensorMap out;
  std::memcpy(&out, &map, sizeof out);
  CHECK_EQ(out.magic, NullTensorMap::kMagic);
  return out;
}

NullTensorMap made(const TensorMapMaker& maker, const Call& call) {
  TensorMap map;
  CHECK(maker.make(call, map));
  return read(map);
}

TEST(what_the_driver_is_asked_for) {
  const Driver driver = counting();
  const Param param = input_map();
  const TensorMapMaker maker("kernel", param, driver);
  Call call = bound(7, 640);
  call.tensors[kInput].strides[0] = 768;
  const NullTensorMap map = made(maker, call);
  CHECK_EQ(map.address, call.tensors[kInput].data);
  CHECK_EQ(int{map.type}, int{kMapBFloat16});
  CHECK_EQ(int{map.rank}, 2);
  CHECK_EQ(map.dims[0], 640u);  // innermost first
  CHECK_EQ(map.dims[1], 7u);
  CHECK_EQ(map.strides[0], 2 * 768u);  // bytes
  CHECK_EQ(map.strides[1], 0u);
  CHECK_EQ(map.box[0], 64u);
  CHECK_EQ(map.box[1], 128u);
  CHECK_EQ(int{map.swizzle}, 3);
  CHECK_EQ(int{map.fill}, 0);
}

TEST(every_rank_type_swizzle_and_fill) {
  const Driver driver = counting();
  const std::pair<int, uint32_t> types[] = {{kMapUInt8, 1},   {kMapUInt16, 2},  {kMapInt32, 4},   {kMapFloat16, 2},
                                            {kMapFloat32, 4}, {kMapFloat64, 8}, {kMapTFloat32, 4}};
  for (const auto& [type, bytes] : types)
    for (uint32_t rank = 1; rank <= kMaxMapRank; ++rank)
      for (const uint32_t swizzle : {0u, 32u, 64u, 128u}) {
        Param param = input_map();
        param.value = expr("M", 16, "*");
        param.map = {static_cast<TensorMapType>(type), {}, {}, {}, swizzle, rank % 2 == 1};
        for (uint32_t i = 0; i < rank; ++i) {
          param.map.shape.push_back(i % 2 ? expr("M", static_cast<int>(i), "+") : expr(static_cast<int>(i) + 10));
          param.map.box.push_back(i + 1 < rank ? i + 1 : 16 / bytes);
          if (i + 1 < rank)
            param.map.strides.push_back(i % 2 ? expr("K", 16, "*") : expr(160 + 16 * static_cast<int>(i)));
        }
        const TensorMapMaker maker("kernel", param, driver);
        const Call call = bound(3, 64);
        const NullTensorMap map = made(maker, call);
        CHECK_EQ(map.address, call.tensors[kInput].data + 48);
        CHECK_EQ(int{map.type}, type);
        CHECK_EQ(int{map.rank}, static_cast<int>(rank));
        CHECK_EQ(int{map.fill}, static_cast<int>(rank % 2));
        CHECK_EQ(16 << map.swizzle, swizzle ? static_cast<int>(swizzle) : 16);
        for (uint32_t i = 0; i < rank; ++i) {
          const uint32_t at = rank - 1 - i;
          CHECK_EQ(map.dims[at], i % 2 ? 3u + i : 10u + i);
          if (i + 1 < rank) CHECK_EQ(map.box[at], i + 1);
          if (i + 1 < rank) CHECK_EQ(map.strides[at - 1], bytes * (i % 2 ? 64u * 16 : 160u + 16 * i));
        }
      }
}

TEST(the_same_numbers_cost_one_driver_call) {
  const Driver driver = counting();
  const Param param = input_map();
  const TensorMapMaker maker("kernel", param, driver);
  Call call = bound(7, 640);
  const NullTensorMap first = made(maker, call);
  for (int i = 0; i < 10; ++i) CHECK(!std::memcmp(&first, std::array{made(maker, call)}.data(), sizeof first));
  CHECK_EQ(encoded.load(), 1);
  std::thread([&] { made(maker, call); }).join();  // a thread begins with nothing
  CHECK_EQ(encoded.load(), 2);
  // The same pointer with another M, another stride, another K; another pointer; and each of them again.
  Call others[4] = {bound(8, 640), call, bound(7, 704), call};
  others[1].tensors[kInput].strides[0] = 1024;
  others[3].tensors[kInput].data += 4096;
  for (int round = 0; round < 2; ++round) {
    CHECK_EQ(made(maker, others[0]).dims[1], 8u);
    CHECK_EQ(made(maker, others[1]).strides[0], 2048u);
    CHECK_EQ(made(maker, others[2]).dims[0], 704u);
    CHECK_EQ(made(maker, others[3]).address, call.tensors[kInput].data + 4096);
    CHECK_EQ(made(maker, call).dims[1], 7u);
  }
  CHECK_EQ(encoded.load(), 6);
}

TEST(many_weights_stay_and_no_number_of_maps_is_wrong) {
  const Driver driver = counting();
  Param param = input_map();
  param.map.shape[0] = expr(4096);
  param.map.strides[0] = expr(640);
  const TensorMapMaker maker("kernel", param, driver);
  Call call = bound(7, 640);
  const auto use = [&](uintptr_t count) {
    for (uintptr_t i = 0; i < count; ++i) {
      call.tensors[kInput].data = (uintptr_t{1} << 40) + i * (uintptr_t{4096} * 640 * 2);
      CHECK_EQ(made(maker, call).address, call.tensors[kInput].data);
    }
  };
  use(200);  // a large model has a hundred layers
  encoded = 0;
  for (int round = 0; round < 10; ++round) use(200);
  CHECK(encoded < 200);  // of 2000: a set of the cache may have more than its share
  for (int round = 0; round < 3; ++round) use(5000);
}

TEST(makers_do_not_share_maps) {
  const Driver driver = counting();
  const Param wide = input_map();
  Param tall = wide;
  tall.map.box = {64, 32};
  const Call call = bound(7, 640);
  for (int i = 0; i < 100; ++i) {  // one after the other in the same memory
    CHECK_EQ(made(TensorMapMaker("kernel", wide, driver), call).box[1], 128u);
    CHECK_EQ(made(TensorMapMaker("kernel", tall, driver), call).box[1], 64u);
  }
  CHECK_EQ(encoded.load(), 200);
}

TEST(threads_do_not_mix_their_maps) {
  const Driver driver = counting();
  const Param param = input_map();
  const TensorMapMaker maker("kernel", param, driver);
  constexpr int kThreads = 4;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&maker, t] {
      Random random(static_cast<uint64_t>(t));
      for (int i = 0; i < 20000; ++i) {
        // Thrice as many maps as a cache holds, in ever changing order.
        Call call = bound(random.in(1, 64), 64 * random.in(1, 4));
        call.tensors[kInput].data = 4096 * static_cast<uintptr_t>(random.in(1, 12));
        const NullTensorMap map = made(maker, call);
        CHECK_EQ(map.address, call.tensors[kInput].data);
        CHECK_EQ(map.dims[1], static_cast<uint64_t>(call.sizes[kM]));
        CHECK_EQ(map.dims[0], static_cast<uint64_t>(call.sizes[kK]));
        CHECK_EQ(map.strides[0], 2 * static_cast<uint64_t>(call.sizes[kK]));
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(encoded > 3072);
}

TEST(what_tma_cannot_do_is_refused) {
  const Driver driver = counting();
  const auto objection = [&driver](const Param& param, const Call& call) {
    const TensorMapMaker maker("kernel", param, driver);
    TensorMap map;
    CHECK(!maker.make(call, map));
    CHECK(!maker.make(call, map));
    return maker.objection(call);
  };
  const auto with_shape = [](Expr size) {
    Param param = input_map();
    param.map.shape[0] = std::move(size);
    return param;
  };
  Call call = bound(7, 640);
  call.tensors[kInput].data += 8;
  CHECK_CONTAINS(objection(input_map(), call), "address 0x2008, sizes [7, 640], strides [640, 1] of 2-byte elements");
  for (const int64_t stride : {int64_t{641}, int64_t{644}, int64_t{-640}, int64_t{1} << 39, INT64_MAX - 7, INT64_MIN}) {
    call = bound(7, 640);
    call.tensors[kInput].strides[0] = stride;
    CHECK_CONTAINS(objection(input_map(), call), text("strides [", stride, ", 1]"));
  }
  for (const int64_t size : {int64_t{0}, int64_t{-1}, (int64_t{1} << 32) + 1})
    CHECK_CONTAINS(objection(with_shape(expr(size)), bound(7, 640)), text("sizes [", size, ", 640]"));
  CHECK_EQ(objection(with_shape(expr(1, "M", 7, "-", "//")), bound(7, 640)), "a size or stride has no value");
  CHECK_EQ(encoded.load(), 0);
  Driver unwilling = driver;
  unwilling.tensor_map_encode = refuse;
  const Param param = input_map();
  const TensorMapMaker maker("kernel", param, unwilling);
  TensorMap map;
  CHECK(!maker.make(bound(7, 640), map));
  CHECK_EQ(maker.objection(bound(7, 640)), "cuTensorMapEncodeTiled answers 1");
  // At the limits.
  call = bound(7, 640);
  call.tensors[kInput].strides[0] = (int64_t{1} << 39) - 8;
  const Param large = with_shape(expr(int64_t{1} << 32));
  CHECK_EQ(made(TensorMapMaker("kernel", large, driver), call).strides[0], (uint64_t{1} << 40) - 16);
}

TEST(small_maps_lose_a_bit_that_old_drivers_set) {
  Driver driver = counting();
  driver.tensor_map_encode = all_ones;
  const auto bit_85 = [&driver](int version, int64_t m) {
    static int answer;
    answer = version;
    driver.driver_version = [](int* out) -> CUresult { return *out = answer, kCudaSuccess; };
    const Param param = input_map();
    const TensorMapMaker maker("kernel", param, driver);
    TensorMap map;
    CHECK(maker.make(bound(m, 640), map));
    CHECK_EQ(map.words[1] | uint64_t{1} << 21, ~uint64_t{0});
    return map.words[1] >> 21 & 1;
  };
  CHECK_EQ(bit_85(13010, 102), 0u);  // 102 * 640 * 2 = 130560 bytes
  CHECK_EQ(bit_85(13010, 103), 1u);
  CHECK_EQ(bit_85(13020, 102), 1u);
}

TEST(maps_that_no_call_could_have) {
  const Driver driver = counting();
  const auto with = [&driver](auto change) {
    Param param = input_map();
    change(param.map);
    const TensorMapMaker maker("kernel", param, driver);
  };
  CHECK_FAULT(kBundle, "kernel: the tensor map of input has 0 sizes", with([](auto& m) { m.shape.clear(); }));
  CHECK_FAULT(kBundle, "2 sizes, 0 strides and a box of 2", with([](auto& m) { m.strides.clear(); }));
  CHECK_FAULT(kBundle, "2 sizes, 1 strides and a box of 3", with([](auto& m) { m.box.push_back(1); }));
  CHECK_FAULT(kBundle, "a box of 257 elements", with([](auto& m) { m.box[0] = 257; }));
  CHECK_FAULT(kBundle, "a box of 0 elements", with([](auto& m) { m.box[1] = 0; }));
  CHECK_FAULT(kBundle, "a box 256 bytes wide", with([](auto& m) { m.box[1] = 128; }));
  CHECK_FAULT(kBundle, "a box 8 bytes wide", with([](auto& m) { m.box[1] = 4; }));
  CHECK_FAULT(kBundle, "a swizzle of 16 bytes", with([](auto& m) { m.swizzle = 16; }));
  CHECK_FAULT(kBundle, "no tensor map that hdispatch can make",
              with([](auto& m) { m.type = static_cast<TensorMapType>(13); }));
}

// ---- as a parameter of a kernel ----

Record map_record(uint32_t maps = 1) {
  Record record;
  record.kernel = "copy";
  record.grid = {expr("M", 127, "+", 128, "//"), expr(1), expr(1)};
  Param m;
  m.kind = ParamKind::kI32;
  m.value = expr("M");
  record.params = {m};
  Cubin& code = record.cubins[static_cast<size_t>(MClass::kOther)];
  code.file = code.function = "other";
  code.num_warps = 4;
  code.params = {0};
  for (uint32_t i = 0; i < maps; ++i) {
    record.params.push_back(input_map());
    record.params.back().map.box[0] = i + 1;
    record.params.push_back(m);
    code.params.insert(code.params.end(), {2 * i + 1, 2 * i + 2});
  }
  return record;
}

CUfunction null_function(const Cubin& which, const std::vector<uint32_t>& param_bytes) {
  static std::vector<std::unique_ptr<NullFunction>> all;
  all.push_back(std::make_unique<NullFunction>(NullFunction{which.function, which.file, param_bytes}));
  return reinterpret_cast<CUfunction>(all.back().get());
}

TEST(a_launch_passes_maps_by_value) {
  const CubinLauncher launcher(map_record(CubinLauncher::kMaxTensorMaps), null_driver(), null_function);
  null_record(true);
  for (const int64_t m : {7, 7, 9}) CHECK(launcher.launch(bound(m, 640), nullptr).status == LaunchStatus::kLaunched);
  null_record(false);
  const int64_t ms[] = {7, 7, 9};
  for (size_t at = 0; at < 3; ++at) {
    const NullLaunch launch = null_launches().at(at);
    CHECK_EQ(launch.params.size(), 2 * CubinLauncher::kMaxTensorMaps + 3u);
    for (size_t i = 0; i < CubinLauncher::kMaxTensorMaps; ++i) {
      const std::vector<uint8_t>& bytes = launch.params.at(2 * i + 1);
      CHECK_EQ(bytes.size(), sizeof(TensorMap));
      TensorMap map;
      std::memcpy(&map, bytes.data(), sizeof map);
      CHECK_EQ(read(map).box[1], i + 1);
      CHECK_EQ(read(map).dims[1], static_cast<uint64_t>(ms[at]));
      CHECK_EQ(int64_t{launch.params.at(2 * i)[0]}, ms[at]);
    }
  }
  CHECK_FAULT(kBundle, "other: takes 9 tensor maps; a kernel takes at most 8",
              CubinLauncher(map_record(9), null_driver(), null_function));
}

TEST(a_launch_whose_map_cannot_be_is_a_failed_guard) {
  const CubinLauncher launcher(map_record(2), null_driver(), null_function);
  Call call = bound(7, 640);
  call.tensors[kInput].data += 2;
  LaunchResult result = launcher.launch(call, nullptr);
  CHECK(result.status == LaunchStatus::kAlign && result.detail == 1);
  CHECK_EQ(launcher.reason(result), "guard: input is 16-byte aligned");
  CHECK_CONTAINS(launcher.describe(result, call), "its address 0x2002 is 2 past a multiple of 16)");
  call = bound(7, 640);
  call.tensors[kInput].strides[0] = 641;
  result = launcher.launch(call, nullptr);
  CHECK(result.status == LaunchStatus::kMap && result.detail == 1);
  CHECK_EQ(launcher.reason(result), "guard: input fits a TMA descriptor");
  CHECK_CONTAINS(launcher.describe(result, call),
                 "guard: input fits a TMA descriptor does not hold in copy (M = 7, K = 640, N = 0, address 0x2000, "
                 "sizes [7, 640], strides [641, 1] of 2-byte elements; it takes sizes from 1 to 2^32, and ");
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
