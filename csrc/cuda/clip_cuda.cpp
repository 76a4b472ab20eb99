// A call over CUDA devices: what is launched where, in which order, and what goes from one device to another.
//
// The device of the first gradient leads. Every other device reduces its own gradients and sends its partial norms
// there, unrounded; the leading device combines all of them, scales its own gradients, and sends the coefficient back.
// All of it is queued on the devices' current streams and nothing waits, unless the CPU takes part: it has to know the
// coefficient to scale its gradients, and when the first gradient is on the CPU, the CPU leads.
//
// No stream is told of any tensor (record_stream): gradients are used on the streams on which torch's own operations
// would use them, and everything else is allocated on the stream that uses it.
#include "clip_cuda.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>

#include "../clip_math.h"
#include "../factors.h"
#include "launch.h"

namespace fastclip::cuda {
namespace {

constexpr int64_t kColumns = sizeof(StatisticsRow) / sizeof(double);

// A tensor over a part of a storage on a CUDA device.
at::Tensor view(const c10::Storage& storage, at::ScalarType dtype, size_t byte, at::IntArrayRef sizes) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  tensor.unsafeGetTensorImpl()->set_storage_offset(byte / c10::elementSize(dtype));
  return tensor;
}

c10::Storage new_storage(size_t bytes) {
  c10::Allocator* allocator = c10::cuda::CUDACachingAllocator::get();
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, allocator->allocate(bytes), allocator, true);
}

// What a call does with the gradients. examines: their statistics are wanted. finds_bad: so is the first one with inf
// or NaN.
struct Plan {
  bool reduces, writes, examines = false, finds_bad = false;
  Nonfinite nonfinite = Nonfinite::Propagate;
};

// One device's part of a call.
class Part {
 public:
  Part(Group& group, Plan plan)
      : group(group),
        stream(c10::cuda::getCurrentCUDAStream(group.device.index())),
        table_(group.dense.size() + (plan.reduces ? group.gapped.size() : 0)) {
    table_.add(group.dense);
    scale_rows_ = table_.rows();
    examines_ = plan.examines, finds_bad_ = plan.finds_bad, nonfinite_ = plan.nonfinite;
    if (plan.reduces) {
      TensorTable copies;
      for (const Gapped& grad : group.gapped) {
        copies_.push_back(grad.tensor.contiguous());
        copies.add(copies_.back().mutable_data_ptr(), copies_.back().numel(), grad.dtype);
      }
      table_.add(copies);
    }
    if (plan.writes) {
      for (const TensorTable& round : rounds_without_overlaps(group.dense)) {
        rounds_.emplace_back(round.size()).add(round);
      }
    }
    blocks_ = blocks_for(table_, group.device.index());
  }

  int partials() const { return blocks_; }
  // Whether scaling leaves behind results that later steps need: with only a norm given, they have no room of their
  // own.
  bool needs_results() const { return !group.gapped.empty() || !rounds_.empty(); }

  // Makes room for the results: the partial norms of this device, and of others behind them.
  void allocate(int other_partials = 0) {
    const c10::cuda::CUDAGuard guard(group.device);
    storage_ = new_storage(offsetof(Results, partial_norms) + (blocks_ + other_partials) * sizeof(double));
    all_partials_ = blocks_ + other_partials;
    if (!examines_ || table_.size() == 0) return;
    // Apart from the results, since the user keeps the norm and the statistics for as long as he likes, each without
    // the other, and the warps' parts are of no use after the call.
    warp_parts_ = new_storage((blocks_ * kWarps + table_.size() - 1) * sizeof(WarpPart));
    statistics_ = new_storage(table_.size() * sizeof(StatisticsRow));
  }

  // The statistics of all gradients of the table, in its order.
  at::Tensor statistics() const { return view(statistics_, at::kDouble, 0, {table_.size(), kColumns}); }

