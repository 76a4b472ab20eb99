// Clipping by norm of several groups of gradients at once, each with its own threshold.
#pragma once

#include <vector>

#include "clip.h"

namespace fastclip {

// The thresholds, one a group: numbers, or a 1-d tensor on a CUDA device, which is not waited for.
struct MaxNorms {
  std::vector<double> values;
  at::Tensor tensor;
};

// Groups are given by their ends: group g has the gradients [ends[g - 1], ends[g]) of those added, empty ones counted.

// Why each group has to be done by a call of its own, "" where the kernels do all together.
std::string why_not_grouped(const Gradients& grads, double norm_type);

// clip_grad_norm for each group. Returns their norms, [groups], in the promotion of all gradients; 0 for a group that
// has none. A threshold of inf leaves a group as it is, whatever its norm.
at::Tensor clip_grad_norms(Gradients& grads, const std::vector<int64_t>& ends, const MaxNorms& max_norms, NormType type,
                           bool error_if_nonfinite);

// Throws the error of clip_grad_norm for the first group whose norm is not finite.
void check_finite_groups(const at::Tensor& norms, NormType type);

namespace cuda {
// `ends` in slices of the group's table.
at::Tensor clip_grad_norms(Group& grads, const std::vector<int64_t>& ends, const MaxNorms& max_norms, NormType type,
                           bool error_if_nonfinite, at::ScalarType norm_dtype);
}  // namespace cuda

}  // namespace fastclip
