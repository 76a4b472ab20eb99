"""Forward hooks that say how much of a module's output is saturated, in the steps that are recorded.

Saturated: where the derivative is below 5% of its largest value, so that next to nothing of the gradient comes through.
What that means for an output y (or an input x):

- Sigmoid: y (1 - y) < 0.05 / 4, that is y outside of [0.01266, 0.98734]
- Tanh, and the outputs of LSTM, GRU and RNN, which are products and averages of tanh: 1 - y^2 < 0.05, |y| > 0.97468
- ReLU, RNN with relu: y = 0. ReLU6, Hardtanh, Hardsigmoid: y at one of the limits
- GELU and its approximations: x < -2.28. SiLU: x < -3.93. Left of that |derivative| stays below 5% of the maximum
- ELU: y + alpha < 0.05 max(1, alpha). CELU: y + alpha < 0.05 alpha. Softplus: beta y < 0.0513
- Softmax, LogSoftmax: the share of distributions, not of elements, whose largest probability is above 0.98734: then all
  derivatives p_i (1 - p_i) are that small

Functions (torch.relu(x), F.softmax) are no modules and cannot be seen, nor can what torch.compile runs.
"""

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fastclip.health.naming import named_modules

_SAMPLE = 65_536  # elements of an output that are looked at, evenly spread; the rest is not read
_TANH = math.sqrt(0.95)
_SIGMOID = (1 + math.sqrt(0.95)) / 2  # p (1 - p) = 0.05 / 4
_GELU, _SILU = -2.28, -3.93
_SOFTPLUS = -math.log(0.95)  # the derivative of softplus is 1 - exp(-y)

Share = Callable[[Any, Tensor, Tensor], Tensor]  # (module, output, input) -> what is saturated, as booleans


def _left_of(limit: float) -> Share:
    return lambda m, y, x: x < limit


def _tanh(m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return y.abs() > _TANH


def _rnn(m: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return y == 0 if "relu" in (getattr(m, "nonlinearity", ""), getattr(m, "mode", "").lower()[4:]) else _tanh(m, y, x)


# By the name of the class or of one it is derived from, so that transformers' classes need no import.
_SATURATED: dict[str, Share] = {
    "Sigmoid": lambda m, y, x: (y - 0.5).abs() > _SIGMOID - 0.5,
    "Hardsigmoid": lambda m, y, x: (y == 0) | (y == 1),
    "Tanh": _tanh,
    "Hardtanh": lambda m, y, x: (y <= m.min_val) | (y >= m.max_val),  # and ReLU6
    "ReLU": lambda m, y, x: y == 0,
    "GELU": _left_of(_GELU),
    **dict.fromkeys(
        ("GELUActivation", "NewGELUActivation", "PytorchGELUTanh", "GELUTanh", "FastGELUActivation"), _left_of(_GELU)
    ),
    "SiLU": _left_of(_SILU),
    "SiLUActivation": _left_of(_SILU),
    "ELU": lambda m, y, x: y + m.alpha < 0.05 * max(1.0, m.alpha),
    "CELU": lambda m, y, x: y + m.alpha < 0.05 * m.alpha,
    "Softplus": lambda m, y, x: m.beta * y < _SOFTPLUS,
    **dict.fromkeys(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"), _rnn),
}
_DISTRIBUTIONS = {"Softmax", "LogSoftmax"}


class Activations:
    """Watches the activation modules of a model. ``take`` gives what was seen since it was called last."""

    def __init__(self, model: nn.Module):
        self.active = True  # whether the coming step is recorded
        self.classes: dict[str, str] = {}  # of each module that is watched, in the model's order
        self.first_runs: dict[str, int] = {}  # the order in which modules began to run
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._handles = []
        self._order_handles = []
        for name, module in named_modules(model):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks once it is compiled
            if (kind := _kind(module)) is not None:
                self.classes[name] = type(module).__name__
                self._handles.append(module.register_forward_hook(_Hook(self, name, kind)))
            self._order_handles.append(module.register_forward_pre_hook(_Hook(self, name, None)))
        self._finalizer = weakref.finalize(self, _remove, self._handles, self._order_handles)

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """For each module that ran: the sum of (saturated, zeros) over its runs, float32 [2], and their number."""
        if self.first_runs:
            _remove(self._order_handles)
        taken = {name: (total, self._counts[name]) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return taken

    def close(self) -> None:
        self._finalizer()

    def see(self, name: str, kind: str | None, module: nn.Module, inputs: tuple, output: Any) -> None:
        if not self.active or not module.training:
            return
        if kind is None:  # also without grad mode, in which checkpointed blocks run the first time
            self.first_runs.setdefault(name, len(self.first_runs))
            return
        if not torch.is_grad_enabled():
            return
        y, x = _tensor(output), _tensor(inputs)
        if y is None or not y.numel() or not y.is_floating_point():
            return
        with torch.no_grad():
            shares = _shares(module, kind, y.detach(), y if x is None else x.detach())
        known = self._sums.get(name)
        if known is None:
            self._sums[name], self._counts[name] = shares, 1
        elif known.device == shares.device:  # of the replicas of a module one is looked at
            self._sums[name], self._counts[name] = known + shares, self._counts[name] + 1


class _Hook:
    """A forward hook that keeps nothing alive. Copies and pickles of the model get one that does nothing instead."""

    def __init__(self, activations: Activations, name: str, kind: str | None):
        self.activations = weakref.ref(activations)
        self.name, self.kind = name, kind

    def __call__(self, module: nn.Module, inputs: tuple, output: Any = None) -> None:
        if is_dynamo_compiling():
            return
        activations = self.activations()
        if activations is not None:
            activations.see(self.name, self.kind, module, inputs, output)

    def __reduce__(self):
        # Takes (module, inputs, output), returns None, and whoever unpickles it needs nothing but Python.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _kind(module: nn.Module) -> str | None:
    if getattr(module, "proj_size", 0):
        return None  # an LSTM whose outputs are linear
    names = [c.__name__ for c in type(module).__mro__]
    kind = next((name for name in names if name in _SATURATED or name in _DISTRIBUTIONS), None)
    return None if kind == "SiLU" and module.inplace else kind  # its input is gone by then


def _shares(module: nn.Module, kind: str, y: Tensor, x: Tensor) -> Tensor:
    if kind in _DISTRIBUTIONS:
        dim = getattr(module, "dim", None)
        largest = y.amax(-1 if dim is None else dim)
        saturated = (largest.exp() if kind == "LogSoftmax" else largest) > _SIGMOID
        return torch.stack([saturated.float().mean(), (_sample(y) == 0).float().mean()])
    y, x = _sample(y), _sample(x)
    return torch.stack([_SATURATED[kind](module, y, x).float().mean(), (y == 0).float().mean()])


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: flat.numel() // _SAMPLE | 1] if flat.numel() > _SAMPLE else flat  # odd: not along one channel


def _tensor(value: Any) -> Tensor | None:
    """The plain tensor in what a module takes or returns: its first element, and that of a PackedSequence.

    None for what has no values to look at here: sparse and nested tensors, DTensors and other subclasses, tensors under
    vmap or while a model is exported.
    """
    while isinstance(value, tuple) and value and not isinstance(value, Tensor):
        value = value[0]
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_nested:
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(value) else value


def _remove(*lists: list) -> None:
    for handles in lists:
        for handle in handles:
            handle.remove()
        handles.clear()
