// launcher.cpp -- what both kinds of launcher check and say.
#include "launcher.h"

#include "check.h"

namespace hdispatch {

void Launcher::set_head(const RecordHead& head) {
  HD_CHECK_BUNDLE(head.m_min >= 1 && head.m_min <= head.m_max, head.kernel, ": valid for M in [", head.m_min, ", ",
                  head.m_max, "], which is empty");
  head_ = &head;
}

std::string Launcher::common_reason(const LaunchResult& result) const {
  switch (result.status) {
    case LaunchStatus::kMRange:
      return text("guard: ", head_->m_min, " <= M <= ", head_->m_max);
    case LaunchStatus::kGuard:
      return "guard: " + head_->guards[static_cast<size_t>(result.detail)].text;
    case LaunchStatus::kRaised:
      return "error";
    default:
      return "driver";
  }
}

std::string Launcher::place(const LaunchResult& result, const Call& call) const {
  return text(reason(result), " does not hold in ", head_->kernel, " (M = ", call.sizes[kM], ", K = ", call.sizes[kK],
              ", N = ", call.sizes[kN]);
}

}  // namespace hdispatch
