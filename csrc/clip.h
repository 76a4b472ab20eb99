// From gradients to a backend and back: the choice of one, and what is the same for all.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "gradients.h"

namespace fastclip {

// A threshold or a norm. On a CUDA device it is left where it is: reading it here would wait for the device.
struct Number {
  double value = 0;
  at::Tensor tensor;  // 0-d, on a CUDA device; undefined for a number that is known here

  double here() const { return tensor.defined() ? tensor.item().toDouble() : value; }
};

// A threshold: a number, or a policy (policy.h), which makes one of the norm.
struct Threshold : Number {
  at::Tensor policy;  // its state: float64, on the device that decides

  // For a norm in memory here. A policy learns from it.
  double at(double total_norm) const;
};

// A 0-d tensor of plain memory on a CUDA device, which can be left there; nothing for any other.
std::optional<Number> on_device(const at::Tensor& tensor);

// What a call has done, for who asks later: 0-d tensors, on the device of the norm. Only reading them waits.
class ClipReport {
 public:
  at::Tensor total_norm;  // as the user gets it; undefined: no call has filled this
  at::Tensor clip_coef;   // float64: what the gradients were multiplied by

  // A search on a CUDA device: int32 [2], the first gradients with inf or NaN in the first part of a table and in the
  // rest, beyond the table where there is none; and the rows of the table's gradients, as in Slice.
  void add_search(at::Tensor found, std::vector<uint32_t> rows) {
    searches_.push_back({std::move(found), std::move(rows)});
  }
  void add_row(int64_t row) { row_ = row; }
  void set_passed_over(std::vector<int64_t> indices) { passed_over_ = std::move(indices); }

  // The index in the caller's list of the first gradient with inf or NaN, -1 if there is none.
  int64_t first_bad() const;

 private:
  struct Search {
    at::Tensor found;
    std::vector<uint32_t> rows;
  };
  std::vector<Search> searches_;
  int64_t row_ = -1;                  // found on the CPU
  std::vector<int64_t> passed_over_;  // as Gradients has them
};

// A group on the CPU: its norm, unrounded; its gradients changed in place, and their version counters where they were.
double total_norm(const Group& group, NormType type, StatisticsRow* rows = nullptr);  // also adds to gradients' rows
at::Tensor empty_statistics(int64_t gradients);                                       // the rows, all zero
void scale(Group& group, double coef, Nonfinite nonfinite = Nonfinite::Propagate);
void clamp(Group& group, double clip_value);
int64_t first_nonfinite(const Group& group);  // the row of the first gradient with inf or NaN, -1 if there is none

// A norm as users get it: rounded to norm_dtype(), and as a 0-d tensor on the CPU.
double rounded(double total_norm, at::ScalarType norm_dtype);
at::Tensor number_tensor(double value, at::ScalarType dtype);  // float32 or float64

// Throws torch's error when the norm that the user would get is not finite; then it looks for the first bad gradient,
// which waits for the device.
void check_finite(Gradients& grads, double returned_norm, NormType type);
void check_finite(double returned_norm, const std::string& order, const std::string& where = "");

// The clip coefficient, from the unrounded norm. Where the user gets inf or NaN, torch's results hold: everything
// finite becomes 0, what was infinite NaN; or what `nonfinite` says.
double coef_for(const Threshold& max_norm, double total_norm, double returned_norm,
                Nonfinite nonfinite = Nonfinite::Propagate);

// The order of the norm where a kernel computes it.
std::optional<NormType> fused_norm_type(double p);
// Why torch has to compute the norm of order p of these gradients, "" where a kernel does.
std::string why_not_fused(const Gradients& grads, double p);
// Whether a tensor can stand for the norm: 0-d and of plain memory.
bool is_norm(const at::Tensor& total_norm);

// How many calls were done here and not by torch, over all of the process.
inline std::atomic<int64_t> native_calls{0};
inline void count_native_call() {
  native_calls.fetch_add(1, std::memory_order_relaxed);
}

// What an optimizer's step has to know of its gradients, as 0-d tensors on the device of the first one.
struct Prepared {
  at::Tensor total_norm;  // as get_total_norm has it, of the gradients divided by the grad_scale that they came with
  at::Tensor grad_scale;  // float32: dividing by it unscales and clips them. Undefined where it is known to be 1.
  at::Tensor found_inf;   // float32: 1 if one of them is inf or NaN, else 0
};

// What gradients that are multiplied by grad_scale have to be multiplied by to be unscaled and clipped.
double step_factor(const Threshold& max_norm, double scaled_norm, double grad_scale, at::ScalarType norm_dtype,
                   Nonfinite nonfinite);
Prepared prepared_tensors(double scaled_norm, double grad_scale, double factor, at::ScalarType norm_dtype,
                          Nonfinite nonfinite);

// The functions of fastclip._C, on packed gradients.
// With `statistics`, a tensor that becomes [gradients, 6] float64, also when the norm is not finite and that is an
// error.
at::Tensor get_total_norm(Gradients& grads, NormType type, bool error_if_nonfinite, at::Tensor* statistics = nullptr);
// With `report`, it is filled too, in the same cases.
at::Tensor clip_grad_norm(Gradients& grads, const Threshold& max_norm, NormType type, Nonfinite nonfinite,
                          at::Tensor* statistics = nullptr, ClipReport* report = nullptr);
void clip_grads_with_norm(Gradients& grads, const Number& max_norm, const Number& total_norm,
                          Nonfinite nonfinite = Nonfinite::Propagate);
// What clip_grads_with_norm() is going to do, and which gradient is the first bad one if the norm is not finite.
void report_on(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite,
               ClipReport& report);
void clip_grad_value(Gradients& grads, double clip_value);

// Lets a policy follow a norm on its own device, 0-d: its threshold is in its state then. Nothing waits.
void follow_norm(const at::Tensor& policy, const at::Tensor& total_norm);

// Prepares the step of an optimizer whose gradients are still multiplied by grad_scale. Reads them once. In place: also
// divides them by the result's grad_scale, unless one of them is inf or NaN, since then the step is left out.
//
// Whether one is shows in the norm, unrounded: it is finite exactly when all of them are. A sum of squares of finite
// float32 is at most 2^256 times their number, and float64 reaches to 2^1024. Only float64 gradients can have a norm
// beyond their dtype, above 1.8e308; that counts as inf. With Nonfinite::Skip so does each norm that the user gets as
// inf.
Prepared prepare_step(Gradients& grads, const Threshold& max_norm, NormType type, const Number& grad_scale,
                      bool in_place, Nonfinite nonfinite = Nonfinite::Propagate, at::Tensor* statistics = nullptr,
                      ClipReport* report = nullptr);

}  // namespace fastclip
