// The kernels: raw pointers in, gradients scaled in place. No torch header.
//
// The rows of all gradients are one long list, and each warp has a contiguous share of it. A warp reduces its share
// front to back; the blocks' partial norms are combined after a grid-wide barrier, by every block, in the same order;
// then each warp scales its share back to front, since what it read last is still in the L2 cache. A coefficient
// of 1 ends the kernel instead: nothing is written.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../clip_math.h"
#include "../factors.h"
#include "../policy.h"
#include "job.h"

namespace fastclip::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;
static_assert(kWarp == 32, "kAllLanes has a bit for each lane");

template <class T>
__device__ __forceinline__ T lesser(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ __forceinline__ T greater(T a, T b) {
  return a < b ? b : a;
}

// ---- dtypes ----

// x limited to [-bound, bound]; NaN stays NaN.
template <class T>
__device__ __forceinline__ T clamp_number(T x, T bound) {
  return x > bound ? bound : x < -bound ? -bound : x;
}

// The same for all elements of a vector.
template <class D>
__device__ __forceinline__ uint4 clamp_elements(uint4 v, typename D::Element bound) {
  typename D::Number x[D::kElements];
  D::unpack(v, x);
#pragma unroll
  for (int e = 0; e < D::kElements; ++e) x[e] = clamp_number(x[e], bound);
  return D::pack(x);
}

// Each dtype says how a 16-byte vector becomes numbers and back, and what the largest and the smallest absolute value
// in it is, as a bit pattern: as integers NaN is above inf and inf above every number. kNormal is that of the smallest
// number that is not subnormal.

struct F32 {
  using Element = float;
  using Number = float;
  static constexpr int kElements = 4;
  using Pattern = uint32_t;
  static constexpr Pattern kAbs = 0x7fffffff, kInf = 0x7f800000, kNormal = 0x00800000;

  static __device__ void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  static __device__ uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  }
  static __device__ uint4 clamp(uint4 v, float bound) { return clamp_elements<F32>(v, bound); }
  static __device__ double widen(float x) { return x; }
  static __device__ float narrow(double x) { return static_cast<float>(x); }
  static __device__ Pattern bits(float x) { return __float_as_uint(x); }
  static __device__ float value(Pattern bits) { return __uint_as_float(bits); }

  struct Largest {
    uint32_t bits = 0;
    __device__ void take(uint32_t word) { bits = max(bits, word & kAbs); }
    __device__ void take(uint4 v) { take(v.x), take(v.y), take(v.z), take(v.w); }
    __device__ Pattern pattern() const { return bits; }
  };
  struct Smallest {
    uint32_t bits = kAbs;
    __device__ void take(uint32_t word) { bits = min(bits, word & kAbs); }
    __device__ void take(uint4 v) { take(v.x), take(v.y), take(v.z), take(v.w); }
    __device__ Pattern pattern() const { return bits; }
  };
  static __device__ void magnitudes(uint4 v, Pattern (&x)[4]) {
    x[0] = v.x & kAbs, x[1] = v.y & kAbs, x[2] = v.z & kAbs, x[3] = v.w & kAbs;
  }
};

// Two 16-bit elements in a word. The larger of the upper halves is found with the lower halves left in place, which
// only decide between equals; those of the lower halves are shifted up, the sign out of the word.
struct Largest16 {
  uint32_t upper = 0, lower = 0;
  __device__ void take(uint32_t word) { upper = max(upper, word & 0x7fffffff), lower = max(lower, word << 17); }
  __device__ void take(uint4 v) { take(v.x), take(v.y), take(v.z), take(v.w); }
  __device__ uint16_t pattern() const { return static_cast<uint16_t>(max(upper >> 16, lower >> 17)); }
};

struct Smallest16 {
  uint32_t upper = 0x7fffffff, lower = 0xffffffff;
  __device__ void take(uint32_t word) { upper = min(upper, word & 0x7fffffff), lower = min(lower, word << 17); }
  __device__ void take(uint4 v) { take(v.x), take(v.y), take(v.z), take(v.w); }
  __device__ uint16_t pattern() const { return static_cast<uint16_t>(min(upper >> 16, lower >> 17)); }
};

// What float16 and bfloat16 have in common; D takes a word apart and puts it together.
template <class D>
struct SixteenBit {
  using Number = float;
  static constexpr int kElements = 8;
  using Pattern = uint16_t;
  using Largest = Largest16;
  using Smallest = Smallest16;

