// test_ffi_launcher.cpp -- a record and a call -> what a function with TVM FFI's ABI gets; refusals; errors; libraries.
#include "ffi_launcher.h"

#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>

#include "calls.h"
#include "table_builder.h"
#include "testing.h"

namespace hdispatch {
namespace {

using namespace testing;

// ---- a function of our own ----

struct SeenTensor {
  ffi::Tensor view;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

/// What the function answers and what it saw last.
struct Seen {
  int answer = 0;
  ffi::Any result{};
  int calls = 0;
  void* self = nullptr;
  std::vector<ffi::Any> args;
  std::vector<SeenTensor> tensors;
  void* env_stream = nullptr;  ///< what was set while the function ran
};
Seen seen;
void* environment = nullptr;

int observe(void* self, const ffi::Any* args, int32_t count, ffi::Any* result) {
  ++seen.calls;
  seen.self = self;
  seen.args.assign(args, args + count);
  seen.tensors.clear();
  seen.env_stream = environment;
  CHECK(result->type == 0 && result->integer == 0);
  for (const ffi::Any& arg : seen.args) {
    CHECK_EQ(arg.zero, 0u);
    if (arg.type != ffi::kTypeTensorPtr) continue;
    const auto& tensor = *static_cast<const ffi::Tensor*>(arg.pointer);
    seen.tensors.push_back(
        {tensor, {tensor.shape, tensor.shape + tensor.rank}, {tensor.strides, tensor.strides + tensor.rank}});
  }
  *result = seen.result;
  return seen.answer;
}

const char* error_text(const char** kind) {
  *kind = seen.answer == -9 ? "CUDADialectError" : "ValueError";
  return "made up for a test";
}

int set_environment(int32_t type, int32_t device, void* stream, void** before) {
  CHECK(type == ffi::kDeviceCuda && device == 2);
  if (before) *before = environment;
  environment = stream;
  return 0;
}

int self_tag;
const FfiFunction kObserved = {observe, &self_tag, error_text, set_environment};
const CUstream kStream = reinterpret_cast<CUstream>(uintptr_t{0x5000});

// ---- records ----

FfiArg tensor(int arg, uint32_t align = 1) {
  FfiArg made;
  made.kind = FfiArgKind::kTensor;
  made.arg = arg;
  made.align = align;
  made.name = toy_args()[static_cast<size_t>(arg)].name;
  return made;
}

FfiArg simple(FfiArgKind kind, Expr value = {}) {
  FfiArg made;
  made.kind = kind;
  made.value = std::move(value);
  return made;
}

FfiArg real(int arg, double constant = 0) {
  FfiArg made;
  made.kind = FfiArgKind::kFloat;
  made.arg = arg;
  made.constant = constant;
  return made;
}

/// result, input, None, M, epsilon, stream, PDL.
FfiRecord small_record() {
  FfiRecord record;
  record.kernel = "small";
  record.function = "small_f";
  record.args = {tensor(kResult, 16),
                 tensor(kInput),
                 simple(FfiArgKind::kNone),
                 simple(FfiArgKind::kInt, expr("M")),
                 real(kEpsilon),
                 simple(FfiArgKind::kStream),
                 simple(FfiArgKind::kPdl)};
  record.pdl = true;
  return record;
}

FfiRecord changed(const std::function<void(FfiRecord&)>& change) {
  FfiRecord record = small_record();
  change(record);
  return record;
}

/// A call with its sizes set, as `Op::bind` leaves it.
Call bound(int64_t m, int64_t k, bool full = false) {
  Call call = toy_call(m, k, full);
  call.sizes[kM] = m;
  call.sizes[kK] = k;
  call.sizes[kN] = 0;
  return call;
}

LaunchResult launch(const FfiLauncher& launcher, const Call& call) {
  const Seen kept = seen;
  seen = Seen{};
  seen.answer = kept.answer;
  seen.result = kept.result;
  return launcher.launch(call, kStream);
}

bool launched(const LaunchResult& result) { return result.status == LaunchStatus::kLaunched; }

// ---- arguments ----

TEST(what_a_function_gets) {
  const FfiLauncher launcher(small_record(), kObserved, 3);
  Call call = bound(5, 64);
  call.tensors[kInput].strides[0] = 80;
  CHECK(launched(launch(launcher, call)));
  CHECK_EQ(seen.calls, 1);
  CHECK(seen.self == &self_tag);
  CHECK_EQ(seen.args.size(), 7u);
  constexpr int32_t kTypes[] = {7, 7, 0, 1, 3, 4, 1};
  for (size_t i = 0; i < 7; ++i) CHECK_EQ(seen.args[i].type, kTypes[i]);
  CHECK_EQ(seen.args[2].integer, 0);
  CHECK_EQ(seen.args[3].integer, 5);
  CHECK_EQ(seen.args[4].real, 1e-6);
  CHECK(seen.args[5].pointer == kStream);
  CHECK_EQ(seen.args[6].integer, 1);
  CHECK_EQ(seen.tensors.size(), 2u);
  const SeenTensor& result = seen.tensors[0];
  const SeenTensor& input = seen.tensors[1];
  CHECK(result.view.data == reinterpret_cast<void*>(uintptr_t{4096}));
  CHECK(result.view.dtype.code == 10 && result.view.dtype.bits == 8 && result.view.dtype.lanes == 1);
  CHECK(result.shape == std::vector<int64_t>({5, 64}) && result.strides == std::vector<int64_t>({64, 1}));
  CHECK(input.view.dtype.code == 4 && input.view.dtype.bits == 16);
  CHECK(input.strides == std::vector<int64_t>({80, 1}));
  for (const SeenTensor& each : seen.tensors) {
    CHECK(each.view.device.type == 2 && each.view.device.id == 2);
    CHECK_EQ(each.view.byte_offset, 0u);
  }
  CHECK(environment == nullptr && seen.env_stream == nullptr);
}

TEST(on_the_cpu) {
  const FfiLauncher launcher(small_record(), kObserved, kCpuSlot);
  CHECK(launched(launch(launcher, bound(1, 64))));
  CHECK(seen.tensors[0].view.device.type == 1 && seen.tensors[0].view.device.id == 0);
}

TEST(every_dtype) {
  const FfiLauncher launcher(small_record(), kObserved, 1);
  const std::vector<std::tuple<DType, int, int>> kAll = {
      {DType::kFloat32, 2, 32},      {DType::kFloat64, 2, 64},    {DType::kFloat16, 2, 16}, {DType::kBFloat16, 4, 16},
      {DType::kFloat8E4M3FN, 10, 8}, {DType::kFloat8E5M2, 12, 8}, {DType::kInt8, 0, 8},     {DType::kUInt8, 1, 8},
      {DType::kInt16, 0, 16},        {DType::kInt32, 0, 32},      {DType::kInt64, 0, 64},   {DType::kBool, 6, 8}};
  for (const auto& [dtype, code, bits] : kAll) {
    Call call = bound(2, 64);
    call.tensors[kInput].dtype = dtype;
    CHECK(launched(launch(launcher, call)));
    CHECK_EQ(int{seen.tensors[1].view.dtype.code}, code);
    CHECK_EQ(int{seen.tensors[1].view.dtype.bits}, bits);
  }
}

TEST(chosen_dimensions_and_another_type) {
  const FfiLauncher launcher(changed([](FfiRecord& r) {
                               r.args[1].dims = {1, 0};
                               r.args[0].dims = {0};
                               r.args[0].dtype = DType::kUInt8;
                             }),
                             kObserved, 1);
  CHECK(launched(launch(launcher, bound(5, 64))));
  CHECK(seen.tensors[1].shape == std::vector<int64_t>({64, 5}) &&
        seen.tensors[1].strides == std::vector<int64_t>({1, 64}));
  CHECK(seen.tensors[0].shape == std::vector<int64_t>({5}) && seen.tensors[0].strides == std::vector<int64_t>({64}));
  CHECK(seen.tensors[0].view.dtype.code == ffi::kCodeUInt);
}

TEST(constants_and_flags) {
  const FfiLauncher launcher(changed([](FfiRecord& r) {
                               r.args = {simple(FfiArgKind::kInt, expr(-7)), simple(FfiArgKind::kBool, expr(5)),
                                         simple(FfiArgKind::kBool, expr("M")), real(-1, 0.25)};
                             }),
                             kObserved, 1);
  CHECK(launched(launch(launcher, bound(5, 64))));
  CHECK(seen.args[0].type == 1 && seen.args[0].integer == -7);
  CHECK(seen.args[1].type == 2 && seen.args[1].integer == 1);
  CHECK(seen.args[2].type == 2 && seen.args[2].integer == 1);
  CHECK(seen.args[3].type == 3 && seen.args[3].real == 0.25);
}

TEST(pdl_needs_the_record_and_the_option) {
  for (const bool option : {false, true})
    for (const bool waits : {false, true}) {
      const FfiLauncher launcher(changed([&](FfiRecord& r) { r.pdl = waits; }), kObserved, 1, option);
      CHECK(launched(launch(launcher, bound(2, 64))));
      CHECK_EQ(seen.args[6].integer, int64_t{option && waits});
    }
}

TEST(the_stream_in_the_environment) {
  FfiRecord record = changed([](FfiRecord& r) { r.env_stream = true; });
  environment = &self_tag;
  const FfiLauncher on_gpu(record, kObserved, 3);
  CHECK(launched(launch(on_gpu, bound(2, 64))));
  CHECK(seen.env_stream == kStream && environment == &self_tag);  // and what was set is set again
  const FfiLauncher on_cpu(record, kObserved, kCpuSlot);
  CHECK(launched(launch(on_cpu, bound(2, 64))));
  CHECK(seen.env_stream == &self_tag);
  environment = nullptr;
}

// ---- refusals: the function is not called ----

TEST(guards) {
  const FfiLauncher launcher(changed([](FfiRecord& r) {
                               r.m_max = 16;
                               r.guards = {{expr("K", 64, "%", 0, "=="), "K % 64 == 0"},
                                           {expr("input.stride(0)", 8, "%", 0, "=="), "rows of 8"}};
                             }),
                             kObserved, 1);
  const auto refused = [&](Call call, LaunchStatus status, const std::string& words) {
    const LaunchResult result = launch(launcher, call);
    CHECK(result.status == status);
    CHECK_EQ(seen.calls, 0);
    CHECK_EQ(launcher.reason(result), "guard: " + words);
    CHECK_CONTAINS(launcher.describe(result, call), "guard: " + words + " does not hold in small (M = ");
    CHECK(!is_failure(result.status));
  };
  CHECK(launched(launch(launcher, bound(16, 64))));
  refused(bound(17, 64), LaunchStatus::kMRange, "1 <= M <= 16");
  refused(bound(16, 65), LaunchStatus::kGuard, "K % 64 == 0");
  Call call = bound(4, 64);
  call.tensors[kInput].strides[0] = 68;
  refused(call, LaunchStatus::kGuard, "rows of 8");
  call = bound(4, 64);
  call.tensors[kResult].data += 8;
  refused(call, LaunchStatus::kAlign, "result is 16-byte aligned");
  CHECK_CONTAINS(launcher.describe({LaunchStatus::kAlign, 0}, call), "address 0x1008 is 8 past a multiple of 16");
  call.tensors[kResult].data -= 8;
  call.tensors[kInput].data += 2;  // nothing is assumed of it
  CHECK(launched(launch(launcher, call)));
}

TEST(a_value_that_does_not_exist) {
  const FfiLauncher launcher(changed([](FfiRecord& r) { r.args[3] = simple(FfiArgKind::kInt, expr("M", "N", "//")); }),
                             kObserved, 1);
  const LaunchResult result = launch(launcher, bound(2, 64));
  CHECK(result.status == LaunchStatus::kParam && seen.calls == 0);
  CHECK_EQ(launcher.reason(result), "guard: argument 3 has a value");
}

TEST(what_a_launcher_refuses) {
  const auto make = [](const std::function<void(FfiRecord&)>& change, FfiFunction function = kObserved) {
    FfiLauncher(changed(change), function, 1);
  };
  CHECK_FAULT(kBundle, "valid for M in [5, 4], which is empty", make([](FfiRecord& r) { r.m_min = 5, r.m_max = 4; }));
  CHECK_FAULT(kBundle, "there is no function", make([](FfiRecord&) {}, {}));
  CHECK_FAULT(kBundle, "alignment 24 is not a power of two", make([](FfiRecord& r) { r.args[0].align = 24; }));
  CHECK_FAULT(kBundle, "5 dimensions of input", make([](FfiRecord& r) { r.args[1].dims = {0, 0, 0, 0, 0}; }));
  CHECK_FAULT(kBundle, "41 arguments; a function takes at most 40",
              make([](FfiRecord& r) { r.args.assign(41, simple(FfiArgKind::kNone)); }));
  CHECK_FAULT(kBundle, "34 tensors; a function takes at most 33",
              make([](FfiRecord& r) { r.args.assign(34, tensor(kInput)); }));
  CHECK_FAULT(kBundle, "arguments 5 and 6 are both the stream",
              make([](FfiRecord& r) { r.args[6] = simple(FfiArgKind::kStream); }));
  CHECK_FAULT(kBundle, "libtvm_ffi is not loaded",
              make([](FfiRecord& r) { r.env_stream = true; }, {observe, nullptr, error_text, nullptr}));
}

// ---- errors ----

TEST(errors_come_back_with_their_text) {
  const FfiLauncher launcher(small_record(), kObserved, 1);
  seen.answer = -1;
  LaunchResult result = launch(launcher, bound(2, 64));
  CHECK(result.status == LaunchStatus::kRaised && result.detail == -1 && is_failure(result.status));
  CHECK_FAULT(kFunction, "the toy: the function small_f returned -1, ValueError: made up for a test",
              launcher.raise(result, "the toy"));
  seen.answer = -9;
  result = launch(launcher, bound(2, 64));
  CHECK_FAULT(kDriver, "CUDADialectError: made up", launcher.raise(result, "the toy"));
  seen.answer = 0;
  const FfiLauncher live(small_record(), {observe, nullptr, nullptr, nullptr}, 1);
  CHECK_FAULT(kFunction, "libtvm_ffi is not loaded, so its text is not known",
              live.raise({LaunchStatus::kRaised, -1}, "the toy"));
}

TEST(a_result_is_dropped) {
  const FfiLauncher launcher(small_record(), kObserved, 1);
  seen.result.type = ffi::kTypeInt;
  seen.result.integer = 7;
  CHECK(launched(launch(launcher, bound(2, 64))));
  seen.result = {};
}

TEST(handles) {
  ffi::Function function{};
  function.object.type = ffi::kTypeFunction;
  function.safe_call = observe;
  const FfiFunction live = live_function(reinterpret_cast<uintptr_t>(&function));
  CHECK(live.call == observe && live.self == &function);
  CHECK_FAULT(kBundle, "is null", live_function(0));
  function.object.type = 65;
  CHECK_FAULT(kBundle, "is of type 65; a function is of type 68",
              live_function(reinterpret_cast<uintptr_t>(&function)));
}

// ---- in a table ----

CUstream a_stream(DeviceSlot) { return kStream; }

const Op& new_op() {
  static int made = 0;
  return Runtime::get().define_op("ffi_toy" + std::to_string(made++), "", toy_args(), toy_variants());
}

Outcome dispatch(const Op& op, Call call, Dispatch& found) {
  return Runtime::get().dispatch(op, call, a_stream, found);
}
Outcome dispatch(const Op& op, const Call& call) {
  Dispatch found;
  return dispatch(op, call, found);
}

Record cubin_record() {
  Record record;
  record.kernel = "cubin";
  record.grid = {expr("M"), expr(1), expr(1)};
  for (Cubin& cubin : record.cubins) {
    cubin.file = "a.cubin";
    cubin.function = "a";
    cubin.num_warps = 1;
  }
  return record;
}

TEST(both_kinds_of_launcher_in_one_table) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {4, 64});
  builder.add_module("a.cubin", {});
  builder.add_row(op, 0, 64, 0, 0, builder.add_record(small_record(), kObserved));
  builder.add_row(op, 0, 64, 0, 1, builder.add_record(cubin_record()));
  builder.publish();
  seen = Seen{};
  Dispatch found;
  CHECK(dispatch(op, toy_call(4, 64), found) == Outcome::kLaunched);
  CHECK_EQ(found.row->launcher->head().kernel, "small");
  CHECK_EQ(seen.calls, 1);
  CHECK(dispatch(op, toy_call(5, 64), found) == Outcome::kLaunched);
  CHECK_EQ(found.row->launcher->head().kernel, "cubin");
  CHECK_EQ(seen.calls, 1);
  CHECK(dispatch(op, toy_call(0, 64)) == Outcome::kEmpty);
  CHECK_EQ(seen.calls, 1);
  CHECK_EQ(op.counters().hits.load(), 2u);
}

TEST(explanations_and_errors_in_words) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {4, 64});
  builder.add_row(op, 0, 64, 0, 0, builder.add_record(small_record(), kObserved));
  builder.publish();
  seen = Seen{};
  Call call = toy_call(3, 64);
  const std::string words = Runtime::get().explain(op, call);
  CHECK_CONTAINS(words, "row      0: small");
  CHECK_CONTAINS(words, "function small_f in this process");
  CHECK_CONTAINS(words, "args     result, input, None, 3, 1e-06, stream, PDL 1, driver \"null\"");
  CHECK_EQ(seen.calls, 0);
  call = toy_call(3, 64);
  call.tensors[kResult].data += 1;
  CHECK_CONTAINS(Runtime::get().explain(op, call), "fallback ");
  seen.answer = -1;
  Dispatch found;
  call = toy_call(3, 64);
  const Outcome outcome = dispatch(op, call, found);
  CHECK(outcome == Outcome::kRefused);
  CHECK_FAULT(kFunction, op.name() + "(bfloat16, M=0, K=0, N=0), row 0, small: the function small_f returned -1",
              (call.sizes[kM] = call.sizes[kK] = call.sizes[kN] = 0, Runtime::raise_failure(op, call, found)));
  CHECK_EQ(op.counters().hits.load(), 0u);
  seen.answer = 0;
}

