"""Thresholds that follow the norms of a run, given as ``max_norm``: ZClip and AutoClip. Evaluated by csrc/policy.h."""

import math
from typing import Any

import torch
from torch import Tensor

from fastclip import _policy_rules
from fastclip._native import _C

# Every policy is one float64 tensor; it begins with these, see csrc/policy.h.
_THRESHOLD, _COUNT, _OWN = 1, 2, 3


class ThresholdPolicy:
    """What ZClip and AutoClip have in common.

    Given as ``max_norm=`` to ``clip_grad_norm_``, ``ClippedOptimizer`` or ``GradientMonitor.clip_grad_norm_``, a policy
    makes the threshold of each call from the norm of that call and from what it has learnt of those before, in the same
    pass over the gradients. Its state stays on the device of the first gradient, where it moves at its first use, and
    nothing waits for it; it can be captured in a CUDA graph, once it has been used on that device.

    Only finite norms are learnt from. Under a GradScaler norms are the true, unscaled ones. Where several ranks clip a
    model together, each has a policy of its own; they see the same norm and agree.

    One policy follows one model: with two it would learn from a mixture.
    """

    _rule: int

    def __init__(self, own: list[float]):
        self._state = torch.tensor([self._rule, math.inf, 0, *own], dtype=torch.float64, device="cpu")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_state" and "_state" in self.__dict__:
            raise AttributeError(f"{name}: a policy stays as it was made; make another {type(self).__name__}")
        super().__setattr__(name, value)

    @property
    def threshold(self) -> Tensor:
        """The threshold of the last call: a new 0-d float64 tensor on the state's device. Nothing waits for it.

        inf before the first call and where nothing is to be clipped; 0 where the norm was not finite.
        """
        return self._state[_THRESHOLD].clone()

    @property
    def count(self) -> Tensor:
        """How many norms were learnt from, likewise."""
        return self._state[_COUNT].clone()

    def follow(self, total_norm: Tensor) -> Tensor:
        """Learns from a norm and returns the threshold for it, as ``threshold`` has it.

        For who computes norms himself; the functions of fastclip that take a ``max_norm`` do it.

        Args:
            total_norm: 0-d, of a floating-point dtype, on any device.
        """
        if not isinstance(total_norm, Tensor) or total_norm.dim() or not total_norm.is_floating_point():
            raise TypeError(f"total_norm: expected a 0-d floating-point tensor, got {total_norm!r}")
        norm = total_norm.detach()
        state = self._state_on(norm.device)
        if _C and norm.device.type in ("cpu", "cuda" if _C.cuda else "cpu"):
            _C.follow_norm(state, norm)
        else:
            _policy_rules.follow(state, norm.item())
        return self.threshold

    def _state_on(self, device: str | torch.device) -> Tensor:
        if self._state.device != torch.device(device):
            self._state = self._state.to(device)
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as numbers and a tensor on the CPU. Waits for the device. What was told is not in it."""
        state = self._state.cpu()
        return {"policy": type(self).__name__, "count": int(state[_COUNT]), "threshold": float(state[_THRESHOLD])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict()`` of the same kind of policy has returned.

        Raises:
            ValueError: it is that of another kind.
        """
        if state_dict.get("policy") != type(self).__name__:
            expected, found = type(self).__name__, state_dict.get("policy")
            raise ValueError(f"state_dict['policy']: expected {expected!r}, got {found!r}")
        learnt = self._state.cpu().clone()
        learnt[_THRESHOLD], learnt[_COUNT] = state_dict["threshold"], state_dict["count"]
        self._load(learnt, state_dict)
        self._state.copy_(learnt)  # in place: a captured graph has its address

    def _load(self, state: Tensor, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def in_force(max_norm):
    """The threshold that a policy has set in the call just made; anything else as it is."""
    return max_norm.threshold if isinstance(max_norm, ThresholdPolicy) else max_norm


class ZClip(ThresholdPolicy):
    """Clips norms that stand out from a running mean: a threshold only where there is a spike.

    Kumar, Owen, Chowdhury, Guera: ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
    https://arxiv.org/abs/2504.02507. Mean m and variance v of the norms g are exponential moving averages; a norm whose
    ``z = (g - m) / (sqrt(v) + eps)`` is above ``z_threshold`` is clipped and enters the averages as clipped::

        m = alpha * m + (1 - alpha) * g
        v = alpha * v + (1 - alpha) * (g - m)^2      # with the new m

    Args:
        alpha: how slowly the averages follow, in [0, 1].
        z_threshold: from which z on a norm is a spike, > 0.
        warmup: so many finite norms are only learnt from; m and v begin as their mean and population variance, >= 1.
        spike_to: what spikes are clipped to: "reciprocal", ``m + z_threshold^2 / z * sqrt(v)``, which is the lower the
            higher the spike; "max", ``m + z_threshold * sqrt(v)``; "mean", ``m``.
        max_norm: a limit that holds always, during warm-up too; inf for none.
        eps: added to the deviation.

    At the edges: a variance of 0 makes a spike of everything above ``m + eps * z_threshold``. A norm that is not finite
    is not learnt from (in the authors' code NaN stays in the averages for ever), nor is one above 1.3e154, whose square
    is not finite; that one is clipped as others are. ``max_norm`` does not change what is learnt. Norms have to be well
    above ``eps``. The authors' code has besides: a factor on the threshold, and leaving spikes out of the averages.

    Raises:
        TypeError, ValueError: an argument is not a number, or outside of its range.
    """

    _rule = 1
    _MEAN, _VARIANCE = _OWN, _OWN + 1
    _SPIKE_TO = ("reciprocal", "max", "mean")

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        warmup: int = 25,
        *,
        spike_to: str = "reciprocal",
        max_norm: float = math.inf,
        eps: float = 1e-6,
    ):
        if spike_to not in self._SPIKE_TO:
            raise ValueError(f'spike_to: expected "reciprocal", "max" or "mean", got {spike_to!r}')
        self.alpha = _number(alpha, "alpha", 0, 1)
        self.z_threshold = _number(z_threshold, "z_threshold", math.ulp(0))
        self.warmup = _integer(warmup, "warmup")
        self.spike_to = spike_to
        self.max_norm = _number(max_norm, "max_norm", 0)
        self.eps = _number(eps, "eps", 0)
        told = [self.alpha, self.z_threshold, self.warmup, self.eps, self._SPIKE_TO.index(spike_to), self.max_norm]
        super().__init__([0, 0, *told])

    def state_dict(self) -> dict[str, Any]:
        state = self._state.cpu()
        return {**super().state_dict(), "mean": float(state[self._MEAN]), "variance": float(state[self._VARIANCE])}

    def _load(self, state: Tensor, state_dict: dict[str, Any]) -> None:
        state[self._MEAN], state[self._VARIANCE] = state_dict["mean"], state_dict["variance"]

    def __repr__(self) -> str:
        told = f"alpha={self.alpha}, z_threshold={self.z_threshold}, warmup={self.warmup}, spike_to={self.spike_to!r}"
        return f"ZClip({told}, max_norm={self.max_norm}, eps={self.eps})"


