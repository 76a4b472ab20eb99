// Adaptive clipping on the device: every unit is read, judged, and scaled where it has to be, by one warp or, from
// kBlockBytes on, by one block. Nothing crosses blocks, so one launch does it without a barrier over the grid.
#pragma once

#include "../unit.h"
#include "clip_kernels.cuh"

namespace fastclip::cuda {

// A warp reads 3 KB at once: a unit of eight times as much is worth the block's barriers. One that is far larger, such
// as a bias of millions of elements, is still done by one block, while the others have the rest.
constexpr int64_t kBlockBytes = 8 * kRowsInFlight * kRowBytes;
// Weight and gradient count together. The smaller one, a bfloat16 beside a float64, still has a row for each warp, so
// that row 0 and what lies around the whole vectors is the first warp's alone.
static_assert(2 * kBlockBytes / 10 * 2 > (kWarps + 1) * kRowBytes);

// The units of a tensor, as a part of a list: those before it are counted by the entry before.
struct UnitEntry {
  const char* weight;
  char* grad;
  int64_t end;    // units of all entries up to this one
  int64_t numel;  // of a unit
  DType weight_dtype, grad_dtype;
};

// Entries whose units are done by blocks, then those whose units are done by warps; each kind is counted from 0.
constexpr int kFewUnitEntries = 200;
constexpr int kManyUnitEntries = (kParameterBytes - 64) / sizeof(UnitEntry);

template <int N>
struct UnitList {
  UnitLimit limit;
  int by_blocks, entries;
  UnitEntry entry[N];
};
static_assert(sizeof(UnitList<kManyUnitEntries>) <= kParameterBytes);

namespace {

// A unit as a table of one gradient: see PackedTable::add.
__device__ Entry pack_unit(const char* data, int64_t bytes, DType dtype) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  const uintptr_t last = (address + bytes) / kVectorBytes * kVectorBytes;
  const int64_t rows = last > first + kRowBytes ? static_cast<int64_t>(last - first + kRowBytes - 1) / kRowBytes : 1;
  const uint64_t slack = rows * kRowBytes + kSlackBias - bytes;
  return {const_cast<char*>(data),
          static_cast<uint64_t>(rows) << kRowShift | slack << kDTypeBits | static_cast<uint64_t>(dtype)};
}

// What a warp has of a unit: all of it, or, with a block at work, its part of the rows.
template <bool kBlock>
__device__ Segment segment_of(const Entry& unit) {
  const int64_t rows = end_row(unit);
  if (!kBlock) return Segment(&unit, 0, Share(0, rows));
  const int64_t warp = threadIdx.x / kWarp;
  return Segment(&unit, 0, Share(rows * warp / kWarps, rows * (warp + 1) / kWarps));
}

// The norm of a unit, for all threads that work on it.
template <class Norm, bool kBlock>
__device__ double unit_norm(const char* data, int64_t bytes, DType dtype) {
  const Entry unit = pack_unit(data, bytes, dtype);
  const Segment segment = segment_of<kBlock>(unit);
  Norm norm;
  with_dtype(dtype, [&](auto d) { reduce<decltype(d)>(segment, threadIdx.x % kWarp, norm); });
  if (!kBlock) return warp_norm(norm).norm();
  __shared__ double shared;
  const double total = block_norm(norm);
  if (threadIdx.x == 0) shared = total;
  __syncthreads();
  return shared;  // block_norm() has barriers before the next one is written
}

__device__ int64_t item_bytes(DType dtype) {
  return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2;
}

template <class Norm, bool kBlock>
__device__ void adapt_unit(const UnitEntry& entry, int64_t unit, UnitLimit limit) {
  const int64_t weight_bytes = entry.numel * item_bytes(entry.weight_dtype);
  const int64_t grad_bytes = entry.numel * item_bytes(entry.grad_dtype);
  char* const grad = entry.grad + unit * grad_bytes;
  const double weight_norm =
      unit_norm<Norm, kBlock>(entry.weight + unit * weight_bytes, weight_bytes, entry.weight_dtype);
  const double coef = unit_coef(limit, weight_norm, unit_norm<Norm, kBlock>(grad, grad_bytes, entry.grad_dtype));
  if (!must_scale(coef)) return;
  const Entry packed = pack_unit(grad, grad_bytes, entry.grad_dtype);
  const Segment segment = segment_of<kBlock>(packed);
  const Factors factors = factors_of(coef);
  const int lane = threadIdx.x % kWarp;
  with_dtype(entry.grad_dtype, [&](auto d) {
    using D = decltype(d);
    scale<D>(segment, lane, factors.first);
    if (factors.second != 1) scale<D>(segment, lane, factors.second);
  });
}

// Every `stride`-th unit of a list from `first` on: neighbours work on neighbouring memory.
template <class Norm, bool kBlock>
__device__ void adapt_units(const UnitEntry* entries, int count, int64_t first, int64_t stride, UnitLimit limit) {
  int64_t start = 0;
  int64_t unit = first;
  for (int i = 0; i < count; ++i) {
    const int64_t end = entries[i].end;
    for (; unit < end; unit += stride) adapt_unit<Norm, kBlock>(entries[i], unit - start, limit);
    start = end;
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 2) adapt_kernel(const __grid_constant__ UnitList<N> list) {
  with_norm_type(list.limit.norm_type, [&](auto norm) {
    using Norm = decltype(norm);
    adapt_units<Norm, true>(list.entry, list.by_blocks, blockIdx.x, gridDim.x, list.limit);
    const int64_t warp = static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
    adapt_units<Norm, false>(list.entry + list.by_blocks, list.entries - list.by_blocks, warp,
                             static_cast<int64_t>(gridDim.x) * kWarps, list.limit);
    return 0;
  });
}

}  // namespace
}  // namespace fastclip::cuda