TEST(what_a_row_may_read) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {4, 64});
  const auto add = [&](FfiArg arg) {
    builder.add_row(op, 0, 64, 0, 0, builder.add_record(changed([&](FfiRecord& r) { r.args[0] = arg; }), kObserved));
  };
  CHECK_FAULT(kBundle, "reads residual, which is None in variant bfloat16", add(tensor(kResidual)));
  CHECK_FAULT(kBundle, "reads float 1, which", add(real(kInput)));
  FfiArg rank = tensor(kWeight);
  rank.dims = {1};
  CHECK_FAULT(kBundle, "reads dimension 1 of weight, which has rank 1", add(rank));
}

TEST(a_table_on_top_of_another) {
  const Op& op = new_op();
  const Op& other = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {4, 64});
  builder.add_module("a.cubin", {});
  const uint32_t index = builder.add_record(cubin_record());
  for (const uint32_t bucket : {0u, 1u}) builder.add_row(op, 0, 64, 0, bucket, index);
  const auto base = builder.finish();
  CHECK_FAULT(kInternal, "published", builder.add_record(cubin_record()));
  Runtime::get().publish(base);
  const auto kernel_of = [](const Op& which, int64_t m, int64_t k) -> std::string {
    Dispatch found;
    return dispatch(which, toy_call(m, k), found) == Outcome::kLaunched ? found.row->launcher->head().kernel : "none";
  };
  CHECK_EQ(kernel_of(op, 4, 64), "cubin");
  TableBuilder second(-1, 0, true);
  second.extend(base);
  const uint32_t added = second.add_record(small_record(), kObserved);
  second.add_row(op, 0, 64, 0, 0, added);  // in the place of one
  second.add_row(op, 0, 0, 0, 1, added);   // any K, beside an exact one
  second.set_ladder(other, {8});
  second.add_row(other, 0, 64, 0, 0, added);
  second.publish();
  CHECK_EQ(kernel_of(op, 4, 64), "small");
  CHECK_EQ(kernel_of(op, 5, 64), "cubin");
  CHECK_EQ(kernel_of(op, 5, 65), "small");
  CHECK_EQ(kernel_of(other, 5, 64), "small");
  Dispatch found;
  dispatch(other, toy_call(5, 64), found);
  CHECK_EQ(found.row->index, 4u);  // after those of the base
  Runtime::get().publish(base);
  CHECK_EQ(kernel_of(op, 4, 64), "cubin");
  CHECK_EQ(kernel_of(op, 5, 65), "none");
}

