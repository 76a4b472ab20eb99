"""The four clipping functions of ``torch.nn.utils``: arguments, and the choice between native code and torch."""

import sys
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastclip import _torch_functions, clip_report, compiled, distributed, watching
from fastclip._native import _C, NOT_BUILT
from fastclip.counters import count_fallback
from fastclip.policies import ThresholdPolicy, in_force
from fastclip.statistics import GradStatistics
from fastclip.statistics import by_torch as statistics_by_torch
from fastclip.statistics import check as check_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tensors = Tensor | Iterable[Tensor]


def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: "ProcessGroup | None" = None,
    process_groups: "Mapping[ProcessGroup, Tensors] | None" = None,
) -> Tensor:
    """Computes the norm of all tensors, as if they were concatenated into one vector.

    Args:
        tensors: one tensor or an iterable of tensors of any shape; float32, float64, float16, bfloat16 mixed.
        norm_type: order p of the norm, ``(sum |x|^p)^(1/p)``; ``inf`` or ``"inf"`` for the maximum. 1, 2 and inf are
            fused, others are computed by torch.
        error_if_nonfinite: raise when the result is inf or NaN.
        foreach: accepted for compatibility; means something only where torch does the work.
        process_group: the ranks of this group hold different parts of the model, as the stages of a pipeline do: the
            norm is that of all parts. All of them have to call, also one that has no tensors.
        process_groups: the same for some of the tensors only: a mapping from each process group to those that its
            ranks hold different parts of, such as the experts of expert parallelism. Every rank of a group has to name
            it, with an empty list if need be, and several groups in the same order.

    Returns:
        A new 0-d tensor on the first tensor's device. Its dtype is the promotion of the tensors' dtypes, and at least
        float32 (torch returns float16 for float16, which overflows at 65504). Correct to 1e-6 for float32 results,
        1e-12 for float64. ``tensor(0.)`` when there are no tensors. A replicated DTensor when all tensors are DTensors
        of one mesh and no process group is given.

    Raises:
        TypeError: an item is not a tensor or not of a floating-point dtype; the message has its index.
        ValueError: a tensor in ``process_groups`` is not one of ``tensors``, or ``norm_type`` is not fused and there
            are process groups.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
    """
    if is_dynamo_compiling() and process_group is None and not process_groups:
        return compiled.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    tensors = _as_sequence(tensors, "tensors")
    if process_group is not None or process_groups:
        return distributed.get_total_norm(tensors, norm_type, error_if_nonfinite, process_group, process_groups)
    reason = NOT_BUILT
    if _C:
        result = _C.get_total_norm(tensors, norm_type, error_if_nonfinite)
        if result is None:
            return torch.tensor(0.0)
        if type(result) is not str:
            return result
        if result == "subclass":
            result = distributed.get_total_norm(tensors, norm_type, error_if_nonfinite)
            if type(result) is not str:
                return result
        reason = result
    count_fallback(reason)
    with clip_report.naming_the_first_bad("tensors", tensors):
        return _torch_functions.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: "ProcessGroup | None" = None,
    process_groups: "Mapping[ProcessGroup, Tensors] | None" = None,
    statistics: GradStatistics | None = None,
    nonfinite: str | None = None,
) -> Tensor:
    """Scales all gradients in place so that their common norm is at most ``max_norm``.

    The norm is taken over all gradients as if they were one vector; each is multiplied by
    ``min(1, max_norm / (total_norm + 1e-6))``, the formula of ``torch.nn.utils.clip_grad_norm_`` (gradient clipping
    by norm: Pascanu, Mikolov, Bengio 2013, https://arxiv.org/abs/1211.5063). Where that is 1, nothing is written.

    Args:
        parameters: one tensor or an iterable of tensors; those whose ``.grad`` is None are passed over. Gradients are
            float32, float64, float16 or bfloat16, mixed as they come.
        max_norm: the threshold, a number or a 0-d tensor, in the gradients' own unit; or a ``ZClip`` or ``AutoClip``,
            which makes it of the norms so far (under torch.compile such a call leaves the graph).
        norm_type: order of the norm; 1, 2 and inf (or ``"inf"``) are fused, others are done by torch.
        error_if_nonfinite: raise when the norm is inf or NaN, and leave every gradient as it was. The message names
            the first gradient with inf or NaN.
        foreach: accepted for compatibility; means something only where torch does the work.
        process_group: the ranks of this group hold different parts of the model, as the stages of a pipeline do: the
            norm is that of all parts. All of them have to call, also one that has no parameters.
        process_groups: the same for some of the parameters only: a mapping from each process group to those that its
            ranks hold different parts of, such as the experts of expert parallelism. Every rank of a group has to name
            it, with an empty list if need be, and several groups in the same order.
        statistics: its ``values`` become what the same pass over memory knows of each gradient before clipping, see
            ``GradStatistics``. Under torch.compile a call with statistics leaves the graph.
        nonfinite: what to do when the norm is inf or NaN. ``"propagate"`` scales by it, as torch does and as without
            the argument: everything becomes 0 or NaN. ``"skip"`` leaves every gradient as it is. ``"zero"`` stores 0
            in all of them. ``fastclip.last_report()`` then says what was done and which gradient is the first with inf
            or NaN; the call itself does not wait for that. Under torch.compile it leaves the graph.

    Returns:
        The norm before clipping: a new 0-d tensor on the first gradient's device, in the promotion of the gradients'
        dtypes and at least float32. ``tensor(0.)`` when there are no gradients. A replicated DTensor when all gradients
        are DTensors of one mesh and no process group is given.

    Raises:
        TypeError: an item is not a tensor, or its gradient is not of a floating-point dtype; the message has its index.
            ``statistics`` is neither None nor a GradStatistics.
        ValueError: ``nonfinite`` is another value, or ``"skip"`` or ``"zero"`` beside ``error_if_nonfinite``;
            ``max_norm`` or ``norm_type`` is text that is not a number; a tensor in ``process_groups`` is not
            one of ``parameters``; with process groups, a norm type that is not fused.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set; or, as in torch, a gradient cannot be
            written in place because several of its elements share one place in memory.
    """
    if not is_dynamo_compiling() and watching.watchers:
        parameters = _parameters_of(parameters)
        if recording := watching.begin(parameters, statistics=statistics):
            return clip_recorded(
                recording,
                parameters,
                max_norm,
                norm_type,
                error_if_nonfinite,
                foreach,
                process_group=process_group,
                process_groups=process_groups,
                nonfinite=nonfinite,
            )
    if nonfinite is not statistics:  # one look at both: mostly they are None
        return _clip_and_tell(
            parameters,
            max_norm,
            norm_type,
            error_if_nonfinite,
            foreach,
            process_group,
            process_groups,
            statistics,
            nonfinite,
        )
    if is_dynamo_compiling() and process_group is None and not process_groups:
        if isinstance(max_norm, ThresholdPolicy):
            return _clip_outside_of_graphs(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        return compiled.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if type(parameters) is not list:  # two frames of Python less, 0.2 us
        parameters = _parameters_of(parameters)
    if process_group is not None or process_groups:
        return distributed.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, process_group, process_groups
        )
    reason = NOT_BUILT
    if _C:
        result = _C.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
        if result is None:
            return torch.tensor(0.0)
        if type(result) is not str:
            return result
        if result == "subclass":
            result = distributed.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
            if type(result) is not str:
                return result
        reason = result
    count_fallback(reason)
    items = [parameters] if isinstance(parameters, Tensor) else parameters
    return clip_report.clip_by_torch(items, max_norm, norm_type, error_if_nonfinite, foreach, None)


