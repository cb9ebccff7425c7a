// test_runtime_lifetime.cpp -- when tables are freed, what they share, and threads that dispatch while they change.
#include <chrono>
#include <thread>

#include "testing.h"
#include "toy_tables.h"

namespace hdispatch {
namespace {

using namespace testing;

TEST(a_table_is_freed_when_nothing_serves_from_it) {
  const Op& op = new_op();
  const auto build = [&op](std::shared_ptr<const DeviceTable> base) {
    TableBuilder builder(-1, 0, true);
    if (base) builder.extend(std::move(base));
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    builder.add_row(op, 0, 64, 0, 0, builder.add_record(tagged(1)));
    return builder.finish();
  };
  std::shared_ptr<const DeviceTable> base = build(nullptr);
  std::shared_ptr<const DeviceTable> top = build(base);
  const std::weak_ptr<const DeviceTable> base_lives = base, top_lives = top;
  runtime().publish(std::move(top));
  base.reset();
  CHECK(!top_lives.expired());   // it serves
  CHECK(!base_lives.expired());  // rows of the one on top point to its launchers
  {
    const TableReader reader;  // a call that blocks
    runtime().withdraw(kCpuSlot);
    CHECK(!top_lives.expired());
  }
  runtime().withdraw(kCpuSlot);
  CHECK(top_lives.expired());
  CHECK(base_lives.expired());
}

TEST(tables_share_modules_of_one_content) {
  const auto build = [](const std::string& digest) {
    TableBuilder builder(-1, 0, true);
    builder.add_module("a.cubin", {}, digest);
    return builder.finish();
  };
  const auto handle = reinterpret_cast<CUmodule>(uintptr_t{1});
  CHECK(runtime().find_module(kCpuSlot, "one") == nullptr);
  runtime().share_module(kCpuSlot, "one", handle);
  runtime().share_module(kCpuSlot, "one", reinterpret_cast<CUmodule>(uintptr_t{2}));  // another was there first
  CHECK(runtime().find_module(kCpuSlot, "one") == handle);
  CHECK(runtime().find_module(1, "one") == nullptr);  // a device's own
  build("one");
  CHECK(runtime().find_module(kCpuSlot, "one") == handle);
}

TEST(without_early_reads_what_reads_early_has_no_pdl) {
  const Op& op = new_op();
  for (const bool early_reads : {true, false}) {
    TableBuilder builder(-1, 0, true, early_reads);
    builder.set_ladder(op, kEdges);
    builder.add_module("a.cubin", {});
    Record waits = tagged(1), early = tagged(2);
    for (Record* record : {&waits, &early})
      for (Cubin& cubin : record->cubins) cubin.pdl = true;
    early.early = {kWeight};
    builder.add_row(op, 0, 64, 0, 0, builder.add_record(waits));
    builder.add_row(op, 0, 512, 0, 0, builder.add_record(early));
    builder.publish();
    for (const int64_t k : {64, 512}) {
      dispatch(op, toy_call(1, k));  // what is pending is unknown at first
      null_record(true);
      CHECK(dispatch(op, toy_call(1, k)).outcome == Outcome::kLaunched);
      null_record(false);
      CHECK_EQ(null_launches().at(0).attributes.size(), size_t{k == 64 || early_reads});
    }
  }
}

// ---- threads ----

TEST(threads_dispatch_while_tables_are_replaced) {
  const Op& op = new_op();
  constexpr int kTables = 60, kThreads = 3;
  publish(op, {64, 512}, tagged(1));
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> launched{0}, without{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      int wrong = 0;
      for (int64_t m = 1; !stop; m = m % 40 + 1) {
        const TableReader reader;
        const Served served = dispatch(op, toy_call(m, t % 2 ? 64 : 512));
        if (served.outcome == Outcome::kLaunched)
          ++launched, wrong += key_bucket(served.found.row->key) != Ladder(kEdges).bucket(m);
        else
          ++without, wrong += served.outcome != Outcome::kNoTable;
      }
      CHECK_EQ(wrong, 0);
    });
  for (int i = 0; i < kTables; ++i) {
    publish(op, {64, 512}, tagged(i + 2));
    if (i % 8 == 7) runtime().withdraw(kCpuSlot);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(launched > 0);
  CHECK_EQ(op.counters().hits.load(), launched.load());
}

TEST(counters_add_up_over_threads_and_recording) {
  const Op& op = new_op();
  publish(op, {64});
  constexpr int kThreads = 4, kCalls = 2000;
  null_record(true);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&op] {
      for (int i = 0; i < kCalls; ++i) dispatch(op, toy_call(i % 20, 64));
    });
  for (std::thread& thread : threads) thread.join();
  null_record(false);
  CHECK_EQ(op.counters().empty.load(), uint64_t{kThreads * kCalls / 20});
  CHECK_EQ(op.counters().hits.load(), uint64_t{kThreads * kCalls * 19 / 20});
  CHECK_EQ(null_launches().size(), op.counters().hits.load());
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