  // Calls visit(row of the call, row of statistics(), rows) for as many rows at once as follow each other in both.
  template <class Visit>
  void for_each_run_of_rows(Visit visit) const {
    const int64_t dense = group.dense.size(), all = table_.size();
    const auto row = [&](int64_t i) -> int64_t {
      return i < dense ? group.dense.slices()[i].row : group.gapped[i - dense].row;
    };
    for (int64_t begin = 0, end; begin < all; begin = end) {
      for (end = begin + 1; end < all && row(end) == row(begin) + (end - begin);) ++end;
      visit(row(begin), begin, end - begin);
    }
  }

  at::Tensor norm(at::ScalarType dtype) const { return view(storage_, dtype, 0, {}); }
  at::Tensor coef() const { return view(storage_, at::kDouble, offsetof(Results, coef), {}); }
  at::Tensor grad_scale() const { return view(storage_, at::kFloat, offsetof(Results, grad_scale), {}); }
  at::Tensor first_bad() const { return view(storage_, at::kInt, offsetof(Results, first_bad), {2}); }
  at::Tensor found_inf() const { return view(storage_, at::kFloat, offsetof(Results, found_inf), {}); }
  // The coefficient and the two factors that it is applied as.
  at::Tensor factors() const { return view(storage_, at::kDouble, offsetof(Results, coef), {3}); }
  at::Tensor partial_norms(int from, int count) const {
    return view(storage_, at::kDouble, offsetof(Results, partial_norms) + from * sizeof(double), {count});
  }

  void reduce(NormType type) const {
    Job job = new_reducing_job();
    job.task = Task::Reduce;
    job.norm_type = type;
    launch(job, table_, blocks_, stream);
    if (!job.parts) return;
    job.task = Task::Rows;
    launch(job, table_, blocks_, stream);
  }

  // Looks for the first bad gradient, in a launch of its own, if the norm is not finite: that which job.source gives.
  void find_bad(Job job) const {
    job.task = Task::Decide;
    job.finds_bad = true;
    job.parts = nullptr;
    job.policy = nullptr;  // follows a norm once
    launch(job, table_, blocks_, stream);
  }

  // The same for the norm of this device's own gradients, which have been reduced.
  void find_bad() const {
    Job job = new_job();
    job.source = Source::PartialNorms;
    job.partials = blocks_;
    find_bad(job);
  }

  // Adds what was found to a report.
  void tell(ClipReport& report) const {
    std::vector<uint32_t> rows;
    rows.reserve(table_.size());
    for (int64_t i = 0; i < group.dense.size(); ++i) rows.push_back(group.dense.slices()[i].row);
    for (const Gapped& grad : group.gapped) rows.push_back(grad.row);
    report.add_search(first_bad(), std::move(rows));
  }

  // A job with everything in it but the task and the source.
  Job new_job() const {
    Job job{};
    job.grad_scale.value = 1;
    job.scale_rows = scale_rows_;
    job.partials = all_partials_;
    job.nonfinite = nonfinite_;
    job.results = storage_ ? static_cast<Results*>(storage_.mutable_data()) : nullptr;
    return job;
  }

  // The same for a task that reduces.
  Job new_reducing_job() const {
    Job job = new_job();
    if (statistics_) {
      job.parts = static_cast<WarpPart*>(warp_parts_.mutable_data());
      job.statistics = static_cast<StatisticsRow*>(statistics_.mutable_data());
    }
    return job;
  }

  void norm(Job job) const {
    job.task = Task::Norm;
    job.finds_bad = finds_bad_;
    job.source = Source::PartialNorms;
    launch(job, table_, blocks_, stream);
  }

  // Reduces, decides, and scales.
  void reduce_then_scale(Job job) const {
    job.source = Source::PartialNorms;
    if (!rounds_.empty()) {
      reduce(job.norm_type);
      if (finds_bad_) find_bad(job);
      job.parts = nullptr;
      if (job.policy) decide(job);
      return scale(job);
    }
    job.task = Task::ReduceThenScale;
    job.finds_bad = finds_bad_;
    launch(job, table_, blocks_, stream);
  }

  // Lets the policy decide, for all launches that follow.
  void decide(Job& job) const {
    Job alone = job;
    alone.task = Task::Decide;
    launch(alone, table_, 1, stream);
    job.policy = nullptr;
    job.source = Source::Coef;
  }

