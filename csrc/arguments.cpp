#include "arguments.h"

#include <torch/csrc/autograd/python_variable.h>

#include <charconv>
#include <limits>
#include <string_view>

namespace fastclip::python {
namespace {

// torch.nn.Parameter: beside torch.Tensor the one type whose `.grad` is known to be torch's own attribute, so that it
// can be read without running Python code.
PyTypeObject* parameter_type = nullptr;

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

std::string at_index(const char* argument, Py_ssize_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

}  // namespace

void remember_parameter_type() {
  py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
}

double to_double(py::handle object, const char* argument) {
  if (PyFloat_CheckExact(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(object.ptr()));
  if (number) return PyFloat_AS_DOUBLE(number.ptr());
  if (PyErr_ExceptionMatches(PyExc_OverflowError)) {  // an int whose digits nobody wants to read
    PyErr_Clear();
    raise(PyExc_OverflowError, std::string(argument) + ": expected a number in float64's range, got one beyond it");
  }
  const bool type_error = PyErr_ExceptionMatches(PyExc_TypeError);
  if (!type_error && !PyErr_ExceptionMatches(PyExc_ValueError)) throw py::error_already_set();
  PyErr_Clear();
  raise(type_error ? PyExc_TypeError : PyExc_ValueError,
        std::string(argument) + ": expected a number, got " + std::string(py::repr(object)));
}

Number to_number(py::handle object, const char* argument) {
  if (THPVariable_Check(object.ptr())) {
    if (const auto number = on_device(THPVariable_Unpack(object.ptr()))) return *number;
  }
  return {to_double(object, argument), {}};
}

bool is_policy(py::handle object) {
  return !PyFloat_CheckExact(object.ptr()) && !THPVariable_Check(object.ptr()) && !PyType_Check(object.ptr()) &&
         PyObject_HasAttrString(object.ptr(), "_state_on");
}

Threshold to_threshold(py::handle object, bool follows, const Number& number, Gradients& grads) {
  if (!follows || grads.none() || !grads.fallback_reason().empty()) return {number, {}};
  grads.own_all();
  const std::string device = grads.groups().front().device.str();
  return {{}, THPVariable_Unpack(object.attr("_state_on")(device).ptr())};
}

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

Nonfinite to_nonfinite(py::handle name, bool error_if_nonfinite) {
  if (error_if_nonfinite) return Nonfinite::Raise;
  if (!name || name.is_none()) return Nonfinite::Propagate;
  const auto text = name.cast<std::string_view>();
  return text == "skip" ? Nonfinite::Skip : text == "zero" ? Nonfinite::Zero : Nonfinite::Propagate;
}

// ---- lists ----

namespace {

// A list is a list, a tuple or a single tensor. Its size is asked for anew each time: reading an attribute may run code
// that changes it.
bool is_sequence(py::handle list) {
  return PyList_Check(list.ptr()) || PyTuple_Check(list.ptr());
}
Py_ssize_t size_of(py::handle list) {
  return is_sequence(list) ? PySequence_Fast_GET_SIZE(list.ptr()) : 1;
}
PyObject* item_of(py::handle list, Py_ssize_t index) {
  return is_sequence(list) ? PySequence_Fast_GET_ITEM(list.ptr(), index) : list.ptr();
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

// Reads all gradients of a list, called `argument` in errors.
void collect(Gradients& grads, py::handle list, Items items, const char* argument) {
  const bool sequence = is_sequence(list);
  for (Py_ssize_t i = 0; i < size_of(list); ++i) {
    PyObject* item = item_of(list, i);
    if (has_exact_type(item)) {
      if (sequence) fetch_ahead(PySequence_Fast_ITEMS(list.ptr()) + i, size_of(list) - i, items);
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

}  // namespace

Gradients collected(Access access, py::handle list, Items items) {
  const char* const argument = items == Items::Parameters ? "parameters" : "tensors";
  Gradients grads(access, size_of(list), argument);
  collect(grads, list, items, argument);
  return grads;
}

std::pair<Gradients, Gradients> collected_with_weights(py::handle list) {
  std::pair<Gradients, Gradients> result(Gradients(Access::Read, size_of(list)),
                                         Gradients(Access::Write, size_of(list)));
  auto& [weights, grads] = result;
  for (Py_ssize_t i = 0; i < size_of(list); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(item_of(list, i));
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
    weights.add(tensor.unsafeGetTensorImpl(), "parameters", i, "weight");
    if (!has_exact_type(item.ptr())) weights.keep(tensor);
  }
  return result;
}

std::vector<int64_t> collect_groups(Gradients& grads, py::list groups) {
  std::vector<int64_t> ends;
  Owners owners(groups.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    const py::object group = groups[g];
    for (Py_ssize_t i = 0; i < size_of(group); ++i) {
      const int64_t owner = owners.add(item_of(group, i), g);
      if (owner == static_cast<int64_t>(g)) continue;
      raise(PyExc_ValueError, "groups: expected each parameter in one group, got one in groups[" +
                                  std::to_string(owner) + "] and groups[" + std::to_string(g) + "]");
    }
    char name[32] = "groups[";
    *std::to_chars(name + 7, name + 30, g).ptr = ']';  // what follows is zero
    collect(grads, group, Items::Parameters, name);
    ends.push_back(grads.count());
  }
  return ends;
}

}  // namespace fastclip::python
