// adopted_table.cpp -- finding and adding keys.
#include "adopted_table.h"

#include <algorithm>

namespace hdispatch {

const AdoptedEntry* AdoptedTable::find(const AdoptedCall& call) const noexcept {
  if (HD_UNLIKELY(slots_.empty())) return nullptr;
  const size_t mask = slots_.size() - 1;
  for (size_t slot = call.hash & mask;; slot = (slot + 1) & mask) {
    const AdoptedEntry* entry = slots_[slot];
    if (!entry) return nullptr;
    if (entry->hash == call.hash && entry->words.size() == call.count &&
        std::equal(call.words, call.words + call.count, entry->words.data()))
      return entry;
  }
}

void AdoptedTable::rehash(size_t slots) {
  slots_.assign(slots, nullptr);
  for (const auto& entry : entries_) {
    size_t slot = entry->hash & (slots - 1);
    while (slots_[slot]) slot = (slot + 1) & (slots - 1);
    slots_[slot] = entry.get();
  }
}

const AdoptedEntry* AdoptedTable::insert(std::unique_ptr<AdoptedEntry> entry) {
  entries_.push_back(std::move(entry));
  const AdoptedEntry* made = entries_.back().get();
  if (2 * entries_.size() >= slots_.size()) {
    rehash(std::max<size_t>(16, 2 * slots_.size()));
    return made;
  }
  size_t slot = made->hash & (slots_.size() - 1);
  while (slots_[slot]) slot = (slot + 1) & (slots_.size() - 1);
  return slots_[slot] = made;
}

void AdoptedTable::clear() noexcept {
  slots_.clear();
  entries_.clear();
}

}  // namespace hdispatch