  static __device__ void unpack(uint4 v, float (&x)[8]) {
    D::unpack_pair(v.x, x), D::unpack_pair(v.y, x + 2), D::unpack_pair(v.z, x + 4), D::unpack_pair(v.w, x + 6);
  }
  static __device__ uint4 pack(const float (&x)[8]) {
    return make_uint4(D::pack_pair(x), D::pack_pair(x + 2), D::pack_pair(x + 4), D::pack_pair(x + 6));
  }
  static __device__ void magnitudes(uint4 v, Pattern (&x)[8]) {
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = words[i] & 0x7fff, x[2 * i + 1] = words[i] >> 16 & 0x7fff;
  }
  // Two elements an instruction; NaN stays NaN.
  template <class Element>
  static __device__ uint4 clamp(uint4 v, Element bound) {
    return make_uint4(D::clamp_pair(v.x, bound), D::clamp_pair(v.y, bound), D::clamp_pair(v.z, bound),
                      D::clamp_pair(v.w, bound));
  }
};

struct F16 : SixteenBit<F16> {
  using Element = __half;
  static constexpr Pattern kAbs = 0x7fff, kInf = 0x7c00, kNormal = 0x0400;

  static __device__ void unpack_pair(uint32_t word, float* x) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = pair.x, x[1] = pair.y;
  }
  static __device__ uint32_t pack_pair(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ uint32_t clamp_pair(uint32_t word, __half bound) {
    const __half2 high = __half2half2(bound), low = __hneg2(high);
    const __half2 pair = __hmin2_nan(__hmax2_nan(*reinterpret_cast<const __half2*>(&word), low), high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ double widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(double x) { return __float2half_rn(static_cast<float>(x)); }
  static __device__ Pattern bits(__half x) { return __half_as_ushort(x); }
  static __device__ __half value(Pattern bits) { return __ushort_as_half(bits); }
};

struct BF16 : SixteenBit<BF16> {
  using Element = __nv_bfloat16;
  static constexpr Pattern kAbs = 0x7fff, kInf = 0x7f80, kNormal = 0x0080;

  // A bfloat16 is the upper half of a float: one instruction an element.
  static __device__ void unpack_pair(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000);
  }
  static __device__ uint32_t pack_pair(const float* x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ uint32_t clamp_pair(uint32_t word, __nv_bfloat16 bound) {
    const __nv_bfloat162 high = __bfloat162bfloat162(bound), low = __hneg2(high);
    const __nv_bfloat162 pair = __hmin2_nan(__hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&word), low), high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(double x) { return __float2bfloat16_rn(static_cast<float>(x)); }
  static __device__ Pattern bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
  static __device__ __nv_bfloat16 value(Pattern bits) { return __ushort_as_bfloat16(bits); }
};

struct F64 {
  using Element = double;
  using Number = double;
  static constexpr int kElements = 2;
  using Pattern = unsigned long long;
  static constexpr Pattern kAbs = 0x7fffffffffffffff, kInf = 0x7ff0000000000000, kNormal = 0x0010000000000000;

  static __device__ void unpack(uint4 v, double (&x)[2]) {
    x[0] = __hiloint2double(v.y, v.x), x[1] = __hiloint2double(v.w, v.z);
  }
  static __device__ uint4 pack(const double (&x)[2]) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]), __double2hiint(x[1]));
  }
  static __device__ uint4 clamp(uint4 v, double bound) { return clamp_elements<F64>(v, bound); }
  static __device__ double widen(double x) { return x; }
  static __device__ double narrow(double x) { return x; }
  static __device__ Pattern bits(double x) { return __double_as_longlong(x); }
  static __device__ double value(Pattern bits) { return __longlong_as_double(bits); }

  struct Largest {
    Pattern bits = 0;
    __device__ void take(uint4 v) {
      bits = max(bits, (static_cast<Pattern>(v.y & 0x7fffffff) << 32) | v.x);
      bits = max(bits, (static_cast<Pattern>(v.w & 0x7fffffff) << 32) | v.z);
    }
    __device__ Pattern pattern() const { return bits; }
  };
  struct Smallest {
    Pattern bits = kAbs;
    __device__ void take(uint4 v) {
      Pattern x[2];
      magnitudes(v, x);
      bits = min(bits, min(x[0], x[1]));
    }
    __device__ Pattern pattern() const { return bits; }
  };
  static __device__ void magnitudes(uint4 v, Pattern (&x)[2]) {
    x[0] = (static_cast<Pattern>(v.y & 0x7fffffff) << 32) | v.x;
    x[1] = (static_cast<Pattern>(v.w & 0x7fffffff) << 32) | v.z;
  }
};

// Calls visit(dtype tag): the only switch over dtypes.
template <class Visit>
__device__ __forceinline__ void with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::F32:
      return visit(F32());
    case DType::F64:
      return visit(F64());
    case DType::F16:
      return visit(F16());
    case DType::BF16:
      return visit(BF16());
  }
}

__device__ double read(const Operand& operand) {
  double value = operand.value;
  if (operand.pointer) {
    with_dtype(operand.dtype, [&](auto d) {
      using D = decltype(d);
      value = D::widen(*static_cast<const typename D::Element*>(operand.pointer));
    });
  }
  return value;
}

