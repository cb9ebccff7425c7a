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
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
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

#define CHECK_EQ(actual, expected)                                                                        \
  do {                                                                                                    \
    const auto actual_ = (actual);                                                                        \
    const auto expected_ = (expected);                                                                    \
    if (!(actual_ == expected_))                                                                          \
      ::hdispatch::testing::failed(__FILE__, __LINE__,                                                    \
                                   ::hdispatch::text(#actual " is ", actual_, ", expected ", expected_)); \
  } while (0)

#define CHECK_CONTAINS(actual, part)                                                                          \
  do {                                                                                                        \
    const std::string actual_ = (actual);                                                                     \
    if (actual_.find(part) == std::string::npos)                                                              \
      ::hdispatch::testing::failed(__FILE__, __LINE__, ::hdispatch::text("no \"", part, "\" in: ", actual_)); \
  } while (0)

/// The statement throws an Error of that fault whose message holds `part`.
#define CHECK_FAULT(wanted, part, ...)                                                                               \
  do {                                                                                                               \
    bool threw_ = false;                                                                                             \
    try {                                                                                                            \
      __VA_ARGS__;                                                                                                   \
    } catch (const ::hdispatch::Error& error_) {                                                                     \
      threw_ = true;                                                                                                 \
      if (error_.fault() != ::hdispatch::Fault::wanted)                                                              \
        ::hdispatch::testing::failed(                                                                                \
            __FILE__, __LINE__, ::hdispatch::text("fault ", static_cast<int>(error_.fault()), ": ", error_.what())); \
      CHECK_CONTAINS(error_.what(), part);                                                                           \
    }                                                                                                                \
    if (!threw_) ::hdispatch::testing::failed(__FILE__, __LINE__, #__VA_ARGS__ " did not throw");                    \
  } while (0)
