#include "clip.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "factors.h"
#include "policy.h"
#ifdef FASTCLIP_CUDA
#include "cuda/clip_cuda.h"
#endif

namespace fastclip {
namespace {

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

int64_t ClipReport::first_bad() const {
  int64_t first = row_;
  for (const Search& search : searches_) {
    const at::Tensor found = search.found.cpu();  // waits
    for (const int32_t entry : {found.const_data_ptr<int32_t>()[0], found.const_data_ptr<int32_t>()[1]}) {
      if (entry >= static_cast<int64_t>(search.rows.size())) continue;
      if (first < 0 || search.rows[entry] < first) first = search.rows[entry];
    }
  }
  if (first < 0) return -1;
  for (const int64_t index : passed_over_) first += index <= first;
  return first;
}

double total_norm(const Group& group, NormType type, StatisticsRow* rows) {
  const auto norm_of = [&](const TensorTable& table) {
    return rows ? cpu::total_norm(table, type, rows) : cpu::total_norm(table, type);
  };
  double total = norm_of(group.dense);
  for (const Gapped& grad : group.gapped) {
    for_each_piece(grad.tensor, [&](const at::Tensor& piece) {
      TensorTable table;
      table.add(piece.mutable_data_ptr(), piece.numel(), grad.dtype, grad.row);
      total = combine_norms(total, norm_of(table), type);
    });
  }
  return total;
}

at::Tensor empty_statistics(int64_t gradients) {
  static_assert(sizeof(StatisticsRow) == 6 * sizeof(double));
  at::Tensor values = at::detail::empty_cpu({gradients, 6}, at::kDouble);
  std::fill_n(static_cast<StatisticsRow*>(values.mutable_data_ptr()), gradients, StatisticsRow{});
  return values;
}

void scale(Group& group, double coef, Nonfinite nonfinite) {
  const bool zeros = must_zero(coef, nonfinite);
  zeros ? cpu::zero(group.dense) : cpu::scale(group.dense, coef);
  for (at::TensorImpl* impl : group.impls) impl->bump_version();
  if (zeros) {
    for (const Gapped& grad : group.gapped) grad.tensor.zero_();
    return;
  }
  const Factors factors = factors_of(coef);
  for (const Gapped& grad : group.gapped) {
    // A tensor, which mul_ rounds to float32 for half types; it rounds a Scalar to the half type itself.
    grad.tensor.mul_(number_tensor(factors.first, at::kDouble));
    if (factors.second != 1) grad.tensor.mul_(number_tensor(factors.second, at::kDouble));
  }
}

void clamp(Group& group, double clip_value) {
  cpu::clamp(group.dense, clip_value);
  for (int64_t i = 0; i < group.dense.size(); ++i) {
    if (group.dense.slices()[i].written) group.impls[i]->bump_version();
  }
  for (const Gapped& grad : group.gapped) grad.tensor.clamp_(-clip_value, clip_value);
}

int64_t first_nonfinite(const Group& group) {
  const int64_t slice = cpu::first_nonfinite(group.dense);
  int64_t first = slice < 0 ? -1 : static_cast<int64_t>(group.dense.slices()[slice].row);
  for (const Gapped& grad : group.gapped) {
    if (first >= 0 && first < grad.row) break;
    bool bad = false;
    for_each_piece(grad.tensor, [&](const at::Tensor& piece) {
      TensorTable table;
      table.add(piece.mutable_data_ptr(), piece.numel(), grad.dtype);
      bad = bad || cpu::first_nonfinite(table) >= 0;
    });
    if (bad) return grad.row;
  }
  return first;
}

double rounded(double total_norm, at::ScalarType norm_dtype) {
  return norm_dtype == at::kDouble ? total_norm : static_cast<float>(total_norm);
}

// Not from torch's allocator: its alignment to 64 bytes costs 1,500 instructions for these eight bytes, a tenth of a
// call on six tensors.
at::Tensor number_tensor(double value, at::ScalarType dtype) {
  void* const memory = std::malloc(sizeof(double));
  if (!memory) throw std::bad_alloc();
  const auto as_bytes = c10::Storage::use_byte_size_t();
  c10::Storage storage(as_bytes, c10::elementSize(dtype), c10::DataPtr(memory, memory, std::free, c10::kCPU),
                       c10::GetDefaultCPUAllocator(), /*resizable=*/true);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_sizes_contiguous({});
  if (dtype == at::kDouble) {
    *static_cast<double*>(memory) = value;
  } else {
    *static_cast<float*>(memory) = static_cast<float>(value);
  }
  return result;
}

void check_finite(double returned_norm, const std::string& order, const std::string& where) {
  TORCH_CHECK(
      std::isfinite(returned_norm), "The total norm of order ", order,
      " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable this error and scale "
      "the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`",
      where);
}

void check_finite(Gradients& grads, double returned_norm, NormType type) {
  if (std::isfinite(returned_norm)) return;
  ClipReport report;
  report_on(grads, {}, {returned_norm, {}}, Nonfinite::Raise, report);
  const int64_t index = report.first_bad();
  const std::string argument = grads.argument();
  check_finite(returned_norm,
               type == NormType::L1   ? "1.0"
               : type == NormType::L2 ? "2.0"
                                      : "inf",
               index < 0 ? c10::str(". No gradient has an inf or NaN: the norm is beyond ",
                                    grads.norm_dtype() == at::kDouble ? "float64" : "float32")
                         : c10::str(". ", argument, "[", index, "]", argument == "parameters" ? ".grad" : "",
                                    " has the first inf or NaN"));
}

double Threshold::at(double total_norm) const {
  return policy.defined() ? follow(Alone(), policy.mutable_data_ptr<double>(), total_norm) : here();
}

double coef_for(const Threshold& max_norm, double total_norm, double returned_norm, Nonfinite nonfinite) {
  const double norm = std::isfinite(returned_norm) ? total_norm : returned_norm;
  return clip_coef(max_norm.at(norm), norm, nonfinite);
}

double step_factor(const Threshold& max_norm, double scaled_norm, double grad_scale, at::ScalarType norm_dtype,
                   Nonfinite nonfinite) {
  const double norm = scaled_norm / grad_scale;
  return coef_for(max_norm, norm, rounded(norm, norm_dtype), nonfinite) / grad_scale;
}

Prepared prepared_tensors(double scaled_norm, double grad_scale, double factor, at::ScalarType norm_dtype,
                          Nonfinite nonfinite) {
  const double norm = scaled_norm / grad_scale;
  const bool is_finite = std::isfinite(nonfinite == Nonfinite::Skip ? rounded(norm, norm_dtype) : scaled_norm);
  return {number_tensor(norm, norm_dtype), must_scale(factor) ? number_tensor(1 / factor, at::kFloat) : at::Tensor(),
          number_tensor(is_finite ? 0 : 1, at::kFloat)};
}

// Fills a report on gradients that are all on the CPU.
static void fill(ClipReport& report, const Gradients& grads, double total_norm, double returned_norm, double coef) {
  report.total_norm = number_tensor(returned_norm, grads.norm_dtype());
  report.clip_coef = number_tensor(coef, at::kDouble);
  report.set_passed_over(grads.passed_over());
  if (!std::isfinite(total_norm) && !grads.none()) report.add_row(first_nonfinite(grads.groups().front()));
}

std::optional<Number> on_device(const at::Tensor& tensor) {
  return tensor.is_cuda() && is_norm(tensor) ? std::optional<Number>({0, tensor.detach()}) : std::nullopt;
}

bool is_norm(const at::Tensor& total_norm) {
  Gradients one(Access::Read, 1);
  return total_norm.dim() == 0 && one.add(total_norm.unsafeGetTensorImpl()) == Gradients::Added::Yes;
}

std::optional<NormType> fused_norm_type(double p) {
  if (p == 2) return NormType::L2;
  if (p == 1) return NormType::L1;
  if (p == std::numeric_limits<double>::infinity()) return NormType::Inf;
  return std::nullopt;
}

std::string why_not_fused(const Gradients& grads, double p) {
  if (!grads.fallback_reason().empty()) return grads.fallback_reason();
  const auto type = fused_norm_type(p);
  if (!type) return "norm_type";
  return *type == NormType::Inf && grads.has_empty() ? "inf norm of an empty gradient" : "";
}

// The norm of gradients that are all on the CPU, and their statistics where there is a place for them.
static double norm_and_statistics(Gradients& grads, NormType type, at::Tensor* statistics) {
  const Group& group = grads.groups().front();
  if (!statistics) return total_norm(group, type);
  at::Tensor values = empty_statistics(grads.count());
  const double norm = total_norm(group, type, static_cast<StatisticsRow*>(values.mutable_data_ptr()));
  *statistics = std::move(values);
  return norm;
}

// The only place where a backend is chosen. What is all on the CPU is done here.

at::Tensor get_total_norm(Gradients& grads, NormType type, bool error_if_nonfinite, at::Tensor* statistics) {
#ifdef FASTCLIP_CUDA
  if (!grads.only_on_cpu()) return cuda::get_total_norm(grads, type, error_if_nonfinite, statistics);
#endif
  const double norm = rounded(norm_and_statistics(grads, type, statistics), grads.norm_dtype());
  if (error_if_nonfinite) check_finite(grads, norm, type);
  return number_tensor(norm, grads.norm_dtype());
}

at::Tensor clip_grad_norm(Gradients& grads, const Threshold& max_norm, NormType type, Nonfinite nonfinite,
                          at::Tensor* statistics, ClipReport* report) {
#ifdef FASTCLIP_CUDA
  if (!grads.only_on_cpu()) return cuda::clip_grad_norm(grads, max_norm, type, nonfinite, statistics, report);
#endif
  Group& group = grads.groups().front();
  const double norm = norm_and_statistics(grads, type, statistics);
  const double returned_norm = rounded(norm, grads.norm_dtype());
  const double coef = coef_for(max_norm, norm, returned_norm, nonfinite);
  if (report) fill(*report, grads, norm, returned_norm, coef);
  if (nonfinite == Nonfinite::Raise) check_finite(grads, returned_norm, type);
  at::Tensor result = number_tensor(norm, grads.norm_dtype());  // before anything is written: it may be out of memory
  if (must_scale(coef)) scale(group, coef, nonfinite);
  return result;
}

Prepared prepare_step(Gradients& grads, const Threshold& max_norm, NormType type, const Number& grad_scale,
                      bool in_place, Nonfinite nonfinite, at::Tensor* statistics, ClipReport* report) {
#ifdef FASTCLIP_CUDA
  if (!grads.only_on_cpu()) {
    return cuda::prepare_step(grads, max_norm, type, grad_scale, in_place, nonfinite, statistics, report);
  }
#endif
  Group& group = grads.groups().front();
  const double norm = norm_and_statistics(grads, type, statistics);
  const double scaled_by = grad_scale.here();
  const double factor = step_factor(max_norm, norm, scaled_by, grads.norm_dtype(), nonfinite);
  Prepared prepared = prepared_tensors(norm, scaled_by, factor, grads.norm_dtype(), nonfinite);
  if (report) fill(*report, grads, norm, rounded(norm / scaled_by, grads.norm_dtype()), factor * scaled_by);
  if (in_place && std::isfinite(norm) && must_scale(factor)) scale(group, factor);
  return prepared;
}

void clip_grads_with_norm(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite) {
#ifdef FASTCLIP_CUDA
  if (!grads.only_on_cpu()) return cuda::clip_grads_with_norm(grads, max_norm, total_norm, nonfinite);
#endif
  const double coef = clip_coef(max_norm.here(), total_norm.here(), nonfinite);
  if (must_scale(coef)) scale(grads.groups().front(), coef, nonfinite);
}

void report_on(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite,
               ClipReport& report) {
#ifdef FASTCLIP_CUDA
  if (!grads.none() && !grads.only_on_cpu()) return cuda::report_on(grads, max_norm, total_norm, nonfinite, report);
#endif
  const double norm = total_norm.here();
  fill(report, grads, norm, norm, clip_coef(max_norm.here(), norm, nonfinite));
}

void follow_norm(const at::Tensor& policy, const at::Tensor& total_norm) {
#ifdef FASTCLIP_CUDA
  if (policy.is_cuda()) return cuda::follow_norm(policy, total_norm);
#endif
  Threshold{{}, policy}.at(total_norm.item().toDouble());
}

void clip_grad_value(Gradients& grads, double clip_value) {
#ifdef FASTCLIP_CUDA
  if (!grads.only_on_cpu()) return cuda::clip_grad_value(grads, clip_value);
#endif
  clamp(grads.groups().front(), clip_value);
}

}  // namespace fastclip