_clip_outside_of_graphs = torch._disable_dynamo(clip_grad_norm_)


def _gradients_of(parameters: Tensor | list | tuple) -> list[Tensor]:
    return [p.grad for p in ([parameters] if isinstance(parameters, Tensor) else parameters) if p.grad is not None]


def clip_recorded(
    recording: watching.Recording | None,
    parameters: Tensors,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    **others: Any,
) -> Tensor:
    """``clip_grad_norm_`` whose statistics go into a recording, if there is one. Watchers were asked before."""
    if recording is None and not watching.watchers:
        return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach, **others)
    statistics = recording.statistics if recording else None
    norm = None
    try:
        with watching.unasked():
            norm = clip_grad_norm_(
                parameters, max_norm, norm_type, error_if_nonfinite, foreach, statistics=statistics, **others
            )
    finally:
        # Also after the error for a norm that is not finite: that step says most about it.
        if recording and getattr(statistics, "values", None) is not None:
            recording.finish(norm, in_force(max_norm), float(norm_type))
    return norm


@torch._disable_dynamo
def _clip_and_tell(
    parameters,
    max_norm,
    norm_type,
    error_if_nonfinite,
    foreach,
    process_group,
    process_groups,
    statistics: GradStatistics | None,
    nonfinite: str | None,
) -> Tensor:
    """A call with statistics, or with ``nonfinite``, of which there is a report then."""
    if nonfinite is not None:
        clip_report.check(nonfinite, error_if_nonfinite)
    if statistics is not None:
        check_statistics(statistics)
        statistics.values = None
    parameters = _parameters_of(parameters)
    if process_group is not None or process_groups:
        return distributed.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, process_group, process_groups, statistics, nonfinite
        )
    reason = NOT_BUILT
    if _C:
        with clip_report.filled(nonfinite, error_if_nonfinite) as report:
            result = _C.clip_grad_norm_and_tell(
                parameters, max_norm, norm_type, error_if_nonfinite, statistics, nonfinite, report
            )
        if result is None:
            if statistics is not None:
                statistics.values = statistics_by_torch([], norm_type)
            if nonfinite is not None:
                clip_report.remember(clip_report.Known(0.0, 1.0), nonfinite)
            return torch.tensor(0.0)
        if type(result) is not str:
            return result
        if result == "subclass":
            result = distributed.clip_grad_norm_(
                parameters, max_norm, norm_type, error_if_nonfinite, statistics=statistics, nonfinite=nonfinite
            )
            if type(result) is not str:
                return result
        reason = result
    count_fallback(reason)
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    if statistics is None:
        return clip_report.clip_by_torch(parameters, max_norm, norm_type, error_if_nonfinite, foreach, nonfinite)
    values = statistics_by_torch(_gradients_of(parameters), norm_type)
    try:
        norm = clip_report.clip_by_torch(parameters, max_norm, norm_type, error_if_nonfinite, foreach, nonfinite)
    except RuntimeError as error:
        if "is non-finite" in str(error):
            statistics.values = values
        raise
    statistics.values = values.to(norm.device)
    return norm


