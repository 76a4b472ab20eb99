#include "adaptive.h"

namespace fastclip {
namespace {

// Whether the units of a dense tensor follow each other in its memory: dimension 0 is the outermost one, as it is in
// channels_last too. Tensors of fewer than two dimensions are one unit.
bool has_flat_units(const at::TensorImpl& tensor) {
  return tensor.dim() < 2 || tensor.size(0) == 1 || tensor.stride(0) == tensor.numel() / tensor.size(0);
}

UnitTensor unit_tensor(const Slice& weight, const Slice& grad, const at::TensorImpl& shape) {
  const int64_t units = shape.dim() < 2 ? 1 : shape.size(0);
  return {weight.data, grad.data, units, shape.numel() / units, weight.dtype, grad.dtype, 0};
}

bool fits(const Group& weights, const Group& grads) {
  if (!weights.gapped.empty() || !grads.gapped.empty()) return false;
  if (weights.device != grads.device || weights.impls.size() != grads.impls.size()) return false;
  for (size_t i = 0; i < grads.impls.size(); ++i) {
    if (weights.impls[i]->sizes() != grads.impls[i]->sizes()) return false;  // resized since it was assigned
    if (!has_flat_units(*weights.impls[i]) || !has_flat_units(*grads.impls[i])) return false;
  }
  return true;
}

}  // namespace

std::string why_not_adaptive(const Gradients& weights, const Gradients& grads, double norm_type) {
  for (const Gradients* list : {&grads, &weights}) {
    if (!list->fallback_reason().empty()) return list->fallback_reason();
  }
  if (!fused_norm_type(norm_type)) return "norm_type";
  if (weights.groups().size() != grads.groups().size()) return "weights on other devices";
  for (size_t i = 0; i < grads.groups().size(); ++i) {
    const Group &of_weights = weights.groups()[i], &of_grads = grads.groups()[i];
    if (!fits(of_weights, of_grads)) return "units with gaps";
    if (of_grads.dense.has_overlaps()) return "gradients that share memory";
  }
  return "";
}

void clip_grad_adaptive(Gradients& weights, Gradients& grads, UnitLimit limit) {
  for (size_t i = 0; i < grads.groups().size(); ++i) {
    const Group& of_weights = weights.groups()[i];
    Group& group = grads.groups()[i];
    std::vector<UnitTensor> tensors;
    tensors.reserve(group.impls.size());
    for (int64_t s = 0; s < group.dense.size(); ++s) {
      tensors.push_back(unit_tensor(of_weights.dense.slices()[s], group.dense.slices()[s], *group.impls[s]));
    }
#ifdef FASTCLIP_CUDA
    if (!group.device.is_cpu()) {
      cuda::adapt(tensors, limit, group.device);
      for (at::TensorImpl* impl : group.impls) impl->bump_version();
      continue;
    }
#endif
    cpu::adapt(tensors, limit);
    for (size_t s = 0; s < tensors.size(); ++s) {
      if (tensors[s].written) group.impls[s]->bump_version();
    }
  }
}

}  // namespace fastclip