  // Scales the gradients that are flat memory. The coefficient comes from job.source.
  void scale(Job job) const {
    job.task = Task::Scale;
    if (rounds_.empty()) return launch(job, table_, blocks_, stream);
    for (const PackedTable& round : rounds_) {
      job.scale_rows = round.rows();
      launch(job, round, blocks_for(round, group.device.index()), stream);
      job.source = Source::Coef;  // which the first round has left
    }
  }

  // Scales the gradients with gaps, by the factors that a launch has left, and bumps all version counters.
  void finish_scaling() const {
    // Nobody on the host knows whether the device has written, so the counters rise as they do for torch's mul_.
    for (at::TensorImpl* impl : group.impls) impl->bump_version();
    if (group.gapped.empty()) return;
    const at::Tensor first = view(storage_, at::kDouble, offsetof(Results, first), {});
    const at::Tensor second = view(storage_, at::kDouble, offsetof(Results, second), {});
    for (const Gapped& grad : group.gapped) {
      if (c10::elementSize(grad.tensor.scalar_type()) ==
          2) {  // mul_ would round a factor on the device to 8 or 11 bits
        grad.tensor.copy_(grad.tensor.to(at::kFloat).mul_(first).mul_(second));
      } else {
        grad.tensor.mul_(first).mul_(second);
      }
      if (nonfinite_ == Nonfinite::Zero) grad.tensor.masked_fill_(first.eq(0), 0);
    }
  }

  void clamp(double clip_value) const {
    Job job = new_job();
    job.task = Task::Clamp;
    job.clip_value = clip_value;
    if (rounds_.empty()) launch(job, table_, blocks_, stream);
    for (const PackedTable& round : rounds_) {
      job.scale_rows = round.rows();
      launch(job, round, blocks_for(round, group.device.index()), stream);
    }
    for (at::TensorImpl* impl : group.impls) impl->bump_version();
    for (const Gapped& grad : group.gapped) grad.tensor.clamp_(-clip_value, clip_value);
  }

  Group& group;
  const c10::cuda::CUDAStream stream;

 private:
  PackedTable table_;               // flat memory, then the copies of gradients with gaps
  std::vector<at::Tensor> copies_;  // those copies
  int64_t scale_rows_;              // of the flat memory
  std::vector<PackedTable> rounds_;
  int blocks_ = 1, all_partials_ = 0;
  bool examines_, finds_bad_;
  Nonfinite nonfinite_;
  c10::Storage storage_;                  // Results
  c10::Storage warp_parts_, statistics_;  // where statistics are wanted: WarpPart and StatisticsRow
};

at::Tensor factors_tensor(double coef) {
  const Factors factors = factors_of(coef);
  at::Tensor tensor = at::detail::empty_cpu({3}, at::kDouble);
  double* values = tensor.mutable_data_ptr<double>();
  values[0] = coef, values[1] = factors.first, values[2] = factors.second;
  return tensor;
}

// All devices of a call.
struct Call {
  Call(Gradients& grads, Plan plan) : dtype(grads.norm_dtype()), count(grads.count()), plan(plan) {
    parts.reserve(grads.groups().size());
    for (Group& group : grads.groups()) {
      if (group.device.is_cpu()) {
        cpu = &group;
      } else {
        parts.emplace_back(group, plan);
      }
    }
    host_leads = grads.groups().front().device.is_cpu();
  }

  Part& lead() { return parts.front(); }

  // Lets all but the leading device reduce, and queues the copies of what they find.
  void gather(NormType type) {
    int others = cpu ? 1 : 0;
    for (size_t i = 1; i < parts.size(); ++i) others += parts[i].partials();
    lead().allocate(others);
    int at = lead().partials();
    for (size_t i = 1; i < parts.size(); ++i) {
      Part& part = parts[i];
      part.allocate();
      part.reduce(type);
      if (plan.finds_bad) part.find_bad();
      lead().partial_norms(at, part.partials()).copy_(part.partial_norms(0, part.partials()), true);
      at += part.partials();
    }
    if (cpu) lead().partial_norms(at, 1).copy_(number_tensor(norm_of_cpu(type), at::kDouble).view({1}), true);
  }

