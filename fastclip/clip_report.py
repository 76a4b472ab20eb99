"""What a call with ``nonfinite=`` does where the norm is inf or NaN, and what it says of that afterwards.

A call leaves behind what nobody has read yet: numbers on the device. ``last_report()`` reads them, and waits.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip import _torch_functions
from fastclip._native import _C
from fastclip.policies import ThresholdPolicy

# What the argument may be, and what ClipReport.action calls it where it was done.
POLICIES = {"propagate": "propagated", "skip": "skipped", "zero": "zeroed"}
_thread = threading.local()


@dataclass(frozen=True)
class ClipReport:
    """What a call of ``clip_grad_norm_(…, nonfinite=…)`` or a step of ``ClippedOptimizer(…, nonfinite=…)`` did.

    - ``total_norm``: the norm before clipping, as it was returned
    - ``clip_coef``: what the gradients were multiplied by; 1.0 where they stayed, 0.0 where they became zero
    - ``is_nonfinite``: whether that norm is inf or NaN
    - ``action``: ``"nothing"`` or ``"clipped"`` where it is finite, else ``"propagated"``, ``"skipped"``, ``"zeroed"``,
      and ``"nothing"`` where an error was raised
    - ``first_bad``: the index in ``parameters`` of the first gradient with inf or NaN, None where none has one: the
      norm of finite gradients may still be beyond its dtype. Over several ranks it is this rank's own.
    """

    total_norm: float
    clip_coef: float
    is_nonfinite: bool
    action: str
    first_bad: int | None


def last_report() -> ClipReport | None:
    """The report on this thread's last call that was given ``nonfinite``; None if there was none. Waits for the device.

    Of a call that was captured in a CUDA graph, it is that on the latest replay.
    """
    last = getattr(_thread, "last", None)
    if last is None:
        return None
    source, nonfinite, has_raised = last
    total_norm, clip_coef, first_bad = source.total_norm(), source.clip_coef(), source.first_bad()
    is_nonfinite = not math.isfinite(total_norm)
    if is_nonfinite:
        action = "nothing" if has_raised else POLICIES[nonfinite]
    else:
        action = "nothing" if clip_coef == 1 else "clipped"
    return ClipReport(total_norm, clip_coef, is_nonfinite, action, None if first_bad < 0 else first_bad)


def check(nonfinite: object, error_if_nonfinite: bool = False) -> None:
    """Raises a ValueError for what is no policy, and for one beside an error that comes before it."""
    if not isinstance(nonfinite, str) or nonfinite not in POLICIES:
        raise ValueError(f'nonfinite: expected "propagate", "skip" or "zero", got {nonfinite!r}')
    if error_if_nonfinite and nonfinite != "propagate":
        raise ValueError(
            f'error_if_nonfinite: expected False beside nonfinite="{nonfinite}", got {error_if_nonfinite!r}'
        )


def remember(source: "_C.ClipReport | Known", nonfinite: str, has_raised: bool = False) -> None:
    """Makes a call this thread's last one."""
    _thread.last = source, nonfinite, has_raised


class Known:
    """A report on what torch's functions did, with the methods of ``_C.ClipReport``: numbers that the host has."""

    def __init__(self, total_norm: float, clip_coef: float, first_bad: int = -1):
        self._total_norm, self._clip_coef, self._first_bad = total_norm, clip_coef, first_bad

    def total_norm(self) -> float:
        return self._total_norm

    def clip_coef(self) -> float:
        return self._clip_coef

    def first_bad(self) -> int:
        return self._first_bad


def known(total_norm: Tensor, max_norm: float | Tensor, nonfinite: str, grads: Sequence[Tensor | None]) -> Known:
    """The report on gradients that are about to be clipped: a None for each parameter without one.

    It waits for the device. The coefficient is computed in the dtype of the norm, as the gradients' is.
    """
    norm, is_finite = float(total_norm), bool(total_norm.isfinite())
    if is_finite or nonfinite == "propagate":
        coef = float((max_norm / (total_norm + 1e-6)).clamp(max=1.0))
    else:
        coef = 0.0 if nonfinite == "zero" else 1.0
    return Known(norm, coef, -1 if is_finite else first_bad_of(grads))


def first_bad_of(grads: Sequence[Tensor | None]) -> int:
    """The index of the first gradient with inf or NaN, -1 if there is none; by torch's own operations."""
    for index, grad in enumerate(grads):
        if grad is not None and not _is_finite(grad.detach()):
            return index
    return -1


def _is_finite(grad: Tensor) -> bool:
    grad = getattr(grad, "_local_tensor", grad)  # of a DTensor
    if grad.layout == torch.sparse_coo:
        grad = grad.coalesce().values()
    elif grad.layout != torch.strided:
        grad = grad.to_dense()
    return bool(grad.isfinite().all())


@contextlib.contextmanager
def naming_the_first_bad(argument: str, items: Tensor | Sequence[Tensor], suffix: str = "") -> Iterator[None]:
    """Adds to torch's error for a norm that is not finite which item of ``argument`` is the first bad one."""
    try:
        yield
    except RuntimeError as error:
        if "is non-finite, so it cannot be clipped" not in str(error):
            raise
        items = [items] if isinstance(items, Tensor) else items
        index = first_bad_of([item.grad for item in items] if argument == "parameters" else items)
        name = f"{argument}[{index}]{'.grad' if argument == 'parameters' else ''}"
        where = f"{name} has the first inf or NaN" if index >= 0 else "No gradient has an inf or NaN"
        raise RuntimeError(f"{error}. {where}{suffix}") from None


@contextlib.contextmanager
def filled(nonfinite: str | None, error_if_nonfinite: bool) -> "Iterator[_C.ClipReport | None]":
    """What a native call in the block is to fill, if there is a policy; remembered once it has, also if it raises."""
    report = None if nonfinite is None else _C.ClipReport()
    try:
        yield report
    finally:
        if nonfinite is not None and report is not None and report.is_filled():
            remember(report, nonfinite, error_if_nonfinite)


def scale_by_torch(
    parameters: Sequence[Tensor],
    max_norm: float | Tensor,
    total_norm: Tensor,
    nonfinite: str | None,
    foreach: bool | None = None,
) -> None:
    """``clip_grads_with_norm_`` through torch's functions. With a policy it waits for the device."""
    if nonfinite in (None, "propagate") or bool(total_norm.isfinite()):
        return _torch_functions.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    if nonfinite == "zero":
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()


def clip_by_torch(
    parameters: Sequence[Tensor],
    max_norm: Any,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    nonfinite: str | None,
) -> Tensor:
    """``clip_grad_norm_`` through torch's functions, for what no kernel does. ``nonfinite`` waits for the device."""
    follows = isinstance(max_norm, ThresholdPolicy)
    if nonfinite is None and not follows:
        with naming_the_first_bad("parameters", parameters):
            return _torch_functions.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    grads = [p.grad for p in parameters]
    own = [grad for grad in grads if grad is not None]
    norm = _torch_functions.get_total_norm(own, norm_type, False, foreach)
    plain = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if follows:
        max_norm = max_norm.follow(plain) if own else math.inf
    if nonfinite is not None:
        report = known(plain, max_norm, "skip" if error_if_nonfinite else nonfinite, grads)
        remember(report, nonfinite, error_if_nonfinite)
    if error_if_nonfinite and not plain.isfinite():
        with naming_the_first_bad("parameters", parameters):
            _torch_functions.get_total_norm([plain.abs()], norm_type, error_if_nonfinite=True)  # torch's own error
    scale_by_torch(parameters, max_norm, norm, nonfinite, foreach)
    return norm