def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float | Tensor, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scales all gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``, with a norm computed before.

    Args:
        parameters: one tensor or an iterable of tensors; those whose ``.grad`` is None are passed over.
        max_norm: the threshold, a number or a 0-d tensor, in the gradients' own unit.
        total_norm: 0-d tensor, as ``get_total_norm`` returns it. The coefficient is computed from it in float64.
        foreach: accepted for compatibility; means something only where torch does the work.

    Raises:
        TypeError, ValueError, RuntimeError: as ``clip_grad_norm_``.
    """
    if is_dynamo_compiling():
        return compiled.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    parameters = _as_sequence(parameters, "parameters")
    if isinstance(max_norm, ThresholdPolicy):
        max_norm = max_norm.follow(total_norm.full_tensor() if distributed.is_dtensor(total_norm) else total_norm)
    if watching.watchers and (recording := watching.begin(parameters)):
        recording.measure()
        recording.finish(total_norm, max_norm)
    reason: Any = NOT_BUILT
    if _C:
        reason = _C.clip_grads_with_norm_(parameters, max_norm, total_norm)
        if reason is None:
            return
        if reason == "subclass" or distributed.is_dtensor(total_norm):
            reason = distributed.clip_grads_with_norm_(parameters, max_norm, total_norm)
            if reason is None:
                return
    count_fallback(reason)
    _torch_functions.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


def clip_grad_value_(parameters: Tensors, clip_value: float | Tensor, foreach: bool | None = None) -> None:
    """Limits every element of every gradient to ``[-clip_value, clip_value]``, in place; NaN stays NaN.

    Gradients are read once; a part in which nothing has to change is not written. No gradient at all is no error
    (torch raises one).

    Args:
        parameters: one tensor or an iterable of tensors; those whose ``.grad`` is None are passed over.
        clip_value: the limit, a number or a 0-d tensor, rounded to each gradient's dtype. Negative and NaN limits are
            handed to torch.
        foreach: accepted for compatibility; means something only where torch does the work.

    Raises:
        TypeError, ValueError: as ``clip_grad_norm_``.
        RuntimeError: a gradient's dtype cannot represent ``clip_value`` (1e6 in float16); or as ``clip_grad_norm_``.
    """
    if is_dynamo_compiling():
        return compiled.clip_grad_value_(parameters, clip_value, foreach)
    parameters = _as_sequence(parameters, "parameters")
    if watching.watchers and (recording := watching.begin(parameters)):
        recording.measure()
        recording.finish(None, None)
    reason: Any = NOT_BUILT
    if _C:
        reason = _C.clip_grad_value_(parameters, clip_value)
        if reason is None:
            return
        if reason == "subclass":
            reason = distributed.clip_grad_value_(parameters, clip_value)
            if reason is None:
                return
    elif not _gradients_of(parameters):
        return
    count_fallback(reason)
    _torch_functions.clip_grad_value_(parameters, clip_value, foreach)


def _parameters_of(given: Tensors) -> Tensor | list | tuple:
    parameters = _as_sequence(given, "parameters")
    if parameters is not given and not parameters and isinstance(given, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=_level_of_caller()
        )
    return parameters


def _level_of_caller() -> int:
    """How far up the stack, in the sense of warnings.warn, the caller is: past fastclip's and torch's own wrappers."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fastclip.", "torch.nn.utils.clip_grad")):
        level, frame = level + 1, frame.f_back
    return level


def _as_sequence(items: Tensors, argument: str) -> Tensor | list | tuple:
    """A list or tuple, or a tensor itself; any other iterable is read, once."""
    if type(items) in (list, tuple) or isinstance(items, Tensor):
        return items  # type: ignore[return-value]
    try:
        return list(items)
    except TypeError:
        if isinstance(items, Iterable):
            raise
        raise TypeError(
            f"{argument}: expected a torch.Tensor or an iterable of them, got {type(items).__name__}"
        ) from None