  // Scales on all but the leading device, by the leading device's coefficient.
  void scale_others() {
    for (size_t i = 1; i < parts.size(); ++i) {
      parts[i].factors().copy_(lead().factors(), true);
      Job job = parts[i].new_job();
      job.source = Source::Coef;
      parts[i].scale(job);
      parts[i].finish_scaling();
    }
    if (!cpu) return;
    const double coef = lead().coef().item().toDouble();  // waits
    if (must_scale(coef)) scale(*cpu, coef, plan.nonfinite);
  }

  // Scales everywhere by a coefficient that the host knows.
  void scale_all(double coef) {
    for (const Part& part : parts) {
      part.factors().copy_(factors_tensor(coef), true);
      Job job = part.new_job();
      job.source = Source::Coef;
      part.scale(job);
      part.finish_scaling();
    }
    scale(*cpu, coef, plan.nonfinite);
  }

  // The norm, for the host. Waits.
  double norm_here(NormType type) {
    for (Part& part : parts) {
      part.allocate();
      part.reduce(type);
      if (plan.finds_bad) part.find_bad();
    }
    double norm = norm_of_cpu(type);
    for (Part& part : parts) {
      const at::Tensor partials = part.partial_norms(0, part.partials()).cpu();
      for (int i = 0; i < part.partials(); ++i) norm = combine_norms(norm, partials.const_data_ptr<double>()[i], type);
    }
    return norm;
  }

  // Of the gradients on the CPU. Their statistics stay in cpu_statistics.
  double norm_of_cpu(NormType type) {
    double norm;
    if (plan.examines) {
      cpu_statistics = empty_statistics(count);
      norm = total_norm(*cpu, type, static_cast<StatisticsRow*>(cpu_statistics.mutable_data_ptr()));
    } else {
      norm = total_norm(*cpu, type);
    }
    if (plan.finds_bad && !std::isfinite(norm)) bad_row_of_cpu = first_nonfinite(*cpu);
    return norm;
  }

  // What the parts have found, once all of them have been asked.
  void tell(ClipReport& report, const Gradients& grads, at::Tensor norm, at::Tensor coef) const {
    report.total_norm = std::move(norm), report.clip_coef = std::move(coef);
    report.set_passed_over(grads.passed_over());
    report.add_row(bad_row_of_cpu);
    for (const Part& part : parts) part.tell(report);
  }

  // The statistics of all gradients, on the leading device, once all parts have reduced. Those of a list without gaps
  // and empty gradients on one device are there already; others are put together, which takes copies.
  at::Tensor statistics() {
    if (!cpu && parts.size() == 1) {
      bool in_order = false;
      lead().for_each_run_of_rows([&](int64_t row, int64_t, int64_t rows) { in_order = row == 0 && rows == count; });
      if (in_order) return lead().statistics();
    }
    at::Tensor all;
    if (cpu) {
      all = host_leads ? cpu_statistics : cpu_statistics.to(lead().group.device);
    } else {
      const c10::cuda::CUDAGuard guard(lead().group.device);
      all = view(new_storage(count * sizeof(StatisticsRow)), at::kDouble, 0, {count, kColumns}).zero_();
    }
    for (const Part& part : parts) {
      part.for_each_run_of_rows([&](int64_t row, int64_t from, int64_t rows) {
        all.narrow(0, row, rows).copy_(part.statistics().narrow(0, from, rows), /*non_blocking=*/!host_leads);
      });
    }
    return all;
  }

  std::vector<Part> parts;
  Group* cpu = nullptr;
  bool host_leads;
  at::ScalarType dtype;  // of the norm that the user gets
  int64_t count;         // of gradients, empty ones too
  Plan plan;
  at::Tensor cpu_statistics;
  int64_t bad_row_of_cpu = -1;  // as ClipReport has it
};

double* state_of(const Threshold& threshold) {
  return threshold.policy.defined() ? threshold.policy.mutable_data_ptr<double>() : nullptr;
}

