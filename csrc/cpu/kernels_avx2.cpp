// Kernels for AVX2 + FMA + F16C.
#if defined(__x86_64__)
#define FASTCLIP_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "adaptive_impl.h"
#include "kernels_impl.h"

const fastclip::cpu::Kernels fastclip::cpu::kAvx2{"avx2", reduce, examine, scale, clamp, adapt};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
