#include "tensor_table.h"

#include <algorithm>

namespace fastclip {

std::vector<Cut> TensorTable::cut(int shares) const {
  std::vector<Cut> cuts;
  cuts.reserve(shares + 1);
  cuts.push_back({0, 0});
  int64_t slice = 0, before = 0;  // bytes in all slices before `slice`
  for (int share = 1; share < shares; ++share) {
    const int64_t target = bytes_ / shares * share;
    while (slice < size() && before + slices_[slice].bytes <= target) before += slices_[slice++].bytes;
    const Cut cut{slice, slice < size() ? (target - before) / kCutBytes * kCutBytes : 0};
    cuts.push_back(cut);
  }
  cuts.push_back({size(), 0});
  return cuts;
}

bool TensorTable::has_overlaps() const {
  const auto ascending = [](const Slice& a, const Slice& b) { return a.data < b.data; };
  std::vector<Slice> sorted;
  const Slice* slices = slices_.data();
  if (!std::is_sorted(slices_.begin(), slices_.end(), ascending)) {
    sorted = slices_;
    std::sort(sorted.begin(), sorted.end(), ascending);
    slices = sorted.data();
  }
  for (int64_t i = 1; i < size(); ++i) {
    if (slices[i - 1].data + slices[i - 1].bytes > slices[i].data) return true;
  }
  return false;
}

}  // namespace fastclip
