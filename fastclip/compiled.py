"""The four functions inside of torch.compile: an operator of csrc/ops.cpp goes into the graph, or torch's own function.

Thresholds go there as tensors: the number that a graph was traced with would be a constant in it, and every other one
compiled anew. A tensor's product with a number is what torch.compile can keep open.
"""

import math

import torch
from torch import Tensor

from fastclip import _torch_functions
from fastclip._native import _C

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda") if _C and _C.cuda else ("cpu",)


def get_total_norm(tensors, norm_type, error_if_nonfinite, foreach) -> Tensor:
    tensors, order = _as_list(tensors), _fused_order(norm_type)
    if order is None or not _are_plain(tensors):
        return _torch_functions.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    return torch.ops.fastclip.get_total_norm(tensors, order, error_if_nonfinite)


def clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach) -> Tensor:
    parameters, order = _as_list(parameters), _fused_order(norm_type)
    grads = _gradients_of(parameters)
    if order is None or not _are_plain(grads):
        return _torch_functions.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    limit = _as_tensor(max_norm, grads[0].device)
    return torch.ops.fastclip.clip_grad_norm_(grads, limit, order, error_if_nonfinite)


def clip_grads_with_norm_(parameters, max_norm, total_norm, foreach) -> None:
    parameters = _as_list(parameters)
    grads = _gradients_of(parameters)
    if not (_are_plain(grads) and _are_plain([total_norm]) and total_norm.dim() == 0):
        return _torch_functions.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    torch.ops.fastclip.clip_grads_with_norm_(grads, _as_tensor(max_norm, grads[0].device), total_norm)


def clip_grad_value_(parameters, clip_value, foreach) -> None:
    parameters = _as_list(parameters)
    grads = _gradients_of(parameters)
    if not grads:
        return
    if not _are_plain(grads):
        return _torch_functions.clip_grad_value_(parameters, clip_value, foreach)
    torch.ops.fastclip.clip_grad_value_(grads, _as_tensor(clip_value, "cpu"))


def _as_list(items):
    return [items] if isinstance(items, Tensor) else list(items)


def _gradients_of(parameters):
    return [p.grad for p in parameters if p.grad is not None]


def _as_tensor(number, device):
    return number if isinstance(number, Tensor) else torch.ones((), dtype=torch.float64, device=device) * float(number)


def _are_plain(tensors) -> bool:
    """Whether there are tensors, and the operators can pack all of them."""
    return _C is not None and len(tensors) > 0 and all(map(_is_plain, tensors))


def _is_plain(tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and tensor.device.type in _DEVICES
    )


def _fused_order(norm_type) -> float | None:
    """norm_type as a constant, which it is not where torch.compile takes numbers for variables."""
    norm_type = float(norm_type)
    for order in (2.0, 1.0, math.inf):
        if norm_type == order:
            return order
    return None


def _fake_norm(tensors, *_):
    if not tensors:
        return torch.empty(())
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if double else torch.float32)


def _register_fake_kernels() -> None:
    for name in ("get_total_norm", "clip_grad_norm_", "clip_grad_norm_.Tensor"):
        torch.library.register_fake(f"fastclip::{name}", _fake_norm)
    for name in ("clip_grads_with_norm_", "clip_grad_value_"):
        for overload in ("", ".Tensor"):
            torch.library.register_fake(f"fastclip::{name}{overload}", lambda *_: None)


if _C:
    _register_fake_kernels()