// ---- the null driver ----

TEST(the_null_driver_records_a_bundles_function) {
  const Op& op = new_op();
  TableBuilder builder(-1, 0, true);
  builder.set_ladder(op, {64});
  builder.add_library("a.so", {});  // which is not opened
  CHECK_FAULT(kBundle, "a.so is added twice", builder.add_library("a.so", {}));
  CHECK_FAULT(kBundle, "b.so is used by a record but was not added",
              builder.add_record(changed([](FfiRecord& r) { r.file = "b.so"; })));
  builder.add_row(op, 0, 64, 0, 0, builder.add_record(changed([](FfiRecord& r) { r.file = "a.so"; })));
  builder.publish();
  CHECK(dispatch(op, toy_call(3, 64)) == Outcome::kLaunched);
  null_record(true);
  CHECK(dispatch(op, toy_call(3, 64)) == Outcome::kLaunched);
  null_record(false);
  CHECK_EQ(null_launches().size(), 1u);
  const NullLaunch launch = null_launches()[0];
  CHECK_EQ(launch.function, "small_f");
  CHECK_EQ(launch.file, "a.so");
  CHECK_EQ(launch.params.size(), 7u);
  CHECK_EQ(launch.params[0].size(), 24u + 4 * 8);
  int64_t strides[2];
  std::memcpy(strides, launch.params[0].data() + 24 + 16, 16);
  CHECK(strides[0] == 64 && strides[1] == 1);
  ffi::Any any;
  CHECK_EQ(launch.params[3].size(), sizeof any);
  std::memcpy(&any, launch.params[3].data(), sizeof any);
  CHECK(any.type == ffi::kTypeInt && any.integer == 3);
}

