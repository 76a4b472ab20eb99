// The loops over memory, written once and compiled for each instruction set by the kernels_*.cpp files.
//
// Everything is in an unnamed namespace, and nothing of the standard library is instantiated: an inline function
// compiled here for AVX-512 must never be the one that the linker keeps for everybody.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

using fastclip::Cut;
using fastclip::DType;
using fastclip::NormType;
using fastclip::PartStatistics;
using fastclip::Slice;

// The last bytes of a slice, padded with zeros to a whole register: the same loops serve them.
struct Tail {
  explicit Tail(const char* p, int64_t bytes) { __builtin_memcpy(padded, p, bytes); }
  alignas(64) char padded[kVecBytes] = {};
};

// ---- L1 and L2: sums -----------------------------------------------------------------------------------------------

// Eight independent accumulators hide the latency of an addition (4 cycles, two a cycle). Each of their lanes takes
// 16 terms before it is flushed to double: 16 roundings of 2^-24 put a sum off by 9.6e-7 at worst, the L2 norm by half
// of that. Accumulating in double from the start would need no flush and no rescue, but was measured 10% slower for
// float32 and half as fast for bfloat16 (memory-bound, 2 threads).
constexpr int kAccumulators = 8;
constexpr int kRounds = 16;

template <class T>
constexpr int kBlockVecs = kRounds * kAccumulators / T::kParts;

struct Abs {
  template <class V>
  static V add(V sum, V x) {
    return sum + abs_vec(x);
  }
  template <class Exact>
  static Exact add_exact(Exact sum, Exact x) {
    return sum + (x < 0 ? -x : x);
  }
};

struct Square {
  template <class V>
  static V add(V sum, V x) {
    return sum + x * x;
  }
  template <class Exact>
  static Exact add_exact(Exact sum, Exact x) {
    return sum + x * x;
  }
};

// In the range [kLeast, kMost] a block's sum is sound: no term overflowed, and what underflowed (at most 2^-126 a
// term where the processor flushes subnormal numbers, 2^11 terms) is less than 2^-24 of it.
template <class T>
struct Sound {
  static constexpr double kLeast = 0x1p-90, kMost = 3.4e38;
};
template <>
struct Sound<F64> {
  static constexpr double kLeast = 0x1p-960, kMost = 1.7e308;
};

inline double lane_sum(f64v x) {
  double sum = 0;
  for (int lane = 0; lane < kVecBytes / 8; ++lane) sum += x[lane];
  return sum;
}

// The sum of all lanes of all accumulators, as a tree: a chain of 16 additions would cost a small gradient 20 ns.
template <class V>
inline double flush(const V* acc) {
  f64v sum[kAccumulators];
#pragma GCC unroll 8
  for (int i = 0; i < kAccumulators; ++i) sum[i] = widened_sum(acc[i]);
#pragma GCC unroll 8
  for (int width = kAccumulators / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return lane_sum(sum[0]);
}

// Memory delivers 10 to 25% more to two forward streams than to one (measured at 500 MB, 2 threads; 16 KB to 256 KB
// apart alike; no difference in the cache). Long slices are therefore walked in pairs of streams this far apart.
constexpr int64_t kStreamBytes = 65536;

// Half of what a round reads, in bytes: each half comes from a place of its own.
template <class T>
constexpr int64_t kHalfRound = kAccumulators / T::kParts / 2 * kVecBytes;

// What a sum does with the address of each register that it reads. This one, of short slices, does nothing.
struct NoWatch {
  void take(const char*) {}
  void end_block(const char*, int64_t, int64_t = 0) {}
};

// Slices of this size come from memory or the last-level cache. There reading ahead takes 11% off the time of float32
// and 16% off that of bfloat16 (GPT-2 small, 2 threads); below, it was up to 12% slower.
constexpr int64_t kLongBytes = 1 << 20, kAheadBytes = 1024;

inline void read_ahead(const char* p) {  // as a number: the address may be past the end
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + kAheadBytes));
}

struct ReadAhead : NoWatch {
  void take(const char* p) { read_ahead(p); }
};

