// call.h -- one call as the core sees it: tensors as pointers, sizes and strides; scalars; the sizes M, K, N.
//
// A door fills a `Call` on its stack; nothing in it is owned. The core reads it; Op::bind writes `sizes`, and makes the
// views what the declaration says.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "dtype.h"

namespace hdispatch {

inline constexpr uint32_t kMaxArgs = 32;  ///< of an op; a signature is 32 nibbles
inline constexpr uint32_t kMaxRank = 4;   ///< of a tensor argument

inline constexpr uint32_t kMaxDerived = 4;  ///< quotients of symbols among an op's dimensions

/// The symbols that dimensions are written in. M is bucketed, K and N are exact, A and B are in no key.
enum Symbol : uint8_t { kM = 0, kK = 1, kN = 2, kA = 3, kB = 4, kSymbols = 5 };

inline constexpr const char* kSymbolNames[kSymbols] = {"M", "K", "N", "A", "B"};

/// The symbol of that name, or -1.
inline int symbol_named(std::string_view name) noexcept {
  for (int i = 0; i < kSymbols; ++i)
    if (name == kSymbolNames[i]) return i;
  return -1;
}

/// Where a tensor lives. Slot 0 is the CPU, which only the null driver serves; slot 1 + i is CUDA device i.
using DeviceSlot = uint32_t;
inline constexpr DeviceSlot kCpuSlot = 0;
inline constexpr DeviceSlot kMaxSlots = 65;
inline constexpr DeviceSlot kNoSlot = ~0u;  ///< a device that no table can serve

struct TensorView {
  uintptr_t data;             ///< address of the first element
  uintptr_t storage;          ///< where its storage begins; 0 of one that was freed, or never held anything
  int64_t sizes[kMaxRank];    ///< elements; only the first `rank`
  int64_t strides[kMaxRank];  ///< elements; of a dimension of size 0 or 1 it means nothing
  DeviceSlot slot;
  uint32_t rank;
  DType dtype;  ///< kNone: the argument is absent and nothing else is set
};

/// A string that the caller holds: UTF-8, which may hold NULs.
struct Text {
  const char* data;
  size_t size;
};

struct Call {
  /// By argument index; entries of scalars are not set. After the arguments the op's workspace, once a row has it.
  TensorView tensors[kMaxArgs + 1];
  double scalars[kMaxArgs];  ///< by argument index; floats
  /// By argument index; integers, flags; for a kNone argument 1 if a value was passed; a string's position among its
  /// argument's values, or -1.
  int64_t integers[kMaxArgs];
  Text texts[kMaxArgs];  ///< by argument index; strings, for messages
  /// M, K, N, A, B; 1 for sizes that are literal; then the op's quotients. Set by Op::bind.
  int64_t sizes[kSymbols + 1 + kMaxDerived];
};

/// Wraps: only the sizes of a tensor without elements have a product beyond int64.
inline int64_t times(int64_t a, int64_t b) noexcept {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

}  // namespace hdispatch
