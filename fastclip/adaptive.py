"""Adaptive gradient clipping: each unit's gradient is limited to a fraction of its weight."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastclip import watching
from fastclip._native import _C, NOT_BUILT
from fastclip.clip import Tensors, _parameters_of
from fastclip.counters import count_fallback


def clip_grad_adaptive_(
    parameters: Tensors, clipping: float = 0.01, eps: float = 1e-3, *, norm_type: float = 2.0
) -> None:
    """Limits the gradient of each unit, in place, to ``clipping`` times the norm of its weight.

    A unit is what one output of a layer has: ``weight[i]`` of a tensor with two and more dimensions (a row of a linear
    layer, a filter of a convolution, an embedding vector), all of a tensor with fewer (a bias, a gain). With
    ``limit = clipping * max(norm(weight), eps)``, a unit whose gradient has a norm of ``limit`` or more is multiplied
    by ``limit / max(norm(grad), 1e-6)``: adaptive gradient clipping (Brock, De, Smith, Simonyan 2021,
    https://arxiv.org/abs/2102.06171), in the form of timm's ``adaptive_clip_grad``, but with norms that are exact to
    1e-6 in every dtype. Weights and gradients are read once, and a unit within its limit is not written.

    The paper does not clip the last, linear layer: leave it out of ``parameters``.

    A unit with NaN in its weight or gradient becomes NaN. One with inf in its gradient becomes 0, and NaN where it was
    infinite; all NaN where its weight has inf too. A weight with inf does not limit a finite gradient.

    Args:
        parameters: one tensor or an iterable of tensors; those whose ``.grad`` is None are passed over. Weights and
            gradients are float32, float64, float16 or bfloat16, mixed as they come.
        clipping: the largest norm of a unit's gradient, in units of its weight's norm; 0 or more.
        eps: the least norm that a weight counts with, so that units of zeros can learn; 0 or more, in the weights' own
            unit.
        norm_type: order of the norms; 1, 2 and inf (or ``"inf"``) are fused, others are done by torch.

    Raises:
        TypeError: an item is not a tensor, or its gradient is sparse or not of a floating-point dtype; the message has
            its index. ``clipping``, ``eps`` or ``norm_type`` is not a number. Nothing is modified then.
        ValueError: ``clipping`` or ``eps`` is negative or NaN.
    """
    if is_dynamo_compiling():
        return _outside_the_graph(parameters, clipping, eps, norm_type)
    clipping, eps = _not_negative(clipping, "clipping"), _not_negative(eps, "eps")
    order = number(norm_type, "norm_type")
    parameters = _parameters_of(parameters)
    if watching.watchers and (recording := watching.begin(parameters)):
        recording.measure()
        recording.finish(None, None)
    reason = _C.clip_grad_adaptive_(parameters, clipping, eps, order) if _C else NOT_BUILT
    if reason is not None:
        _by_torch([parameters] if isinstance(parameters, Tensor) else list(parameters), clipping, eps, order)
        count_fallback(reason)


@torch._disable_dynamo  # not the function itself: its first call would import torch._dynamo, which takes seconds
def _outside_the_graph(parameters: Tensors, clipping: float, eps: float, norm_type: float) -> None:
    clip_grad_adaptive_(parameters, clipping, eps, norm_type=norm_type)


def number(given: float | Tensor, argument: str) -> float:
    """``float(given)``, whose error names the argument."""
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: expected a number, got {given!r}") from None


def _not_negative(given: float, argument: str) -> float:
    value = number(given, argument)
    if not value >= 0:
        raise ValueError(f"{argument}: expected a number of at least 0, got {given!r}")
    return value


@torch.no_grad()
def _by_torch(parameters: list[Tensor], clipping: float, eps: float, norm_type: float) -> None:
    """The same with torch's operations, one parameter after the other."""
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{index}]: expected a torch.Tensor, got {type(parameter).__name__}")
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise TypeError(f"parameters[{index}]: expected a gradient of layout torch.strided, got {grad.layout}")
        if not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(f"parameters[{index}]: expected a floating-point gradient, got {grad.dtype}")
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or grad.numel() == 0:
            continue
        max_norm = clipping * _unit_norms(parameter, norm_type).clamp(min=eps)
        grad_norm = _unit_norms(grad, norm_type)
        clipped = grad * (max_norm / grad_norm.clamp(min=1e-6))
        grad.copy_(torch.where(grad_norm < max_norm, grad, clipped))


def _unit_norms(tensor: Tensor, norm_type: float) -> Tensor:
    """Norms of a tensor's units in float64, of a shape that broadcasts with it."""
    dims = None if tensor.ndim <= 1 else tuple(range(1, tensor.ndim))
    if tensor.device.type == "mps":  # has no float64
        return torch.linalg.vector_norm(tensor.float(), norm_type, dim=dims, keepdim=dims is not None)
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.linalg.vector_norm(tensor, norm_type, dim=dims, keepdim=dims is not None, dtype=dtype)
