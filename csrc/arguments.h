// Python arguments as C++: numbers, thresholds, and lists of tensors, whose gradients are read. Errors name the
// argument.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "clip.h"
#include "groups.h"

namespace fastclip::python {

namespace py = pybind11;

// Called once, before anything else: looks for torch.nn.Parameter.
void remember_parameter_type();

// float(object), naming the argument where that fails. TypeError or ValueError, as float() has it.
double to_double(py::handle object, const char* argument);

// A number, or a 0-d tensor with one. What can be read without waiting is read.
Number to_number(py::handle object, const char* argument);

// Whether an object is a threshold policy: something that has its state on a device (fastclip/policies.py).
bool is_policy(py::handle object);

// A threshold for these gradients, once they are collected. For a policy Python code runs.
Threshold to_threshold(py::handle object, bool follows, const Number& number, Gradients& grads);

// `count` thresholds: a 1-d tensor on a CUDA device, a list of numbers and None, or one number for all.
MaxNorms to_max_norms(py::handle object, size_t count);

// What a name of fastclip/clip_report.py's POLICIES means; with None, and where an error is wanted, as without it.
Nonfinite to_nonfinite(py::handle name, bool error_if_nonfinite = false);

// What a list holds: parameters, whose .grad is meant, or the gradients themselves.
enum class Items { Parameters, Tensors };

// Reads all gradients of `list`, which is a list, a tuple or a single tensor.
Gradients collected(Access access, py::handle list, Items items);

// Reads all parameters that have a gradient, and these: (weights, grads).
std::pair<Gradients, Gradients> collected_with_weights(py::handle list);

// Reads the gradients of groups, each a list, a tuple or a single tensor. Returns how many there are up to the end of
// each group.
std::vector<int64_t> collect_groups(Gradients& grads, py::list groups);

}  // namespace fastclip::python