// ---- norms ----

// Up to 6 rows of a gradient, of which a lane has a vector each: loaded at once, then used.
struct Batch {
  static constexpr int kVectors = kRowsInFlight * kWarp;

  uint4* p;   // the first vector of this lane
  int count;  // how many vectors this lane has, every kWarp-th from p on
  uint4 v[kRowsInFlight];

  // `left` vectors follow from `first` on. Those that a lane does not have are zeros, which change no norm.
  __device__ __forceinline__ Batch(uint4* first, int lane, int left)
      : p(first + lane), count(left >= kVectors ? kRowsInFlight : (left - lane + kWarp - 1) / kWarp) {
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) v[k] = k < count ? p[k * kWarp] : make_uint4(0, 0, 0, 0);
  }

  // The largest absolute value, as a bit pattern.
  template <class D>
  __device__ __forceinline__ typename D::Pattern largest() const {
    typename D::Largest found;
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) found.take(v[k]);
    return found.pattern();
  }

  // The smallest absolute value of the vectors that this lane has.
  template <class D>
  __device__ __forceinline__ typename D::Pattern smallest() const {
    typename D::Smallest found;
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (k < count) found.take(v[k]);
    }
    return found.pattern();
  }

  // Calls take(double) for each element. Reads them again, in a loop that is not unrolled: for what happens rarely.
  template <class D, class Take>
  __device__ __forceinline__ void for_each_element(Take take) const {
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      typename D::Number x[D::kElements];
      D::unpack(p[k * kWarp], x);
#pragma unroll
      for (int e = 0; e < D::kElements; ++e) take(static_cast<double>(x[e]));
    }
  }
};

// A batch, added up in the dtype's own arithmetic. Each of the float accumulators takes 6 terms, and three additions
// join 8 of them: 9 roundings of 2^-24 put the sum off by 5.4e-7 at worst, and the L2 norm by half of that. From here
// on it is float64. One conversion and one addition in float64 for 48 bfloat16 elements: cards with 1/64 of their
// float32 rate in float64 still do it several times faster than their memory delivers.
template <class D, class Add>
__device__ __forceinline__ typename D::Number sum_of(const Batch& batch, Add add) {
  typename D::Number sum[D::kElements] = {};
#pragma unroll
  for (int k = 0; k < kRowsInFlight; ++k) {
    typename D::Number x[D::kElements];
    D::unpack(batch.v[k], x);
#pragma unroll
    for (int e = 0; e < D::kElements; ++e) sum[e] = add(sum[e], x[e]);
  }
#pragma unroll
  for (int half = D::kElements / 2; half > 0; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) sum[e] += sum[e + half];
  }
  return sum[0];
}

// In [kLeast, kMost] a batch's sum of squares is sound: nothing overflowed, and what underflowed (2^-150 a term, 48
// terms) is nothing beside it. float16 cannot leave the range. A float64 sum stays so far below the largest number
// that all batches together do, too.
template <class D>
struct Sound {
  static constexpr float kLeast = 0x1p-90f, kMost = 3.4e38f;
};
template <>
struct Sound<F16> {
  static constexpr float kLeast = 0, kMost = 3.4e38f;
};
template <>
struct Sound<F64> {
  static constexpr double kLeast = 0x1p-900, kMost = 0x1p960;
};

struct L1 {
  double sum = 0;

  template <class D>
  __device__ __forceinline__ void take(const Batch& batch) {
    using Number = typename D::Number;
    const Number total = sum_of<D>(batch, [](Number sum, Number x) { return sum + fabs(x); });
    if (total <= Sound<D>::kMost || sizeof(Number) == 8) {
      sum += total;
    } else {
      batch.for_each_element<D>([this](double x) { take(x); });
    }
  }
  __device__ void take(double x) { sum += fabs(x); }
  __device__ void merge(const L1& other) { sum += other.sum; }
  __device__ void store(double* to) const { to[0] = sum; }
  static __device__ L1 load(const double* from) { return {from[0]}; }
  static constexpr int kNumbers = 1;  // that store() writes
  __device__ L1 of_lane(int mask) const { return {__shfl_xor_sync(kAllLanes, sum, mask)}; }
  __device__ double norm() const { return sum; }
};

struct L2 {
  // Sums of squares. Those of values beyond 2^480, if there are many, and below 2^-400 are no numbers in float64; they
  // are summed apart, multiplied by powers of 2.
  double sum = 0, large = 0, small = 0;

