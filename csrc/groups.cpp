#include "groups.h"

#include <ATen/EmptyTensor.h>

#include <cmath>

#include "clip_math.h"

namespace fastclip {
namespace {

// The ends of groups in slices: empty gradients have none.
std::vector<int64_t> ends_in_slices(const TensorTable& table, const std::vector<int64_t>& ends) {
  std::vector<int64_t> in_slices;
  in_slices.reserve(ends.size());
  int64_t slice = 0;
  for (const int64_t end : ends) {
    while (slice < table.size() && table.slices()[slice].row < end) ++slice;
    in_slices.push_back(slice);
  }
  return in_slices;
}

at::Tensor clip_on_cpu(Group& group, const std::vector<int64_t>& ends, const std::vector<double>& max_norms,
                       NormType type, bool error_if_nonfinite, at::ScalarType dtype) {
  const int64_t count = static_cast<int64_t>(ends.size());
  at::Tensor result = at::detail::empty_cpu({count}, dtype);  // before anything is written: it may be out of memory
  std::vector<double> coefs(count);
  const auto decide = [&](int64_t g, double norm) {
    const double returned = rounded(norm, dtype);
    if (dtype == at::kDouble) {
      result.mutable_data_ptr<double>()[g] = returned;
    } else {
      result.mutable_data_ptr<float>()[g] = static_cast<float>(returned);
    }
    return coefs[g] = group_coef(max_norms[g], norm, returned);
  };
  if (error_if_nonfinite) {
    cpu::clip_groups(group.dense, ends, type, [&](int64_t g, double norm) { return decide(g, norm), 1.0; });
    check_finite_groups(result, type);
    cpu::scale_groups(group.dense, ends, coefs.data());
  } else {
    cpu::clip_groups(group.dense, ends, type, decide);
  }
  for (int64_t g = 0, slice = 0; g < count; ++g) {
    for (; slice < ends[g]; ++slice) {
      if (must_scale(coefs[g])) group.impls[slice]->bump_version();
    }
  }
  return result;
}

}  // namespace

std::string why_not_grouped(const Gradients& grads, double norm_type) {
  const std::string reason = why_not_fused(grads, norm_type);
  if (!reason.empty()) return reason;
  if (grads.groups().size() > 1) return "groups on several devices";
  if (!grads.groups()[0].gapped.empty()) return "groups with gaps";
  return grads.groups()[0].dense.has_overlaps() ? "gradients that share memory" : "";
}

void check_finite_groups(const at::Tensor& norms, NormType type) {
  const at::Tensor here = norms.cpu().to(at::kDouble);
  for (int64_t g = 0; g < here.numel(); ++g) {
    TORCH_CHECK(std::isfinite(here.const_data_ptr<double>()[g]), "The total norm of order ",
                type == NormType::L1   ? "1.0"
                : type == NormType::L2 ? "2.0"
                                       : "inf",
                " for gradients from `groups[", g,
                "]` is non-finite, so it cannot be clipped. To disable this error and scale the gradients by the "
                "non-finite norm anyway, set `error_if_nonfinite=False`");
  }
}

at::Tensor clip_grad_norms(Gradients& grads, const std::vector<int64_t>& ends, const MaxNorms& max_norms, NormType type,
                           bool error_if_nonfinite) {
  Group& group = grads.groups().front();
  const std::vector<int64_t> in_slices = ends_in_slices(group.dense, ends);
#ifdef FASTCLIP_CUDA
  if (!group.device.is_cpu()) {
    return cuda::clip_grad_norms(group, in_slices, max_norms, type, error_if_nonfinite, grads.norm_dtype());
  }
#endif
  if (!max_norms.tensor.defined()) {
    return clip_on_cpu(group, in_slices, max_norms.values, type, error_if_nonfinite, grads.norm_dtype());
  }
  const at::Tensor here = max_norms.tensor.cpu().to(at::kDouble).contiguous();
  const double* values = here.const_data_ptr<double>();
  return clip_on_cpu(group, in_slices, {values, values + here.numel()}, type, error_if_nonfinite, grads.norm_dtype());
}

}  // namespace fastclip
