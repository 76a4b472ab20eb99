// What a backend does with a table of gradients. Everything above it (clip.cpp) is the same for all devices.
#pragma once

#include <functional>
#include <vector>

#include "tensor_table.h"

namespace fastclip::cpu {

// Below this many bytes (some 30 us of work from the second-level cache) a call stays on the calling thread and keeps
// the interpreter lock: entering a parallel region and owning a reference to each gradient would cost as much.
constexpr int64_t kSmallBytes = 1 << 20;

// The norm of all elements, not rounded to the gradients' dtype. Never overflows where the result is representable.
double total_norm(const TensorTable& table, NormType type);

// The same number, and adds what is known of each slice to its row of `rows`, in the same pass. A row that nothing has
// been added to is all zeros; parts of one gradient may come in several calls.
double total_norm(const TensorTable& table, NormType type, StatisticsRow* rows);

// Multiplies every element by coef.
void scale(const TensorTable& table, double coef);

// Stores zeros.
void zero(const TensorTable& table);

// The first slice with an inf or NaN, -1 if there is none.
int64_t first_nonfinite(const TensorTable& table);

// Limits every element to [-clip_value, clip_value], clip_value >= 0, and marks the slices that changed as `written`.
void clamp(TensorTable& table, double clip_value);

// For each group of slices, [ends[g - 1], ends[g]), the norm that total_norm() has for it; then multiplies its elements
// by coef_of(g, norm). Several threads call coef_of, each for groups of its own. No slices overlap.
void clip_groups(const TensorTable& table, const std::vector<int64_t>& ends, NormType type,
                 const std::function<double(int64_t, double)>& coef_of);

// Multiplies the elements of group g by coefs[g].
void scale_groups(const TensorTable& table, const std::vector<int64_t>& ends, const double* coefs);

}  // namespace fastclip::cpu
