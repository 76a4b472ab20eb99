// The plain table of gradients that a backend works on, and its division into shares. Knows no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "slice.h"

namespace fastclip {

class TensorTable {
 public:
  void reserve(size_t slices) { slices_.reserve(slices); }

  // Empty gradients carry nothing to reduce or scale: they are never in the table, so no backend has to skip them.
  void add(void* data, int64_t numel, DType dtype, uint32_t row = 0) {
    if (numel == 0) return;
    const int64_t bytes = numel * item_size(dtype);
    slices_.push_back({static_cast<char*>(data), bytes, dtype, 0, row});
    bytes_ += bytes;
  }

  Slice* slices() { return slices_.data(); }
  const Slice* slices() const { return slices_.data(); }
  int64_t size() const { return static_cast<int64_t>(slices_.size()); }
  int64_t bytes() const { return bytes_; }

  // Boundaries of `shares` contiguous shares of about equal bytes: share i is [cuts[i], cuts[i + 1]).
  // They depend on the table and the number of shares alone, so the same call always adds in the same order.
  std::vector<Cut> cut(int shares) const;

  // Whether two slices have a byte in common: then the order of in-place updates matters, and threads would race.
  bool has_overlaps() const;

 private:
  std::vector<Slice> slices_;
  int64_t bytes_ = 0;
};

}  // namespace fastclip
