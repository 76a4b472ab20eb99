// What adaptive clipping works on: weights and gradients side by side, divided into units. Plain structs and arithmetic
// that every backend shares; no standard library code, as in slice.h, and internal linkage for all functions.
#pragma once

#include "slice.h"

namespace fastclip {

// A weight and its gradient. Unit i of each is the i-th run of `numel` elements of its flat memory.
struct UnitTensor {
  char* weight;
  char* grad;
  int64_t units;
  int64_t numel;  // of a unit
  DType weight_dtype, grad_dtype;
  uint8_t written;  // set when a unit of the gradient has been clipped; two threads may both set it
};

// How large a unit's gradient may be beside its weight.
struct UnitLimit {
  NormType norm_type;
  double clipping, eps;
};

// A position among units: unit `unit` of tensor `tensor`.
struct UnitCut {
  int64_t tensor;
  int64_t unit;
};

// What a unit's gradient is multiplied by, from the unrounded norms: the formula of timm's adaptive_clip_grad, term by
// term, so that NaN and inf do what they do there. A comparison with NaN is false, and max(NaN, x) is NaN as in clamp.
FASTCLIP_SHARED_FUNCTION double unit_coef(UnitLimit limit, double weight_norm, double grad_norm) {
  const double max_norm = limit.clipping * (weight_norm < limit.eps ? limit.eps : weight_norm);
  if (grad_norm < max_norm) return 1;
  return max_norm / (grad_norm < 1e-6 ? 1e-6 : grad_norm);
}

}  // namespace fastclip