  template <class D>
  __device__ __forceinline__ void take(const Batch& batch) {
    using Number = typename D::Number;
    const Number total = sum_of<D>(batch, [](Number sum, Number x) { return fma(x, x, sum); });
    if (total >= Sound<D>::kLeast && total <= Sound<D>::kMost) {
      sum += total;
    } else if (batch.largest<D>() != 0) {
      batch.for_each_element<D>([this](double x) {
        if (sizeof(Number) == 8) {
          take(x);
        } else {
          sum = fma(x, x, sum);  // squares of floats are numbers in float64
        }
      });
    }
  }
  __device__ void take(double x) {
    const double size = fabs(x);
    if (size > 0x1p480) {
      large = fma(x * 0x1p-600, x * 0x1p-600, large);
    } else if (size < 0x1p-400) {
      small = fma(x * 0x1p600, x * 0x1p600, small);
    } else {
      sum = fma(x, x, sum);
    }
  }
  __device__ void merge(const L2& other) { sum += other.sum, large += other.large, small += other.small; }
  __device__ void store(double* to) const { to[0] = sum, to[1] = large, to[2] = small; }
  static __device__ L2 load(const double* from) { return {from[0], from[1], from[2]}; }
  static constexpr int kNumbers = 3;
  __device__ L2 of_lane(int mask) const {
    return {__shfl_xor_sync(kAllLanes, sum, mask), __shfl_xor_sync(kAllLanes, large, mask),
            __shfl_xor_sync(kAllLanes, small, mask)};
  }
  __device__ double norm() const {
    double norm = sqrt(sum);
    if (large != 0) norm = combine_norms(norm, sqrt(large) * 0x1p600, NormType::L2);
    if (small != 0) norm = combine_norms(norm, sqrt(small) * 0x1p-600, NormType::L2);
    return norm;
  }
};

struct Inf {
  double max = 0;

  template <class D>
  __device__ __forceinline__ void take(const Batch& batch) {
    take(D::widen(D::value(batch.largest<D>())));
  }
  __device__ void take(double x) { max = nan_max(max, fabs(x)); }
  __device__ void merge(const Inf& other) { max = nan_max(max, other.max); }
  __device__ void store(double* to) const { to[0] = max; }
  static __device__ Inf load(const double* from) { return {from[0]}; }
  static constexpr int kNumbers = 1;
  __device__ Inf of_lane(int mask) const { return {__shfl_xor_sync(kAllLanes, max, mask)}; }
  __device__ double norm() const { return max; }
};

// The norm over all threads of a block, for thread 0. Always in the same order.
template <class Norm>
__device__ double block_norm(Norm mine) {
  __shared__ double storage[kWarps * sizeof(Norm) / sizeof(double)];
  Norm* warps = reinterpret_cast<Norm*>(storage);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) mine.merge(mine.of_lane(mask));
  __syncthreads();  // the storage may still be read by an earlier call
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  Norm total = warps[0];
  for (int warp = 1; warp < kWarps; ++warp) total.merge(warps[warp]);
  return total.norm();
}

// ---- shares ----

// The contiguous rows [begin, end) of a warp.
struct Share {
  int64_t begin, end;

  __device__ Share(int64_t begin, int64_t end) : begin(begin), end(end) {}
  __device__ explicit Share(int64_t rows) {
    const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t each = rows / warps, rest = rows % warps;
    begin = each * warp + lesser(warp, rest);
    end = begin + each + (warp < rest);
  }
};

// The warp that has a row.
__device__ int64_t warp_of(int64_t row, int64_t rows) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t each = rows / warps, rest = rows % warps, longer = rest * (each + 1);
  return row < longer ? row / (each + 1) : rest + (row - longer) / each;
}

__device__ __forceinline__ int64_t end_row(const Entry& entry) {
  return static_cast<int64_t>(entry.packed >> kRowShift);
}

// The gradient that has a row: the first that ends behind it.
__device__ int find(const Entry* entries, int count, int64_t row) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end_row(entries[middle]) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// What a warp has of one gradient.
struct Segment {
  uint4* vectors;            // the first whole vector of this warp's rows
  int count;                 // and how many there are: 2^31 of them are 32 GB for one warp
  char *head, *tail;         // what lies before the first and behind the last whole vector of the gradient:
  int head_size, tail_size;  // bytes, 0 unless row 0 is among this warp's rows
  DType dtype;

