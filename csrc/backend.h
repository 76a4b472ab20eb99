// What a backend does with a table of gradients. Everything above it (clip.cpp) is the same for all devices.
#pragma once

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

}  // namespace fastclip::cpu
