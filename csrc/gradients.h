// The gradients of one call: what is plain memory is packed into a table, everything else is named.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <string>
#include <vector>

#include "tensor_table.h"

namespace fastclip {

enum class Access { Read, Write };

// A gradient with gaps between its elements: copied for the norm, written through torch.
struct Gapped {
  at::Tensor tensor;
  DType dtype;
  uint32_t row;  // as in Slice
};

// The gradients of one call that lie on one device.
struct Group {
  explicit Group(c10::Device device) : device(device) {}

  c10::Device device;
  TensorTable dense;                   // gradients that are flat memory
  std::vector<at::TensorImpl*> impls;  // theirs, one a slice
  std::vector<Gapped> gapped;          // the others
  size_t owned = 0;                    // how many of impls are kept alive by this call
};

// The gradients of one call. add() either packs a gradient or says why it cannot be.
class Gradients {
 public:
  enum class Added { Yes, Fallback, NotFloating, NoMemory };

  // argument: the name of the list that they come from, for messages.
  Gradients(Access access, size_t expected, const char* argument = "grads");

  // Packs a gradient. The caller keeps it alive until own_all(), or until the end of the call.
  // Fallback: torch has to do this call, fallback_reason() says why. Adding more is still worth it: what is wrong with
  // them shows before torch has changed anything. NotFloating: an integer or bool gradient. NoMemory: its storage has
  // been resized to less than it needs.
  // Throws torch's own error for what cannot be written in place (expanded, inference tensors).
  Added add(at::TensorImpl* grad);
  // The same for item `index` of the argument: throws a TypeError for NotFloating, a RuntimeError for NoMemory.
  void add(at::TensorImpl* grad, int64_t index) { add(grad, argument_, index); }
  // Of another argument; what: the word for it in the error.
  void add(at::TensorImpl* grad, const char* argument, int64_t index, const char* what = "gradient") {
    const Added added = add(grad);
    if (added != Added::Yes && added != Added::Fallback) refuse(*grad, added, argument, index, what);
  }
  // Says that item `index` of the argument has no gradient.
  void pass_over(int64_t index) { passed_over_.push_back(index); }
  // Has torch do this call for a reason that lies outside of the gradients.
  Added fall_back(std::string reason);
  // Keeps a gradient alive that nobody else may own.
  void keep(at::Tensor grad) { kept_.push_back(std::move(grad)); }
  // Takes references to every gradient added so far and to its memory: these no longer need the interpreter lock.
  void own_all();

  bool none() const { return count_ == 0; }
  int64_t count() const { return count_; }
  bool only_on_cpu() const { return groups_.size() == 1 && groups_[0].device.is_cpu(); }
  c10::SmallVectorImpl<Group>& groups() { return groups_; }
  const c10::SmallVectorImpl<Group>& groups() const { return groups_; }
  bool has_empty() const { return has_empty_; }
  const std::string& fallback_reason() const { return fallback_reason_; }
  const char* argument() const { return argument_; }
  const std::vector<int64_t>& passed_over() const { return passed_over_; }
  int64_t bytes() const { return bytes_; }
  bool has(DType dtype) const { return dtypes_ >> static_cast<int>(dtype) & 1; }
  // The promotion of the gradients' dtypes, at least float32.
  at::ScalarType norm_dtype() const { return any_double_ ? at::kDouble : at::kFloat; }
  // Makes norm_dtype() float64: the norm is left as it was computed.
  void keep_norm_unrounded() { any_double_ = true; }

  // Throws torch's error where a dtype among the gradients cannot represent a finite clip_value.
  void check_clip_value(double clip_value) const;

 private:
  Group& group_on(c10::Device device) {
    return !groups_.empty() && groups_[0].device == device ? groups_[0] : other_group_on(device);
  }
  Group& other_group_on(c10::Device device);
  [[noreturn]] static void refuse(const at::TensorImpl& grad, Added added, const char* argument, int64_t index,
                                  const char* what);

  Access access_;
  size_t expected_;
  const char* argument_;
  c10::SmallVector<Group, 1> groups_;  // in the order of their first gradients
  std::vector<at::Tensor> kept_;
  std::vector<c10::Storage> kept_memory_;
  std::vector<int64_t> passed_over_;  // indices of items without a gradient, ascending
  int64_t bytes_ = 0;
  int64_t count_ = 0;
  uint8_t dtypes_ = 0;  // bit set of DType
  bool any_double_ = false;
  bool has_empty_ = false;
  std::string fallback_reason_;
};

}  // namespace fastclip
