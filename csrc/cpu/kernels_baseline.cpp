// Kernels for any machine: 16-byte vectors are SSE2 on x86-64 and NEON on aarch64.
#define FASTCLIP_VECTOR_BYTES 16
#include "adaptive_impl.h"
#include "kernels_impl.h"

const fastclip::cpu::Kernels fastclip::cpu::kBaseline{"baseline", reduce, examine, scale, clamp, adapt};
