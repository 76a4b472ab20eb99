"""The four functions inside of torch.compile: what is traced puts one operator of csrc/ops.cpp into the graph."""

import math

import torch
from torch import Tensor

from fastclip import _torch_functions
from fastclip._native import _C

_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEVICES = ("cpu",) if _C is None or _C.cuda is None else ("cpu", "cuda")


def get_total_norm(tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None) -> Tensor:
    tensors = _as_list(tensors)
    norm_type = float(norm_type)
    if not _is_fused(tensors, norm_type):
        return _torch_functions.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        return torch.ops.fastclip.get_total_norm(tensors, norm_type, error_if_nonfinite)


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None) -> Tensor:
    parameters = _as_list(parameters)
    norm_type = float(norm_type)
    grads = _gradients(parameters)
    if not _is_fused(grads, norm_type):
        return _torch_functions.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        return torch.ops.fastclip.clip_grad_norm_(grads, max_norm, norm_type, error_if_nonfinite)


def clip_grads_with_norm_(parameters, max_norm, total_norm, foreach=None) -> None:
    parameters = _as_list(parameters)
    grads = _gradients(parameters)
    if not _is_fused([*grads, total_norm] if grads else []):
        return _torch_functions.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    with torch.no_grad():
        torch.ops.fastclip.clip_grads_with_norm_(grads, max_norm, total_norm)


def clip_grad_value_(parameters, clip_value, foreach=None) -> None:
    parameters = _as_list(parameters)
    clip_value = float(clip_value)
    grads = _gradients(parameters)
    if not grads:
        return
    if not _is_fused(grads):
        return _torch_functions.clip_grad_value_(parameters, clip_value, foreach)
    with torch.no_grad():
        torch.ops.fastclip.clip_grad_value_(grads, clip_value)


def _as_list(items):
    return [items] if isinstance(items, Tensor) else list(items)


def _gradients(parameters):
    return [p.grad for p in parameters if p.grad is not None]


def _is_fused(tensors, norm_type=2.0) -> bool:
    """Whether the operator is the way: native code, gradients which it packs, and a norm that it computes."""
    return (
        _C is not None
        and len(tensors) > 0
        and norm_type in (1.0, 2.0, math.inf)
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.layout == torch.strided
            and t.dtype in _FUSED_DTYPES
            and t.device.type in _DEVICES
            for t in tensors
        )
    )


def _norm(tensors, norm_type, error_if_nonfinite):
    """A norm as csrc/ops.cpp allocates it: on the first tensor's device, float64 where a tensor is, else float32."""
    if not tensors:
        return torch.empty((), dtype=torch.float32)
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if double else torch.float32)


if _C:
    fake = torch.library.register_fake
    fake("fastclip::get_total_norm", _norm)
    fake("fastclip::clip_grad_norm_", lambda grads, max_norm, *norm: _norm(grads, *norm))
    fake("fastclip::clip_grad_norm_.Tensor", lambda grads, max_norm, *norm: _norm(grads, *norm))
    fake("fastclip::clip_grads_with_norm_", lambda grads, max_norm, total_norm: None)
    fake("fastclip::clip_grads_with_norm_.Tensor", lambda grads, max_norm, total_norm: None)
    fake("fastclip::clip_grad_value_", lambda grads, clip_value: None)
