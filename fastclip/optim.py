"""The optimizer wrapper: clipping as a part of the step, folded into it where the optimizer can scale gradients."""

import contextlib
import inspect
import numbers
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from fastclip import clip, watching
from fastclip._native import _C
from fastclip.counters import count_fallback
from fastclip.statistics import COLUMNS, GradStatistics
from fastclip.statistics import by_torch as statistics_by_torch
from fastclip.statistics import check as check_statistics

Threshold = float | Tensor | Callable[[int], float | Tensor]

# What torch.amp.GradScaler leaves on an optimizer for the time of its step: divide gradients by the one; do nothing
# where the other is 1.
_AMP_ATTRIBUTES = "grad_scale", "found_inf"
_HOOKS = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]


def _of_the_optimizer(name: str) -> property:
    return property(
        lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value)
    )


class ClippedOptimizer(Optimizer):
    """Wraps an optimizer so that ``step()`` clips the gradients first; everything else is the optimizer's own.

    Torch's fused optimizers divide gradients by an attribute ``grad_scale`` while they step. There the clip costs
    nothing but the reading of the norm: ``1 / clip_coef`` goes in as ``grad_scale``. Others are clipped in place.

    Args:
        optimizer: any ``torch.optim.Optimizer``; stays reachable as ``.optimizer``.
        max_norm: the threshold for the common norm of all gradients: a number >= 0, a 0-d tensor, or a callable that is
            given ``.steps``, the number of steps taken before. May be set at any time. None: only groups with a
            threshold of their own are clipped.
        norm_type: order of the norm, see ``fastclip.clip_grad_norm_``.
        fold: "auto" folds where it is possible, False clips in place, True raises where it is not possible.
        clip_value: clips each element to ``[-clip_value, clip_value]`` instead, in place.
        statistics: each step fills it with what it knows of each gradient before clipping, see ``GradStatistics``; may
            be set at any time. Rows are those of all parameters of all groups, in order, whose ``.grad`` is not None.
            Under a GradScaler norms and maxima are the true, unscaled ones; elements are counted as they lie in memory
            (zero or subnormal while still scaled, where the step reads them so).
        monitor: a ``fastclip.GradientMonitor`` that records each step; the same as ``monitor.attach(…)``.

    A parameter group may have a threshold of its own, ``param_groups[i]["max_norm"]`` (None: it is not clipped). It is
    then clipped by its own norm, in place, and no part of the common norm; groups without the key share that one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or is a ClippedOptimizer; a threshold is not a number.
        ValueError: a threshold is negative or NaN, or both thresholds are given; ``fold=True`` is not possible.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: Threshold | None = None,
        norm_type: float = 2.0,
        fold: bool | str = "auto",
        *,
        clip_value: float | None = None,
        statistics: GradStatistics | None = None,
        monitor: watching.Watcher | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, ClippedOptimizer):
            raise TypeError("optimizer: expected one that is not clipped already, got ClippedOptimizer")
        if not (isinstance(fold, bool) or fold == "auto"):
            raise ValueError(f'fold: expected "auto", True or False, got {fold!r}')
        if clip_value is not None and max_norm is not None:
            raise ValueError("clip_value: expected None beside max_norm, got both")
        if clip_value is not None:
            _number(clip_value, "clip_value")
        if monitor is not None and not callable(getattr(monitor, "attach", None)):
            raise TypeError(f"monitor: expected a fastclip.GradientMonitor, got {type(monitor).__name__}")
        self.__setstate__(
            {"optimizer": optimizer, "norm_type": norm_type, "fold": fold, "clip_value": clip_value, "steps": 0}
        )
        self.max_norm = max_norm
        self.statistics = statistics
        self._check_fold()
        if monitor is not None:
            monitor.attach(self)

    @property
    def statistics(self) -> GradStatistics | None:
        return self._statistics

    @statistics.setter
    def statistics(self, value: GradStatistics | None) -> None:
        if value is not None:
            check_statistics(value)
        self._statistics = value

    @property
    def max_norm(self) -> Threshold | None:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: Threshold | None) -> None:
        if value is not None and not callable(value):
            _number(value, "max_norm")
        self._max_norm = value

    @property
    def last_total_norm(self) -> Tensor | None:
        """The common norm at the last step, unscaled, before clipping: 0-d, as ``clip_grad_norm_`` returns it."""
        return self._last[0]

    @property
    def last_clip_coef(self) -> Tensor | None:
        """What the gradients were multiplied by at the last step: 0-d, on the norm's device. Nothing waits for it."""
        norm, max_norm = self._last
        return None if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1)

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and steps; returns what the optimizer returns.

        With a closure, the gradients of each of its evaluations are clipped (LBFGS makes several in a step).

        Raises:
            RuntimeError: called during the backward pass, when only a part of the gradients exists.
            ValueError: a threshold is negative or NaN; ``fold=True`` is not possible. Nothing has been changed then.
        """
        # torch.compile leaves its graph for the step; to be outside of it always would cost 2 us. The name `torch` has
        # to stand here: in frames without tensors or torch, Dynamo evaluates nothing and goes on to trace the callees.
        if torch.compiler.is_dynamo_compiling():
            return _step_outside_of_graphs(self, closure)
        return self._step(closure)

    step.hooked = True  # or torch would put its own hooks around it, those of all optimizers a second time

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        try:
            if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
                return self._step_with_hooks((self, closure), {})
            return self._clip_and_step(closure)
        except BaseException:
            _forget(self)  # a GradScaler does it after a step that ended well
            raise
        finally:
            attributes = self.optimizer.__dict__
            if "grad_scale" in attributes or "found_inf" in attributes:
                _forget(self.optimizer)

    def _step_with_hooks(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs the hooks of this very optimizer. Those of all optimizers run around the inner step."""
        for hook in self._optimizer_step_pre_hooks.values():
            args, kwargs = _first_given(hook(self, args, kwargs), (args, kwargs))
        result = self._clip_and_step(*args[1:], **kwargs)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, args, kwargs)
        return result

    def _clip_and_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            self._clip()
            result = self.optimizer.step()
        else:
            first = iter([True])
            result = self.optimizer.step(lambda: self._evaluate(closure, next(first, False)))
        self.steps += 1
        return result

    def _evaluate(self, closure: Callable[[], Any], is_first: bool) -> Any:
        loss = closure()
        self._clip(is_recorded=is_first)
        return loss

    def _clip(self, is_recorded: bool = True) -> None:
        if not self.monitors and not watching.watchers:
            self._clip_unwatched()
        else:
            is_new = self._prepared is None and not self._is_recorded
            with self._watched(is_recorded and is_new, self.__dict__.get("grad_scale")):
                self._clip_unwatched()

    @contextlib.contextmanager
    def _watched(self, is_recorded: bool, grad_scale: Tensor | None) -> Iterator[None]:
        """Records what is clipped in the block; what it calls asks no watcher again."""
        parameters = self._all_parameters()
        recording = watching.begin(parameters, self.monitors, self._statistics) if is_recorded else None
        given = self._statistics
        if recording:
            self._statistics, self._last = recording.statistics, (None, None)
        try:
            with watching.unasked():
                yield
        finally:
            self._statistics = given
        if recording:
            has_one_norm = not any("max_norm" in group for group in self.param_groups)
            total_norm, max_norm = self._last if has_one_norm else (None, None)
            recording.finish(total_norm, max_norm, self.norm_type, grad_scale)

    def _clip_unwatched(self) -> None:
        if self.clip_value is not None:
            if self._statistics is not None:
                self._statistics.values = self._rows_of(self._all_parameters())
            clip.clip_grad_value_(self._parameters(), self.clip_value)
            return
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "ClippedOptimizer.step() was called during the backward pass (from a gradient hook, as an optimizer in "
                "backward does it): no norm over all gradients exists then. Step after backward(), or use clip_value"
            )
        if self._prepared is not None:
            (grad_scale,) = self._prepared
        elif (parameters := self._foldable()) is not None:
            max_norm = self._max_norm
            grad_scale = self._read_norm(parameters, self._threshold(max_norm) if callable(max_norm) else max_norm)
        else:
            self._check_fold()
            return self._clip_in_place()
        # Without a grad_scale the optimizer does not write the gradients.
        if grad_scale is not None:
            self.optimizer.grad_scale = grad_scale
        if "found_inf" in self.__dict__:
            self.optimizer.found_inf = self.found_inf

    def _clip_in_place(self) -> None:
        # All thresholds are read before anything is clipped, since one may be wrong.
        own = [
            (group["params"], self._threshold(group["max_norm"], f"param_groups[{i}]['max_norm']"))
            for i, group in enumerate(self.param_groups)
            if group.get("max_norm") is not None
        ]
        max_norm = None if self._max_norm is None else self._threshold(self._max_norm)
        calls = None if self._statistics is None else _Calls(self._statistics)
        for parameters, threshold in own:
            clip.clip_grad_norm_(parameters, threshold, self.norm_type, statistics=calls and calls.next(parameters))
        if max_norm is not None:
            parameters = self._parameters()
            statistics = calls and calls.next(parameters)
            norm = clip.clip_grad_norm_(parameters, max_norm, self.norm_type, statistics=statistics)
            self._last = _plain(norm), max_norm
        if calls:
            calls.gather(self._all_parameters(), self._rows_of)

    def _threshold(self, value: Threshold, argument: str = "max_norm") -> float | Tensor:
        return _number(value(self.steps) if callable(value) else value, argument)

    # ---- folding ----

    def _foldable(self) -> list[Tensor] | None:
        """The parameters whose clipping the step takes over, None where it does not."""
        groups = self.optimizer.param_groups
        if self.fold is False or not self._honours_grad_scale or self._max_norm is None:
            return None
        for group in groups:
            if "max_norm" in group or not group.get("fused", True):
                return None
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    @property
    def _folds(self) -> bool:
        return self._foldable() is not None

    # Asked by GradScaler. Where the step does not fold, it unscales the gradients and leaves bad steps out itself.
    _step_supports_amp_scaling = _folds

    def _check_fold(self) -> None:
        if self.fold is True and not self._folds:
            raise ValueError(
                "fold: expected with True an optimizer that honours grad_scale (torch's SGD, Adam, AdamW, Adagrad with "
                "fused=True in all groups) and one max_norm for all groups, got "
                f"{type(self.optimizer).__name__}, max_norm={self._max_norm}, clip_value={self.clip_value}, groups "
                f"with fused={[group.get('fused') for group in self.param_groups]}, "
                f"max_norm={[group.get('max_norm', 'missing') for group in self.param_groups]}"
            )

    def _read_norm(self, parameters: list[Tensor], max_norm: float | Tensor) -> Tensor | None:
        """Reads the norm and returns what the optimizer has to divide by, None for 1."""
        grad_scale = self.__dict__.get("grad_scale")
        reason = None
        if _C:
            prepared = self._prepare(parameters, max_norm, grad_scale, False)
            if prepared is None:  # no gradients
                prepared = torch.tensor(0.0), grad_scale, None
            if type(prepared) is not str:
                self._last = prepared[0], max_norm
                return prepared[1]
            reason = prepared
        if self.fold is True and reason == "sparse":
            raise ValueError("fold: expected with True dense gradients, got a sparse one")
        if self._statistics is not None:
            self._statistics.values = _unscaled(self._rows_of(parameters), grad_scale)
        with torch.no_grad():
            norm = clip.get_total_norm([p.grad for p in parameters if p.grad is not None], self.norm_type)
            norm = _plain(norm)
            self._last = norm if grad_scale is None else norm / grad_scale, max_norm
            return ((1 if grad_scale is None else grad_scale) / self.last_clip_coef).float()

    def _prepare_scaled(self, grad_scale: Tensor) -> Tensor | None:
        """For fastclip.GradScaler: reads the norm of gradients that are multiplied by ``grad_scale``, in one pass.

        Where the step does not fold, that pass unscales and clips as well. Returns found_inf (0-d float32), or None
        where torch's GradScaler has to do its part.
        """
        if not _C or self._max_norm is None or any("max_norm" in group for group in self.param_groups):
            return None
        if not self.monitors and not watching.watchers:
            return self._prepare_unwatched(grad_scale)
        with self._watched(True, grad_scale):
            found_inf = self._prepare_unwatched(grad_scale)
            if found_inf is None and self._statistics is not None:
                self._last = None, self._threshold(self._max_norm)
                self._statistics.values = _unscaled(self._rows_of(self._parameters()), grad_scale)
        self._is_recorded = True
        return found_inf

    def _prepare_unwatched(self, grad_scale: Tensor) -> Tensor | None:
        max_norm = self._threshold(self._max_norm)
        folds = self._folds
        prepared = self._prepare(self._parameters(), max_norm, grad_scale, not folds)
        if prepared is None or type(prepared) is str:
            return None
        self._last = prepared[0], max_norm
        self._prepared = (prepared[1] if folds else None,)
        return prepared[2]

    def _prepare(self, parameters: list[Tensor], max_norm, grad_scale: Tensor | None, in_place: bool) -> Any:
        statistics = self._statistics
        if statistics is None:
            return _C.prepare_step(parameters, max_norm, self.norm_type, grad_scale, in_place)
        statistics.values = None
        prepared = _C.prepare_step_with_statistics(
            parameters, max_norm, self.norm_type, grad_scale, in_place, statistics
        )
        if prepared is None:
            statistics.values = statistics_by_torch([], self.norm_type)
        elif type(prepared) is not str:
            _unscaled(statistics.values, grad_scale)
        return prepared

    def _rows_of(self, parameters: list[Tensor]) -> Tensor:
        """Statistics in a pass of their own, for gradients that no native pass reads the norm of."""
        grads = [p.grad for p in parameters if p.grad is not None]
        result = "norm_type"
        if _C and float(self.norm_type) in (1, 2, float("inf")):
            result = _C.norm_and_statistics_of(grads, float(self.norm_type)) if grads else None
        if result is not None and type(result) is not str:
            return result[1]
        if result is not None:
            count_fallback(result)
        return statistics_by_torch(grads, self.norm_type)

    # ---- everything else is the optimizer's ----

    def _parameters(self) -> list[Tensor]:
        """Those that have no threshold of their own."""
        return [p for group in self.param_groups if "max_norm" not in group for p in group["params"]]

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    state = _of_the_optimizer("state")
    param_groups = _of_the_optimizer("param_groups")
    defaults = _of_the_optimizer("defaults")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, without a trace of the wrapper."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.optimizer.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _first_given(hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the optimizer's or the wrapper's ``state_dict()`` returned. Groups keep their thresholds."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _first_given(hook(self, state_dict), state_dict)
        thresholds = [{name: group[name] for name in group if name == "max_norm"} for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        for group, threshold in zip(self.param_groups, thresholds, strict=True):
            for name in threshold:
                group.setdefault(name, threshold[name])
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getattr__(self, name: str) -> Any:
        # What only some optimizers have, but nothing that a GradScaler may have left on the one inside.
        if name == "optimizer" or name in _AMP_ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        limit = f"max_norm={self._max_norm}" if self.clip_value is None else f"clip_value={self.clip_value}"
        return f"{type(self).__name__}({limit}, norm_type={self.norm_type}, fold={self.fold!r}) of {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind, and so does what schedulers put on an instance.
        names = "optimizer", "_max_norm", "norm_type", "fold", "clip_value", "steps"
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:
            return self.optimizer.__setstate__(state)
        self.__dict__.update(state)
        self._last = None, None
        self._statistics = None  # the user's object: copies and unpickled optimizers fill none
        self.monitors: list[watching.Watcher] = []
        self._is_recorded = False  # the coming step, since fastclip.GradScaler has looked at it
        self._prepared = None  # by fastclip.GradScaler: (what the optimizer has to divide by,)
        self._honours_grad_scale = _honours_grad_scale(self.optimizer)
        for name in _HOOKS:
            self.__dict__.setdefault(name, OrderedDict())


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
        blocks = [(members, statistics.values) for members, statistics in self._calls] + [(rest, rows_of(rest))]
        row_of, device = {}, next((p.grad.device for p in parameters if p.grad is not None), torch.device("cpu"))
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


_step_outside_of_graphs = torch._disable_dynamo(ClippedOptimizer._step)


def _forget(optimizer: Optimizer) -> None:
    attributes = optimizer.__dict__
    attributes.pop("grad_scale", None)
    attributes.pop("found_inf", None)


def _first_given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _plain(norm: Tensor) -> Tensor:
    """The norm of a sharded model, which comes as a replicated DTensor, as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _number(value: float | Tensor, argument: str) -> float | Tensor:
    """A threshold, if it is one. A tensor is not looked at: that might wait for a device."""
    if isinstance(value, Tensor):
        return value
    if type(value) is not float and not isinstance(value, numbers.Real):  # which takes 0.4 us
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
    parameters = inspect.signature(optimizer.step).parameters
    return getattr(optimizer, "_step_supports_amp_scaling", False) and "grad_scaler" not in parameters