// A number as a kernel on `device` reads it. A copy of it, if one has to be made, is kept in `kept`.
Operand operand(const Number& number, c10::Device device, std::vector<at::Tensor>& kept) {
  if (!number.tensor.defined()) return {number.value, nullptr, DType::F64};
  const at::Tensor tensor = kept.emplace_back(number.tensor.to(device));
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return {0, tensor.const_data_ptr(), DType::F32};
    case at::kHalf:
      return {0, tensor.const_data_ptr(), DType::F16};
    case at::kBFloat16:
      return {0, tensor.const_data_ptr(), DType::BF16};
    default:
      return {0, kept.emplace_back(tensor.to(at::kDouble)).const_data_ptr(), DType::F64};
  }
}

Job norm_job(Call& call, NormType type) {
  Job job = call.lead().new_reducing_job();
  job.norm_type = type;
  job.norm_is_f64 = call.dtype == at::kDouble;
  return job;
}

}  // namespace

at::Tensor get_total_norm(Gradients& grads, NormType type, bool error_if_nonfinite, at::Tensor* statistics) {
  Call call(grads, {.reduces = true, .writes = false, .examines = statistics != nullptr});
  at::Tensor norm;
  if (call.host_leads) {
    norm = number_tensor(call.norm_here(type), call.dtype);
  } else {
    call.gather(type);
    call.lead().norm(norm_job(call, type));
    norm = call.lead().norm(call.dtype);
  }
  if (statistics) *statistics = call.statistics();
  if (error_if_nonfinite) check_finite(grads, norm.item().toDouble(), type);
  return norm;
}

static at::Tensor clip_led_by_host(Call& call, Gradients& grads, const Threshold& max_norm, NormType type,
                                   at::Tensor* statistics, ClipReport* report) {
  const double total_norm = call.norm_here(type), returned_norm = rounded(total_norm, call.dtype);
  if (statistics) *statistics = call.statistics();
  at::Tensor result = number_tensor(returned_norm, call.dtype);
  const double coef = coef_for(max_norm, total_norm, returned_norm, call.plan.nonfinite);
  if (report) call.tell(*report, grads, result, number_tensor(coef, at::kDouble));
  if (call.plan.nonfinite == Nonfinite::Raise) check_finite(grads, returned_norm, type);
  if (must_scale(coef)) call.scale_all(coef);
  return result;
}

at::Tensor clip_grad_norm(Gradients& grads, const Threshold& max_norm, NormType type, Nonfinite nonfinite,
                          at::Tensor* statistics, ClipReport* report) {
  Call call(grads, {.reduces = true,
                    .writes = true,
                    .examines = statistics != nullptr,
                    .finds_bad = report != nullptr,
                    .nonfinite = nonfinite});
  if (call.host_leads) return clip_led_by_host(call, grads, max_norm, type, statistics, report);

  std::vector<at::Tensor> kept;
  call.gather(type);
  Job job = norm_job(call, type);
  job.max_norm = operand(max_norm, call.lead().group.device, kept);
  job.policy = state_of(max_norm);
  call.lead().reduce_then_scale(job);
  at::Tensor norm = call.lead().norm(call.dtype);
  if (statistics) *statistics = call.statistics();
  if (report) call.tell(*report, grads, norm, call.lead().coef());
  // Waits; nothing was written if it throws.
  if (nonfinite == Nonfinite::Raise) check_finite(grads, norm.item().toDouble(), type);
  call.lead().finish_scaling();
  call.scale_others();
  return norm;
}