  __device__ Segment(const Entry* entries, int index, Share share) {
    const Entry entry = entries[index];
    const int64_t start = index > 0 ? end_row(entries[index - 1]) : 0, rows = end_row(entry) - start;
    const int64_t slack = entry.packed >> kDTypeBits & ((1 << kSlackBits) - 1);
    dtype = static_cast<DType>(entry.packed & ((1 << kDTypeBits) - 1));
    char* const stop = entry.data + (rows * kRowBytes + kSlackBias - slack);
    const auto down = [](char* p) {
      return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) & ~static_cast<uintptr_t>(kVectorBytes - 1));
    };
    char* const first = down(entry.data + kVectorBytes - 1);
    char* const last = down(stop);
    const int64_t begin = greater(share.begin - start, int64_t{0}), end = lesser(share.end - start, rows);
    vectors = reinterpret_cast<uint4*>(first + begin * kRowBytes);
    // -1 for a gradient inside a vector.
    count = static_cast<int>(reinterpret_cast<uint4*>(lesser(first + end * kRowBytes, last)) - vectors);
    head = entry.data, tail = greater(first, last);
    head_size = begin == 0 ? static_cast<int>(lesser(first, stop) - head) : 0;
    tail_size = begin == 0 && tail < stop ? static_cast<int>(stop - tail) : 0;
  }

  // The element of head or tail that this lane has, if any: the first lanes have the head, the next the tail.
  template <class Element>
  __device__ Element* element(int lane) const {
    constexpr int kMost = kVectorBytes / sizeof(Element);
    const bool in_tail = lane >= kMost;
    const int offset = (in_tail ? lane - kMost : lane) * static_cast<int>(sizeof(Element));
    return offset < (in_tail ? tail_size : head_size) ? reinterpret_cast<Element*>((in_tail ? tail : head) + offset)
                                                      : nullptr;
  }
};

template <class D, class Norm>
__device__ __forceinline__ void reduce(const Segment& segment, int lane, Norm& norm) {
  if (const auto* x = segment.element<typename D::Element>(lane)) norm.take(D::widen(*x));
  uint4* p = segment.vectors;
  for (int left = segment.count; left > 0; left -= Batch::kVectors, p += Batch::kVectors) {
    norm.template take<D>(Batch(p, lane, left));
  }
}

template <class Norm>
__device__ double reduce_share(const Job& job, const Entry* entries) {
  const Share share(job.rows);
  const int lane = threadIdx.x % kWarp;
  Norm norm;
  if (share.begin < share.end) {
    for (int i = find(entries, job.entries, share.begin); i < job.entries; ++i) {
      const Segment segment(entries, i, share);
      with_dtype(segment.dtype, [&](auto d) { reduce<decltype(d)>(segment, lane, norm); });
      if (end_row(entries[i]) >= share.end) break;
    }
  }
  return block_norm(norm);
}

// ---- statistics ----

__device__ unsigned long long warp_sum(unsigned long long x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}
__device__ double warp_max(double x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = nan_max(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}
template <class Norm>
__device__ Norm warp_norm(Norm norm) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) norm.merge(norm.of_lane(mask));
  return norm;
}

// What a warp counts of the gradient at hand, and the norm of all it has had. In shared memory, where lane 0 alone
// keeps it: the plain kernel already has all of its 64 registers in use.
struct WarpTotals {
  unsigned long long zeros, small, large, nans;  // small: zeros and subnormal numbers. large: inf and NaN
  double norm[3];

  // Counts what all lanes have: patterns(i, take) calls take for those of the i-th of this lane's `count` pieces.
  template <class D, class Patterns>
  __device__ void count(int lane, int count, Patterns patterns) {
    uint32_t own_zeros = 0, own_small = 0, own_large = 0, own_nans = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      patterns(i, [&](typename D::Pattern x) {
        own_zeros += x == 0, own_small += x<D::kNormal, own_large += x >= D::kInf, own_nans += x> D::kInf;
      });
    }
    const auto all_zeros = warp_sum(own_zeros), all_small = warp_sum(own_small);
    const auto all_large = warp_sum(own_large), all_nans = warp_sum(own_nans);
    if (lane == 0) zeros += all_zeros, small += all_small, large += all_large, nans += all_nans;
  }
};

// A lane's part of a gradient as reduce() has it, and what else is known of it. Every batch costs a maximum and a
// minimum; only where these say that there is something to count is it read again, from the cache, and counted.
// Returns the lane's largest absolute value.
template <class D, class Norm>
__device__ __forceinline__ double examine(const Segment& segment, int lane, Norm& norm, WarpTotals& totals) {
  using Pattern = typename D::Pattern;
  Pattern largest = 0;
  if (segment.head_size + segment.tail_size > 0) {
    const auto* const x = segment.element<typename D::Element>(lane);
    if (x) {
      norm.take(D::widen(*x));
      largest = static_cast<Pattern>(D::bits(*x) & D::kAbs);
    }
    totals.count<D>(lane, x != nullptr, [largest](int, auto take) { take(largest); });
  }
  uint4* p = segment.vectors;
  for (int left = segment.count; left > 0; left -= Batch::kVectors, p += Batch::kVectors) {
    const Batch batch(p, lane, left);
    norm.template take<D>(batch);
    const Pattern most = batch.largest<D>(), least = batch.smallest<D>();
    largest = greater(largest, most);
    if (!__any_sync(kAllLanes, most >= D::kInf || least < D::kNormal)) continue;
    totals.count<D>(lane, batch.count, [&batch](int k, auto take) {
      Pattern x[D::kElements];
      D::magnitudes(batch.p[k * kWarp], x);
#pragma unroll
      for (int e = 0; e < D::kElements; ++e) take(x[e]);
    });
  }
  return D::widen(D::value(largest));
}

