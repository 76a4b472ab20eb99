"""Measures ClippedOptimizer: part ``optim`` of ``python -m benchmarks``.

The optimizer is one fused AdamW, bare for torch's calls and wrapped for fastclip's: the same parameters, gradients and
state for everybody, gradients restored before each step.
"""

from collections.abc import Callable, Iterator

import torch

import fastclip
from benchmarks import models, stats
from benchmarks.cases import CLIPPED, UNCLIPPED, Aim
from benchmarks.clocks import clock
from benchmarks.gradients import NEVER, WrongResult
from benchmarks.measure import Contestant, Effort, Times, paired, summary

PART = "optim"
SCALE = 2.0**16
NORM_TOLERANCE = 1e-5
OVERHEAD_US = 5.0


class Idle(torch.optim.Optimizer):
    """An optimizer whose step does nothing: what is left is the clipping."""

    _step_supports_amp_scaling = True  # the wrapper folds

    def step(self) -> None:
        pass

    step.hooked = True  # torch puts no hooks around it


class Setting:
    """Parameters with gradients, an optimizer and a wrapper around it."""

    def __init__(self, shapes, scale: float = 1.0, device: str = "cpu"):
        torch.manual_seed(0)
        self.device = device
        self.parameters = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        self.saved = [torch.randn_like(p) * scale for p in self.parameters]
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        self.restore()
        self.norm = float(sum(g.double().square().sum() for g in self.saved) ** 0.5) / scale
        self.clips = self.norm / 10  # a threshold that clips
        self.inner = torch.optim.AdamW(self.parameters, 1e-5, fused=True)
        self.wrapper = fastclip.ClippedOptimizer(self.inner, NEVER, fold=True)

    def restore(self) -> None:
        torch._foreach_copy_([p.grad for p in self.parameters], self.saved)

    def plain(self, clip: Callable, max_norm: float) -> Contestant:
        def run() -> None:
            clip(self.parameters, max_norm)
            self.inner.step()

        return Contestant(run, self.restore)

    def wrapped(self, max_norm: float) -> Contestant:
        def prepare() -> None:
            self.restore()
            self.wrapper.max_norm = max_norm

        return Contestant(self.wrapper.step, prepare, self.check)

    def bare_calls(self, inner: torch.optim.Optimizer) -> dict[str, Contestant]:
        """Clipping and ``inner``'s step, plain and wrapped, without anything before or after them."""

        def plain() -> None:
            fastclip.clip_grad_norm_(self.parameters, NEVER)
            inner.step()

        return {
            "plain": Contestant(plain),
            "wrapped": Contestant(fastclip.ClippedOptimizer(inner, NEVER, fold=True).step),
        }

    def plain_amp(self, max_norm: float) -> Contestant:
        scaler = self.scaler(torch.amp.GradScaler)

        def run() -> None:
            scaler.unscale_(self.inner)
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
            scaler.step(self.inner)
            scaler.update(SCALE)

        return Contestant(run, self.restore)

    def wrapped_amp(self, scaler_type: type, max_norm: float) -> Contestant:
        scaler = self.scaler(scaler_type)

        def prepare() -> None:
            self.restore()
            self.wrapper.max_norm = max_norm

        def run() -> None:
            scaler.step(self.wrapper)
            scaler.update(SCALE)

        return Contestant(run, prepare, self.check)

    def scaler(self, scaler_type: type) -> torch.amp.GradScaler:
        scaler = scaler_type(self.device, init_scale=SCALE)
        scaler.scale(torch.ones(1, device=self.device))  # makes its tensors
        return scaler

    def check(self, _: object) -> None:
        """The wrapper's norm, after every timed step."""
        got = float(self.wrapper.last_total_norm)
        if not abs(got / self.norm - 1) <= NORM_TOLERANCE:
            raise WrongResult(f"ClippedOptimizer: norm {got!r} instead of {self.norm!r}")


def row(case: str, mode: str, times: Times, plain: str, ours: str, aim: float | None = None) -> dict:
    figures = summary(times, plain, ours, Aim(plain, aim) if aim else None)
    for name in ("median_us", "samples_us"):
        figures[name] = {plain: figures[name][plain], ours: figures[name][ours]}
    return {"part": PART, "case": case, "mode": mode, **figures}


def measure(effort: Effort, device: str = "cpu") -> Iterator[dict]:
    watch = clock(device)
    big = Setting(models.distil_gpt2(), device=device)
    for mode, max_norm, aim in ((UNCLIPPED, NEVER, 1.3), (CLIPPED, big.clips, 1.25)):
        contestants = {
            "plain": big.plain(torch.nn.utils.clip_grad_norm_, max_norm),
            "wrapped": big.wrapped(max_norm),
        }
        times = paired(contestants, 8.0, effort, clock=watch)
        yield row("clip and step", mode, times, "plain", "wrapped", aim)
    del big

    scaled = Setting(models.distil_gpt2(), SCALE, device)
    for mode, max_norm in ((UNCLIPPED, NEVER), (CLIPPED, scaled.clips)):
        contestants = {
            "plain": scaled.plain_amp(max_norm),
            "torch's scaler": scaled.wrapped_amp(torch.amp.GradScaler, max_norm),
            "fastclip's scaler": scaled.wrapped_amp(fastclip.GradScaler, max_norm),
        }
        times = paired(contestants, 10.0, effort, clock=watch)
        yield row("AMP, torch's GradScaler", mode, times, "plain", "torch's scaler", 1.25)
        yield row("AMP, fastclip's GradScaler", mode, times, "plain", "fastclip's scaler", 1.4)
    del scaled

    # What the wrapper itself costs: nothing is clipped, so nothing has to be restored between the calls.
    small = Setting(models.rl_policy(), device=device)
    for mode, inner in (("no step", Idle(small.parameters, {})), ("AdamW's step", small.inner)):
        times = paired(small.bare_calls(inner), 2.0, effort, max_rounds=4000, clock=watch)
        overhead = row("6 tensors, overhead", mode, times, "plain", "wrapped")
        # On a CUDA device it is the host that the wrapper costs time.
        samples = times.samples if device == "cpu" else times.host
        in_us = {name: [s * 1e6 for s in samples[name]] for name in ("plain", "wrapped")}
        overhead["overhead_us"] = stats.difference(in_us["wrapped"], in_us["plain"])
        overhead["aim_us"] = OVERHEAD_US
        yield overhead
