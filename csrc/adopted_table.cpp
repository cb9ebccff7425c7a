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

void AdoptedTable::put(std::unique_ptr<AdoptedEntry> entry) {
  if (2 * entries_.size() + 2 >= slots_.size()) rehash(std::max<size_t>(16, 2 * slots_.size()));
  const auto has_its_key = [&](const AdoptedEntry& each) {
    return each.hash == entry->hash && each.words == entry->words;
  };
  size_t slot = entry->hash & (slots_.size() - 1);
  while (slots_[slot] && !has_its_key(*slots_[slot])) slot = (slot + 1) & (slots_.size() - 1);
  AdoptedEntry* last = slots_[slot];
  if (!last) {
    slots_[slot] = entry.get();
    entry->place = entries_.size();
    entries_.push_back(std::move(entry));
    return;
  }
  if (last->choices == entry->choices) return;
  // Tuned again and again, a key has no more entries than there are configurations.
  const auto is_like = [&](const AdoptedEntry& each) {
    return each.compiled == entry->compiled && each.config == entry->config && !each.row == !entry->row;
  };
  const auto renew = [&](AdoptedEntry& each) {
    each.choices = entry->choices;
    std::swap(each.config_state, entry->config_state);
  };
  if (is_like(*last)) return renew(*last);
  std::unique_ptr<AdoptedEntry>* again = &last->former;
  while (*again && !is_like(**again)) again = &(*again)->former;
  if (*again) {
    renew(**again);
    std::unique_ptr<AdoptedEntry> found = std::move(*again);
    *again = std::move(found->former);
    std::swap(found, entry);
  }
  const size_t place = last->place;
  slots_[slot] = entry.get();
  entry->place = place;
  entry->former = std::move(entries_[place]);
  entries_[place] = std::move(entry);
}

void AdoptedTable::clear() noexcept {
  slots_.clear();
  entries_.clear();
}

}  // namespace hdispatch
