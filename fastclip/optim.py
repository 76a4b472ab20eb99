"""The optimizer wrapper: an optimizer like any other, whose step clips the gradients first."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip import clip_report
from fastclip.policies import ThresholdPolicy
from fastclip.statistics import GradStatistics
from fastclip.statistics import check as check_statistics
from fastclip.step_clipping import AMP_ATTRIBUTES, StepClipping, Threshold, number

if TYPE_CHECKING:
    from fastclip.health.monitor import GradientMonitor

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


def _of_the_clipping(name: str, check: Callable[[Any], Any] = lambda value: None) -> property:
    def set_checked(self, value: Any) -> None:
        check(value)
        setattr(self._clipping, name, value)

    return property(lambda self: getattr(self._clipping, name), set_checked)


def _check_fold(value: bool | str) -> None:
    if not (isinstance(value, bool) or value == "auto"):
        raise ValueError(f'fold: expected "auto", True or False, got {value!r}')


def _check_norm_type(value: float) -> None:
    try:
        float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"norm_type: expected a number, got {value!r}") from None


def _check_thresholds(max_norm: Threshold | None, clip_value: float | None) -> None:
    if clip_value is not None and max_norm is not None:
        raise ValueError("clip_value: expected None beside max_norm, got both")
    if clip_value is not None:
        number(clip_value, "clip_value")
    if max_norm is not None and not callable(max_norm):
        number(max_norm, "max_norm")


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
        nonfinite: what a step does when the norm is inf or NaN, ``"propagate"``, ``"skip"`` or ``"zero"``, see
            ``fastclip.clip_grad_norm_``; may be set at any time. ``"skip"`` leaves the step out: by ``found_inf`` where
            the optimizer is fused, which waits for nothing; others are not called, and to know that waits for the
            device. ``"zero"`` clips in place. ``fastclip.last_report()`` says what was done.

    A parameter group may have a threshold of its own, ``param_groups[i]["max_norm"]`` (None: it is not clipped). It is
    then clipped by its own norm, in place, and no part of the common norm; groups without the key share that one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or is a ClippedOptimizer; a threshold is not a number.
        ValueError: a threshold is negative or NaN, or both thresholds are given; ``fold=True`` is not possible;
            ``nonfinite`` is another value, or there is no norm (``clip_value``).
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
        monitor: "GradientMonitor | None" = None,
        nonfinite: str | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, ClippedOptimizer):
            raise TypeError("optimizer: expected one that is not clipped already, got ClippedOptimizer")
        _check_fold(fold)
        _check_norm_type(norm_type)
        _check_thresholds(max_norm, clip_value)
        if monitor is not None and not callable(getattr(monitor, "attach", None)):
            raise TypeError(f"monitor: expected a fastclip.GradientMonitor, got {type(monitor).__name__}")
        _check_nonfinite(nonfinite, clip_value)
        self.__setstate__(
            {
                "optimizer": optimizer,
                "max_norm": max_norm,
                "norm_type": norm_type,
                "fold": fold,
                "clip_value": clip_value,
                "nonfinite": nonfinite,
            }
        )
        self.statistics = statistics
        self._clipping.check_fold()
        if monitor is not None:
            monitor.attach(self)

    @property
    def optimizer(self) -> Optimizer:
        return self._clipping.optimizer

    @property
    def max_norm(self) -> Threshold | None:
        return self._clipping.max_norm

    @max_norm.setter
    def max_norm(self, value: Threshold | None) -> None:
        _check_thresholds(value, self.clip_value)
        self._clipping.max_norm = value

    @property
    def clip_value(self) -> float | None:
        return self._clipping.clip_value

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        _check_thresholds(self.max_norm, value)
        _check_nonfinite(self.nonfinite, value)
        self._clipping.clip_value = value

    @property
    def nonfinite(self) -> str | None:
        return self._clipping.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str | None) -> None:
        _check_nonfinite(value, self.clip_value)
        self._clipping.nonfinite = value

    @property
    def statistics(self) -> GradStatistics | None:
        return self._clipping.statistics

    @statistics.setter
    def statistics(self, value: GradStatistics | None) -> None:
        if value is not None:
            check_statistics(value)
        self._clipping.statistics = value

    norm_type = _of_the_clipping("norm_type", _check_norm_type)
    fold = _of_the_clipping("fold", _check_fold)
    steps = _of_the_clipping("steps")
    monitors = _of_the_clipping("monitors")

    @property
    def last_total_norm(self) -> Tensor | None:
        """The common norm at the last step, unscaled, before clipping: 0-d, as ``clip_grad_norm_`` returns it."""
        return self._clipping.last[0]

    @property
    def last_clip_coef(self) -> Tensor | None:
        """What the gradients were multiplied by at the last step: 0-d, on the norm's device. Nothing waits for it."""
        return self._clipping.last_clip_coef

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and steps; returns what the optimizer returns.

        With a closure, the gradients of each of its evaluations are clipped (LBFGS makes several in a step).
        ``nonfinite="skip"`` can leave a step out after the first one.

        Raises:
            RuntimeError: called during the backward pass, when only a part of the gradients exists.
            ValueError: a threshold is negative or NaN; ``fold=True`` is not possible. Nothing has been changed then.
        """
        # torch.compile leaves its graph for the step; to be outside of it always would cost 2 us. The name `torch` has
        # to stand here: in frames without tensors or torch, Dynamo evaluates nothing and goes on to trace the callees.
        if torch.compiler.is_dynamo_compiling():
            return _step_outside_of_graphs(self, closure)
        # One flat function: between the steps of a model caches are cold, and each frame more costs 1 us.
        own = self.__dict__  # other ways to its items pass by __getattr__
        clipping = own["_clipping"]
        optimizer = clipping.optimizer
        call = None  # (args, kwargs) for the hooks, which may come to be while the optimizer steps
        try:
            # The hooks of this very optimizer. Those of all optimizers run around the inner step.
            pre_hooks, post_hooks = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
            if pre_hooks:
                call = _call_of_step(self, closure)
                for hook in pre_hooks.values():
                    call = _checked_call(hook(self, *call), call)
                closure = _closure(*call[0][1:], **call[1])
            grad_scale, found_inf = own.get("grad_scale"), own.get("found_inf")
            if closure is None:
                result = None if clipping.clip(grad_scale, found_inf) else optimizer.step()
            else:
                result = clipping.step(closure, grad_scale, found_inf)
            clipping.steps += 1
            if post_hooks:
                call = call or _call_of_step(self, closure)
                for hook in post_hooks.values():
                    hook(self, *call)
            return result
        except BaseException:
            _forget(own)  # a GradScaler does it after a step that ended well
            raise
        finally:
            if clipping.honours_grad_scale:  # or what has this name is something else, the optimizer's own
                attributes = optimizer.__dict__
                if "grad_scale" in attributes or "found_inf" in attributes:
                    _forget(attributes)

    # Or torch would put its own hooks around it, those of all optimizers a second time.
    step.hooked = True  # type: ignore[attr-defined]

    # Asked by GradScaler. Where the step does not fold, it unscales the gradients and leaves bad steps out itself.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._clipping.folds_scaled

    # ---- everything else is the optimizer's ----

    state = _of_the_optimizer("state")
    param_groups = _of_the_optimizer("param_groups")
    defaults = _of_the_optimizer("defaults")

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """The optimizer's own. None: as it does by default; some take no argument."""
        self.optimizer.zero_grad(*(() if set_to_none is None else (set_to_none,)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, without a trace of the wrapper.

        A policy that is a group's ``max_norm`` is there as its own ``state_dict()``, which
        ``torch.load(weights_only=True)`` reads; that waits for the device.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.optimizer.state_dict()
        state_dict = {**state_dict, "param_groups": [_with_policy_state(g) for g in state_dict["param_groups"]]}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _first_given(post_hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the optimizer's or the wrapper's ``state_dict()`` returned. Groups keep their thresholds.

        A policy that is a group's ``max_norm`` stays that object and goes on from the state that the checkpoint has.

        Raises:
            ValueError: that state is one of another kind of policy, or the group has no policy. Nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _first_given(hook(self, state_dict), state_dict)
        thresholds = [{name: group[name] for name in group if name == "max_norm"} for group in self.param_groups]
        # The inner optimizer would put copies in their place. If there are more groups in the one, it raises an error.
        saved_groups = [_with_policy_state(group) for group in state_dict["param_groups"]]
        learnt = [
            _policy_state(group, threshold.get("max_norm"), i)
            for i, (group, threshold) in enumerate(zip(saved_groups, thresholds, strict=False))
        ]
        self.optimizer.load_state_dict({**state_dict, "param_groups": saved_groups})
        for group, threshold, state in zip(self.param_groups, thresholds, learnt, strict=True):
            for name in threshold:
                group.setdefault(name, threshold[name])
            if state is not None:
                threshold["max_norm"].load_state_dict(state)
                group["max_norm"] = threshold["max_norm"]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getattr__(self, name: str) -> Any:
        # What only some optimizers have, but nothing that a GradScaler may have left on the one inside.
        if name == "_clipping" or name in AMP_ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._clipping.optimizer, name)

    def __repr__(self) -> str:
        limit = f"max_norm={self.max_norm}" if self.clip_value is None else f"clip_value={self.clip_value}"
        return f"{type(self).__name__}({limit}, norm_type={self.norm_type}, fold={self.fold!r}) of {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks stay behind, and so does what schedulers put on an instance. Statistics and monitors are
        # the user's objects: copies and unpickled optimizers fill none.
        names = "optimizer", "max_norm", "norm_type", "fold", "clip_value", "steps", "honours_grad_scale", "nonfinite"
        return {name: getattr(self._clipping, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:
            return self.optimizer.__setstate__(state)
        self._clipping = StepClipping(**state)
        for name in _HOOKS:
            self.__dict__.setdefault(name, OrderedDict())


_step_outside_of_graphs = torch._disable_dynamo(ClippedOptimizer.step)


def _with_policy_state(group: dict[str, Any]) -> dict[str, Any]:
    """A group of a state dict, with the state of its policy instead of the object."""
    max_norm = group.get("max_norm")
    return {**group, "max_norm": max_norm.state_dict()} if isinstance(max_norm, ThresholdPolicy) else group


def _policy_state(saved_group: dict[str, Any], own: Any, index: int) -> dict[str, Any] | None:
    """The state of a policy in a group that is about to be loaded, None without one; checked against ``own``."""
    saved = saved_group.get("max_norm")
    if not (isinstance(saved, dict) and "policy" in saved):
        return None
    argument = f"state_dict['param_groups'][{index}]['max_norm']"
    if not isinstance(own, ThresholdPolicy):
        raise ValueError(f"{argument}: expected none where the group has no policy, got that of {saved['policy']}")
    try:
        copy.deepcopy(own).load_state_dict(saved)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{argument}: expected what {type(own).__name__}.state_dict() returns, {error}") from None
    return saved


def _check_nonfinite(value: str | None, clip_value: float | None) -> None:
    if value is None:
        return
    clip_report.check(value)
    if clip_value is not None:
        raise ValueError(f"nonfinite: expected None with clip_value, which takes no norm, got {value!r}")


def _forget(attributes: dict[str, Any]) -> None:
    for name in AMP_ATTRIBUTES:
        attributes.pop(name, None)


def _call_of_step(optimizer: ClippedOptimizer, closure: Callable[[], Any] | None) -> tuple[tuple, dict[str, Any]]:
    """What a step's hooks get to see as its args and kwargs."""
    return ((optimizer,) if closure is None else (optimizer, closure)), {}


def _checked_call(changed: Any, call: tuple[tuple, dict[str, Any]]) -> tuple[tuple, dict[str, Any]]:
    """The args and kwargs that a pre hook has returned, or those that it was given."""
    if changed is None:
        return call
    if isinstance(changed, tuple) and len(changed) == 2:
        return changed
    raise RuntimeError(f"step pre hook: expected None or a tuple of (new_args, new_kwargs), got {changed!r}")


def _closure(closure: Callable[[], Any] | None = None) -> Callable[[], Any] | None:
    """The closure among the arguments of step()."""
    return closure


def _first_given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