// `rounds` rounds, of which the second half lies `gap` bytes behind the first and both move on by `advance` bytes; then
// `rest` registers in a row.
template <class T, class Op, class Watch>
inline double block_sum(const char* p, int64_t gap, int64_t advance, int64_t rounds, int64_t rest, Watch& watch) {
  constexpr int kLoads = kAccumulators / T::kParts;
  typename T::Vec acc[kAccumulators] = {};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (int k = 0; k < kLoads; ++k) {
      typename T::Vec part[T::kParts];
      const char* at = p + (k < kLoads / 2 ? k * kVecBytes : gap + (k - kLoads / 2) * kVecBytes);
      T::load(at, part);
      watch.take(at);
#pragma GCC unroll 2
      for (int q = 0; q < T::kParts; ++q) acc[k * T::kParts + q] = Op::add(acc[k * T::kParts + q], part[q]);
    }
    p += advance;
  }
  for (int64_t i = 0; i < rest; ++i) {
    typename T::Vec part[T::kParts];
    T::load(p + i * kVecBytes, part);
    watch.take(p + i * kVecBytes);
#pragma GCC unroll 2
    for (int q = 0; q < T::kParts; ++q) acc[q] = Op::add(acc[q], part[q]);
  }
  return flush(acc);
}

inline bool all_zero(const char* p, int64_t vecs) {
  i64v bits = {};
  for (int64_t i = 0; i < vecs; ++i) bits |= load_vec<i64v>(p + i * kVecBytes);
  int64_t any = 0;
  for (int lane = 0; lane < kVecBytes / 8; ++lane) any |= bits[lane];
  return any == 0;
}

// A block whose values are too large or too small to be squared in T::Scalar, or not finite: one by one, in a type in
// which they are not. It is read from the first-level cache.
template <class T, class Op>
__attribute__((noinline, cold)) long double rescued_sum(const char* p, int64_t vecs) {
  if (all_zero(p, vecs)) return 0;
  long double total = 0;
  for (int64_t i = 0; i < vecs; ++i) {
    typename T::Vec part[T::kParts];
    T::load(p + i * kVecBytes, part);
    for (int q = 0; q < T::kParts; ++q) {
      for (int lane = 0; lane < static_cast<int>(kVecBytes / sizeof(typename T::Scalar)); ++lane) {
        total = Op::add_exact(total, static_cast<long double>(part[q][lane]));
      }
    }
  }
  return total;
}

template <class T>
inline bool is_sound(double sum) {
  return __builtin_expect(sum >= Sound<T>::kLeast && sum <= Sound<T>::kMost, 1);
}

// Up to kBlockVecs<T> registers in a row.
template <class T, class Op, class Watch>
inline long double sum_block(const char* p, int64_t vecs, Watch& watch) {
  constexpr int kLoads = kAccumulators / T::kParts;
  const double sum = block_sum<T, Op>(p, kHalfRound<T>, 2 * kHalfRound<T>, vecs / kLoads, vecs % kLoads, watch);
  watch.end_block(p, vecs);
  return is_sound<T>(sum) ? sum : rescued_sum<T, Op>(p, vecs);
}

// A block of which one half lies kStreamBytes behind the other.
template <class T, class Op, class Watch>
inline long double sum_split_block(const char* p, Watch& watch) {
  const double sum = block_sum<T, Op>(p, kStreamBytes, kHalfRound<T>, kRounds, 0, watch);
  watch.end_block(p, kBlockVecs<T> / 2, kStreamBytes);
  if (is_sound<T>(sum)) return sum;
  return rescued_sum<T, Op>(p, kBlockVecs<T> / 2) + rescued_sum<T, Op>(p + kStreamBytes, kBlockVecs<T> / 2);
}

template <class T, class Op, class Watch>
long double sum_slice(const char* p, int64_t bytes, Watch watch) {
  constexpr int64_t kBlockBytes = kBlockVecs<T> * kVecBytes;
  long double total = 0;
  for (; bytes >= 2 * kStreamBytes; p += 2 * kStreamBytes, bytes -= 2 * kStreamBytes) {
    for (int64_t i = 0; i < kStreamBytes; i += kBlockBytes / 2) total += sum_split_block<T, Op>(p + i, watch);
  }
  for (; bytes >= kBlockBytes; p += kBlockBytes, bytes -= kBlockBytes) {
    total += sum_block<T, Op>(p, kBlockVecs<T>, watch);
  }
  const int64_t vecs = bytes / kVecBytes, rest = bytes % kVecBytes;
  if (vecs > 0) total += sum_block<T, Op>(p, vecs, watch);
  if (rest > 0) total += sum_block<T, Op>(Tail(p + vecs * kVecBytes, rest).padded, 1, watch);
  return total;
}

