#include "packed_table.h"

#include <ATen/cuda/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <numeric>

namespace fastclip::cuda {

PackedTable::PackedTable(int64_t capacity) {
  TORCH_CHECK(capacity <= INT32_MAX, "expected at most 2^31 - 1 gradients on one device, got ", capacity);
  entries_.reset(new Entry[std::max<int64_t>(capacity, kManyEntries)]);
}

void PackedTable::add(const Slice& slice) {
  const auto data = reinterpret_cast<uintptr_t>(slice.data);
  const uintptr_t first = (data + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  const uintptr_t last = (data + slice.bytes) / kVectorBytes * kVectorBytes;
  const int64_t rows = last > first + kRowBytes ? (last - first + kRowBytes - 1) / kRowBytes : 1;
  rows_ += rows;
  bytes_ += slice.bytes;
  const uint64_t slack = rows * kRowBytes + kSlackBias - slice.bytes;
  entries_[size_++] = {
      slice.data, static_cast<uint64_t>(rows_) << kRowShift | slack << kDTypeBits | static_cast<uint64_t>(slice.dtype)};
}

// ---- on the device ----

namespace {

size_t bytes_of(const PackedTable& table) {
  return table.size() * sizeof(Entry);
}

c10::DataPtr allocate(size_t bytes) {
  return c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
}

// A stream's copies. The allocator and the stream's own order keep them apart from everything else: a copy is
// overwritten after the kernels that read it, and its memory, when it is given back, goes to later work of that stream.
struct Copy {
  c10::cuda::CUDAStream stream;
  std::vector<Entry> content;
  c10::DataPtr memory;
  size_t capacity;
};

constexpr size_t kCopies = 8;         // in all
constexpr size_t kCopiesAStream = 2;  // two models that take turns

// What is kept for a device. One lock a device, since it is held while a kernel is launched: a launch may wait for room
// behind a collective that a thread with another device has yet to join.
struct DeviceCache {
  std::mutex mutex;
  std::list<Copy> copies;             // used last: first
  cudaStream_t for_graphs = nullptr;  // see stream_for_graphs()
};

DeviceCache& cache_of(c10::DeviceIndex device) {
  static DeviceCache* const caches = new DeviceCache[C10_COMPILE_TIME_MAX_GPUS];  // CUDA may be gone before statics are
  return caches[device];
}

// Copies whose graph is gone. The callback that tells so must not call CUDA, nor wait for somebody who does; a later
// upload frees them.
std::mutex ownerless_mutex;
std::vector<std::unique_ptr<c10::DataPtr>>& ownerless = *new std::vector<std::unique_ptr<c10::DataPtr>>;

void upload(const PackedTable& table, void* memory, c10::cuda::CUDAStream stream) {
  // torch's pinned memory is used again only after the event that recordEvent leaves in the stream.
  // Deprecated in torch 2.14, but what replaces it is not in 2.7.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  auto* const pinned = at::cuda::getCachingHostAllocator();
  const c10::DataPtr staged = pinned->allocate(bytes_of(table));
  std::memcpy(staged.get(), table.entries(), bytes_of(table));
  C10_CUDA_CHECK(cudaMemcpyAsync(memory, staged.get(), bytes_of(table), cudaMemcpyHostToDevice, stream));
  at::cuda::CachingHostAllocator_recordEvent(staged.get(), staged.get_context(), stream);
#pragma GCC diagnostic pop
}

// The graph that a stream is being captured into, or null. (c10 has a function for it, but not in torch 2.7.)
cudaGraph_t captured_graph(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, nullptr, nullptr));
#endif
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

// A stream for the copies that graphs own. None of torch's pool: that hands out the same 32 again and again, and among
// them the one that is captured, where a wait is an error.
c10::cuda::CUDAStream stream_for_graphs(c10::DeviceIndex device) {
  DeviceCache& cache = cache_of(device);
  const std::lock_guard<std::mutex> lock(cache.mutex);
  if (!cache.for_graphs) {
    const c10::cuda::CUDAGuard guard(device);
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&cache.for_graphs, cudaStreamNonBlocking));
  }
  return c10::cuda::getStreamFromExternal(cache.for_graphs, device);
}

// A replay must find the table that was captured, whatever happened since. So the copy is made now, on a stream that
// is not captured, and belongs to the graph. Here the host waits: for the copy alone, and once a capture.
const Entry* upload_for_graph(const PackedTable& table, c10::cuda::CUDAStream stream, cudaGraph_t graph) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  const auto restore = [&mode](void*) { cudaThreadExchangeStreamCaptureMode(&mode); };
  const std::unique_ptr<void, decltype(restore)> restored(&mode, restore);

  const c10::cuda::CUDAStream side = stream_for_graphs(stream.device_index());
  const c10::cuda::CUDAStreamGuard guard(side);
  auto memory = std::make_unique<c10::DataPtr>(allocate(bytes_of(table)));
  void* const address = memory->get();
  C10_CUDA_CHECK(cudaMemcpyAsync(address, table.entries(), bytes_of(table), cudaMemcpyHostToDevice, side));
  C10_CUDA_CHECK(cudaStreamSynchronize(side));

  const auto disown = [](void* owned) {
    const std::lock_guard<std::mutex> lock(ownerless_mutex);
    ownerless.emplace_back(static_cast<c10::DataPtr*>(owned));
  };
  cudaUserObject_t object;
  C10_CUDA_CHECK(cudaUserObjectCreate(&object, memory.get(), disown, 1, cudaUserObjectNoDestructorSync));
  memory.release();
  C10_CUDA_CHECK(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
  return static_cast<const Entry*>(address);
}