Prepared prepare_step(Gradients& grads, const Threshold& max_norm, NormType type, const Number& grad_scale,
                      bool in_place, Nonfinite nonfinite, at::Tensor* statistics, ClipReport* report) {
  Call call(grads, {.reduces = true,
                    .writes = in_place,
                    .examines = statistics != nullptr,
                    .finds_bad = report != nullptr,
                    .nonfinite = nonfinite});
  if (call.host_leads) {
    const double norm = call.norm_here(type), scaled_by = grad_scale.here();
    if (statistics) *statistics = call.statistics();
    const double factor = step_factor(max_norm, norm, scaled_by, call.dtype, nonfinite);
    if (report) {
      const at::Tensor returned = number_tensor(norm / scaled_by, call.dtype);
      call.tell(*report, grads, returned, number_tensor(factor * scaled_by, at::kDouble));
    }
    if (in_place && std::isfinite(norm) && must_scale(factor)) call.scale_all(factor);
    return prepared_tensors(norm, scaled_by, factor, call.dtype, nonfinite);
  }

  std::vector<at::Tensor> kept;
  call.gather(type);
  Job job = norm_job(call, type);
  job.max_norm = operand(max_norm, call.lead().group.device, kept);
  job.policy = state_of(max_norm);
  job.grad_scale = operand(grad_scale, call.lead().group.device, kept);
  job.spare_found_inf = in_place;
  if (in_place) {
    call.lead().reduce_then_scale(job);
    call.lead().finish_scaling();
    call.scale_others();
  } else {
    call.lead().norm(job);
  }
  if (statistics) *statistics = call.statistics();
  const at::Tensor norm = call.lead().norm(call.dtype);
  if (report) {
    const at::Tensor coef = call.lead().coef();
    call.tell(*report, grads, norm, grad_scale.tensor.defined() ? coef.mul(grad_scale.tensor) : coef);
  }
  return {norm, call.lead().grad_scale(), call.lead().found_inf()};
}

void clip_grads_with_norm(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite) {
  Call call(grads, {.reduces = false, .writes = true, .nonfinite = nonfinite});
  std::vector<at::Tensor> kept;
  for (Part& part : call.parts) {
    if (part.needs_results()) part.allocate();
    Job job = part.new_job();
    job.source = Source::TotalNorm;
    job.norm_is_f64 = true;  // it is given, and not rounded again
    job.max_norm = operand(max_norm, part.group.device, kept);
    job.total_norm = operand(total_norm, part.group.device, kept);
    part.scale(job);
    part.finish_scaling();
  }
  if (!call.cpu) return;
  const double coef = clip_coef(max_norm.here(), total_norm.here(), nonfinite);
  if (must_scale(coef)) scale(*call.cpu, coef, nonfinite);
}

void report_on(Gradients& grads, const Number& max_norm, const Number& total_norm, Nonfinite nonfinite,
               ClipReport& report) {
  Call call(grads, {.reduces = true, .writes = false, .finds_bad = true, .nonfinite = nonfinite});
  std::vector<at::Tensor> kept;
  const at::Tensor none_bad = at::detail::empty_cpu({2}, at::kInt);
  std::fill_n(none_bad.mutable_data_ptr<int32_t>(), 2, kNoneBad);
  for (Part& part : call.parts) {
    part.allocate();
    part.first_bad().copy_(none_bad, true);
    Job job = part.new_job();
    job.source = Source::TotalNorm;
    job.norm_is_f64 = true;
    job.max_norm = operand(max_norm, part.group.device, kept);
    job.total_norm = operand(total_norm, part.group.device, kept);
    part.find_bad(job);
  }
  if (call.cpu && !std::isfinite(total_norm.here())) call.bad_row_of_cpu = first_nonfinite(*call.cpu);
  call.tell(report, grads, call.lead().norm(at::kDouble), call.lead().coef());
}

void follow_norm(const at::Tensor& policy, const at::Tensor& total_norm) {
  std::vector<at::Tensor> kept;
  Job job{};
  job.task = Task::Decide;
  job.source = Source::TotalNorm;
  job.norm_is_f64 = true;
  job.grad_scale.value = 1;
  job.total_norm = operand({0, total_norm}, policy.device(), kept);
  job.policy = policy.mutable_data_ptr<double>();
  launch(job, PackedTable(0), 1, c10::cuda::getCurrentCUDAStream(policy.device().index()));
}

void clip_grad_value(Gradients& grads, double clip_value) {
  Call call(grads, {.reduces = false, .writes = true});
  for (const Part& part : call.parts) part.clamp(clip_value);
  if (call.cpu) clamp(*call.cpu, clip_value);
}

}  // namespace fastclip::cuda