// ---- inf: maxima, exact, on the bit patterns: as integers NaN is above inf and inf above every number -------------

// The largest lane, as a number.
template <class T>
inline long double largest_value(typename T::Bits bits) {
  typename T::Bits largest = {};
  for (int lane = 0; lane < static_cast<int>(kVecBytes / sizeof(typename T::BitsScalar)); ++lane) {
    if (bits[lane] > largest[0]) largest[0] = bits[lane];
  }
  typename T::Vec part[T::kParts];
  T::load(reinterpret_cast<const char*>(&largest), part);
  return part[0][0];
}

template <class T>
long double max_slice(const char* p, int64_t bytes) {
  using Bits = typename T::Bits;
  constexpr int kUnroll = 4;
  Bits acc[kUnroll] = {};
  const auto take = [&acc](int k, Bits bits) {
    bits &= T::kAbs;
    acc[k] = bits > acc[k] ? bits : acc[k];
  };
  const int64_t vecs = bytes / kVecBytes, rest = bytes % kVecBytes;
  const int64_t whole = vecs / kUnroll * kUnroll;
  for (int64_t i = 0; i < whole; i += kUnroll) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnroll; ++k) take(k, load_vec<Bits>(p + (i + k) * kVecBytes));
  }
  for (int64_t i = whole; i < vecs; ++i) take(0, load_vec<Bits>(p + i * kVecBytes));
  if (rest > 0) take(0, load_vec<Bits>(Tail(p + vecs * kVecBytes, rest).padded));

  for (int k = 1; k < kUnroll; ++k) acc[0] = acc[k] > acc[0] ? acc[k] : acc[0];
  return largest_value<T>(acc[0]);
}

// ---- statistics of each gradient, from the pass that sums --------------------------------------------------------

// Keeps the least and the largest bit pattern of a block: three cheap instructions a register. Only where these say
// that there is a zero, a subnormal number, inf or NaN is the block counted, from the first-level cache.
template <class T>
class Examiner {
  using Bits = typename T::Bits;
  using BitsScalar = typename T::BitsScalar;
  static constexpr BitsScalar kSmallestNormal = T::kInf & -T::kInf;  // the exponent's last bit

 public:
  explicit Examiner(PartStatistics& part) : part_(part) {}

  // Four instructions wait for each register that is loaded, and fill the scheduler long before memory is busy: without
  // reading ahead, the pass took 1.17 of the time of a plain one that does not either (float32, 500 MB, 2 threads).
  void take(const char* p) {
    read_ahead(p);
    const Bits bits = load_vec<Bits>(p) & T::kAbs;
    least_ = bits < least_ ? bits : least_;
    largest_ = bits > largest_ ? bits : largest_;
  }

  // The registers taken were `vecs` at p, and, with a gap, as many that far behind.
  void end_block(const char* p, int64_t vecs, int64_t gap = 0) {
    const Bits special = (least_ < kSmallestNormal) | (largest_ >= T::kInf);
    if (__builtin_expect(!all_zero(reinterpret_cast<const char*>(&special), 1), 0)) {
      count(p, vecs, part_);
      if (gap > 0) count(p + gap, vecs, part_);
    }
    if (__builtin_expect(!all_zero(reinterpret_cast<const char*>(&largest_), 1), 1)) {
      const Bits more = largest_ > all_;
      all_ = (largest_ & more) | (all_ & ~more);
    }
    least_ = Bits{} + T::kAbs;
    largest_ = Bits{};
  }

  Bits all() const { return all_; }

 private:
  // Blocks have fewer registers than a lane of 16 bits can count.
  static __attribute__((noinline)) void count(const char* p, int64_t vecs, PartStatistics& part) {
    Bits zeros = {}, small = {}, special = {}, nans = {};
    for (int64_t i = 0; i < vecs; ++i) {
      const Bits bits = load_vec<Bits>(p + i * kVecBytes) & T::kAbs;
      zeros -= bits == 0;
      small -= bits < kSmallestNormal;
      special -= bits >= T::kInf;
      nans -= bits > T::kInf;
    }
    for (int lane = 0; lane < static_cast<int>(kVecBytes / sizeof(BitsScalar)); ++lane) {
      part.zeros += zeros[lane];
      part.subnormals += small[lane] - zeros[lane];
      part.infs += special[lane] - nans[lane];
      part.nans += nans[lane];
    }
  }

