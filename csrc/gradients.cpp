#include "gradients.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace fastclip {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// What a tensor's keys are beyond those of autograd and autocast, which change nothing about its memory.
DispatchKeySet memory_keys(const at::TensorImpl& tensor) {
  return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
}

// Whether a tensor is plain memory on a device that there is a backend for.
bool is_plain(const at::TensorImpl& tensor) {
  const DispatchKeySet keys = memory_keys(tensor);
  if (keys == DispatchKeySet(DispatchKey::CPU)) return true;
#ifdef FASTCLIP_CUDA
  return keys == DispatchKeySet(DispatchKey::CUDA);
#else
  return false;
#endif
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
  if (tensor.is_mkldnn()) return "mkldnn";
  if (tensor.is_nested()) return "nested";
  if (tensor.device_type() != c10::DeviceType::CPU) return "device " + c10::DeviceTypeName(tensor.device_type(), true);
  return std::string("layout ") + c10::toString(keys.highestPriorityTypeId());
}

// Who would see torch's operations, but not ours: then torch has to do the call. Null if there is nobody.
const char* torch_is_watched() {
  if (c10::impl::dispatch_mode_enabled()) return "dispatch mode";
  if (c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode)) return "functorch";
  if (c10::impl::tls_is_dispatch_key_included(DispatchKey::Tracer)) return "tracing";
  return nullptr;
}

}  // namespace

Gradients::Gradients(Access access, size_t expected, const char* argument)
    : access_(access), expected_(expected), argument_(argument) {}

Group& Gradients::other_group_on(c10::Device device) {
  for (Group& group : groups_) {
    if (group.device == device) return group;
  }
  Group& group = groups_.emplace_back(device);
  if (groups_.size() == 1) {  // most often the only one
    group.dense.reserve(expected_);
    group.impls.reserve(expected_);
  }
  return group;
}

Gradients::Added Gradients::fall_back(std::string reason) {
  // The first reason, but any subclass before it: a DTensor goes to the same collectives on every rank, also where only
  // this one counts FLOPs or has a complex gradient before it in the list.
  if (fallback_reason_.empty() || reason == "subclass") fallback_reason_ = std::move(reason);
  return Added::Fallback;
}

Gradients::Added Gradients::add(at::TensorImpl* grad) {
  if (count_++ == 0) {
    if (const char* mode = torch_is_watched()) fall_back(mode);
  }
  if (!is_plain(*grad)) return fall_back(why_not_plain(*grad));
  DType dtype;
  const at::ScalarType scalar_type = c10::typeMetaToScalarType(grad->dtype());
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

  Group& group = group_on(grad->device());
  const int64_t numel = grad->numel();
  if (numel == 0) {
    has_empty_ = true;
    return Added::Yes;
  }
  bytes_ += numel * item_size(dtype);
  const auto offset = static_cast<size_t>(grad->storage_offset());
  if (grad->unsafe_storage().nbytes() < (offset + 1) * item_size(dtype)) return Added::NoMemory;
  if (grad->is_non_overlapping_and_dense()) {
    if (grad->unsafe_storage().nbytes() < (offset + numel) * item_size(dtype)) return Added::NoMemory;
    void* data = access_ == Access::Write ? grad->mutable_data() : const_cast<void*>(grad->data());
    group.dense.add(data, numel, dtype, static_cast<uint32_t>(count_ - 1));
    group.impls.push_back(grad);
    return Added::Yes;
  }
  if (access_ == Access::Write) at::assert_no_internal_overlap(grad);
  group.gapped.push_back({at::Tensor(c10::intrusive_ptr<at::TensorImpl>::unsafe_reclaim_from_nonowning(grad)), dtype,
                          static_cast<uint32_t>(count_ - 1)});
  return Added::Yes;
}

void Gradients::refuse(const at::TensorImpl& grad, Added added, const char* argument, int64_t index, const char* what) {
  TORCH_CHECK(added != Added::NoMemory, argument, "[", index, "]: expected a ", what,
              " with memory for its elements, got ", grad.unsafe_storage().nbytes(), " bytes of storage");
  TORCH_CHECK_TYPE(false, argument, "[", index, "]: expected a floating-point ", what, ", got ", "torch.",
                   c10::getDtypeNames(c10::typeMetaToScalarType(grad.dtype())).first);
}

void Gradients::own_all() {
  for (Group& group : groups_) {
    for (; group.owned < group.impls.size(); ++group.owned) {
      at::TensorImpl* impl = group.impls[group.owned];
      kept_.emplace_back(c10::intrusive_ptr<at::TensorImpl>::unsafe_reclaim_from_nonowning(impl));
      kept_memory_.push_back(impl->unsafe_storage());
    }
  }
}

void Gradients::check_clip_value(double clip_value) const {
  const at::Scalar limit(clip_value);  // torch's own conversion: how its error names the type depends on its version
  if (has(DType::F16)) limit.toHalf();
  if (has(DType::BF16)) limit.toBFloat16();
  if (has(DType::F32)) limit.toFloat();
}

}  // namespace fastclip
