// One vector register of FASTCLIP_VECTOR_BYTES, and how each dtype is loaded into and stored from it.
//
// A dtype is described by
//   Vec, Scalar   what it is computed in: float for the 16-bit types, whose squares are exact there
//   kParts        how many Vec one register of memory becomes
//   load, store   memory <-> Vec[kParts]; store rounds to nearest even and keeps NaN
//   Bits, kAbs, kInf   its bit pattern as signed integers, in which absolute values compare like numbers
// The order of elements inside the parts is free: reductions do not care, and store undoes load.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../slice.h"

namespace {

constexpr int kVecBytes = FASTCLIP_VECTOR_BYTES;

typedef float f32v __attribute__((vector_size(kVecBytes)));
typedef double f64v __attribute__((vector_size(kVecBytes)));
typedef int16_t i16v __attribute__((vector_size(kVecBytes)));
typedef int32_t i32v __attribute__((vector_size(kVecBytes)));
typedef int64_t i64v __attribute__((vector_size(kVecBytes)));
typedef uint32_t u32v __attribute__((vector_size(kVecBytes)));

template <class V>
inline V load_vec(const char* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_vec(char* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline f32v abs_vec(f32v x) {
  return (f32v)((i32v)x & 0x7fffffff);
}
inline f64v abs_vec(f64v x) {
  return (f64v)((i64v)x & 0x7fffffffffffffff);
}

// The sum of the two halves of a register of floats, as doubles.
inline f64v widened_sum(f32v x) {
#if defined(__x86_64__) && FASTCLIP_VECTOR_BYTES == 16
  return (f64v)(_mm_cvtps_pd((__m128)x) + _mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x)));
#elif FASTCLIP_VECTOR_BYTES == 32
  return (f64v)(_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)) +
                _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)));
#elif FASTCLIP_VECTOR_BYTES == 64
  return (f64v)(_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)) +
                _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)));
#else
  f64v sum = {};
  for (int lane = 0; lane < kVecBytes / 4; ++lane) sum[lane % (kVecBytes / 8)] += x[lane];
  return sum;
#endif
}
inline f64v widened_sum(f64v x) {
  return x;
}

struct F32 {
  using Vec = f32v;
  using Scalar = float;
  using Bits = i32v;
  using BitsScalar = int32_t;
  static constexpr int kParts = 1;
  static constexpr int32_t kAbs = 0x7fffffff, kInf = 0x7f800000;
  static void load(const char* p, Vec* part) { part[0] = load_vec<f32v>(p); }
  static void store(char* p, const Vec* part) { store_vec(p, part[0]); }
};

struct F64 {
  using Vec = f64v;
  using Scalar = double;
  using Bits = i64v;
  using BitsScalar = int64_t;
  static constexpr int kParts = 1;
  static constexpr int64_t kAbs = 0x7fffffffffffffff, kInf = 0x7ff0000000000000;
  static void load(const char* p, Vec* part) { part[0] = load_vec<f64v>(p); }
  static void store(char* p, const Vec* part) { store_vec(p, part[0]); }
};

// bfloat16 is the upper half of a float: a register of pairs splits into its odd and even elements with one mask and
// one shift, without a shuffle.
struct BF16 {
  using Vec = f32v;
  using Scalar = float;
  using Bits = i16v;
  using BitsScalar = int16_t;
  static constexpr int kParts = 2;
  static constexpr int16_t kAbs = 0x7fff, kInf = 0x7f80;
  static void load(const char* p, Vec* part) {
    const u32v pairs = load_vec<u32v>(p);
    part[0] = (f32v)(pairs << 16);
    part[1] = (f32v)(pairs & 0xffff0000u);
  }
  static void store(char* p, const Vec* part) {
    store_vec(p, (rounded(part[0]) >> 16) | (rounded(part[1]) & 0xffff0000u));
  }

 private:
  // To nearest even. NaN needs no care: a product's NaN is one of the factors' or the default one, whose lower 16 bits
  // are zero, so that the addition cannot carry into the sign.
  static u32v rounded(f32v value) {
    const u32v bits = (u32v)value;
    return bits + (0x7fffu + ((bits >> 16) & 1u));
  }
};

#if FASTCLIP_VECTOR_BYTES == 16
// float16 without conversion instructions, again as odd and even elements.
struct F16 {
  using Vec = f32v;
  using Scalar = float;
  using Bits = i16v;
  using BitsScalar = int16_t;
  static constexpr int kParts = 2;
  static constexpr int16_t kAbs = 0x7fff, kInf = 0x7c00;
  static void load(const char* p, Vec* part) {
    const u32v pairs = load_vec<u32v>(p);
    part[0] = widened(pairs & 0xffffu);
    part[1] = widened(pairs >> 16);
  }
  static void store(char* p, const Vec* part) { store_vec(p, narrowed(part[0]) | (narrowed(part[1]) << 16)); }

 private:
  // The exponent moves up by 112. A subnormal number is a small integer times 2^-24; no multiplication of a subnormal
  // float takes part, which torch.set_flush_denormal(True) would turn into zero.
  static f32v widened(u32v half) {
    const u32v magnitude = half & 0x7fffu;
    const u32v normal = (magnitude << 13) + 0x38000000u;
    const u32v subnormal = (u32v)(__builtin_convertvector((i32v)magnitude, f32v) * 0x1p-24f);
    const u32v finite = magnitude < 0x400u ? subnormal : normal;
    const u32v bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite;
    return (f32v)(bits | ((half & 0x8000u) << 16));
  }
  static u32v narrowed(f32v value) {
    const u32v bits = (u32v)value, magnitude = bits & 0x7fffffffu;
    const u32v special = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : 0x7c00u + 0u * bits;
    // Adding 0.5 leaves the subnormal result, rounded by the addition itself, in the last bits.
    const u32v subnormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
    const u32v normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // 0x477ff000 is 65520, which rounds to infinity; 0x38800000 is 2^-14, the smallest normal float16.
    const u32v half = magnitude >= 0x477ff000u ? special : magnitude < 0x38800000u ? subnormal : normal;
    return half | ((bits >> 16) & 0x8000u);
  }
};
#else
struct F16 {
  using Vec = f32v;
  using Scalar = float;
  using Bits = i16v;
  using BitsScalar = int16_t;
  static constexpr int kParts = 2;
  static constexpr int16_t kAbs = 0x7fff, kInf = 0x7c00;
#if FASTCLIP_VECTOR_BYTES == 32
  using Half = __m128i;
  static __m256 widened(Half half) { return _mm256_cvtph_ps(half); }
  static Half narrowed(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  using Half = __m256i;
  static __m512 widened(Half half) { return _mm512_cvtph_ps(half); }
  static Half narrowed(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
#endif
  static void load(const char* p, Vec* part) {
    for (int i = 0; i < 2; ++i) part[i] = (f32v)widened(load_vec<Half>(p + i * (kVecBytes / 2)));
  }
  static void store(char* p, const Vec* part) {
    for (int i = 0; i < 2; ++i) {
      store_vec(p + i * (kVecBytes / 2), narrowed(bit_cast<decltype(widened(Half()))>(part[i])));
    }
  }
};
#endif

}  // namespace
