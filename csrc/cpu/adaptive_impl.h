// Adaptive clipping of units, compiled for each instruction set like kernels_impl.h, which it builds on. A unit is read
// and, where it has to be, scaled before the next one is looked at: its gradient is still in the cache then.
#pragma once

#include "../factors.h"
#include "../unit.h"
#include "kernels_impl.h"

namespace {

using fastclip::Factors;
using fastclip::factors_of;
using fastclip::UnitCut;
using fastclip::UnitLimit;
using fastclip::UnitTensor;

template <class T, class Watch>
inline double unit_norm(const char* p, int64_t bytes, NormType type) {
  switch (type) {
    case NormType::L1:
      return static_cast<double>(sum_slice<T, Abs>(p, bytes, Watch()));
    case NormType::L2:
      return static_cast<double>(__builtin_sqrtl(sum_slice<T, Square>(p, bytes, Watch())));
    case NormType::Inf:
      break;
  }
  return static_cast<double>(max_slice<T>(p, bytes));
}

template <class T>
inline void scale_unit(char* p, int64_t bytes, double coef) {
  using Scalar = typename T::Scalar;
  if (coef != coef) coef = __builtin_nan("");  // the default NaN, on which BF16::store relies
  const Factors factors = factors_of(coef);
  scale_slice<T>(p, bytes, static_cast<Scalar>(factors.first));
  if (__builtin_expect(factors.second != 1, 0)) scale_slice<T>(p, bytes, static_cast<Scalar>(factors.second));
}

// Returns whether a unit has been written.
template <class W, class G, class Watch>
bool adapt_units(const UnitTensor& tensor, int64_t begin, int64_t end, UnitLimit limit) {
  const int64_t weight_bytes = tensor.numel * static_cast<int64_t>(sizeof(typename W::BitsScalar));
  const int64_t grad_bytes = tensor.numel * static_cast<int64_t>(sizeof(typename G::BitsScalar));
  bool written = false;
  for (int64_t unit = begin; unit < end; ++unit) {
    char* const grad = tensor.grad + unit * grad_bytes;
    const double weight_norm = unit_norm<W, Watch>(tensor.weight + unit * weight_bytes, weight_bytes, limit.norm_type);
    const double coef = unit_coef(limit, weight_norm, unit_norm<G, Watch>(grad, grad_bytes, limit.norm_type));
    if (coef == 1) continue;
    scale_unit<G>(grad, grad_bytes, coef);
    written = true;
  }
  return written;
}

void adapt(UnitTensor* tensors, UnitCut begin, UnitCut end, UnitLimit limit) {
  for (int64_t t = begin.tensor; t < end.tensor + (end.unit > 0); ++t) {
    UnitTensor& tensor = tensors[t];
    const int64_t from = t == begin.tensor ? begin.unit : 0, to = t == end.tensor ? end.unit : tensor.units;
    bool written = false;
    with_dtype(tensor.weight_dtype, [&](auto w) {
      with_dtype(tensor.grad_dtype, [&](auto g) {
        using W = decltype(w);
        using G = decltype(g);
        // Units follow each other in memory: reading ahead of one is reading the next.
        const int64_t bytes = (to - from) * tensor.numel * static_cast<int64_t>(sizeof(typename G::BitsScalar));
        written = bytes < kLongBytes ? adapt_units<W, G, NoWatch>(tensor, from, to, limit)
                                     : adapt_units<W, G, ReadAhead>(tensor, from, to, limit);
      });
    });
    if (written) __atomic_store_n(&tensor.written, 1, __ATOMIC_RELAXED);
  }
}

}  // namespace
