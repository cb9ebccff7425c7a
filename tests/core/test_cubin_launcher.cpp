// test_cubin_launcher.cpp -- a record and a call -> what the driver gets; every refusal; drivers that fail.
#include "cubin_launcher.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>

#include "calls.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

// ---- a driver of our own ----

/// What the fake driver answers and what it saw. One at a time.
struct FakeDriver {
  CUresult launch_answer = kCudaSuccess;
  CUresult load_answer = kCudaSuccess;
  CUresult set_answer = kCudaSuccess;
  std::vector<size_t> declared;  ///< sizes of the loaded function's parameters
  int launches = 0;
  int loads = 0;
  std::map<int, int> set;  ///< function attributes
  LaunchConfig config{};
  CUfunction function = nullptr;
};

FakeDriver fake;

CUresult fake_launch(const LaunchConfig* config, CUfunction function, void**, void** extra) {
  CHECK(extra == nullptr);
  ++fake.launches;
  fake.config = *config;
  fake.function = function;
  return fake.launch_answer;
}
CUresult fake_load(CUfunction) {
  ++fake.loads;
  return fake.load_answer;
}
CUresult fake_set(CUfunction, int attribute, int value) {
  fake.set[attribute] = value;
  return fake.set_answer;
}
CUresult fake_param_info(CUfunction, size_t index, size_t* offset, size_t* bytes) {
  if (index >= fake.declared.size()) return kCudaInvalidValue;
  *offset = 8 * index;
  *bytes = fake.declared[index];
  return kCudaSuccess;
}
CUresult fake_name(CUresult, const char** out) {
  *out = "CUDA_ERROR_FAKE";
  return kCudaSuccess;
}
CUresult fake_text(CUresult, const char** out) {
  *out = "made up for a test";
  return kCudaSuccess;
}
CUresult unknown_text(CUresult, const char**) { return kCudaInvalidValue; }

Driver make_fake(bool has_param_info = false) {
  fake = FakeDriver{};
  Driver driver = null_driver();
  driver.name = "fake";
  driver.launch = fake_launch;
  driver.error_name = fake_name;
  driver.error_string = fake_text;
  driver.function_set = fake_set;
  driver.function_load = fake_load;
  driver.function_param_info = has_param_info ? fake_param_info : nullptr;
  return driver;
}

const CUfunction kFakeFunction = reinterpret_cast<CUfunction>(uintptr_t{0x1000});

// ---- records ----

Param pointer(int arg, uint32_t align = 1, Expr offset = {}) {
  Param param;
  param.kind = ParamKind::kPtr;
  param.arg = arg;
  param.align = align;
  param.value = std::move(offset);
  return param;
}

Param integer(ParamKind kind, Expr value) {
  Param param;
  param.kind = kind;
  param.value = std::move(value);
  return param;
}

Param real(ParamKind kind, int arg, double constant = 0) {
  Param param;
  param.kind = kind;
  param.arg = arg;
  param.constant = constant;
  return param;
}

Cubin cubin(const std::string& file, std::vector<uint32_t> params) {
  Cubin made;
  made.file = file;
  made.function = file + "_kernel";
  made.params = std::move(params);
  made.num_warps = 4;
  return made;
}

/// Grid ceil(M / 4) x 1 x 1, result and M; code for every class, without M for M == 1.
Record small_record() {
  Record record;
  record.kernel = "small";
  record.grid = {expr("M", 3, "+", 4, "//"), expr(1), expr(1)};
  record.params = {pointer(kResult, 16), integer(ParamKind::kI32, expr("M"))};
  record.cubins = {cubin("one", {0}), cubin("mult16", {0, 1}), cubin("other", {0, 1})};
  return record;
}

/// Small, with something changed.
Record changed(const std::function<void(Record&)>& change) {
  Record record = small_record();
  change(record);
  return record;
}

CubinLauncher make(Record record, const Driver& driver, bool pdl = true) {
  return CubinLauncher(
      std::move(record), driver, [](const Cubin&, const std::vector<uint32_t>&) { return kFakeFunction; }, pdl);
}

