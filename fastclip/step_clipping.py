"""What ClippedOptimizer does to the gradients before each step: clips them, or has the step itself clip them."""

import contextlib
import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from fastclip import clip, clip_report, watching
from fastclip._native import _C
from fastclip.counters import count_fallback
from fastclip.policies import ThresholdPolicy, in_force
from fastclip.statistics import COLUMNS, GradStatistics
from fastclip.statistics import by_torch as statistics_by_torch

# What torch.amp.GradScaler leaves on an optimizer for the time of its step: divide gradients by the one; do nothing
# where the other is 1.
AMP_ATTRIBUTES = "grad_scale", "found_inf"

Threshold = float | Tensor | ThresholdPolicy | Callable[[int], float | Tensor]


class _StepLeftOut(Exception):
    """Ends the step of an optimizer from inside its closure, whose result is the argument."""


class StepClipping:
    """The clipping of one optimizer's gradients; arguments as those of ``ClippedOptimizer``.

    Apart from it, since its ``__getattr__`` makes each look at an attribute of its own slower: 1.3 us a step.
    """

    __slots__ = (
        "clip_value",
        "fold",
        "found_inf",
        "honours_grad_scale",
        "is_recorded",
        "last",
        "max_norm",
        "monitors",
        "nonfinite",
        "norm_type",
        "optimizer",
        "prepared",
        "statistics",
        "steps",
    )

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: Threshold | None,
        norm_type: float,
        fold: bool | str,
        clip_value: float | None,
        steps: int = 0,
        honours_grad_scale: bool | None = None,
        nonfinite: str | None = None,
    ):
        self.optimizer: Any = optimizer  # any attributes: it is given grad_scale and found_inf
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.fold = fold
        self.clip_value = clip_value
        self.steps = steps  # taken so far
        self.nonfinite = nonfinite
        self.found_inf: Tensor | None = None  # 1 where the norm read last is not finite
        self.statistics: GradStatistics | None = None
        self.monitors: list[watching.Watcher] = []
        self.last: tuple[Tensor | None, Any] = None, None  # total_norm and max_norm, last step
        self.prepared: tuple[Tensor | None] | None = None  # by fastclip.GradScaler: what the step has to divide by
        self.is_recorded = False  # the coming step, since fastclip.GradScaler has looked at it
        if honours_grad_scale is None:  # not a copy, whose optimizer has lost the attribute that tells
            honours_grad_scale = _honours_grad_scale(optimizer)
        self.honours_grad_scale = honours_grad_scale

    @property
    def last_clip_coef(self) -> Tensor | None:
        norm, max_norm = self.last
        if norm is None:
            return None
        coef = (in_force(max_norm) / (norm + 1e-6)).clamp(max=1)
        if self.nonfinite not in ("skip", "zero"):
            return coef
        return torch.where(norm.isfinite(), coef, 1.0 if self.nonfinite == "skip" else 0.0)

    def step(self, closure: Callable[[], Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> Any:
        """The step of an optimizer with a closure."""
        try:
            return self.optimizer.step(self.clipped(closure, grad_scale, found_inf))
        except _StepLeftOut as left_out:
            return left_out.args[0]

    def clip(
        self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None, is_recorded: bool = True
    ) -> bool | None:
        """Clips, or leaves attributes on the optimizer with which its step clips. The caller removes these after it.

        Returns whether the caller has to leave the step out.

        Args:
            grad_scale, found_inf: what a GradScaler has left for this step.
            is_recorded: whether monitors record these gradients.
        """
        if not self.monitors and not watching.watchers:
            return self._clip_unwatched(grad_scale, found_inf)
        is_new = self.prepared is None and not self.is_recorded
        with self._watched(is_recorded and is_new, grad_scale):
            return self._clip_unwatched(grad_scale, found_inf)

    def clipped(
        self, closure: Callable[[], Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Callable[[], Any]:
        """A closure that clips after each evaluation. Monitors record the first one."""
        evaluations = itertools.count()

        def evaluate() -> Any:
            loss = closure()
            for name in AMP_ATTRIBUTES if self.honours_grad_scale else ():  # of the evaluation before
                self.optimizer.__dict__.pop(name, None)
            is_first = next(evaluations) == 0
            # Later, an optimizer is in the middle of its step, with parameters on trial.
            if self.clip(grad_scale, found_inf, is_recorded=is_first) and is_first:
                raise _StepLeftOut(loss)
            return loss

        return evaluate

    @contextlib.contextmanager
    def _watched(self, is_recorded: bool, grad_scale: Tensor | None) -> Iterator[None]:
        """Records what is clipped in the block; what it calls asks no watcher again."""
        parameters = self._all_parameters()
        recording = watching.begin(parameters, self.monitors, self.statistics) if is_recorded else None
        given = self.statistics
        if recording:
            self.statistics, self.last = recording.statistics, (None, None)
        try:
            with watching.unasked():
                yield
        finally:
            self.statistics = given
        if recording:
            has_one_norm = not any("max_norm" in group for group in self.optimizer.param_groups)
            total_norm, max_norm = self.last if has_one_norm else (None, None)
            recording.finish(total_norm, in_force(max_norm), self.norm_type, grad_scale)

    def _clip_unwatched(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool | None:
        if self.clip_value is not None and not self._has_own_thresholds():
            if self.statistics is not None:
                self.statistics.values = self._rows_of(self._all_parameters())
            clip.clip_grad_value_(self._parameters(), self.clip_value)
            return None
        if _current_graph_task_id() != -1:
            raise RuntimeError(
                "ClippedOptimizer.step() was called during the backward pass (from a gradient hook, as an optimizer in "
                "backward does it): no norm over all gradients exists then. Step after backward(), or use clip_value"
            )
        if self.prepared is not None:
            (grad_scale,) = self.prepared
        elif (parameters := self._foldable()) is not None:
            grad_scale = self._read_norm(parameters, grad_scale)
            if self.nonfinite == "skip" and found_inf is None:
                found_inf = self.found_inf
        else:
            self.check_fold()
            return self._clip_in_place()
        # Without a grad_scale the optimizer does not write the gradients.
        if grad_scale is not None:
            self.optimizer.grad_scale = grad_scale
        if found_inf is not None:
            if self._begins_momentum() and bool(found_inf):
                return True
            self.optimizer.found_inf = found_inf
        return None

    def _begins_momentum(self) -> bool:
        """Whether this step makes SGD's momentum. torch leaves it without values then where found_inf is 1.

        So the host has to wait, in steps before the first good one.
        """
        if not isinstance(self.optimizer, SGD):
            return False
        firsts = [
            next((p for p in group["params"] if p.grad is not None), None)
            for group in self.optimizer.param_groups
            if group["momentum"]
        ]
        state = self.optimizer.state
        return any(p is not None and state.get(p, {}).get("momentum_buffer") is None for p in firsts)

    def _clip_in_place(self) -> bool | None:
        # All thresholds are read before anything is clipped, since one may be wrong.
        own = [
            (group["params"], self._threshold(group["max_norm"], f"param_groups[{i}]['max_norm']"))
            for i, group in enumerate(self.optimizer.param_groups)
            if group.get("max_norm") is not None
        ]
        max_norm = None if self.max_norm is None else self._threshold(self.max_norm)
        calls = None if self.statistics is None else _Calls(self.statistics)
        norms = []
        for parameters, threshold in own:
            statistics = calls and calls.next(parameters)
            norms.append(
                clip.clip_grad_norm_(
                    parameters, threshold, self.norm_type, statistics=statistics, nonfinite=self.nonfinite
                )
            )
        if max_norm is not None:
            parameters = self._parameters()
            statistics = calls and calls.next(parameters)
            norm = clip.clip_grad_norm_(
                parameters, max_norm, self.norm_type, statistics=statistics, nonfinite=self.nonfinite
            )
            self.last = _plain(norm), max_norm
            norms.append(norm)
        if calls:
            calls.gather(self._all_parameters(), self._rows_of)
        if self.clip_value is not None:
            clip.clip_grad_value_(self._parameters(), self.clip_value)
        return self._leaves_out(norms) if self.nonfinite == "skip" else None

    def _leaves_out(self, norms: list[Tensor]) -> bool:
        """Whether the caller has to leave the step out, or the optimizer is told how to know it."""
        if not (self.honours_grad_scale and all(group.get("fused", True) for group in self.optimizer.param_groups)):
            return not all(bool(_plain(norm).isfinite()) for norm in norms)  # waits
        if norms:
            is_finite = torch.stack([_plain(norm).isfinite().to(norms[-1].device) for norm in norms]).all()
            if self._begins_momentum() and not bool(is_finite):
                return True
            self.optimizer.found_inf = is_finite.logical_not().float()
        return False

    def _threshold(self, value: Threshold | None, argument: str = "max_norm") -> Any:
        value = number(value(self.steps) if callable(value) else value, argument)
        return value.detach() if isinstance(value, Tensor) else value

    # ---- folding ----

    def _foldable(self) -> list[Tensor] | None:
        """The parameters whose clipping the step takes over, None where it does not."""
        groups = self.optimizer.param_groups
        if self.fold is False or not self.honours_grad_scale or self.max_norm is None or self.nonfinite == "zero":
            return None
        for group in groups:
            if "max_norm" in group or not group.get("fused", True):
                return None
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    @property
    def folds(self) -> bool:
        return self._foldable() is not None

    @property
    def folds_scaled(self) -> bool:
        """Whether the step takes over gradients with a GradScaler's scale as well.

        Not where torch takes the norm in the gradients' dtype: 65536^10 is beyond float32.
        """
        return self.folds and float(self.norm_type) in (1, 2, float("inf"))

    def check_fold(self) -> None:
        if self.fold is True and not self.folds:
            raise ValueError(
                "fold: expected with True an optimizer that honours grad_scale (torch's SGD, Adam, AdamW, Adagrad with "
                "fused=True in all groups) and one max_norm for all groups, got "
                f"{type(self.optimizer).__name__}, max_norm={self.max_norm}, clip_value={self.clip_value}, "
                f"nonfinite={self.nonfinite}, groups "
                f"with fused={[group.get('fused') for group in self.optimizer.param_groups]}, "
                f"max_norm={[group.get('max_norm', 'missing') for group in self.optimizer.param_groups]}"
            )

    def _read_norm(self, parameters: list[Tensor], grad_scale: Tensor | None) -> Tensor | None:
        """Reads the norm and returns what the optimizer has to divide by, None for 1."""
        max_norm: Any = self.max_norm
        if not isinstance(max_norm, (float, int)):
            max_norm = self._threshold(max_norm)
        reason = None
        if _C:
            if self.statistics is None and self.nonfinite is None:  # not by way of _prepare(): a frame of Python less
                prepared = _C.prepare_step(parameters, max_norm, self.norm_type, grad_scale, False)
            else:
                prepared = self._prepare(parameters, max_norm, grad_scale, False, self.nonfinite)
            if prepared is None:  # no gradients
                prepared = torch.tensor(0.0), grad_scale, None
            if type(prepared) is not str:
                self.last, self.found_inf = (prepared[0], max_norm), prepared[2]
                return prepared[1]
            reason = prepared
        if self.fold is True and reason == "sparse":
            raise ValueError("fold: expected with True dense gradients, got a sparse one")
        if self.statistics is not None:
            self.statistics.values = _unscaled(self._rows_of(parameters), grad_scale)
        with torch.no_grad():
            own = [p.grad for p in parameters if p.grad is not None]
            norm = _plain(clip.get_total_norm(own, self.norm_type))
            norm = norm if grad_scale is None else norm / grad_scale
            if isinstance(max_norm, ThresholdPolicy):
                max_norm = max_norm.follow(norm) if own else math.inf
            self.last = norm, max_norm
            if self.nonfinite is not None:
                self.found_inf = norm.isfinite().logical_not().float()
                grads = [p.grad for p in parameters]
                clip_report.remember(clip_report.known(norm, max_norm, self.nonfinite, grads), self.nonfinite)
            scale: Any = 1 if grad_scale is None else grad_scale
            return (scale / self.last_clip_coef).float()

    def prepare_scaled(self, grad_scale: Tensor) -> Tensor | None:
        """For fastclip.GradScaler: reads the norm of gradients that are multiplied by ``grad_scale``, in one pass.

        Where the step does not fold, that pass unscales and clips as well. Returns found_inf (0-d float32), or None
        where torch's GradScaler has to do its part.
        """
        if not _C or self.max_norm is None or any("max_norm" in group for group in self.optimizer.param_groups):
            return None
        if not self.monitors and not watching.watchers:
            return self._prepare_unwatched(grad_scale)
        with self._watched(True, grad_scale):
            found_inf = self._prepare_unwatched(grad_scale)
            if found_inf is None and self.statistics is not None:
                self.last = None, self._threshold(self.max_norm)
                self.statistics.values = _unscaled(self._rows_of(self._parameters()), grad_scale)
        self.is_recorded = True
        return found_inf

    def _prepare_unwatched(self, grad_scale: Tensor) -> Tensor | None:
        max_norm = self._threshold(self.max_norm)
        folds = self.folds
        # The scaler leaves a bad step out, whatever the policy is.
        nonfinite = None if self.nonfinite is None else "skip"
        prepared = self._prepare(self._parameters(), max_norm, grad_scale, not folds, nonfinite)
        if prepared is None or type(prepared) is str:
            return None
        self.last = prepared[0], max_norm
        self.prepared = (prepared[1] if folds else None,)
        return prepared[2]

    def _prepare(
        self,
        parameters: list[Tensor],
        max_norm,
        grad_scale: Tensor | None,
        in_place: bool,
        nonfinite: str | None = None,
    ) -> Any:
        statistics = self.statistics
        if statistics is None and nonfinite is None:
            return _C.prepare_step(parameters, max_norm, self.norm_type, grad_scale, in_place)
        if statistics is not None:
            statistics.values = None
        with clip_report.filled(nonfinite, False) as report:
            prepared = _C.prepare_step_and_tell(
                parameters, max_norm, self.norm_type, grad_scale, in_place, statistics, nonfinite, report
            )
        if prepared is None and nonfinite is not None:
            clip_report.remember(clip_report.Known(0.0, 1.0), nonfinite)
        if statistics is None:
            return prepared
        if prepared is None:
            statistics.values = statistics_by_torch([], self.norm_type)
        elif type(prepared) is not str:
            _unscaled(statistics.values, grad_scale)  # type: ignore[arg-type]  # the extension has set them
        return prepared

    def _rows_of(self, parameters: list[Tensor]) -> Tensor:
        """Statistics in a pass of their own, for gradients that no native pass reads the norm of."""
        grads = [p.grad for p in parameters if p.grad is not None]
        result: Any = "norm_type"
        if _C and float(self.norm_type) in (1, 2, float("inf")):
            result = _C.norm_and_statistics_of(grads, float(self.norm_type))
        if type(result) is not str:
            return result[1]
        if grads:
            count_fallback(result)
        return statistics_by_torch(grads, self.norm_type)

    def _has_own_thresholds(self) -> bool:
        return any(group.get("max_norm") is not None for group in self.optimizer.param_groups)

    def _parameters(self) -> list[Tensor]:
        """Those that have no threshold of their own."""
        return [p for group in self.optimizer.param_groups if "max_norm" not in group for p in group["params"]]

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@final
class _Calls:
    """Statistics of the several calls that clip one step's groups, put together in the order of the parameters."""

    def __init__(self, statistics: GradStatistics):
        self._statistics = statistics
        statistics.values = None
        self._calls: list[tuple[list[Tensor], GradStatistics]] = []

    def next(self, parameters: list[Tensor]) -> GradStatistics:
        self._calls.append((parameters, GradStatistics()))
        return self._calls[-1][1]

    def gather(self, parameters: list[Tensor], rows_of: Callable[[list[Tensor]], Tensor]) -> None:
        """``rows_of`` reads the parameters that no call has clipped."""
        if len(self._calls) == 1 and len(self._calls[0][0]) == len(parameters):
            self._statistics.values = self._calls[0][1].values
            return
        clipped = {id(p) for members, _ in self._calls for p in members}
        rest = [p for p in parameters if id(p) not in clipped]
        blocks: list[tuple[list[Tensor], Any]] = [
            (members, statistics.values) for members, statistics in self._calls
        ] + [(rest, rows_of(rest))]
        row_of: dict[int, int] = {}
        device = next((p.grad.device for p in parameters if p.grad is not None), torch.device("cpu"))
        for members, _ in blocks:
            for p in members:
                if p.grad is not None:
                    row_of[id(p)] = len(row_of)
        order = [row_of[id(p)] for p in parameters if p.grad is not None]
        self._statistics.values = torch.cat([values.to(device) for _, values in blocks])[order]


def _unscaled(values: Tensor, grad_scale: Tensor | None) -> Tensor:
    if grad_scale is not None:
        values[:, : COLUMNS.index("zeros")] /= grad_scale.to(values.device)
    return values


def _plain(norm: Tensor) -> Tensor:
    """The norm of a sharded model, which comes as a replicated DTensor, as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def number(value: Any, argument: str) -> float | Tensor | ThresholdPolicy:
    """A threshold, if it is one. A tensor is not looked at: that might wait for a device."""
    if isinstance(value, (Tensor, ThresholdPolicy)):
        return value
    is_number = type(value) is float or isinstance(value, numbers.Real)  # which takes 0.4 us
    if not is_number:
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if not value >= 0:
        raise ValueError(f"{argument}: expected a number >= 0, got {value!r}")
    return value


def _honours_grad_scale(optimizer: Optimizer) -> bool:
    """Whether a step, fused if there is a choice, divides by grad_scale.

    Others than torch's own say so as GradScaler expects it. torch's do it until they are pickled, which loses the
    attribute. Some old ones ask for a grad_scaler instead.
    """
    if type(optimizer) in (SGD, Adam, AdamW, Adagrad):
        return True
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return "grad_scaler" not in inspect.signature(optimizer.step).parameters
