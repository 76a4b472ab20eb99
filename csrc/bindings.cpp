// The module fastclip._C: Python arguments in, tensors and errors out. The only file with binding headers.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <charconv>

#include "adaptive.h"
#include "clip.h"
#include "cpu/dispatch.h"
#ifdef FASTCLIP_CUDA
#include "cuda/launch.h"
#endif
#include "groups.h"
#include "ops.h"

namespace py = pybind11;

namespace fastclip::python {
namespace {

// torch.nn.Parameter: beside torch.Tensor the one type whose `.grad` is known to be torch's own attribute, so that it
// can be read without running Python code.
PyTypeObject* parameter_type = nullptr;

// What a list holds: parameters, whose .grad is meant, or the gradients themselves.
enum class Items { Parameters, Tensors };

const char* argument_name(Items items) {
  return items == Items::Parameters ? "parameters" : "tensors";
}

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

std::string at_index(const char* argument, Py_ssize_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

// float(object), naming the argument where that fails. TypeError or ValueError, as float() has it.
double to_double(py::handle object, const char* argument) {
  if (PyFloat_CheckExact(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(object.ptr()));
  if (number) return PyFloat_AS_DOUBLE(number.ptr());
  const bool type_error = PyErr_ExceptionMatches(PyExc_TypeError);
  if (!type_error && !PyErr_ExceptionMatches(PyExc_ValueError)) throw py::error_already_set();
  PyErr_Clear();
  raise(type_error ? PyExc_TypeError : PyExc_ValueError,
        std::string(argument) + ": expected a number, got " + std::string(py::repr(object)));
}

// A number, or a 0-d tensor with one. What can be read without waiting is read.
Number to_number(py::handle object, const char* argument) {
  if (THPVariable_Check(object.ptr())) {
    if (const auto number = on_device(THPVariable_Unpack(object.ptr()))) return *number;
  }
  return {to_double(object, argument), {}};
}

// Whether an object is a threshold policy: something that has its state on a device (fastclip/policies.py).
bool is_policy(py::handle object) {
  return !PyFloat_CheckExact(object.ptr()) && !THPVariable_Check(object.ptr()) &&
         PyObject_HasAttrString(object.ptr(), "_state_on");
}

// A threshold for these gradients, once they are collected. For a policy Python code runs.
Threshold to_threshold(py::handle object, bool follows, const Number& number, Gradients& grads) {
  if (!follows || grads.none() || !grads.fallback_reason().empty()) return {number, {}};
  grads.own_all();
  const std::string device = grads.groups().front().device.str();
  return {{}, THPVariable_Unpack(object.attr("_state_on")(device).ptr())};
}

// Whether an object is a DTensor. Before torch.distributed.tensor is imported, which takes half a second, there is
// none.
bool is_dtensor(py::handle object) {
  const py::str name("torch.distributed.tensor");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  return module && py::isinstance(object, module.attr("DTensor"));
}

// Adds the gradient of an object of any type, as Python code would read it.
void add_by_attribute(Gradients& grads, PyObject* item, Items items, const char* argument, Py_ssize_t index) {
  const auto owner = py::reinterpret_borrow<py::object>(item);  // the list may lose it while its attribute is read
  py::object object = owner;
  if (items == Items::Parameters) {
    object = py::reinterpret_steal<py::object>(PyObject_GetAttrString(item, "grad"));
    if (!object) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
      PyErr_Clear();
      raise(PyExc_TypeError, at_index(argument, index) + ": expected a torch.Tensor, got " + Py_TYPE(item)->tp_name);
    }
    if (object.is_none()) {
      // Other ranks may have this gradient, and wait for this one.
      if (is_dtensor(owner) && THPVariable_Unpack(item).requires_grad()) grads.fall_back("subclass");
      return grads.pass_over(index);
    }
  }
  if (!THPVariable_Check(object.ptr())) {
    raise(PyExc_TypeError, at_index(argument, index) + (items == Items::Parameters ? ".grad" : "") +
                               ": expected a torch.Tensor, got " + Py_TYPE(object.ptr())->tp_name);
  }
  at::Tensor grad = THPVariable_Unpack(object.ptr());
  grads.add(grad.unsafeGetTensorImpl(), argument, index);
  grads.keep(std::move(grad));
}

bool has_exact_type(PyObject* item) {
  return Py_TYPE(item) == parameter_type || Py_TYPE(item) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

// After a backward pass the objects of a long list are out of the cache, and each gradient is five dependent loads
// away: object, tensor, its autograd data, gradient, storage. Reading them one by one takes 0.25 us a tensor; so for
// each item that is read, those behind it are fetched, each one load further.
void fetch_ahead(PyObject* const* next, Py_ssize_t left, Items items) {
  constexpr Py_ssize_t kStage = 6;
  const auto tensor = [&](Py_ssize_t ahead) -> at::TensorImpl* {
    return ahead < left && has_exact_type(next[ahead]) ? THPVariable_Unpack(next[ahead]).unsafeGetTensorImpl()
                                                       : nullptr;
  };
  const auto grad = [&](Py_ssize_t ahead) -> at::TensorImpl* {
    at::TensorImpl* impl = tensor(ahead);
    return impl && items == Items::Parameters ? impl->grad().unsafeGetTensorImpl() : impl;
  };
  const auto fetch = [](const void* p, int lines) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(p) + 64 * i);
  };
  if (5 * kStage < left) fetch(next[5 * kStage], 1);
  if (at::TensorImpl* impl = tensor(4 * kStage)) fetch(impl, 1);
  if (at::TensorImpl* impl = tensor(3 * kStage)) fetch(impl->autograd_meta(), 1);
  if (at::TensorImpl* impl = grad(2 * kStage)) fetch(impl, 3);
  if (at::TensorImpl* impl = grad(kStage)) fetch(impl->unsafe_storage().unsafeGetStorageImpl(), 1);
}

// Reads all gradients of `list`, which is a list, a tuple or a single tensor, called `argument` in errors.
void collect(Gradients& grads, PyObject* list, Items items, const char* argument) {
  const bool sequence = PyList_Check(list) || PyTuple_Check(list);
  // The size is asked for anew each time: reading an attribute may run code that changes the list.
  for (Py_ssize_t i = 0; i < (sequence ? PySequence_Fast_GET_SIZE(list) : 1); ++i) {
    PyObject* item = sequence ? PySequence_Fast_GET_ITEM(list, i) : list;
    if (has_exact_type(item)) {
      if (sequence) fetch_ahead(PySequence_Fast_ITEMS(list) + i, PySequence_Fast_GET_SIZE(list) - i, items);
      const at::Tensor& tensor = THPVariable_Unpack(item);
      if (items == Items::Tensors) {
        grads.add(tensor.unsafeGetTensorImpl(), argument, i);
      } else {
        const at::Tensor& grad = tensor.unsafeGetTensorImpl()->grad();
        if (grad.defined()) {
          grads.add(grad.unsafeGetTensorImpl(), argument, i);
        } else if (tensor.requires_grad() && !tensor.is_leaf()) {
          // Python's attribute gives torch's warning, which may be an error, here and not when all has been written.
          grads.own_all();
          add_by_attribute(grads, item, items, argument, i);
        } else {
          grads.pass_over(i);
        }
      }
    } else {
      grads.own_all();  // foreign code may drop gradients that were read before
      add_by_attribute(grads, item, items, argument, i);
    }
  }
}

void collect(Gradients& grads, PyObject* list, Items items) {
  collect(grads, list, items, argument_name(items));
}

// Reads all parameters that have a gradient, and these.
void collect_with_weights(Gradients& weights, Gradients& grads, PyObject* list) {
  const bool sequence = PyList_Check(list) || PyTuple_Check(list);
  for (Py_ssize_t i = 0; i < (sequence ? PySequence_Fast_GET_SIZE(list) : 1); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(sequence ? PySequence_Fast_GET_ITEM(list, i) : list);
    if (!THPVariable_Check(item.ptr())) {
      raise(PyExc_TypeError,
            at_index("parameters", i) + ": expected a torch.Tensor, got " + Py_TYPE(item.ptr())->tp_name);
    }
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    const int64_t before = grads.count();
    if (has_exact_type(item.ptr())) {
      const at::Tensor& grad = tensor.grad();
      if (grad.defined()) grads.add(grad.unsafeGetTensorImpl(), "parameters", i);
    } else {
      grads.own_all();
      weights.own_all();
      add_by_attribute(grads, item.ptr(), Items::Parameters, "parameters", i);
    }
    if (grads.count() == before) continue;
    weights.add(tensor.unsafeGetTensorImpl(), "parameters", i);
    if (!has_exact_type(item.ptr())) weights.keep(tensor);
  }
}

// Which group each parameter belongs to: a hash table, since sorting 2,000 addresses would take as long as their norms.
class Owners {
 public:
  explicit Owners(size_t expected) {
    while (table_.size() < 2 * expected) table_.resize(2 * table_.size());
  }