/// Functions of the null driver, which know their parameters' sizes. Kept for ever.
CUfunction null_function(const Cubin& which, const std::vector<uint32_t>& param_bytes) {
  static std::vector<std::unique_ptr<NullFunction>> all;
  all.push_back(std::make_unique<NullFunction>(NullFunction{which.function, which.file, param_bytes}));
  return reinterpret_cast<CUfunction>(all.back().get());
}

/// A call with its sizes set, as `Op::bind` leaves it.
Call bound(int64_t m, int64_t k, bool full = false) {
  Call call = toy_call(m, k, full);
  call.sizes[kM] = m;
  call.sizes[kK] = k;
  call.sizes[kN] = 0;
  return call;
}

NullLaunch launched(const Record& record, const Call& call, bool pdl = true) {
  const CubinLauncher launcher(record, null_driver(), null_function, pdl);
  null_record(true);
  const LaunchResult result = launcher.launch(call, nullptr);
  null_record(false);
  CHECK(result.status == LaunchStatus::kLaunched);
  const auto all = null_launches();
  CHECK_EQ(all.size(), 1u);
  return all.at(0);
}

LaunchResult refused(const Record& record, const Call& call) {
  const Driver driver = make_fake();
  const LaunchResult result = make(record, driver).launch(call, nullptr);
  CHECK_EQ(fake.launches, 0);
  return result;
}

template <typename T>
T as(const std::vector<uint8_t>& bytes) {
  CHECK_EQ(bytes.size(), sizeof(T));
  T out{};
  std::memcpy(&out, bytes.data(), std::min(sizeof(T), bytes.size()));
  return out;
}

// ---- what is launched ----

TEST(every_kind_of_parameter) {
  Record record;
  record.kernel = "all";
  record.grid = {expr("M"), expr("K"), expr(7)};
  record.params = {
      pointer(kInput),
      pointer(kResult, 16, expr(48)),
      pointer(kInput, 1, expr("input.stride(0)", 2, "*", 3, "*")),
      integer(ParamKind::kI1, expr("M", 2, ">")),
      integer(ParamKind::kI8, expr(-128)),
      integer(ParamKind::kI8, expr("M", -5, "-", -1, "*")),
      integer(ParamKind::kI16, expr(-2)),
      integer(ParamKind::kI32, expr(INT32_MIN)),
      integer(ParamKind::kI32, expr("input.stride(0)")),
      integer(ParamKind::kI64, expr("M", 1 << 30, "*", 1 << 10, "*")),
      integer(ParamKind::kI64, expr(INT64_MIN)),
      real(ParamKind::kF32, kEpsilon),
      real(ParamKind::kF64, kEpsilon),
      real(ParamKind::kF32, -1, 0.1),
      real(ParamKind::kF64, -1, 0.1),
      real(ParamKind::kF32, -1, -std::numeric_limits<double>::infinity()),
  };
  std::vector<uint32_t> all;
  for (uint32_t i = 0; i < record.params.size(); ++i) all.push_back(i);
  record.cubins[static_cast<size_t>(MClass::kOther)] = cubin("other", all);
  Call call = bound(5, 640);
  call.tensors[kInput].strides[0] = 768;
  const NullLaunch launch = launched(record, call);
  CHECK_EQ(launch.function, "other_kernel");
  CHECK_EQ(launch.file, "other");
  CHECK_EQ(launch.params.size(), 18u);
  size_t i = 0;
  CHECK_EQ(as<uint64_t>(launch.params[i++]), call.tensors[kInput].data);
  CHECK_EQ(as<uint64_t>(launch.params[i++]), call.tensors[kResult].data + 48);
  CHECK_EQ(as<uint64_t>(launch.params[i++]), call.tensors[kInput].data + 3 * 2 * 768);
  CHECK_EQ(int{as<uint8_t>(launch.params[i++])}, 1);
  CHECK_EQ(int{as<int8_t>(launch.params[i++])}, -128);
  CHECK_EQ(int{as<int8_t>(launch.params[i++])}, -10);
  CHECK_EQ(as<int16_t>(launch.params[i++]), -2);
  CHECK_EQ(as<int32_t>(launch.params[i++]), INT32_MIN);
  CHECK_EQ(as<int32_t>(launch.params[i++]), 768);
  CHECK_EQ(as<int64_t>(launch.params[i++]), int64_t{5} << 40);
  CHECK_EQ(as<int64_t>(launch.params[i++]), INT64_MIN);
  CHECK_EQ(as<float>(launch.params[i++]), 1e-6f);
  CHECK_EQ(as<double>(launch.params[i++]), 1e-6);
  CHECK_EQ(as<float>(launch.params[i++]), 0.1f);
  CHECK_EQ(as<double>(launch.params[i++]), 0.1);
  CHECK_EQ(as<float>(launch.params[i++]), -std::numeric_limits<float>::infinity());
  // The two hidden scratch pointers.
  CHECK_EQ(as<uint64_t>(launch.params[i++]), 0u);
  CHECK_EQ(as<uint64_t>(launch.params[i++]), 0u);
  CHECK_EQ(launch.config.grid[0], 5u);
  CHECK_EQ(launch.config.grid[1], 640u);
  CHECK_EQ(launch.config.grid[2], 7u);
  CHECK_EQ(launch.config.block[0], 128u);
  CHECK_EQ(launch.config.block[1], 1u);
  CHECK_EQ(launch.config.block[2], 1u);
}

