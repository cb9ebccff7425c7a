// testing.h -- the least that the core's tests need: named tests, checks that print both values, expected faults.
//
//   TEST(rounds_down) { CHECK_EQ(f(7), 3); CHECK_FAULT(kBundle, "ladder", make()); }
//   TEST_MAIN()
//
// A failed check prints its place and the test goes on; the program's exit status is the number of failures, at most 1.
// Checks may run on any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"

namespace hdispatch::testing {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline std::atomic<int> failures{0};

inline void failed(const char* file, int line, const std::string& what) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  // A broken loop must not fill the disk.
  if (++failures <= 50) std::cerr << file << ":" << line << ": " << what << std::endl;
}

// What checks do is out of line: inlined at every check, it is most of what the tests' compilation takes, above all
// under a sanitizer.

/// Where CHECK_EQ failed.
template <typename Actual, typename Expected>
HD_COLD void unequal(const char* file, int line, const char* what, const Actual& actual, const Expected& expected) {
  failed(file, line, text(std::string_view(what), " is ", actual, ", expected ", expected));
}

HD_COLD inline void check_contains(const char* file, int line, const std::string& actual, std::string_view part) {
  if (actual.find(part) == std::string::npos) failed(file, line, text("no \"", part, "\" in: ", actual));
}

HD_COLD inline void check_fault(const char* file, int line, Fault wanted, std::string_view part, const char* what,
                                const std::function<void()>& statement) {
  try {
    statement();
  } catch (const Error& error) {
    if (error.fault() != wanted)
      failed(file, line, text("fault ", static_cast<int>(error.fault()), ": ", std::string_view(error.what())));
    return check_contains(file, line, error.what(), part);
  }
  failed(file, line, text(std::string_view(what), " did not throw"));
}

/// Runs every test; exceptions that a test lets through are failures.
inline int run_all() {
  for (const Test& test : tests()) {
    const int before = failures;
    try {
      test.body();
    } catch (const std::exception& error) {
      failed(test.name, 0, std::string("threw ") + error.what());
    }
    std::cout << (failures == before ? "ok      " : "FAILED  ") << test.name << std::endl;
  }
  return failures ? 1 : 0;
}

/// The same numbers in every run.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  /// Uniform in [low, high].
  int64_t in(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool one_in(int64_t n) { return in(1, n) == 1; }
  template <typename Items>
  const auto& of(const Items& items) {
    return items[static_cast<size_t>(in(0, static_cast<int64_t>(std::size(items)) - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace hdispatch::testing

#define TEST(name)                                                            \
  static void name();                                                         \
  static const ::hdispatch::testing::Register name##_registered{#name, name}; \
  static void name()

#define TEST_MAIN() \
  int main() { return ::hdispatch::testing::run_all(); }

#define CHECK(condition)                                                                             \
  do {                                                                                               \
    if (!(condition)) ::hdispatch::testing::failed(__FILE__, __LINE__, #condition " does not hold"); \
  } while (0)

#define CHECK_EQ(actual, expected)                                                                               \
  do {                                                                                                           \
    const auto actual_ = (actual);                                                                               \
    const auto expected_ = (expected);                                                                           \
    if (!(actual_ == expected_)) ::hdispatch::testing::unequal(__FILE__, __LINE__, #actual, actual_, expected_); \
  } while (0)

#define CHECK_CONTAINS(actual, part) ::hdispatch::testing::check_contains(__FILE__, __LINE__, actual, part)

/// The statement throws an Error of that fault whose message holds `part`.
#define CHECK_FAULT(wanted, part, ...)                                                                                 \
  do {                                                                                                                 \
    const auto statement_ = [&] { __VA_ARGS__; };                                                                      \
    ::hdispatch::testing::check_fault(__FILE__, __LINE__, ::hdispatch::Fault::wanted, part, #__VA_ARGS__, statement_); \
  } while (0)
