// Plain structs shared by the table and every kernel. No standard library code: the kernels that include this are
// compiled for instruction sets which the rest of the program may not use.
#pragma once

#include <stdint.h>

// A function for every backend in a header like this one: of internal linkage, so that no file gets the code that was
// compiled for another's instruction set.
#ifdef __CUDACC__
#define FASTCLIP_SHARED_FUNCTION __host__ __device__ static inline
#else
#define FASTCLIP_SHARED_FUNCTION [[maybe_unused]] static inline
#endif

namespace fastclip {

enum class DType : uint8_t { F32, F64, F16, BF16 };
enum class NormType : uint8_t { L1, L2, Inf };
// What a call does where the norm that the user gets is inf or NaN: scale by it, as torch does; raise an error; leave
// the gradients as they are; set all of them to zero.
enum class Nonfinite : uint8_t { Propagate, Raise, Skip, Zero };

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2;
}

// One gradient as flat memory.
struct Slice {
  char* data;
  int64_t bytes;
  DType dtype;
  uint8_t written;  // set by clamp() when it changed something; two threads may share a slice and both set it
  uint32_t row;     // which of the call's gradients it is, empty ones counted
};

// What statistics say of a gradient, in the order of fastclip/statistics.py's columns.
struct StatisticsRow {
  double norm, abs_max, zeros, infs, nans, subnormals;
};

// The same of a part of a gradient, before parts are combined.
struct PartStatistics {
  long double sum;  // of |x| or x^2; unspecified for NormType::Inf
  long double abs_max;
  int64_t zeros, infs, nans, subnormals;
};

// A position in a table: byte `byte` of slice `slice`.
struct Cut {
  int64_t slice;
  int64_t byte;
};

// Cuts inside a slice fall on multiples of this many bytes, which is a multiple of every kernel's block.
constexpr int64_t kCutBytes = 8192;

}  // namespace fastclip