  // Returns the group that has an object already, or `group`.
  int64_t add(const PyObject* object, int64_t group) {
    if (2 * ++count_ > table_.size()) grow();
    Place& place = find(object);
    if (!place.object) place = {object, group};
    return place.group;
  }

 private:
  struct Place {
    const PyObject* object = nullptr;
    int64_t group = 0;
  };

  Place& find(const PyObject* object) {
    const size_t mask = table_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(object) >> 4) * 0x9e3779b97f4a7c15u >> 20 & mask;
    while (table_[at].object && table_[at].object != object) at = (at + 1) & mask;
    return table_[at];
  }

  void grow() {
    std::vector<Place> before(2 * table_.size());
    before.swap(table_);
    for (const Place& place : before) {
      if (place.object) find(place.object) = place;
    }
  }

  std::vector<Place> table_ = std::vector<Place>(64);
  size_t count_ = 0;
};

// Reads the gradients of groups, each a list, a tuple or a single tensor. Returns how many there are up to the end of
// each group.
std::vector<int64_t> collect_groups(Gradients& grads, py::list groups) {
  std::vector<int64_t> ends;
  Owners owners(groups.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    const py::object group = groups[g];
    const bool sequence = PyList_Check(group.ptr()) || PyTuple_Check(group.ptr());
    for (Py_ssize_t i = 0; i < (sequence ? PySequence_Fast_GET_SIZE(group.ptr()) : 1); ++i) {
      const int64_t owner = owners.add(sequence ? PySequence_Fast_GET_ITEM(group.ptr(), i) : group.ptr(), g);
      if (owner == static_cast<int64_t>(g)) continue;
      raise(PyExc_ValueError, "groups: expected each parameter in one group, got one in groups[" +
                                  std::to_string(owner) + "] and groups[" + std::to_string(g) + "]");
    }
    char name[32] = "groups[";
    *std::to_chars(name + 7, name + 30, g).ptr = ']';  // what follows is zero
    collect(grads, group.ptr(), Items::Parameters, name);
    ends.push_back(grads.count());
  }
  return ends;
}

// `count` thresholds: a 1-d tensor on a CUDA device, a list of numbers and None, or one number for all.
MaxNorms to_max_norms(py::handle object, size_t count) {
  if (THPVariable_Check(object.ptr())) return {{}, THPVariable_Unpack(object.ptr()).detach()};
  if (!PyList_Check(object.ptr())) return {std::vector<double>(count, to_double(object, "max_norms")), {}};
  MaxNorms result;
  for (size_t g = 0; g < count; ++g) {
    PyObject* const item = PyList_GET_ITEM(object.ptr(), g);
    double value = std::numeric_limits<double>::infinity();
    if (PyFloat_CheckExact(item)) {
      value = PyFloat_AS_DOUBLE(item);
    } else if (item != Py_None) {
      value = to_double(item, at_index("max_norms", g).c_str());
    }
    result.values.push_back(value);
  }
  return result;
}

size_t expected_size(py::handle list) {
  return PyList_Check(list.ptr()) || PyTuple_Check(list.ptr()) ? PySequence_Fast_GET_SIZE(list.ptr()) : 1;
}

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

// What a name of fastclip/clip_report.py's POLICIES means; with None, and where an error is wanted, as without it.
Nonfinite to_nonfinite(py::handle name, bool error_if_nonfinite = false) {
  if (error_if_nonfinite) return Nonfinite::Raise;
  if (!name || name.is_none()) return Nonfinite::Propagate;
  const auto text = name.cast<std::string_view>();
  return text == "skip" ? Nonfinite::Skip : text == "zero" ? Nonfinite::Zero : Nonfinite::Propagate;
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
  Gradients grads(Access::Read, expected_size(tensors), argument_name(Items::Tensors));
  collect(grads, tensors.ptr(), Items::Tensors);
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
  Gradients grads(Access::Write, expected_size(parameters), argument_name(Items::Parameters));
  collect(grads, parameters.ptr(), Items::Parameters);
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
  Gradients grads(in_place ? Access::Write : Access::Read, expected_size(parameters), argument_name(Items::Parameters));
  collect(grads, parameters.ptr(), Items::Parameters);
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
  Gradients grads(Access::Write, expected_size(parameters), argument_name(Items::Parameters));
  collect(grads, parameters.ptr(), Items::Parameters);
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
  Gradients grads(Access::Write, expected_size(parameters), argument_name(Items::Parameters));
  collect(grads, parameters.ptr(), Items::Parameters);
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
  Gradients weights(Access::Read, expected_size(parameters)), grads(Access::Write, expected_size(parameters));
  collect_with_weights(weights, grads, parameters.ptr());
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
py::object norm_of(py::handle grads_list, double p) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::norm_of", {});
  Gradients grads(Access::Read, expected_size(grads_list), argument_name(Items::Tensors));
  collect(grads, grads_list.ptr(), Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  if (grads.none()) return to_python(number_tensor(0, at::kDouble));
  grads.keep_norm_unrounded();
  return to_python(run(grads, [&] { return fastclip::get_total_norm(grads, *fused_norm_type(p), false); }));
  END_HANDLE_TH_ERRORS_PYBIND
}

// The same, and the gradients' statistics: (norm, values).
py::object norm_and_statistics_of(py::handle grads_list, double p) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::norm_of", {});
  Gradients grads(Access::Read, expected_size(grads_list), argument_name(Items::Tensors));
  collect(grads, grads_list.ptr(), Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  if (grads.none()) return py::str("no gradients");
  grads.keep_norm_unrounded();
  at::Tensor values;
  const at::Tensor norm =
      run(grads, [&] { return fastclip::get_total_norm(grads, *fused_norm_type(p), false, &values); });
  return py::make_tuple(to_python(norm), to_python(values));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object scale_by_norm_(py::handle grads_list, py::handle max_norm, py::handle total_norm, py::handle nonfinite) {
  HANDLE_TH_ERRORS
  RECORD_FUNCTION("fastclip::scale_by_norm_", {});
  const Number threshold = to_number(max_norm, "max_norm"), norm = to_number(total_norm, "total_norm");
  Gradients grads(Access::Write, expected_size(grads_list), argument_name(Items::Tensors));
  collect(grads, grads_list.ptr(), Items::Tensors);
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
  Gradients grads(Access::Read, expected_size(grads_list), argument_name(Items::Tensors));
  collect(grads, grads_list.ptr(), Items::Tensors);
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
  Gradients grads(Access::Write, expected_size(grads_list), argument_name(Items::Tensors));
  collect(grads, grads_list.ptr(), Items::Tensors);
  if (!grads.fallback_reason().empty()) return py::str(grads.fallback_reason());
  grads.check_clip_value(clip_value);
  if (!grads.none()) run(grads, [&] { fastclip::clip_grad_value(grads, clip_value); });
  return py::none();
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace
}  // namespace fastclip::python

PYBIND11_MODULE(_C, m) {
  namespace fc = fastclip::python;
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  fc::parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
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
  m.def("norm_of", &fc::norm_of);
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
  m.def("norm_and_statistics_of", &fc::norm_and_statistics_of);
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
