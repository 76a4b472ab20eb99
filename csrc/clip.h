// From gradients to a backend and back: what is plain memory is packed into a table, everything else is named.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "backend.h"

namespace fastclip {

enum class Access { Read, Write };

// The gradients of one call. add() either packs a gradient or says why it cannot be.
class Gradients {
 public:
  enum class Added { Yes, Fallback, NotFloating };

  Gradients(Access access, size_t expected);

  // Packs a gradient. The caller keeps it alive until own_all(), or until the end of the call.
  // Fallback: torch has to do this call, fallback_reason() says why. NotFloating: an integer or bool gradient.
  // Throws torch's own error for what cannot be written in place (expanded, inference tensors).
  Added add(at::TensorImpl* grad);
  // Keeps a gradient alive that nobody else may own.
  void keep(at::Tensor grad) { kept_.push_back(std::move(grad)); }
  // Takes a reference to every gradient added so far: these no longer need the interpreter lock.
  void own_all();

  bool none() const { return count_ == 0; }
  bool has_empty() const { return has_empty_; }
  const std::string& fallback_reason() const { return fallback_reason_; }
  int64_t bytes() const { return dense_.bytes() + gapped_bytes_; }
  // The promotion of the gradients' dtypes, at least float32.
  at::ScalarType norm_dtype() const { return any_double_ ? at::kDouble : at::kFloat; }

  // The norm, unrounded; rounded to norm_dtype(); as the 0-d tensor that users get.
  double total_norm(NormType type) const;
  double rounded(double total_norm) const;
  at::Tensor norm_tensor(double total_norm) const;

  // Both bump the version counters of the gradients that they write.
  void scale(double coef);
  void clamp(double clip_value);

  // Throws torch's error where a dtype among the gradients cannot represent a finite clip_value.
  void check_clip_value(double clip_value) const;

 private:
  struct Gapped {
    at::Tensor tensor;
    DType dtype;
  };

  Added fall_back(std::string reason);

  Access access_;
  TensorTable dense_;                   // gradients that are flat memory
  std::vector<at::TensorImpl*> impls_;  // theirs, one a slice
  std::vector<Gapped> gapped_;          // the others: copied in pieces for the norm, written through torch
  int64_t gapped_bytes_ = 0;
  std::vector<at::Tensor> kept_;
  size_t owned_ = 0;  // how many of impls_ are kept
  int64_t count_ = 0;
  uint8_t dtypes_ = 0;  // bit set of DType
  bool any_double_ = false;
  bool has_empty_ = false;
  std::string fallback_reason_;
};

// The four functions, on packed gradients.
at::Tensor get_total_norm(const Gradients& grads, NormType type, bool error_if_nonfinite);
at::Tensor clip_grad_norm(Gradients& grads, double max_norm, NormType type, bool error_if_nonfinite);
void clip_grads_with_norm(Gradients& grads, double max_norm, double total_norm);
void clip_grad_value(Gradients& grads, double clip_value);

}  // namespace fastclip
