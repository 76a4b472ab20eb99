// What one instruction set provides. Includes nothing with inline code: see slice.h.
#pragma once

#include "../slice.h"
#include "../unit.h"

namespace fastclip::cpu {

// Each function works on the part [begin, end) of a table, on the calling thread.
struct Kernels {
  const char* name;
  // L1: sum of |x|. L2: sum of x^2. Inf: max of |x|, NaN if there is one.
  long double (*reduce)(const Slice* slices, Cut begin, Cut end, NormType type);
  // L1 and L2 as reduce(), bit by bit; for each slice of the part, from the first on, one of `parts`.
  void (*examine)(const Slice* slices, Cut begin, Cut end, NormType type, PartStatistics* parts);
  // x *= coef, last slice first: what was read last is still in the cache.
  void (*scale)(const Slice* slices, Cut begin, Cut end, double coef);
  // x = min(max(x, -clip_value), clip_value), NaN stays. Sets `written` of slices that changed. clip_value >= 0.
  void (*clamp)(Slice* slices, Cut begin, Cut end, double clip_value);
  // Limits each unit's gradient to what unit_coef() says. Sets `written` of tensors that changed.
  void (*adapt)(UnitTensor* tensors, UnitCut begin, UnitCut end, UnitLimit limit);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace fastclip::cpu
