#include "clip.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/TypeCast.h>

#include <algorithm>
#include <cmath>

#include "clip_math.h"

namespace fastclip {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// What a tensor's keys are beyond those of autograd and autocast, which change nothing about its memory.
DispatchKeySet memory_keys(const at::TensorImpl& tensor) {
  return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
}

bool is_plain_cpu(const at::TensorImpl& tensor) {
  return memory_keys(tensor) == DispatchKeySet(DispatchKey::CPU);
}

std::string why_not_plain(const at::TensorImpl& tensor) {
  const DispatchKeySet keys = tensor.key_set();
  if (keys.has(DispatchKey::Python)) return "subclass";
  for (DispatchKey key : {DispatchKey::FuncTorchBatched, DispatchKey::BatchedNestedTensor, DispatchKey::Functionalize,
                          DispatchKey::FuncTorchGradWrapper, DispatchKey::FuncTorchDynamicLayerFrontMode}) {
    if (keys.has(key)) return "functorch";
  }
  if (tensor.is_sparse() || tensor.is_sparse_compressed()) return "sparse";
  if (keys.has(DispatchKey::Conjugate)) return "conjugate view";
  if (keys.has(DispatchKey::Negative)) return "negative-bit view";
  if (keys.has(DispatchKey::ZeroTensor)) return "zero tensor";
  if (tensor.is_nested()) return "nested";
  if (tensor.device_type() != c10::DeviceType::CPU) return "device " + c10::DeviceTypeName(tensor.device_type(), true);
  return std::string("layout ") + c10::toString(keys.highestPriorityTypeId());
}

// A factor for Tensor::mul_, which rounds a tensor to float32 for half types, but a Scalar to the half type itself.
at::Tensor scalar_tensor(double value) {
  at::Tensor tensor = at::detail::empty_cpu({}, at::kDouble);
  *tensor.mutable_data_ptr<double>() = value;
  return tensor;
}

// Calls visit with contiguous copies of the parts of a tensor with gaps: the copies never take more than this.
constexpr int64_t kPieceBytes = 1 << 19;

template <class Visit>
void for_each_piece(const at::Tensor& tensor, const Visit& visit) {
  if (static_cast<int64_t>(tensor.nbytes()) <= kPieceBytes) return visit(tensor.contiguous());
  const auto sizes = tensor.sizes();
  const int64_t longest = std::max_element(sizes.begin(), sizes.end()) - sizes.begin(), half = sizes[longest] / 2;
  for_each_piece(tensor.narrow(longest, 0, half), visit);
  for_each_piece(tensor.narrow(longest, half, sizes[longest] - half), visit);
}

}  // namespace

Gradients::Gradients(Access access, size_t expected) : access_(access) {
  dense_.reserve(expected);
  impls_.reserve(expected);
}

Gradients::Added Gradients::fall_back(std::string reason) {
  fallback_reason_ = std::move(reason);
  return Added::Fallback;
}

Gradients::Added Gradients::add(at::TensorImpl* grad) {
  if (count_++ == 0 && c10::impl::dispatch_mode_enabled()) return fall_back("dispatch mode");
  if (!is_plain_cpu(*grad)) return fall_back(why_not_plain(*grad));
  DType dtype;
  const at::ScalarType scalar_type = grad->dtype().toScalarType();
  switch (scalar_type) {
    case at::kFloat:
      dtype = DType::F32;
      break;
    case at::kDouble:
      dtype = DType::F64;
      any_double_ = true;
      break;
    case at::kHalf:
      dtype = DType::F16;
      break;
    case at::kBFloat16:
      dtype = DType::BF16;
      break;
    default:
      if (c10::isComplexType(scalar_type)) return fall_back("complex");
      if (c10::isFloatingType(scalar_type)) return fall_back(std::string("dtype ") + c10::toString(scalar_type));
      return Added::NotFloating;
  }
  dtypes_ |= 1 << static_cast<int>(dtype);
  // torch's error: writing to an inference tensor is allowed in inference mode only, where this does nothing.
  if (access_ == Access::Write && grad->is_inference()) grad->bump_version();

  const int64_t numel = grad->numel();
  if (numel == 0) {
    has_empty_ = true;
    return Added::Yes;
  }
  if (grad->is_non_overlapping_and_dense()) {
    void* data = access_ == Access::Write ? grad->mutable_data() : const_cast<void*>(grad->data());
    dense_.add(data, numel, dtype);
    impls_.push_back(grad);
    return Added::Yes;
  }
  if (access_ == Access::Write) at::assert_no_internal_overlap(grad);
  gapped_.push_back({at::Tensor(c10::intrusive_ptr<at::TensorImpl>::unsafe_reclaim_from_nonowning(grad)), dtype});
  gapped_bytes_ += numel * item_size(dtype);
  return Added::Yes;
}