// As reduce_share(), and leaves behind what this warp knows of each gradient.
template <class Norm>
__device__ double examine_share(const Job& job, const Entry* entries) {
  __shared__ WarpTotals storage[kWarps];
  WarpTotals& totals = storage[threadIdx.x / kWarp];
  const Share share(job.rows);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) Norm().store(totals.norm);
  if (share.begin < share.end) {
    for (int i = find(entries, job.entries, share.begin); i < job.entries; ++i) {
      const Segment segment(entries, i, share);
      if (lane == 0) totals.zeros = totals.small = totals.large = totals.nans = 0;
      Norm norm;
      double abs_max = 0;
      with_dtype(segment.dtype, [&](auto d) { abs_max = examine<decltype(d)>(segment, lane, norm, totals); });
      norm = warp_norm(norm), abs_max = warp_max(abs_max);
      if (lane == 0) {
        Norm total = Norm::load(totals.norm);
        total.merge(norm);
        total.store(totals.norm);
        WarpPart& part = job.parts[static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp + i];
        norm.store(part.norm);
        part.abs_max = abs_max;
        part.zeros = totals.zeros, part.subnormals = totals.small - totals.zeros;
        part.infs = totals.large - totals.nans, part.nans = totals.nans;
      }
      if (end_row(entries[i]) >= share.end) break;
    }
  }
  return block_norm(lane == 0 ? Norm::load(totals.norm) : Norm());
}

// The rows of all gradients, a warp for each in turn. The parts of one follow each other, and are always added up in
// the same order.
template <class Norm>
__device__ void write_rows(const Job& job, const Entry* entries) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t i = warp; i < job.entries; i += warps) {
    const int64_t start = i > 0 ? end_row(entries[i - 1]) : 0;
    const int64_t last = warp_of(end_row(entries[i]) - 1, job.rows);
    Norm norm;
    double abs_max = 0;
    unsigned long long zeros = 0, infs = 0, nans = 0, subnormals = 0;
    for (int64_t w = warp_of(start, job.rows) + lane; w <= last; w += kWarp) {
      const WarpPart& part = job.parts[w + i];  // from L2, as in combine_partials()
      double numbers[Norm::kNumbers];
#pragma unroll
      for (int n = 0; n < Norm::kNumbers; ++n) numbers[n] = __ldcg(part.norm + n);
      norm.merge(Norm::load(numbers));
      abs_max = nan_max(abs_max, __ldcg(&part.abs_max));
      zeros += __ldcg(&part.zeros), infs += __ldcg(&part.infs);
      nans += __ldcg(&part.nans), subnormals += __ldcg(&part.subnormals);
    }
    norm = warp_norm(norm), abs_max = warp_max(abs_max);
    zeros = warp_sum(zeros), infs = warp_sum(infs), nans = warp_sum(nans), subnormals = warp_sum(subnormals);
    if (lane == 0) {
      job.statistics[i] = {norm.norm(),
                           abs_max,
                           static_cast<double>(zeros),
                           static_cast<double>(infs),
                           static_cast<double>(nans),
                           static_cast<double>(subnormals)};
    }
  }
}

// ---- norms over blocks ----

template <class Norm>
__device__ double combine_partials(const Job& job) {
  Norm norm;
  // From L2: the first-level cache knows nothing of what other SMs have written.
  for (int i = threadIdx.x; i < job.partials; i += kThreads) norm.take(__ldcg(job.results->partial_norms + i));
  return block_norm(norm);
}

// Calls visit(Norm()) for the norm type.
template <class Visit>
__device__ __forceinline__ double with_norm_type(NormType type, Visit visit) {
  switch (type) {
    case NormType::L1:
      return visit(L1());
    case NormType::L2:
      return visit(L2());
    case NormType::Inf:
      break;
  }
  return visit(Inf());
}

// ---- in place ----

// Applies change(uint4&) -> whether to store to each vector of a segment, from its end to its beginning.
template <class Change>
__device__ __forceinline__ void change_backwards(const Segment& segment, int lane, Change change) {
  if (segment.count <= 0) return;
  for (int i = (segment.count - 1) / Batch::kVectors * Batch::kVectors; i >= 0; i -= Batch::kVectors) {
    Batch batch(segment.vectors + i, lane, segment.count - i);
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (k < batch.count && change(batch.v[k])) batch.p[k * kWarp] = batch.v[k];
    }
  }
}

// Visits what a warp has of each gradient, last one first.
template <class Visit>
__device__ __forceinline__ void walk_backwards(const Job& job, const Entry* entries, Visit visit) {
  const Share share(job.scale_rows);
  if (share.begin >= share.end) return;
  for (int i = find(entries, job.entries, share.end - 1); i >= 0; --i) {
    visit(Segment(entries, i, share));
    if (i == 0 || end_row(entries[i - 1]) <= share.begin) break;
  }
}