bool same(const Copy& copy, const PackedTable& table) {
  return copy.content.size() == static_cast<size_t>(table.size()) &&
         std::memcmp(copy.content.data(), table.entries(), bytes_of(table)) == 0;
}

}  // namespace

TableOnDevice on_device(const PackedTable& table, c10::cuda::CUDAStream stream) {
  if (cudaGraph_t graph = captured_graph(stream)) return {upload_for_graph(table, stream, graph), {}};

  std::vector<std::unique_ptr<c10::DataPtr>> garbage;
  {
    const std::lock_guard<std::mutex> lock(ownerless_mutex);
    garbage.swap(ownerless);
  }
  DeviceCache& cache = cache_of(stream.device_index());
  std::list<Copy>& copies = cache.copies;
  std::unique_lock<std::mutex> lock(cache.mutex);
  size_t of_stream = 0;
  auto oldest = copies.end();
  for (auto copy = copies.begin(); copy != copies.end(); ++copy) {
    if (copy->stream != stream) continue;
    ++of_stream;
    oldest = copy;
    if (!same(*copy, table)) continue;
    copies.splice(copies.begin(), copies, copy);
    return {static_cast<const Entry*>(copy->memory.get()), std::move(lock)};
  }
  if (of_stream >= kCopiesAStream) {
    copies.splice(copies.begin(), copies, oldest);
  } else {
    copies.push_front(Copy{stream, {}, {}, 0});
    if (copies.size() > kCopies) copies.pop_back();
  }
  Copy& copy = copies.front();
  copy.content.clear();  // until the upload has been queued this copy is nobody's
  if (copy.capacity < bytes_of(table)) {
    copy.capacity = 0;
    copy.memory = allocate(bytes_of(table));
    copy.capacity = bytes_of(table);
  }
  upload(table, copy.memory.get(), stream);
  copy.content.assign(table.entries(), table.entries() + table.size());
  return {static_cast<const Entry*>(copy.memory.get()), std::move(lock)};
}

// ---- overlaps ----

namespace {

// Looking for overlaps means sorting, 60 ns a gradient. The lists of recent calls that had none are remembered.
bool known_to_be_disjoint(const TensorTable& table) {
  constexpr size_t kRemembered = 4;
  struct Extent {
    const char* data;
    int64_t bytes;
  };
  thread_local std::list<std::vector<Extent>> remembered;
  const auto matches = [&table](const std::vector<Extent>& list) {
    if (static_cast<int64_t>(list.size()) != table.size()) return false;
    for (int64_t i = 0; i < table.size(); ++i) {
      if (list[i].data != table.slices()[i].data || list[i].bytes != table.slices()[i].bytes) return false;
    }
    return true;
  };
  const auto found = std::find_if(remembered.begin(), remembered.end(), matches);
  if (found != remembered.end()) {
    remembered.splice(remembered.begin(), remembered, found);
    return true;
  }
  if (table.has_overlaps()) return false;
  if (remembered.size() == kRemembered) remembered.pop_back();
  std::vector<Extent>& list = remembered.emplace_front(table.size());
  for (int64_t i = 0; i < table.size(); ++i) list[i] = {table.slices()[i].data, table.slices()[i].bytes};
  return true;
}

}  // namespace

std::vector<TensorTable> rounds_without_overlaps(const TensorTable& table) {
  if (known_to_be_disjoint(table)) return {};
  std::vector<int64_t> order(table.size());
  std::iota(order.begin(), order.end(), 0);
  const Slice* slices = table.slices();
  std::stable_sort(order.begin(), order.end(),
                   [slices](int64_t a, int64_t b) { return slices[a].data < slices[b].data; });
  std::vector<TensorTable> rounds;
  std::vector<const char*> ends;
  for (const int64_t i : order) {
    const Slice& slice = slices[i];
    size_t round = 0;
    while (round < rounds.size() && ends[round] > slice.data) ++round;
    if (round == rounds.size()) {
      rounds.emplace_back();
      ends.push_back(nullptr);
    }
    rounds[round].add(slice.data, slice.bytes / item_size(slice.dtype), slice.dtype);
    ends[round] = slice.data + slice.bytes;
  }
  return rounds;
}

}  // namespace fastclip::cuda