TEST(classes_of_m) {
  const struct {
    int64_t m;
    const char* file;
    size_t params;
  } cases[] = {{1, "one", 3},    {2, "other", 4},   {3, "other", 4},    {15, "other", 4},    {16, "mult16", 4},
               {17, "other", 4}, {32, "mult16", 4}, {1000, "other", 4}, {8192, "mult16", 4}, {8191, "other", 4}};
  for (const auto& c : cases) {
    const NullLaunch launch = launched(small_record(), bound(c.m, 64));
    CHECK_EQ(launch.file, c.file);
    CHECK_EQ(launch.params.size(), c.params);
    CHECK_EQ(launch.config.grid[0], static_cast<uint32_t>((c.m + 3) / 4));
    if (c.params == 4) CHECK_EQ(as<int32_t>(launch.params[1]), c.m);
  }
}

TEST(attributes) {
  const auto attributes = [](bool pdl, bool cooperative, uint32_t cluster, bool allow_pdl = true) {
    Record record = small_record();
    Cubin& code = record.cubins[static_cast<size_t>(MClass::kOther)];
    code.pdl = pdl;
    code.cooperative = cooperative;
    code.cluster = {cluster, 1, 1};
    return launched(record, bound(5, 64), allow_pdl);
  };
  CHECK(attributes(false, false, 1).attributes.empty());
  NullLaunch launch = attributes(true, false, 1);
  CHECK_EQ(launch.attributes.size(), 1u);
  CHECK_EQ(launch.config.attribute_count, 1u);
  CHECK_EQ(launch.attributes[0].id, uint32_t{kAttributeProgrammaticStreamSerialization});
  CHECK_EQ(launch.attributes[0].value.flag, 1);
  CHECK(attributes(true, false, 1, false).attributes.empty());
  launch = attributes(false, true, 1);
  CHECK_EQ(launch.attributes.size(), 1u);
  CHECK_EQ(launch.attributes[0].id, uint32_t{kAttributeCooperative});
  launch = attributes(true, true, 2);
  CHECK_EQ(launch.attributes.size(), 4u);
  CHECK_EQ(launch.attributes[2].id, uint32_t{kAttributeClusterDimension});
  CHECK_EQ(launch.attributes[2].value.cluster.x, 2u);
  CHECK_EQ(launch.attributes[2].value.cluster.y, 1u);
  CHECK_EQ(launch.attributes[2].value.cluster.z, 1u);
  CHECK_EQ(launch.attributes[3].id, uint32_t{kAttributeClusterSchedulingPolicy});
  CHECK_EQ(launch.config.grid[0], 4u);  // ceil(5 / 4) clusters of 2 blocks
  CHECK_EQ(attributes(false, false, 16).config.grid[0], 32u);
}

