// Adaptive gradient clipping: from parameters to tables of units and their backends.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <vector>

#include "clip.h"
#include "unit.h"

namespace fastclip {

// Both hold the same parameters in the same order: their values and their gradients.

// Why torch's operations have to do a call, "" where the kernels can.
std::string why_not_adaptive(const Gradients& weights, const Gradients& grads, double norm_type);

// Limits the norm of each unit of the gradients, see UnitLimit. Weights and gradients are read once; a unit that is
// within its limit is not written.
void clip_grad_adaptive(Gradients& weights, Gradients& grads, UnitLimit limit);

// The backends. Tensors that were changed are marked as `written`, on a CUDA device none is: nobody waits for it.
namespace cpu {
void adapt(std::vector<UnitTensor>& tensors, UnitLimit limit);
}
namespace cuda {
void adapt(const std::vector<UnitTensor>& tensors, UnitLimit limit, c10::Device device);
}

}  // namespace fastclip