  PartStatistics& part_;
  Bits least_ = Bits{} + T::kAbs, largest_ = {}, all_ = {};
};

template <class T, class Op>
void examine_slice(const char* p, int64_t bytes, PartStatistics& part) {
  part = {};
  Examiner<T> examiner(part);
  part.sum = sum_slice<T, Op, Examiner<T>&>(p, bytes, examiner);
  part.abs_max = largest_value<T>(examiner.all());
  const int64_t rest = bytes % kVecBytes;  // the last register is padded with zeros
  if (rest > 0) part.zeros -= (kVecBytes - rest) / static_cast<int64_t>(sizeof(typename T::BitsScalar));
}

// ---- in place ------------------------------------------------------------------------------------------------------

template <class T>
inline void scale_vec(char* p, typename T::Scalar factor) {
  typename T::Vec part[T::kParts];
  T::load(p, part);
#pragma GCC unroll 2
  for (int q = 0; q < T::kParts; ++q) part[q] *= factor;
  T::store(p, part);
}

// Backwards in steps of two forward streams: 128 KB is little beside the cache that walking backwards reuses (steps of
// 8 KB were 15% slower).
template <class T>
void scale_slice(char* begin, int64_t bytes, typename T::Scalar factor) {
  constexpr int kUnroll = 4;
  constexpr int64_t kStepBytes = 2 * kStreamBytes;
  const int64_t steps = bytes / kStepBytes, vecs = bytes / kVecBytes, rest = bytes % kVecBytes;
  if (rest > 0) {
    char* p = begin + vecs * kVecBytes;
    Tail tail(p, rest);
    scale_vec<T>(tail.padded, factor);
    __builtin_memcpy(p, tail.padded, rest);
  }
  for (int64_t i = steps * (kStepBytes / kVecBytes); i < vecs; ++i) scale_vec<T>(begin + i * kVecBytes, factor);
  for (int64_t step = steps - 1; step >= 0; --step) {
    char* p = begin + step * kStepBytes;
    for (int64_t i = 0; i < kStreamBytes; i += kUnroll * kVecBytes) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) scale_vec<T>(p + i + k * kVecBytes, factor);
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) scale_vec<T>(p + kStreamBytes + i + k * kVecBytes, factor);
    }
  }
}

template <class T>
inline typename T::Bits beyond(typename T::Bits x, typename T::BitsScalar limit) {
  const typename T::Bits magnitude = x & T::kAbs;
  return (magnitude > limit) & (magnitude <= T::kInf);
}

template <class T>
inline bool any_beyond(const char* p, int64_t vecs, typename T::BitsScalar limit) {
  typename T::Bits any = {};
  for (int64_t i = 0; i < vecs; ++i) any |= beyond<T>(load_vec<typename T::Bits>(p + i * kVecBytes), limit);
  const char* bits = reinterpret_cast<const char*>(&any);
  return !all_zero(bits, 1);
}

template <class T>
inline void clamp_vecs(char* p, int64_t vecs, typename T::BitsScalar limit) {
  for (int64_t i = 0; i < vecs; ++i) {
    const auto x = load_vec<typename T::Bits>(p + i * kVecBytes);
    const auto mask = beyond<T>(x, limit);
    store_vec(p + i * kVecBytes, (x & ~mask) | (((x & ~T::kAbs) | limit) & mask));
  }
}

// A clamped step is read twice, the second time from the first-level cache.
constexpr int64_t kClampBytes = 4096;

// Returns whether anything was written: a step in which nothing is beyond the limit is only read.
template <class T>
bool clamp_slice(char* p, int64_t bytes, typename T::BitsScalar limit) {
  bool written = false;
  while (bytes >= kVecBytes) {
    const int64_t vecs = (bytes < kClampBytes ? bytes : kClampBytes) / kVecBytes;
    if (any_beyond<T>(p, vecs, limit)) {
      clamp_vecs<T>(p, vecs, limit);
      written = true;
    }
    p += vecs * kVecBytes;
    bytes -= vecs * kVecBytes;
  }
  if (bytes > 0) {
    Tail tail(p, bytes);
    if (any_beyond<T>(tail.padded, 1, limit)) {
      clamp_vecs<T>(tail.padded, 1, limit);
      __builtin_memcpy(p, tail.padded, bytes);
      written = true;
    }
  }
  return written;
}