TEST(shared_memory_and_clusters_opt_in) {
  Driver driver = make_fake();
  const auto prepare = [&driver](uint32_t shared, uint32_t cluster) {
    driver = make_fake();
    make(changed([&](Record& record) {
           record.cubins = {};
           record.cubins[2] = cubin("other", {0});
           record.cubins[2].shared_bytes = shared;
           record.cubins[2].cluster = {cluster, 1, 1};
         }),
         driver);
    CHECK_EQ(fake.loads, 1);  // at once, never on a call
    return fake.set;
  };
  CHECK(prepare(0, 1).empty());
  CHECK(prepare(48 * 1024, 8).empty());
  CHECK((prepare(48 * 1024 + 1, 1) == std::map<int, int>{{kFunctionMaxDynamicSharedBytes, 48 * 1024 + 1}}));
  CHECK((prepare(227 * 1024, 1) == std::map<int, int>{{kFunctionMaxDynamicSharedBytes, 227 * 1024}}));
  CHECK((prepare(0, 16) == std::map<int, int>{{kFunctionNonPortableCluster, 1}}));
}

TEST(the_driver_gets_stream_function_and_shared_memory) {
  const Driver driver = make_fake();
  const CubinLauncher launcher = make(changed([](Record& record) { record.cubins[2].shared_bytes = 1234; }), driver);
  const auto stream = reinterpret_cast<CUstream>(uintptr_t{0x77});
  CHECK(launcher.launch(bound(5, 64), stream).status == LaunchStatus::kLaunched);
  CHECK_EQ(fake.launches, 1);
  CHECK(fake.config.stream == stream);
  CHECK(fake.function == kFakeFunction);
  CHECK_EQ(fake.config.shared_bytes, 1234u);
  CHECK_EQ(fake.config.attribute_count, 0u);
}

// ---- what is refused on a call ----

TEST(range_of_m) {
  Record record = small_record();
  record.m_min = 2;
  record.m_max = 100;
  for (const int64_t m : {1, 101, 1 << 20}) {
    const LaunchResult result = refused(record, bound(m, 64));
    CHECK(result.status == LaunchStatus::kMRange);
    const CubinLauncher launcher = make(record, make_fake());
    CHECK_EQ(launcher.reason(result), "guard: 2 <= M <= 100");
    CHECK_CONTAINS(launcher.describe(result, bound(m, 64)),
                   text("guard: 2 <= M <= 100 does not hold in small (M = ", m, ", K = 64, N = 0)"));
  }
  launched(record, bound(2, 64));
  launched(record, bound(100, 64));
}

TEST(class_without_code) {
  const Record record = changed([](Record& made) { made.cubins[0] = {}; });
  const LaunchResult result = refused(record, bound(1, 64));
  CHECK(result.status == LaunchStatus::kClass);
  CHECK_EQ(make(record, make_fake()).reason(result), "guard: code for this class of M");
  launched(record, bound(2, 64));
}

TEST(guards) {
  const Record record = changed([](Record& made) {
    made.guards = {{expr("K", 64, "=="), "K == 64"},
                   {expr("input.stride(0)", 16, "%", 0, "=="), "input.stride(0) % 16 == 0"},
                   {expr(1, "K", 64, "-", 0, "min", "//"), "a guard without a value"}};
  });
  Call call = bound(4, 64);
  LaunchResult result = refused(record, call);  // 1 // min(0, 0)
  CHECK(result.status == LaunchStatus::kGuard && result.detail == 2);
  call.tensors[kInput].strides[0] = 72;
  result = refused(record, call);
  CHECK(result.status == LaunchStatus::kGuard && result.detail == 1);
  CHECK_EQ(make(record, make_fake()).reason(result), "guard: input.stride(0) % 16 == 0");
  result = refused(record, bound(4, 32));
  CHECK(result.status == LaunchStatus::kGuard && result.detail == 0);
}

