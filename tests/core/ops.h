// ops.h -- what tests of ops share: the toy op, what binds a call, and what is said of one that does not.
#pragma once

#include <string>
#include <vector>

#include "calls.h"
#include "op.h"
#include "testing.h"

namespace hdispatch::testing {

inline const Op& toy() {
  static const Op op(0, "toy", "toy(...) -> ()", toy_args(), toy_variants());
  return op;
}

struct Found {
  bool ok;
  uint16_t variant;
  DeviceSlot slot;
};

inline Found bind(const Op& op, Call& call) {
  Found out{false, 0xffff, kNoSlot};
  out.ok = op.bind(call, out.variant, out.slot) == Bound::kYes;
  return out;
}

/// What `complain` says about a call that `bind` refuses.
inline std::string complaint(Call call, const Op& op = toy()) {
  const Call given = call;
  CHECK(!bind(op, call).ok);
  try {
    op.complain(given);
  } catch (const Error& error) {
    CHECK(error.fault() == Fault::kCaller);
    return error.what();
  }
}

inline TensorView strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  TensorView view = contiguous(2, DType::kFloat32, sizes);
  for (size_t d = 0; d < strides.size(); ++d) view.strides[d] = strides[d];
  return view;
}

inline TensorView plain(const std::vector<int64_t>& sizes) { return strided(sizes, {}); }

}  // namespace hdispatch::testing
