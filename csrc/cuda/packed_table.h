// A table of gradients as the kernels read it: packed, and where it is too long for a launch's parameters, on the
// device.
#pragma once

#include <c10/cuda/CUDAStream.h>

#include <memory>
#include <mutex>
#include <vector>

#include "../tensor_table.h"
#include "job.h"

namespace fastclip::cuda {

class PackedTable {
 public:
  explicit PackedTable(int64_t capacity);

  void add(const Slice& slice);
  void add(const TensorTable& table) {
    for (int64_t i = 0; i < table.size(); ++i) add(table.slices()[i]);
  }

  // Puts 16 bytes of something else behind the gradients, which travels with them; counts as an entry.
  void append(const Entry& other) { entries_[size_++] = other; }

  // Entries up to kManyEntries may be read whatever the size is: a launch copies them all.
  const Entry* entries() const { return entries_.get(); }
  int size() const { return size_; }
  int64_t rows() const { return rows_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<Entry[]> entries_;
  int size_ = 0;
  int64_t rows_ = 0, bytes_ = 0;
};

// A table in device memory. Work that reads it has to be queued on the stream while the lock is held: then another
// thread with a list of its own on the same stream can overwrite or free the copy only behind that work.
struct TableOnDevice {
  const Entry* entries;
  std::unique_lock<std::mutex> lock;
};

// The copy is made without waiting, once for as long as the same table comes again. While a graph is captured, the
// graph owns the copy, and there is nothing to lock.
TableOnDevice on_device(const PackedTable& table, c10::cuda::CUDAStream stream);

// Nothing where no gradients overlap; otherwise tables without overlaps that hold this one together. Gradients that
// share memory must be written one after the other: warps that write them at the same time would race.
std::vector<TensorTable> rounds_without_overlaps(const TensorTable& table);

}  // namespace fastclip::cuda