TEST(alignment) {
  for (const uint32_t align : {1u, 2u, 4u, 16u, 128u})
    for (uintptr_t past = 0; past < 20; ++past) {
      const Record record = changed([&](Record& made) { made.params[0] = pointer(kResult, align); });
      Call call = bound(4, 64);
      call.tensors[kResult].data += past;
      if (past % align == 0) {
        launched(record, call);
        continue;
      }
      const LaunchResult result = refused(record, call);
      CHECK(result.status == LaunchStatus::kAlign && result.detail == 0);
      const CubinLauncher launcher = make(record, make_fake());
      CHECK_EQ(launcher.reason(result), text("guard: ", record.params[0].name, " is ", align, "-byte aligned"));
      CHECK_CONTAINS(launcher.describe(result, call), text(" is ", past % align, " past a multiple of ", align));
    }
  // What is aligned is the address that is passed, offset included.
  const Record record = changed([](Record& made) { made.params[0] = pointer(kResult, 16, expr(8)); });
  Call call = bound(4, 64);
  const LaunchResult result = refused(record, call);
  CHECK(result.status == LaunchStatus::kAlign);
  CHECK_CONTAINS(make(record, make_fake()).describe(result, call), " is 8 past a multiple of 16");
  call.tensors[kResult].data += 8;
  CHECK_EQ(as<uint64_t>(launched(record, call).params[0]), call.tensors[kResult].data + 8);
}

TEST(integers_that_do_not_fit) {
  const struct {
    ParamKind kind;
    int64_t low, high;
  } cases[] = {{ParamKind::kI1, 0, 1},
               {ParamKind::kI8, INT8_MIN, INT8_MAX},
               {ParamKind::kI16, INT16_MIN, INT16_MAX},
               {ParamKind::kI32, INT32_MIN, INT32_MAX}};
  for (const auto& c : cases) {
    // The stride of the input takes any value.
    const Record record = changed([&](Record& made) { made.params[1] = integer(c.kind, expr("input.stride(0)")); });
    for (const int64_t value : {c.low - 1, c.low, c.high, c.high + 1}) {
      Call call = bound(4, 64);
      call.tensors[kInput].strides[0] = value;
      if (value >= c.low && value <= c.high) {
        launched(record, call);
        continue;
      }
      const LaunchResult result = refused(record, call);
      CHECK(result.status == LaunchStatus::kParam && result.detail == 1);
      CHECK_EQ(make(record, make_fake()).reason(result), "guard: param 1 fits its type");
    }
  }
  // No value at all.
  CHECK(refused(changed([](Record& made) { made.params[1] = integer(ParamKind::kI64, expr(1, "K", 64, "-", "//")); }),
                bound(4, 64))
            .status == LaunchStatus::kParam);
  CHECK(refused(changed([](Record& made) { made.params[0] = pointer(kResult, 1, expr(1, "K", 64, "-", "//")); }),
                bound(4, 64))
            .status == LaunchStatus::kParam);
}

TEST(grid_limits) {
  const auto record = [](Expr x, Expr y, Expr z, uint32_t cluster = 1) {
    return changed([&](Record& made) {
      made.grid = {x, y, z};
      for (Cubin& code : made.cubins) code.cluster = {cluster, 1, 1};
    });
  };
  constexpr int64_t kX = 0x7fffffff, kYz = 65535;
  CHECK_EQ(launched(record(expr(kX), expr(kYz), expr(kYz)), bound(4, 64)).config.grid[0], 0x7fffffffu);
  const Record bad[] = {record(expr(kX + 1), expr(1), expr(1)),
                        record(expr(0), expr(1), expr(1)),
                        record(expr(-1), expr(1), expr(1)),
                        record(expr(int64_t{1} << 32), expr(1), expr(1)),
                        record(expr((int64_t{1} << 32) + 1), expr(1), expr(1)),
                        record(expr(1, 0, "//"), expr(1), expr(1))};
  for (const Record& each : bad) {
    const LaunchResult result = refused(each, bound(4, 64));
    CHECK(result.status == LaunchStatus::kGrid && result.detail == 0);
    CHECK_EQ(make(each, make_fake()).reason(result), "guard: grid dimension 0 is within the GPU's limits");
  }
  LaunchResult result = refused(record(expr(1), expr(kYz + 1), expr(1)), bound(4, 64));
  CHECK(result.status == LaunchStatus::kGrid && result.detail == 1);
  result = refused(record(expr(1), expr(1), expr(0)), bound(4, 64));
  CHECK(result.status == LaunchStatus::kGrid && result.detail == 2);
  // With clusters the limit is that of the blocks: 2^28 clusters of 16 would be 0 blocks modulo 2^32.
  for (const int64_t clusters : {(int64_t{1} << 28) + 1, int64_t{1} << 28, int64_t{1} << 27, kX}) {
    result = refused(record(expr(clusters), expr(1), expr(1), 16), bound(4, 64));
    CHECK(result.status == LaunchStatus::kGrid && result.detail == 0);
  }
  CHECK_EQ(launched(record(expr((1 << 27) - 1), expr(1), expr(1), 16), bound(4, 64)).config.grid[0], 0x7ffffff0u);
}