// ---- a bundle's library ----

std::string read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

const std::string& image() {
  static const std::string read = read_file(HDISPATCH_TEST_LIBRARY);
  return read;
}

/// Kernels of a library and what is made of them.
int resident = 0;
CUresult kernel_count(unsigned* out, CUlibrary library) {
  *out = library ? 2 : 0;
  return kCudaSuccess;
}
CUresult kernels(CUkernel* out, unsigned count, CUlibrary) {
  for (unsigned i = 0; i < count; ++i) out[i] = reinterpret_cast<CUkernel>(uintptr_t{i + 1});
  return kCudaSuccess;
}
CUresult kernel_function(CUfunction* out, CUkernel kernel) {
  *out = reinterpret_cast<CUfunction>(kernel);
  return kCudaSuccess;
}
CUresult load_function(CUfunction) {
  ++resident;
  return kCudaSuccess;
}

TEST(a_library_is_opened_once_and_its_modules_are_loaded_ahead) {
  const FfiLibrary& library = FfiLibrary::open("a.so", image());
  CHECK(&library == &FfiLibrary::open("again.so", image()));
  Driver driver = null_driver();
  driver.library_kernel_count = kernel_count;
  driver.library_kernels = kernels;
  driver.kernel_function = kernel_function;
  driver.function_load = load_function;
  const FfiFunction function = library.find("count", 0, driver);
  CHECK_EQ(resident, 2);
  int64_t counts = 0;
  ffi::Any arg{};
  arg.type = ffi::kTypeOpaquePtr;
  arg.pointer = &counts;
  ffi::Any result{};
  CHECK_EQ(function.call(function.self, &arg, 1, &result), 0);
  CHECK_EQ(counts, 101);  // the call loaded nothing more
  library.find("count", 1, driver);
  CHECK_EQ(function.call(function.self, &arg, 1, &result), 0);
  CHECK_EQ(counts, 201);  // one module, loaded to a second device
  function.set_stream(2, 0, reinterpret_cast<void*>(uintptr_t{7}), nullptr);
  CHECK_EQ(function.call(function.self, &arg, 1, &result), 0);
  CHECK_EQ(counts, 70201);
  CHECK_EQ(function.call(function.self, &arg, 2, &result), -1);
  const FfiError error = take_error(function);
  CHECK_EQ(error.kind, "TypeError");
  CHECK_EQ(error.message, "one argument, not more");
}

TEST(what_a_library_lacks) {
  const FfiLibrary& library = FfiLibrary::open("a.so", image());
  CHECK_FAULT(kBundle, "a.so: has no symbol __tvm_ffi_nobody; rebuild", library.find("nobody", 0, null_driver()));
  CHECK_FAULT(kDriver, "loading the kernels of broken on device 3 failed: cannot load the module: 218",
              library.find("broken", 3, null_driver()));
  CHECK_FAULT(kDriver, "the library has no symbol __cute_internal_bare_cuda_load_to_device",
              library.find("bare", 0, null_driver()));
  CHECK_FAULT(kBundle, "b.so: cannot be opened: ", FfiLibrary::open("b.so", std::string("no library")));
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
