"""Clipping by norm of several groups of parameters in one call, each with its own norm and threshold."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastclip import watching
from fastclip._native import _C, NOT_BUILT
from fastclip.adaptive import check_writable, number
from fastclip.clip import Tensors, _as_sequence, clip_grads_with_norm_, get_total_norm
from fastclip.counters import count_fallback

MaxNorms = float | Tensor | Sequence[float | Tensor | None]
INF = math.inf
_PLAIN = {list, tuple, Tensor, torch.nn.Parameter}


def clip_grad_norms_(
    groups: Iterable[Tensors], max_norms: MaxNorms, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales the gradients of each group in place so that their common norm is at most the group's threshold.

    Each group comes out as from ``clip_grad_norm_(groups[i], max_norms[i])``, with the same norm to one unit in the
    last place of float32; but all of them are one call, and on a CUDA device one launch. (Beside a group with float64
    gradients, norms are float64: one beyond float32 is not inf then.) Groups of one tensor are
    clipping by layer; thousands of groups, the experts of a mixture, are what it is made for.

    Args:
        groups: an iterable of groups, each one tensor or an iterable of tensors; those whose ``.grad`` is None are
            passed over. Gradients as in ``clip_grad_norm_``.
        max_norms: the threshold of each group, in the gradients' own unit: a sequence of numbers, 0-d tensors and None,
            a 1-d tensor ``[groups]``, or one number (or 0-d tensor) for all. A group with None or inf is not clipped,
            also when its norm is not finite. A 1-d tensor on a CUDA device is not waited for.
        norm_type: order of the norms; 1, 2 and inf (or ``"inf"``) are fused, others are done by torch.
        error_if_nonfinite: raise when a group's norm is inf or NaN, and leave every gradient as it was.

    Returns:
        The norms before clipping: a new 1-d tensor ``[groups]`` on the first gradient's device, in the promotion of all
        gradients' dtypes and at least float32. 0 for a group without gradients.

    Raises:
        TypeError: ``groups`` is a tensor. An item is not a tensor, or its gradient is not of a floating-point dtype;
            the message has both indices. A threshold is not a number; the message has its index.
        ValueError: there are not as many thresholds as groups, or a parameter is in two groups, which are named.
        RuntimeError: a norm is not finite and ``error_if_nonfinite`` is set.
    """
    if is_dynamo_compiling():
        return _outside_the_graph(groups, max_norms, norm_type, error_if_nonfinite)
    groups = _as_groups(groups)
    max_norms = _as_max_norms(max_norms, len(groups))
    order = number(norm_type, "norm_type")
    if watching.watchers and (recording := watching.begin([p for group in groups for p in _members(group)])):
        recording.measure()
        recording.finish(None, None)
    reason = NOT_BUILT
    if _C:
        result = _C.clip_grad_norms_(groups, max_norms, order, bool(error_if_nonfinite))
        if result is None:
            return torch.zeros(len(groups))
        if type(result) is not str:
            return result
        reason = result
    result = _one_by_one(groups, max_norms, order, error_if_nonfinite)
    count_fallback(reason)
    return result


@torch._disable_dynamo  # not the function itself: its first call would import torch._dynamo, which takes seconds
def _outside_the_graph(
    groups: Iterable[Tensors], max_norms: MaxNorms, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    return clip_grad_norms_(groups, max_norms, norm_type, error_if_nonfinite)


def _members(group: Any) -> Sequence[Tensor]:
    return [group] if isinstance(group, Tensor) else group


def _as_groups(given: Any) -> list[Any]:
    if isinstance(given, Tensor):  # iterating it would make a group of each row
        raise TypeError("groups: expected an iterable of groups, got a tensor")
    groups = list(_as_sequence(given, "groups"))
    if _PLAIN.issuperset(map(type, groups)):
        return groups
    return [_as_sequence(group, f"groups[{i}]") for i, group in enumerate(groups)]


def _as_max_norms(max_norms: MaxNorms, count: int) -> float | Tensor | list:
    """A 1-d tensor on a CUDA device, a list of numbers and None, or one number."""
    if isinstance(max_norms, Tensor):
        if max_norms.ndim > 1:
            raise ValueError(f"max_norms: expected at most 1 dimension, got {max_norms.ndim}")
        if max_norms.ndim == 0:
            return max_norms.expand(count) if max_norms.is_cuda else max_norms.item()
        if not max_norms.is_cuda:
            max_norms = max_norms.tolist()
    elif isinstance(max_norms, Iterable) and not isinstance(max_norms, (str, bytes, dict)) and _has_items(max_norms):
        max_norms = list(max_norms)
    else:
        return INF if max_norms is None else number(max_norms, "max_norms")  # type: ignore[arg-type]
    if len(max_norms) != count:
        raise ValueError(f"max_norms: expected one for each of {count} groups, got {len(max_norms)}")
    return max_norms


def _has_items(given: Any) -> bool:
    return getattr(given, "ndim", 1) != 0  # an array of numpy may be one number


def _one_by_one(
    groups: list[Tensor | list | tuple], max_norms: float | Tensor | list, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """A call for each group. All norms come first: nothing is modified where one of them is an error."""
    if isinstance(max_norms, Tensor):
        max_norms = max_norms.tolist()
    if isinstance(max_norms, list):
        limits = [INF if given is None else number(given, f"max_norms[{g}]") for g, given in enumerate(max_norms)]
    else:
        limits = [number(max_norms, "max_norms")] * len(groups)
    owners: dict[int, int] = {}
    for g, group in enumerate(groups):
        for i, parameter in enumerate(_members(group)):
            if not isinstance(parameter, Tensor):
                raise TypeError(f"groups[{g}][{i}]: expected a torch.Tensor, got {type(parameter).__name__}")
            owner = owners.setdefault(id(parameter), g)
            if owner != g:
                raise ValueError(
                    f"groups: expected each parameter in one group, got one in groups[{owner}] and groups[{g}]"
                )
    grads = [[p.grad for p in _members(group) if p.grad is not None] for group in groups]
    for of_group in grads:
        for grad in of_group:
            check_writable(grad)
    norms = [get_total_norm(of_group, norm_type) for of_group in grads]
    plain = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if error_if_nonfinite:
        for g, norm in enumerate(plain):
            if not math.isfinite(norm):
                raise RuntimeError(
                    f"The total norm of order {norm_type} for gradients from `groups[{g}]` is non-finite, so it "
                    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
                    "set `error_if_nonfinite=False`"
                )
    for group, of_group, limit, norm in zip(groups, grads, limits, norms, strict=True):
        if limit != INF and of_group:
            clip_grads_with_norm_(group, limit, norm)
    device = next((norm.device for norm, of_group in zip(plain, grads, strict=True) if of_group), None)
    dtypes = {norm.dtype for norm, of_group in zip(plain, grads, strict=True) if of_group}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.stack([norm.to(device or norm.device, dtype) for norm in plain])
