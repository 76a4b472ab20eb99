// Kernels for AVX-512 (F, BW, DQ, VL). AVX512_BF16 is not used: its dot product and its conversion flush subnormal
// numbers, and torch's multiplication does not.
#if defined(__x86_64__)
#define FASTCLIP_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own _mm512_undefined_ps, in its header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "adaptive_impl.h"
#include "kernels_impl.h"

const fastclip::cpu::Kernels fastclip::cpu::kAvx512{"avx512", reduce, examine, scale, clamp, adapt};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