void Gradients::own_all() {
  for (; owned_ < impls_.size(); ++owned_) {
    kept_.emplace_back(c10::intrusive_ptr<at::TensorImpl>::unsafe_reclaim_from_nonowning(impls_[owned_]));
  }
}

double Gradients::total_norm(NormType type) const {
  double total = cpu::total_norm(dense_, type);
  for (const Gapped& grad : gapped_) {
    for_each_piece(grad.tensor, [&](const at::Tensor& piece) {
      TensorTable table;
      table.add(piece.mutable_data_ptr(), piece.numel(), grad.dtype);
      total = combine_norms(total, cpu::total_norm(table, type), type);
    });
  }
  return total;
}

double Gradients::rounded(double total_norm) const {
  return any_double_ ? total_norm : static_cast<float>(total_norm);
}

at::Tensor Gradients::norm_tensor(double total_norm) const {
  at::Tensor result = at::detail::empty_cpu({}, norm_dtype());
  if (any_double_) {
    *result.mutable_data_ptr<double>() = total_norm;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(total_norm);
  }
  return result;
}

void Gradients::scale(double coef) {
  cpu::scale(dense_, coef);
  for (at::TensorImpl* impl : impls_) impl->bump_version();
  const Factors factors(coef);
  for (const Gapped& grad : gapped_) {
    grad.tensor.mul_(scalar_tensor(factors.first));
    if (factors.second != 1) grad.tensor.mul_(scalar_tensor(factors.second));
  }
}

void Gradients::clamp(double clip_value) {
  cpu::clamp(dense_, clip_value);
  for (int64_t i = 0; i < dense_.size(); ++i) {
    if (dense_.slices()[i].written) impls_[i]->bump_version();
  }
  for (const Gapped& grad : gapped_) grad.tensor.clamp_(-clip_value, clip_value);
}

void Gradients::check_clip_value(double clip_value) const {
  const auto has = [this](DType dtype) { return dtypes_ >> static_cast<int>(dtype) & 1; };
  if (has(DType::F16)) c10::checked_convert<at::Half>(clip_value, "c10::Half");
  if (has(DType::BF16)) c10::checked_convert<at::BFloat16>(clip_value, "c10::BFloat16");
  if (has(DType::F32)) c10::checked_convert<float>(clip_value, "float");
}

// Throws torch's error when the norm that the user would get is not finite.
static void check_finite(double returned_norm, NormType type) {
  const char* order = type == NormType::L1 ? "1.0" : type == NormType::L2 ? "2.0" : "inf";
  TORCH_CHECK(
      std::isfinite(returned_norm), "The total norm of order ", order,
      " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable this error and scale "
      "the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`");
}

at::Tensor get_total_norm(const Gradients& grads, NormType type, bool error_if_nonfinite) {
  const double returned_norm = grads.rounded(grads.total_norm(type));
  if (error_if_nonfinite) check_finite(returned_norm, type);
  return grads.norm_tensor(returned_norm);
}

at::Tensor clip_grad_norm(Gradients& grads, double max_norm, NormType type, bool error_if_nonfinite) {
  const double total_norm = grads.total_norm(type), returned_norm = grads.rounded(total_norm);
  if (error_if_nonfinite) check_finite(returned_norm, type);
  at::Tensor result = grads.norm_tensor(returned_norm);  // before anything is written: it may be out of memory
  // Where the user gets inf, torch's results hold: everything finite becomes 0, what was infinite NaN.
  const double coef = clip_coef(max_norm, std::isfinite(returned_norm) ? total_norm : returned_norm);
  if (must_scale(coef)) grads.scale(coef);
  return result;
}

void clip_grads_with_norm(Gradients& grads, double max_norm, double total_norm) {
  const double coef = clip_coef(max_norm, total_norm);
  if (must_scale(coef)) grads.scale(coef);
}

void clip_grad_value(Gradients& grads, double clip_value) {
  grads.check_clip_value(clip_value);
  grads.clamp(clip_value);
}

}  // namespace fastclip
