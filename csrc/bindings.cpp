// The module fastclip._C: its functions, which read their arguments, call the one of the same name, and return tensors.
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "adaptive.h"
#include "arguments.h"
#include "cpu/dispatch.h"
#ifdef FASTCLIP_CUDA
#include "cuda/launch.h"
#endif
#include "groups.h"
#include "ops.h"

namespace fastclip::python {
namespace {

// Runs the native part of a call. Short ones keep the interpreter lock, see kSmallBytes.
template <class Work>
auto run(Gradients& grads, Work work) {
  const at::NoGradGuard no_grad;  // gradients with gaps are written by torch's own operations
  if (grads.bytes() < cpu::kSmallBytes && grads.only_on_cpu()) return work();
  grads.own_all();
  const py::gil_scoped_release release;
  return work();
}

// Every function below returns its result; or a str, the reason why torch has to do the call; or, where there is a
// result at all, None when there are no gradients.

py::object to_python(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

// (total_norm, grad_scale or None, found_inf)
py::object to_python(const Prepared& prepared) {
  return py::make_tuple(to_python(prepared.total_norm),
                        prepared.grad_scale.defined() ? to_python(prepared.grad_scale) : py::none(),
                        to_python(prepared.found_inf));
}

py::object nothing_to_do() {
  count_native_call();
  return py::none();
}

template <class Work>
py::object with_norm_type(Gradients& grads, double p, Work work) {
  if (grads.none() && grads.fallback_reason().empty()) return nothing_to_do();
  const std::string reason = why_not_fused(grads, p);
  if (!reason.empty()) return py::str(reason);
  count_native_call();
  return to_python(run(grads, [&] { return work(*fused_norm_type(p)); }));
}

// The same; with `statistics`, an object and not null, their values are left in its attribute `values`, also where the
// norm is not finite and that is an error.
template <class Work>
py::object with_statistics(Gradients& grads, double p, py::handle statistics, Work work) {
  if (!statistics) return with_norm_type(grads, p, [&](NormType type) { return work(type, nullptr); });
  at::Tensor values;
  const auto hand_out = [&] {
    if (values.defined()) statistics.attr("values") = to_python(values);
  };
  try {
    py::object result = with_norm_type(grads, p, [&](NormType type) { return work(type, &values); });
    hand_out();
    return result;
  } catch (...) {
    hand_out();
    throw;
  }
}

// What Python has of a report: a type of this file alone, so that no other part of the process sees its binding.
struct Report : ClipReport {};

// The statistics and the report that a call is to fill, null without one.
py::handle given(py::handle object) {
  return object.is_none() ? py::handle() : object;
}
ClipReport* to_report(py::handle object) {
  return !object || object.is_none() ? nullptr : object.cast<Report*>();
}

py::object get_total_norm(py::handle tensors, py::handle norm_type, py::handle error_if_nonfinite) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::get_total_norm", {});
  const double p = to_double(norm_type, "norm_type");
  const bool error = py::bool_(py::reinterpret_borrow<py::object>(error_if_nonfinite));
  Gradients grads = collected(Access::Read, tensors, Items::Tensors);
  return with_norm_type(grads, p, [&](NormType type) { return fastclip::get_total_norm(grads, type, error); });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object clip_grad_norm_(py::handle parameters, py::handle max_norm, py::handle norm_type,
                           py::handle error_if_nonfinite, py::handle statistics, py::handle nonfinite,
                           py::handle report) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clip_grad_norm_", {});
  const double p = to_double(norm_type, "norm_type");
  const bool follows = is_policy(max_norm);
  const Number number = follows ? Number() : to_number(max_norm, "max_norm");
  const bool error = py::bool_(py::reinterpret_borrow<py::object>(error_if_nonfinite));
  const Nonfinite policy = to_nonfinite(nonfinite, error);
  ClipReport* const told = to_report(report);
  Gradients grads = collected(Access::Write, parameters, Items::Parameters);
  const Threshold threshold = to_threshold(max_norm, follows, number, grads);
  return with_statistics(grads, p, statistics, [&](NormType type, at::Tensor* values) {
    return fastclip::clip_grad_norm(grads, threshold, type, policy, values, told);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object prepare_step(py::handle parameters, py::handle max_norm, py::handle norm_type, py::handle grad_scale,
                        bool in_place, py::handle statistics, py::handle nonfinite, py::handle report) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::prepare_step", {});
  const double p = to_double(norm_type, "norm_type");
  const bool follows = is_policy(max_norm);
  const Number number = follows ? Number() : to_number(max_norm, "max_norm");
  const Number scale = grad_scale.is_none() ? Number{1, {}} : to_number(grad_scale, "grad_scale");
  const Nonfinite policy = to_nonfinite(nonfinite);
  ClipReport* const told = to_report(report);
  Gradients grads = collected(in_place ? Access::Write : Access::Read, parameters, Items::Parameters);
  // torch.amp.GradScaler refuses these, since they lose what scaling has kept; not where the optimizer unscales.
  if (in_place && grads.has(DType::F16)) return py::str("unscaling float16");
  const Threshold threshold = to_threshold(max_norm, follows, number, grads);
  return with_statistics(grads, p, statistics, [&](NormType type, at::Tensor* values) {
    return fastclip::prepare_step(grads, threshold, type, scale, in_place, policy, values, told);
  });
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object clip_grads_with_norm_(py::handle parameters, py::handle max_norm, py::handle total_norm) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clip_grads_with_norm_", {});
  const Number threshold = to_number(max_norm, "max_norm");
  Gradients grads = collected(Access::Write, parameters, Items::Parameters);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  if (grads.none()) return nothing_to_do();
  if (!THPVariable_Check(total_norm.ptr()) || !is_norm(THPVariable_Unpack(total_norm.ptr())))
    return py::str("total_norm");
  const Number norm = to_number(total_norm, "total_norm");
  count_native_call();
  run(grads, [&] { fastclip::clip_grads_with_norm(grads, threshold, norm); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object clip_grad_value_(py::handle parameters, py::handle clip_value) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clip_grad_value_", {});
  const double limit = to_double(clip_value, "clip_value");
  Gradients grads = collected(Access::Write, parameters, Items::Parameters);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  if (grads.none()) return nothing_to_do();
  grads.check_clip_value(limit);
  if (!(limit >= 0)) return py::str("clip_value");  // negative or NaN: rare, and torch's results are peculiar
  count_native_call();
  run(grads, [&] { fastclip::clip_grad_value(grads, limit); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object clip_grad_adaptive_(py::handle parameters, double clipping, double eps, double norm_type) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clip_grad_adaptive_", {});
  auto collected = collected_with_weights(parameters);
  Gradients &weights = collected.first, &grads = collected.second;
  if (grads.none() && grads.fallback_reason().empty()) return nothing_to_do();
  const std::string reason = why_not_adaptive(weights, grads, norm_type);
  if (!reason.empty()) return py::str(reason);
  count_native_call();
  weights.own_all();
  run(grads, [&] { clip_grad_adaptive(weights, grads, {*fused_norm_type(norm_type), clipping, eps}); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

// `max_norms`: as many as there are groups, see to_max_norms().
py::object clip_grad_norms_(py::list groups, py::handle max_norms, double norm_type, bool error_if_nonfinite) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clip_grad_norms_", {});
  const MaxNorms thresholds = to_max_norms(max_norms, groups.size());
  Gradients grads(Access::Write, groups.size());
  const std::vector<int64_t> ends = collect_groups(grads, groups);
  if (grads.none() && grads.fallback_reason().empty()) return nothing_to_do();
  const std::string reason = why_not_grouped(grads, norm_type);
  if (!reason.empty()) return py::str(reason);
  count_native_call();
  return to_python(run(grads, [&] {
    return clip_grad_norms(grads, ends, thresholds, *fused_norm_type(norm_type), error_if_nonfinite);
  }));
  END_HANDLE_TH_ERRORS_PYBIND
}

// The parts that a call over several ranks is made of. They take gradients, not parameters, and are not counted: the
// call is. The reason that they return is why torch has to do this part.

// The unrounded norm, a 0-d float64 tensor; an empty gradient has none. On a CUDA device nothing waits for it.
py::object norm_of(py::handle grads_list, double p, at::Tensor* statistics) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::norm_of", {});
  Gradients grads = collected(Access::Read, grads_list, Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  if (grads.none()) {
    if (statistics) *statistics = empty_statistics(0);
    return to_python(number_tensor(0, at::kDouble));
  }
  grads.keep_norm_unrounded();
  return to_python(run(grads, [&] { return fastclip::get_total_norm(grads, *fused_norm_type(p), false, statistics); }));
  END_HANDLE_TH_ERRORS_PYBIND
}

// The same, and the gradients' statistics: (norm, values).
py::object norm_and_statistics_of(py::handle grads_list, double p) {
  at::Tensor values;
  py::object norm = norm_of(grads_list, p, &values);
  return values.defined() ? py::make_tuple(norm, to_python(values)) : norm;
}

py::object scale_by_norm_(py::handle grads_list, py::handle max_norm, py::handle total_norm, py::handle nonfinite) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::scale_by_norm_", {});
  const Number threshold = to_number(max_norm, "max_norm"), norm = to_number(total_norm, "total_norm");
  Gradients grads = collected(Access::Write, grads_list, Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  const Nonfinite policy = to_nonfinite(nonfinite);
  if (!grads.none()) run(grads, [&] { fastclip::clip_grads_with_norm(grads, threshold, norm, policy); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

// Fills a report on what scale_by_norm_() is going to do. passed_over: the indices of items without a gradient here.
// returned: the norm as the user gets it.
py::object report_on(Report& report, py::handle grads_list, std::vector<int64_t> passed_over, py::handle max_norm,
                     py::handle total_norm, py::handle returned, py::handle nonfinite) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::report_on", {});
  const Number threshold = to_number(max_norm, "max_norm"), norm = to_number(total_norm, "total_norm");
  Gradients grads = collected(Access::Read, grads_list, Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  const Nonfinite policy = to_nonfinite(nonfinite);
  run(grads, [&] { fastclip::report_on(grads, threshold, norm, policy, report); });
  report.set_passed_over(std::move(passed_over));
  report.total_norm = THPVariable_Unpack(returned.ptr());
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

void follow_norm(py::handle policy, py::handle total_norm) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::follow_norm", {});
  fastclip::follow_norm(THPVariable_Unpack(policy.ptr()), THPVariable_Unpack(total_norm.ptr()));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object clamp_(py::handle grads_list, double clip_value) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::clamp_", {});
  Gradients grads = collected(Access::Write, grads_list, Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  grads.check_clip_value(clip_value);
  if (!grads.none()) run(grads, [&] { fastclip::clip_grad_value(grads, clip_value); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace
}  // namespace fastclip::python

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  namespace fc = fastclip::python;
  fc::remember_parameter_type();
  m.def("get_total_norm", &fc::get_total_norm);
  using py::handle;
  m.def("clip_grad_norm_", [](handle parameters, handle max_norm, handle norm_type, handle error_if_nonfinite) {
    return fc::clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, {}, {}, {});
  });
  m.def("clip_grad_norm_and_tell", [](handle parameters, handle max_norm, handle norm_type, handle error_if_nonfinite,
                                      handle statistics, handle nonfinite, handle report) {
    return fc::clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, fc::given(statistics), nonfinite,
                               report);
  });
  m.def("clip_grads_with_norm_", &fc::clip_grads_with_norm_);
  m.def("clip_grad_value_", &fc::clip_grad_value_);
  m.def("clip_grad_adaptive_", &fc::clip_grad_adaptive_);
  m.def("clip_grad_norms_", &fc::clip_grad_norms_);
  m.def("norm_of", [](handle grads, double p) { return fc::norm_of(grads, p, nullptr); });
  m.def("norm_and_statistics_of", &fc::norm_and_statistics_of);
  m.def("scale_by_norm_", &fc::scale_by_norm_);
  m.def("clamp_", &fc::clamp_);
  m.def("follow_norm", &fc::follow_norm);
  m.def("prepare_step", [](handle parameters, handle max_norm, handle norm_type, handle grad_scale, bool in_place) {
    return fc::prepare_step(parameters, max_norm, norm_type, grad_scale, in_place, {}, {}, {});
  });
  m.def("prepare_step_and_tell", [](handle parameters, handle max_norm, handle norm_type, handle grad_scale,
                                    bool in_place, handle statistics, handle nonfinite, handle report) {
    return fc::prepare_step(parameters, max_norm, norm_type, grad_scale, in_place, fc::given(statistics), nonfinite,
                            report);
  });
  m.def("report_on", &fc::report_on);
  using fc::Report;
  py::class_<Report>(m, "ClipReport")  // reading it may wait for a device
      .def(py::init<>())
      .def("is_filled", [](const Report& report) { return report.total_norm.defined(); })
      .def(
          "total_norm", [](const Report& report) { return report.total_norm.item().toDouble(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "clip_coef", [](const Report& report) { return report.clip_coef.item().toDouble(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "first_bad", [](const Report& report) { return report.first_bad(); },
          py::call_guard<py::gil_scoped_release>());
  m.def("count_native_call", &fastclip::count_native_call);
  m.def("native_calls", [] { return fastclip::native_calls.load(); });
  m.def("operator_fallback_reasons", &fastclip::ops::fallback_reasons);
  m.def("reset_counts", [] {
    fastclip::native_calls.store(0);
    fastclip::ops::reset_fallback_reasons();
  });
  m.def("kernels", [] { return std::string(fastclip::cpu::kernels().name); });
  m.def("available_kernels", &fastclip::cpu::available_kernels);
  m.def("select_kernels", &fastclip::cpu::select_kernels);
  m.attr("compiler") = __VERSION__;
#ifdef FASTCLIP_CUDA
  m.attr("cuda") = CUDA_VERSION;
  m.def("force_cuda_blocks", &fastclip::cuda::force_blocks);
  m.def("allow_cooperative_launches", &fastclip::cuda::allow_cooperative);
#else
  m.attr("cuda") = py::none();
#endif
}