template <class D>
__device__ __forceinline__ void scale(const Segment& segment, int lane, double factor) {
  using Number = typename D::Number;
  const Number by = static_cast<Number>(factor);
  change_backwards(segment, lane, [by](uint4& v) {
    Number x[D::kElements];
    D::unpack(v, x);
#pragma unroll
    for (int e = 0; e < D::kElements; ++e) x[e] *= by;
    v = D::pack(x);
    return true;
  });
  if (auto* x = segment.element<typename D::Element>(lane)) {
    *x = D::narrow(static_cast<Number>(D::widen(*x)) * by);
  }
}

__device__ void scale_share(const Job& job, const Entry* entries, double factor) {
  walk_backwards(job, entries, [&](const Segment& segment) {
    with_dtype(segment.dtype, [&](auto d) { scale<decltype(d)>(segment, threadIdx.x % kWarp, factor); });
  });
}

template <class D>
__device__ __forceinline__ void clamp(const Segment& segment, int lane, double clip_value) {
  using Number = typename D::Number;
  const typename D::Element bound = D::narrow(clip_value);
  const typename D::Pattern limit = D::bits(bound) & D::kAbs;  // -0.0 limits to 0, too
  change_backwards(segment, lane, [=](uint4& v) {
    typename D::Largest found;
    found.take(v);
    if (found.pattern() <= limit) return false;
    v = D::clamp(v, bound);
    return true;
  });
  if (auto* x = segment.element<typename D::Element>(lane)) {
    const Number number = static_cast<Number>(D::widen(*x)), most = static_cast<Number>(D::widen(bound));
    if ((D::bits(*x) & D::kAbs) > limit) *x = D::narrow(clamp_number(number, most));
  }
}

__device__ void clamp_share(const Job& job, const Entry* entries) {
  walk_backwards(job, entries, [&](const Segment& segment) {
    with_dtype(segment.dtype, [&](auto d) { clamp<decltype(d)>(segment, threadIdx.x % kWarp, job.clip_value); });
  });
}

template <class D>
__device__ __forceinline__ void zero(const Segment& segment, int lane) {
  change_backwards(segment, lane, [](uint4& v) {
    v = make_uint4(0, 0, 0, 0);
    return true;
  });
  if (auto* x = segment.element<typename D::Element>(lane)) *x = D::narrow(0);
}

__device__ void zero_share(const Job& job, const Entry* entries) {
  walk_backwards(job, entries, [&](const Segment& segment) {
    with_dtype(segment.dtype, [&](auto d) { zero<decltype(d)>(segment, threadIdx.x % kWarp); });
  });
}

// ---- inf and NaN ----

// Whether a warp's part of a gradient has one.
template <class D>
__device__ __forceinline__ bool has_nonfinite(const Segment& segment, int lane) {
  using Pattern = typename D::Pattern;
  Pattern largest = 0;
  if (const auto* x = segment.element<typename D::Element>(lane)) largest = static_cast<Pattern>(D::bits(*x) & D::kAbs);
  uint4* p = segment.vectors;
  for (int left = segment.count; left > 0; left -= Batch::kVectors, p += Batch::kVectors) {
    largest = greater(largest, Batch(p, lane, left).largest<D>());
  }
  return __any_sync(kAllLanes, largest >= D::kInf);
}

// Fills Results::first_bad. Of the gradients that are written each warp looks at the rows that it will write itself, so
// that nobody has to wait for it.
__device__ void find_nonfinite(const Job& job, const Entry* entries) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int copies = 0; copies < 2; ++copies) {
    Share share(copies ? job.rows - job.scale_rows : job.scale_rows);
    if (copies) share.begin += job.scale_rows, share.end += job.scale_rows;
    if (share.begin >= share.end) continue;
    for (int i = find(entries, job.entries, share.begin); i < job.entries; ++i) {
      const Segment segment(entries, i, share);
      bool is_bad = false;
      with_dtype(segment.dtype, [&](auto d) { is_bad = has_nonfinite<decltype(d)>(segment, lane); });
      if (is_bad && lane == 0) atomicMin(&job.results->first_bad[copies], i);
      if (is_bad || end_row(entries[i]) >= share.end) break;
    }
  }
}

// ---- the kernel ----

// The norm that the user gets, unrounded as long as it is finite when rounded.
__device__ double unscaled_norm(const Job& job, double total_norm) {
  total_norm /= read(job.grad_scale);
  const double returned = job.norm_is_f64 ? total_norm : static_cast<float>(total_norm);
  return isfinite(returned) ? total_norm : returned;
}

