// How a coefficient is applied: as one factor, or as two where float32 would lose it. No standard library code, as in
// slice.h, and internal linkage.
#pragma once

#include "slice.h"

namespace fastclip {

struct Factors {
  double first, second;
};

// Where float32 would round the coefficient to a subnormal number or to zero (max_norm 1e-3, total_norm 1e38) there are
// two factors: a power of two, which is exact, and the rest. The rest is at most 1, so that it does not enlarge what
// the first product loses among the subnormal numbers, and a normal float32 down to 1.4e-76 (max_norm 1.4e-38,
// total_norm 1e38), below which products are subnormal themselves. Else the second one is 1.
FASTCLIP_SHARED_FUNCTION Factors factors_of(double coef) {
  const double size = coef < 0 ? -coef : coef;
  if (!(size > 0 && size < 1e-30)) return {coef, 1};
  const bool tiny = size < 1e-50;
  return {tiny ? 0x1p-126 : 0x1p-64, coef * (tiny ? 0x1p126 : 0x1p64)};
}

}  // namespace fastclip
