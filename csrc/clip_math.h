// The arithmetic that every backend shares: how partial results combine and what the clip coefficient is.
#pragma once

#include <math.h>

#include "slice.h"

#ifdef __CUDACC__
#define FASTCLIP_HOST_DEVICE __host__ __device__
#else
#define FASTCLIP_HOST_DEVICE
#endif

namespace fastclip {

// The larger of two absolute values; NaN wins, as in torch.linalg.vector_norm(x, inf).
FASTCLIP_HOST_DEVICE inline double nan_max(double a, double b) {
  return (b > a || b != b) ? b : a;
}

// Combines norms of parts of one vector into the norm of the whole. Divides by the larger one first: the squares of
// two representable norms need not be representable (1e200 in float64).
FASTCLIP_HOST_DEVICE inline double combine_norms(double a, double b, NormType type) {
  if (type == NormType::L1) return a + b;
  if (type == NormType::Inf) return nan_max(a, b);
  const double larger = nan_max(a, b), smaller = larger == a ? b : a;
  if (!(larger > 0 && larger <= 1.7976931348623157e308)) return a + b;  // zero, inf or NaN
  const double ratio = smaller / larger;
  return larger * sqrt(1 + ratio * ratio);
}

// max_norm / (total_norm + 1e-6), at most 1: torch.nn.utils.clip_grad_norm_'s formula, in double. NaN stays NaN.
FASTCLIP_HOST_DEVICE inline double clip_coef(double max_norm, double total_norm) {
  const double coef = max_norm / (total_norm + 1e-6);
  return coef > 1 ? 1 : coef;
}

// The same for one of several groups, from the unrounded norm and the one that the user gets. One without a threshold,
// inf, is left as it is, whatever its norm.
FASTCLIP_HOST_DEVICE inline double group_coef(double max_norm, double total_norm, double returned_norm) {
  if (max_norm > 1.7976931348623157e308) return 1;
  const bool finite = fabs(returned_norm) <= 1.7976931348623157e308;
  return clip_coef(max_norm, finite ? total_norm : returned_norm);
}

// The same where the norm is not finite and that has consequences of its own. Under Nonfinite::Zero a coefficient of 0
// stores zeros, since a product with inf or NaN is NaN.
FASTCLIP_HOST_DEVICE inline double clip_coef(double max_norm, double total_norm, Nonfinite nonfinite) {
  if (nonfinite == Nonfinite::Propagate || total_norm - total_norm == 0) return clip_coef(max_norm, total_norm);
  return nonfinite == Nonfinite::Zero ? 0 : 1;
}

FASTCLIP_HOST_DEVICE inline bool must_zero(double coef, Nonfinite nonfinite) {
  return coef == 0 && nonfinite == Nonfinite::Zero;
}

// Whether gradients have to be written: a coefficient of 1 changes nothing, NaN does, and so does one above 1, which
// only gradients with a grad_scale below 1 have.
FASTCLIP_HOST_DEVICE inline bool must_scale(double coef) {
  return coef != 1;
}

}  // namespace fastclip