// The threads of a block, as policy.h has a team.
struct Block {
  __device__ int size() const { return kThreads; }
  __device__ int rank() const { return threadIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ int count(bool holds) const { return __syncthreads_count(holds); }
};

// Lets the policy follow the norm that thread 0 has; the threshold is in its state then.
__device__ __noinline__ void follow_in_block(const Job& job, double total_norm) {
  __shared__ double norm;
  if (threadIdx.x == 0) norm = unscaled_norm(job, total_norm);
  __syncthreads();
  follow(Block(), job.policy, norm);
}

// For thread 0: the coefficient. Block 0 leaves the norm and the coefficient behind.
__device__ double decide(const Job& job, double total_norm) {
  if (job.source == Source::Coef) return job.results->coef;
  const bool found_inf = !isfinite(total_norm);
  const double grad_scale = read(job.grad_scale);
  // Where the user gets inf, torch's results hold: everything finite becomes 0, what was infinite NaN.
  total_norm = unscaled_norm(job, total_norm);
  const double returned = job.norm_is_f64 ? total_norm : static_cast<float>(total_norm);
  const double max_norm = job.policy ? reinterpret_cast<PolicyHead*>(job.policy)->threshold : read(job.max_norm);
  double coef = clip_coef(max_norm, total_norm, job.nonfinite) / grad_scale;
  if (job.spare_found_inf && found_inf) coef = 1;
  if (blockIdx.x == 0 && job.results) {
    Results& results = *job.results;
    if (job.norm_is_f64) {
      results.norm_f64 = returned;
    } else {
      results.norm_f32 = static_cast<float>(returned);
    }
    const Factors factors = factors_of(coef);
    results.coef = coef, results.first = factors.first, results.second = factors.second;
    results.grad_scale = static_cast<float>(1 / coef);
    results.found_inf = job.nonfinite == Nonfinite::Skip ? !isfinite(returned) : found_inf;
  }
  return coef;
}

// A kernel of its own has statistics: that without them has not a register more for it.
template <bool kStatistics>
__device__ void run(const Job& job, const Entry* entries) {
  if (!kStatistics && job.task == Task::Clamp) return clamp_share(job, entries);
  const auto write_all_rows = [&] {
    with_norm_type(job.norm_type, [&](auto norm) {
      write_rows<decltype(norm)>(job, entries);
      return 0;
    });
  };
  if (kStatistics && job.task == Task::Rows) return write_all_rows();

  if (job.task != Task::Scale && job.task != Task::Decide) {
    const double partial = with_norm_type(job.norm_type, [&](auto norm) {
      using Norm = decltype(norm);
      if constexpr (kStatistics) {
        return examine_share<Norm>(job, entries);
      } else {
        return reduce_share<Norm>(job, entries);
      }
    });
    if (threadIdx.x == 0) job.results->partial_norms[blockIdx.x] = partial;
    if (threadIdx.x < 2 && blockIdx.x == 0) job.results->first_bad[threadIdx.x] = kNoneBad;
    if (job.task == Task::Reduce) return;
    cooperative_groups::this_grid().sync();
    if constexpr (kStatistics) write_all_rows();
    if (job.task == Task::Norm && blockIdx.x != 0 && !job.finds_bad) return;
  }

  double total_norm = 0;
  if (job.source == Source::PartialNorms) {
    total_norm = with_norm_type(job.norm_type, [&](auto norm) { return combine_partials<decltype(norm)>(job); });
  } else if (job.source == Source::TotalNorm) {
    total_norm = read(job.total_norm);
  }
  // The other blocks wait for block 0, which lets a policy follow the norm for all of them.
  const bool decides = !job.policy || blockIdx.x == 0;
  __shared__ double shared_coef;
  __shared__ bool shared_finds_bad;
  if (job.policy && decides) follow_in_block(job, total_norm);
  if (threadIdx.x == 0) {
    if (decides) shared_coef = decide(job, total_norm);
    shared_finds_bad = job.finds_bad && !isfinite(total_norm);
  }
  if (job.policy && job.task == Task::ReduceThenScale) {
    cooperative_groups::this_grid().sync();
    if (threadIdx.x == 0 && !decides) shared_coef = __ldcg(&job.results->coef);
  }
  __syncthreads();
  const double coef = shared_coef;
  if (shared_finds_bad) find_nonfinite(job, entries);
  if (job.task == Task::Norm || job.task == Task::Decide || !must_scale(coef)) return;
  if (must_zero(coef, job.nonfinite)) return zero_share(job, entries);
  const Factors factors = factors_of(coef);
  scale_share(job, entries, factors.first);
  if (factors.second != 1) scale_share(job, entries, factors.second);
}

template <class Table, bool kStatistics>
__global__ void __launch_bounds__(kThreads, 2)
    clip_kernel(const __grid_constant__ Job job, const __grid_constant__ Table table) {
  run<kStatistics>(job, table.entries);
}

}  // namespace
}  // namespace fastclip::cuda