// ---- what is refused when it is made ----

TEST(bad_records_are_refused) {
  const Driver driver = make_fake();
  const auto with = [&driver](auto change) { make(changed(change), driver); };
  CHECK_FAULT(kBundle, "small: 63 parameters; a record takes at most 62",
              with([](Record& r) { r.params.assign(63, pointer(kResult)); }));
  CHECK_FAULT(kBundle, "small: valid for M in [2, 1], which is empty",
              with([](Record& r) { r.m_min = 2, r.m_max = 1; }));
  CHECK_FAULT(kBundle, "valid for M in [0, ", with([](Record& r) { r.m_min = 0; }));
  for (const uint32_t align : {0u, 3u, 12u})
    CHECK_FAULT(kBundle, text("alignment ", align, " is not a power of two"),
                with([&](Record& r) { r.params[0].align = align; }));
  CHECK_FAULT(kBundle, "small: the record has no code", with([](Record& r) { r.cubins = {}; }));
  CHECK_FAULT(kBundle, "small: code takes param 2; the record has 2",
              with([](Record& r) { r.cubins[2].params = {0, 2}; }));
  for (const std::vector<uint32_t>& params : {std::vector<uint32_t>{1, 0}, {0, 0}, std::vector<uint32_t>(100, 1)})
    CHECK_FAULT(kBundle, "params ascend", with([&](Record& r) { r.cubins[2].params = params; }));
  for (const uint32_t warps : {0u, 33u, ~0u})
    CHECK_FAULT(kBundle, text("other: ", warps, " warps per block; it takes 1 to 32"),
                with([&](Record& r) { r.cubins[2].num_warps = warps; }));
  for (const std::array<uint32_t, 3>& cluster :
       {std::array<uint32_t, 3>{0, 1, 1}, {17, 1, 1}, {2, 2, 1}, {1, 1, 2}, {65536, 65536, 1}, {0x80000001, 2, 1}})
    CHECK_FAULT(kBundle, "it takes 1 to 16 blocks along the first dimension",
                with([&](Record& r) { r.cubins[2].cluster = cluster; }));
  CHECK_FAULT(kBundle, "param 1 is 256, which does not fit i8",
              with([](Record& r) { r.params[1] = integer(ParamKind::kI8, expr(256)); }));
  CHECK_FAULT(kBundle, "param 1 is 2, which does not fit i1",
              with([](Record& r) { r.params[1] = integer(ParamKind::kI1, expr(2)); }));
  CHECK_EQ(fake.launches, 0);
}

TEST(as_many_parameters_as_fit) {
  Record record = small_record();
  record.params.assign(62, integer(ParamKind::kI64, expr("M")));
  std::vector<uint32_t> all(62);
  for (uint32_t i = 0; i < 62; ++i) all[i] = i;
  record.cubins = {};
  record.cubins[2] = cubin("other", all);
  const NullLaunch launch = launched(record, bound(5, 64));
  CHECK_EQ(launch.params.size(), 64u);
  for (size_t i = 0; i < 64; ++i) CHECK_EQ(as<int64_t>(launch.params[i]), i < 62 ? 5 : 0);
}

