// The operators fastclip::*, which torch.compile and torch.export put into their graphs: the four functions on lists of
// gradients. What no kernel does is done here with torch's operations, as torch's own functions do it, and counted.
#include "ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <mutex>

#include "clip.h"

namespace fastclip::ops {
namespace {

using at::Tensor;
using at::TensorList;

std::mutex reasons_mutex;
std::map<std::string, int64_t> reasons;

void count_fallback(const std::string& reason) {
  const std::lock_guard<std::mutex> lock(reasons_mutex);
  ++reasons[reason];
}

// Runs a call in one of the two ways, natively where there is no reason against it.
template <class Native, class Torch>
auto run(const std::string& reason, Native native, Torch torch) {
  const at::NoGradGuard no_grad;
  if (reason.empty()) {
    count_native_call();
    return native();
  }
  count_fallback(reason);
  return torch();
}

Gradients collect(TensorList tensors, Access access, const char* argument) {
  Gradients grads(access, tensors.size(), argument);
  for (size_t i = 0; i < tensors.size(); ++i) grads.add(tensors[i].unsafeGetTensorImpl(), i);
  return grads;
}

Number to_number(const Tensor& tensor) {
  if (auto number = on_device(tensor)) return *number;
  return {tensor.item().toDouble(), {}};
}

// What the fake kernels promise, whoever computes the norm: float64 where a gradient is, else float32.
at::ScalarType norm_dtype(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (c10::toRealValueType(tensor.scalar_type()) == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

Tensor norm_by_torch(TensorList tensors, double p, bool error_if_nonfinite) {
  std::vector<Tensor> norms;
  for (const Tensor& tensor : tensors) norms.push_back(at::linalg_vector_norm(tensor, p).to(tensors[0].device()));
  const Tensor norm = at::linalg_vector_norm(at::stack(norms), p).to(norm_dtype(tensors));
  if (error_if_nonfinite) check_finite(norm.item().toDouble(), c10::str(p));
  return norm;
}

void scale_by_torch(TensorList grads, const Number& max_norm, const Tensor& total_norm) {
  const Tensor coef = (max_norm.here() / (total_norm + 1e-6)).clamp_max(1);
  for (const Tensor& grad : grads) grad.mul_(coef.to(grad.device()));
}

Tensor get_total_norm(TensorList tensors, double norm_type, bool error_if_nonfinite) {
  Gradients grads = collect(tensors, Access::Read, "tensors");
  if (grads.none()) return number_tensor(0, at::kFloat);
  return run(
      why_not_fused(grads, norm_type),
      [&] { return fastclip::get_total_norm(grads, *fused_norm_type(norm_type), error_if_nonfinite); },
      [&] { return norm_by_torch(tensors, norm_type, error_if_nonfinite); });
}

Tensor clip_grad_norm(TensorList tensors, const Number& max_norm, double norm_type, bool error_if_nonfinite) {
  Gradients grads = collect(tensors, Access::Write, "grads");
  if (grads.none()) return number_tensor(0, at::kFloat);
  return run(
      why_not_fused(grads, norm_type),
      [&] {
        const Nonfinite nonfinite = error_if_nonfinite ? Nonfinite::Raise : Nonfinite::Propagate;
        return fastclip::clip_grad_norm(grads, {max_norm, {}}, *fused_norm_type(norm_type), nonfinite);
      },
      [&] {
        const Tensor norm = norm_by_torch(tensors, norm_type, error_if_nonfinite);
        scale_by_torch(tensors, max_norm, norm);
        return norm;
      });
}

void clip_grads_with_norm(TensorList tensors, const Number& max_norm, const Tensor& total_norm) {
  Gradients grads = collect(tensors, Access::Write, "grads");
  if (grads.none()) return;
  const std::string& reason = grads.fallback_reason();
  run(
      reason.empty() && !is_norm(total_norm) ? "total_norm" : reason,
      [&] { fastclip::clip_grads_with_norm(grads, max_norm, to_number(total_norm)); },
      [&] { scale_by_torch(tensors, max_norm, total_norm); });
}

void clip_grad_value_float(TensorList tensors, double clip_value) {
  Gradients grads = collect(tensors, Access::Write, "grads");
  if (grads.none()) return;
  grads.check_clip_value(clip_value);
  const std::string& reason = grads.fallback_reason();
  run(
      reason.empty() && !(clip_value >= 0) ? "clip_value" : reason,
      [&] { fastclip::clip_grad_value(grads, clip_value); },
      [&] {
        for (const Tensor& tensor : tensors) tensor.clamp_(-clip_value, clip_value);
      });
}

// As the dispatcher calls them.

Tensor clip_grad_norm_float(TensorList grads, double max_norm, double norm_type, bool error_if_nonfinite) {
  return clip_grad_norm(grads, {max_norm, {}}, norm_type, error_if_nonfinite);
}

Tensor clip_grad_norm_tensor(TensorList grads, const Tensor& max_norm, double norm_type, bool error_if_nonfinite) {
  return clip_grad_norm(grads, to_number(max_norm), norm_type, error_if_nonfinite);
}

void clip_grads_with_norm_float(TensorList grads, double max_norm, const Tensor& total_norm) {
  clip_grads_with_norm(grads, {max_norm, {}}, total_norm);
}

void clip_grads_with_norm_tensor(TensorList grads, const Tensor& max_norm, const Tensor& total_norm) {
  clip_grads_with_norm(grads, to_number(max_norm), total_norm);
}

void clip_grad_value_tensor(TensorList grads, const Tensor& clip_value) {
  clip_grad_value_float(grads, clip_value.item().toDouble());
}

void implement(torch::Library& m) {
  m.impl("get_total_norm", &get_total_norm);
  m.impl("clip_grad_norm_", &clip_grad_norm_float);
  m.impl("clip_grad_norm_.Tensor", &clip_grad_norm_tensor);
  m.impl("clip_grads_with_norm_", &clip_grads_with_norm_float);
  m.impl("clip_grads_with_norm_.Tensor", &clip_grads_with_norm_tensor);
  m.impl("clip_grad_value_", &clip_grad_value_float);
  m.impl("clip_grad_value_.Tensor", &clip_grad_value_tensor);
}

}  // namespace

std::map<std::string, int64_t> fallback_reasons() {
  const std::lock_guard<std::mutex> lock(reasons_mutex);
  return reasons;
}

void reset_fallback_reasons() {
  const std::lock_guard<std::mutex> lock(reasons_mutex);
  reasons.clear();
}

}  // namespace fastclip::ops

TORCH_LIBRARY(fastclip, m) {
  m.set_python_module("fastclip.compiled");  // where the fake kernels are
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("get_total_norm(Tensor[] tensors, float norm_type, bool error_if_nonfinite) -> Tensor", tags);
  m.def("clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, bool error_if_nonfinite) -> Tensor",
        tags);
  m.def(
      "clip_grad_norm_.Tensor(Tensor(a!)[] grads, Tensor max_norm, float norm_type, bool error_if_nonfinite) -> Tensor",
      tags);
  m.def("clip_grads_with_norm_(Tensor(a!)[] grads, float max_norm, Tensor total_norm) -> ()", tags);
  m.def("clip_grads_with_norm_.Tensor(Tensor(a!)[] grads, Tensor max_norm, Tensor total_norm) -> ()", tags);
  m.def("clip_grad_value_(Tensor(a!)[] grads, float clip_value) -> ()", tags);
  m.def("clip_grad_value_.Tensor(Tensor(a!)[] grads, Tensor clip_value) -> ()", tags);
}

// On plain tensors; and under vmap, where why_not_fused() says so and torch's operations know their batches.
TORCH_LIBRARY_IMPL(fastclip, CompositeExplicitAutograd, m) {
  fastclip::ops::implement(m);
}

TORCH_LIBRARY_IMPL(fastclip, FuncTorchBatchedDecomposition, m) {
  fastclip::ops::implement(m);
}

// No derivatives, as torch's functions have none: they run without autograd. A no_grad around the call would stay in
// the graph, and would stay on when error_if_nonfinite raises.
TORCH_LIBRARY_IMPL(fastclip, Autograd, m) {
  for (const char* name : {"get_total_norm", "clip_grad_norm_", "clip_grad_norm_.Tensor", "clip_grads_with_norm_",
                           "clip_grads_with_norm_.Tensor", "clip_grad_value_", "clip_grad_value_.Tensor"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
