// test_table_reader.cpp -- readers that block hold back what was there when they came, and nothing else; forks.
#include "table_reader.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "fork_mutex.h"
#include "testing.h"

namespace hdispatch {
namespace {

TEST(nobody_reads) { CHECK(TableReader::left(TableReader::advance())); }

TEST(a_reader_holds_back_what_was_there) {
  uint64_t before = 0;
  {
    const TableReader reader;
    before = TableReader::advance();
    CHECK(!TableReader::left(before));
  }
  CHECK(TableReader::left(before));
}

TEST(a_reader_that_came_later_holds_back_nothing) {
  const uint64_t before = TableReader::advance();
  const TableReader reader;
  CHECK(TableReader::left(before));
  CHECK(!TableReader::left(TableReader::advance()));
}

TEST(an_inner_reader_does_not_end_the_outer_one) {
  const TableReader outer;
  const uint64_t epoch = TableReader::advance();
  {
    const TableReader inner;
  }
  CHECK(!TableReader::left(epoch));
}

TEST(a_reader_that_blocks_in_another_thread) {
  std::atomic<bool> inside{false}, go{false};
  std::thread blocked([&] {
    const TableReader reader;
    inside = true;
    while (!go) std::this_thread::yield();
  });
  while (!inside) std::this_thread::yield();
  const uint64_t old = TableReader::advance();
  CHECK(!TableReader::left(old));
  go = true;
  blocked.join();
  CHECK(TableReader::left(old));
}

TEST(what_readers_see_is_not_freed) {
  // Two numbers that are equal as long as the object lives.
  struct Pair {
    std::array<std::atomic<uint64_t>, 2> values;
    explicit Pair(uint64_t value) : values{value, value} {}
    ~Pair() { values[0] = 0, values[1] = ~0ull; }
  };
  std::atomic<const Pair*> published{new Pair(1)};
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      while (!stop) {
        const TableReader reader;
        const Pair* pair = published.load(std::memory_order_acquire);
        if (pair->values[0] != pair->values[1]) ++wrong;
      }
    });
  std::vector<std::pair<std::unique_ptr<const Pair>, uint64_t>> retired;
  size_t most = 0;
  for (uint64_t i = 2; i < 3000; ++i) {
    const Pair* old = published.exchange(new Pair(i), std::memory_order_acq_rel);
    retired.emplace_back(old, TableReader::advance());
    std::erase_if(retired, [](const auto& each) { return TableReader::left(each.second); });
    most = std::max(most, retired.size());
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(wrong.load(), 0);
  CHECK(most < 2900);  // they are freed on the way
  delete published.load();
}

TEST(threads_that_end_leave_their_state_to_others) {
  for (int i = 0; i < 500; ++i) std::thread([] { const TableReader reader; }).join();
  CHECK(TableReader::left(TableReader::advance()));
}

// ---- forks ----

/// Whether a forked child gets a true answer; -1 if it does not come back within ten seconds.
template <typename Answer>
int in_child(Answer answer) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(answer() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) == 0 : -1;
}

TEST(a_child_does_not_wait_for_its_parents_readers) {
  std::atomic<bool> inside{false}, go{false};
  std::thread blocked([&] {
    const TableReader reader;
    inside = true;
    while (!go) std::this_thread::yield();
  });
  while (!inside) std::this_thread::yield();
  CHECK_EQ(in_child([] { return TableReader::left(TableReader::advance()); }), 1);
  CHECK_EQ(in_child([] {
             const TableReader reader;
             return !TableReader::left(TableReader::advance());
           }),
           1);
  go = true;
  blocked.join();
}

TEST(a_child_finds_every_mutex_free) {
  static ForkMutex first, second;
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (ForkMutex* mutex : {&first, &second})
    threads.emplace_back([&stop, mutex] {
      while (!stop) {
        const std::lock_guard lock(*mutex);
        std::this_thread::yield();
      }
    });
  int bad = 0;
  for (int i = 0; i < 100; ++i)
    bad += in_child([] {
             const std::lock_guard one(first);
             const std::lock_guard two(second);
             return true;
           }) != 1;
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(bad, 0);
}

}  // namespace
}  // namespace hdispatch

TEST_MAIN()