// ---- drivers that fail, or whose code is not the record's ----

TEST(a_failed_launch_is_the_drivers_answer) {
  const Driver driver = make_fake();
  const CubinLauncher launcher = make(small_record(), driver);
  fake.launch_answer = 700;
  const LaunchResult result = launcher.launch(bound(5, 64), nullptr);
  CHECK(result.status == LaunchStatus::kDriver);
  CHECK_EQ(result.detail, 700);
  CHECK_EQ(launcher.reason(result), "driver");
}

TEST(a_failed_preparation_says_all) {
  Driver driver = make_fake();
  fake.load_answer = 209;
  CHECK_FAULT(kDriver, "small (one): cuFuncLoad failed with 209 CUDA_ERROR_FAKE: made up for a test",
              make(small_record(), driver));
  driver = make_fake();
  fake.set_answer = 1;
  const Record large = changed([](Record& record) { record.cubins[1].shared_bytes = 1 << 20; });
  CHECK_FAULT(kDriver, "small (mult16): cuFuncSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES) failed with 1",
              make(large, driver));
  const Record wide = changed([](Record& record) { record.cubins[1].cluster = {16, 1, 1}; });
  CHECK_FAULT(kDriver, "cuFuncSetAttribute(NON_PORTABLE_CLUSTER_SIZE_ALLOWED) failed with 1", make(wide, driver));
  driver.error_name = unknown_text;
  driver.error_string = unknown_text;
  CHECK_FAULT(kDriver, "failed with 1 (unknown): (no text)", make(wide, driver));
}

TEST(parameter_sizes_are_held_against_the_code) {
  const Driver driver = make_fake(true);
  Record record = small_record();
  record.cubins = {};
  record.cubins[2] = cubin("other", {0, 1});
  const auto declared = [&](std::vector<size_t> bytes) {
    fake.declared = std::move(bytes);
    make(record, driver);
  };
  declared({8, 4, 8, 8});
  CHECK_FAULT(kBundle, "other: parameter 1 of the code has 8 bytes; its record says 4", declared({8, 8, 8, 8}));
  CHECK_FAULT(kBundle, "other: parameter 3 of the code has 4 bytes; its record says 8", declared({8, 4, 8, 4}));
  CHECK_FAULT(kBundle, "other: the code has 3 parameters; its record has 4", declared({8, 4, 8}));
  CHECK_FAULT(kBundle, "other: the code has 0 parameters; its record has 4", declared({}));
  CHECK_FAULT(kBundle, "other: the code has more than the 4 parameters of its record", declared({8, 4, 8, 8, 8}));
}

TEST(the_function_is_looked_up_with_its_parameters) {
  std::vector<std::string> seen;
  const CubinLauncher launcher(small_record(), null_driver(),
                               [&](const Cubin& which, const std::vector<uint32_t>& bytes) {
                                 std::string all = which.file + " " + which.function;
                                 for (const uint32_t size : bytes) all += " " + std::to_string(size);
                                 seen.push_back(all);
                                 return null_function(which, bytes);
                               });
  CHECK((seen == std::vector<std::string>{"one one_kernel 8 8 8", "mult16 mult16_kernel 8 4 8 8",
                                          "other other_kernel 8 4 8 8"}));
}

// ---- the driver layer itself ----

TEST(recording) {
  const CubinLauncher launcher(small_record(), null_driver(), null_function);
  null_record(true);
  for (const int64_t m : {2, 3}) launcher.launch(bound(m, 64), nullptr);
  CHECK_EQ(null_launches().size(), 2u);
  null_record(false);
  launcher.launch(bound(4, 64), nullptr);
  CHECK_EQ(null_launches().size(), 2u);  // kept until the next start
  null_record(true);
  CHECK(null_launches().empty());
  null_record(false);
}

TEST(a_machine_without_a_driver_says_so) {
  const std::string missing = cuda_driver_missing();
  if (missing.empty())
    CHECK_EQ(std::string(cuda_driver().name), "cuda");
  else
    CHECK_FAULT(kDriver, missing, cuda_driver());
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
