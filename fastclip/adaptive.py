"""Adaptive gradient clipping: each unit's gradient is limited to a fraction of its weight."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastclip import watching
from fastclip._native import _C, NOT_BUILT
from fastclip.clip import Tensors, _parameters_of
from fastclip.counters import count_fallback
from fastclip.distributed import is_dtensor, replicated


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

    Of DTensors (FSDP2, tensor parallelism) units are those of the whole tensor, whichever way it is sharded: torch's
    operations do such a call, with a small all-reduce for each parameter whose units are spread over ranks (under FSDP2
    the biases and gains). All ranks have to call, with the same parameters. The flat shards that FSDP1 hands out have
    no units any more: use FSDP2.

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
        ValueError: ``clipping`` or ``eps`` is negative or NaN. A parameter has another shape than its gradient (its
            ``data`` has been replaced).
        RuntimeError: a weight or gradient has lost its memory; or, as in torch, a gradient cannot be written in place
            because several of its elements share one place in memory. Nothing is modified then.
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
    except (TypeError, ValueError, OverflowError) as error:
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
        _check(parameter, index)
    for parameter in parameters:
        grad = parameter.grad
        if parameter.numel() == 0:
            continue
        if grad is None:
            if is_dtensor(parameter) and parameter.requires_grad:  # other ranks may have it, and wait for this one
                _unit_coefs(parameter, torch.zeros_like(parameter), clipping, eps, norm_type)
            continue
        coefs = _unit_coefs(parameter, grad, clipping, eps, norm_type)
        wide = grad.to(_wide(grad))
        clipped = torch.where(coefs == 1, wide, wide * coefs)
        if is_dtensor(clipped) and is_dtensor(grad) and not any(p.is_partial() for p in grad.placements):
            clipped = clipped.redistribute(placements=grad.placements)  # a dimension of one may have become another's
        grad.copy_(clipped)


def _check(parameter: Tensor, index: int) -> None:
    """Raises what would be an error, or wrong, once other gradients have been written."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameters[{index}]: expected a torch.Tensor, got {type(parameter).__name__}")
    grad = parameter.grad
    if grad is None:
        return
    if grad.layout != torch.strided:
        raise TypeError(f"parameters[{index}]: expected a gradient of layout torch.strided, got {grad.layout}")
    if not (grad.is_floating_point() or grad.is_complex()):
        raise TypeError(f"parameters[{index}]: expected a floating-point gradient, got {grad.dtype}")
    if parameter.shape != grad.shape:
        raise ValueError(
            f"parameters[{index}]: expected a weight of its gradient's shape {tuple(grad.shape)}, "
            f"got {tuple(parameter.shape)}"
        )
    check_writable(grad)


def check_writable(grad: Tensor) -> None:
    """Raises the error of torch's in-place operations where elements share memory, without writing anything."""
    if any(stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
        grad.mul_(1)


def _unit_coefs(weight: Tensor, grad: Tensor, clipping: float, eps: float, norm_type: float) -> Tensor:
    """What each unit is multiplied by, in float64, of a shape that broadcasts with the gradient."""
    max_norm = clipping * _unit_norms(weight, norm_type).clamp(min=eps)
    grad_norm = _unit_norms(grad, norm_type)
    coefs = torch.where(grad_norm < max_norm, 1.0, max_norm / grad_norm.clamp(min=1e-6))
    if is_dtensor(coefs) and is_dtensor(weight) and is_dtensor(grad) and weight.placements != grad.placements:
        return replicated(coefs)  # goes with a gradient of any layout
    return coefs


def _wide(tensor: Tensor) -> torch.dtype:
    """In which norms and products are computed."""
    if tensor.is_complex():
        return torch.complex128
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # mps has no float64


def _unit_norms(tensor: Tensor, norm_type: float) -> Tensor:
    """Norms of a tensor's units in float64, of a shape that broadcasts with it."""
    dims = None if tensor.ndim <= 1 else tuple(range(1, tensor.ndim))
    return torch.linalg.vector_norm(tensor.to(_wide(tensor)), norm_type, dim=dims, keepdim=dims is not None)