class AutoClip(ThresholdPolicy):
    """Clips to a percentile of all norms so far, that of this step included.

    Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source Separation Networks, 2020,
    https://arxiv.org/abs/2007.14469. The percentile is ``numpy.percentile``'s, linear between two norms.

    Args:
        percentile: in [0, 100]; the paper recommends 10.
        window: how many norms are remembered, the latest ones, 1 or more. The paper remembers all: until the window is
            full there is no difference. It takes 16 bytes a norm, and each call looks at a part of it.

    At the edges: the first norm is its own percentile. A norm that is not finite is not learnt from (in the authors'
    code an inf stays in the history). Norms of 0 count as others do.

    Raises:
        TypeError, ValueError: an argument is not a number, or outside of its range.
    """

    _rule = 2
    _FRACTION, _ARRIVALS = _OWN, _OWN + 2

    def __init__(self, percentile: float = 10.0, window: int = 10_000):
        self.percentile = _number(percentile, "percentile", 0, 100)
        self.window = _integer(window, "window")
        super().__init__([self.percentile / 100, self.window] + [0] * (2 * self.window))

    def state_dict(self) -> dict[str, Any]:
        """As of every policy; "norms": those remembered, a float64 tensor, the oldest first."""
        state, common = self._state.cpu(), super().state_dict()
        arrivals = state[self._ARRIVALS : self._ARRIVALS + self.window]
        oldest = common["count"] % self.window if common["count"] >= self.window else 0
        norms = arrivals.roll(-oldest)[: common["count"]].clone()
        return {**common, "norms": norms}

    def _load(self, state: Tensor, state_dict: dict[str, Any]) -> None:
        # Into a shorter window the latest norms; a longer one goes on as if it had begun with those remembered.
        norms = state_dict["norms"].to("cpu", torch.float64)[-self.window :]
        if len(norms) < self.window:
            state[_COUNT] = len(norms)
        count = int(state[_COUNT])
        state[self._ARRIVALS :] = 0
        places = torch.arange(count - len(norms), count, device="cpu") % self.window
        state[self._ARRIVALS + places] = norms
        sorted_from = self._ARRIVALS + self.window
        state[sorted_from : sorted_from + len(norms)] = norms.sort().values

    def __repr__(self) -> str:
        return f"AutoClip(percentile={self.percentile}, window={self.window})"


def _number(value: float, argument: str, least: float, most: float = math.inf) -> float:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{argument}: expected a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def _integer(value: int, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: expected 1 or more, got {value!r}")
    return value