// The bit pattern of a value in T, rounded to nearest. The value is one that T can represent as a finite number or inf.
template <class T>
typename T::BitsScalar bits_of(double value) {
  typename T::Vec part[T::kParts];
  for (int q = 0; q < T::kParts; ++q) part[q] = static_cast<typename T::Scalar>(value) + typename T::Vec{};
  typename T::Bits bits;
  T::store(reinterpret_cast<char*>(&bits), part);
  return bits[0];
}

// ---- the walk over a share -----------------------------------------------------------------------------------------

// Calls visit(dtype tag, pointer, bytes) for a part of one slice.
template <class Visit>
inline void with_dtype(DType dtype, Visit visit) {
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

struct Part {
  int64_t offset, bytes;
};

inline Part part_of(const Slice& slice, int64_t index, Cut begin, Cut end) {
  const int64_t from = index == begin.slice ? begin.byte : 0, to = index == end.slice ? end.byte : slice.bytes;
  return {from, to - from};
}

// One past the last slice that has a byte in the share.
inline int64_t end_slice(Cut end) {
  return end.slice + (end.byte > 0);
}

template <class Op>
long double sum_share(const Slice* slices, Cut begin, Cut end) {
  long double total = 0;
  for (int64_t s = begin.slice; s < end_slice(end); ++s) {
    const Part part = part_of(slices[s], s, begin, end);
    const char* p = slices[s].data + part.offset;
    with_dtype(slices[s].dtype, [&](auto t) {
      using T = decltype(t);
      total += part.bytes < kLongBytes ? sum_slice<T, Op>(p, part.bytes, NoWatch())
                                       : sum_slice<T, Op>(p, part.bytes, ReadAhead());
    });
  }
  return total;
}

long double max_share(const Slice* slices, Cut begin, Cut end) {
  long double largest = 0;
  for (int64_t s = begin.slice; s < end_slice(end); ++s) {
    const Part part = part_of(slices[s], s, begin, end);
    const char* p = slices[s].data + part.offset;
    with_dtype(slices[s].dtype, [&](auto t) {
      const long double x = max_slice<decltype(t)>(p, part.bytes);
      if (x > largest || x != x) largest = x;
    });
  }
  return largest;
}

long double reduce(const Slice* slices, Cut begin, Cut end, NormType type) {
  switch (type) {
    case NormType::L1:
      return sum_share<Abs>(slices, begin, end);
    case NormType::L2:
      return sum_share<Square>(slices, begin, end);
    case NormType::Inf:
      break;
  }
  return max_share(slices, begin, end);
}

template <class Op>
void examine_share(const Slice* slices, Cut begin, Cut end, PartStatistics* parts) {
  for (int64_t s = begin.slice; s < end_slice(end); ++s) {
    const Part part = part_of(slices[s], s, begin, end);
    const char* p = slices[s].data + part.offset;
    with_dtype(slices[s].dtype, [&](auto t) { examine_slice<decltype(t), Op>(p, part.bytes, parts[s - begin.slice]); });
  }
}

void examine(const Slice* slices, Cut begin, Cut end, NormType type, PartStatistics* parts) {
  type == NormType::L2 ? examine_share<Square>(slices, begin, end, parts)
                       : examine_share<Abs>(slices, begin, end, parts);
}

void scale(const Slice* slices, Cut begin, Cut end, double coef) {
  if (coef != coef) coef = __builtin_nan("");  // the default NaN, on which BF16::store relies
  for (int64_t s = end_slice(end) - 1; s >= begin.slice; --s) {
    const Part part = part_of(slices[s], s, begin, end);
    char* p = slices[s].data + part.offset;
    with_dtype(slices[s].dtype, [&](auto t) {
      using T = decltype(t);
      scale_slice<T>(p, part.bytes, static_cast<typename T::Scalar>(coef));
    });
  }
}

void clamp(Slice* slices, Cut begin, Cut end, double clip_value) {
  for (int64_t s = begin.slice; s < end_slice(end); ++s) {
    const Part part = part_of(slices[s], s, begin, end);
    char* p = slices[s].data + part.offset;
    with_dtype(slices[s].dtype, [&](auto t) {
      using T = decltype(t);
      if (clamp_slice<T>(p, part.bytes, bits_of<T>(clip_value)))
        __atomic_store_n(&slices[s].written, 1, __ATOMIC_RELAXED);
    });
  }
}

}  // namespace
