"""Adaptive clipping and clipping by groups beside what they replace: ``python -m benchmarks.adaptive``.

Adaptive: ResNet-50's 161 tensors, float32, beside timm's ``adaptive_clip_grad`` (or, without timm, the same operations
written here). Groups: 2,000 tensors of 64, a group each, beside a loop of ``clip_grad_norm_``. Both sides take turns,
and the ratio is the median of the pairs'.
"""

import statistics
import time
from collections.abc import Callable

import torch

import fastclip
from benchmarks import models

try:
    from timm.utils.agc import adaptive_clip_grad
except ImportError:

    def adaptive_clip_grad(parameters, clip_factor=0.01, eps=1e-3):
        for p in parameters:
            dims = tuple(range(1, p.ndim)) if p.ndim > 1 else None
            weight, grad = p.detach(), p.grad.detach()
            max_norm = weight.norm(2, dim=dims, keepdim=p.ndim > 1).clamp_(min=eps).mul_(clip_factor)
            norm = grad.norm(2, dim=dims, keepdim=p.ndim > 1)
            clipped = grad * (max_norm / norm.clamp(min=1e-6))
            grad.copy_(torch.where(norm < max_norm, grad, clipped))


def pairs(ours: Callable, theirs: Callable, restore: Callable, rounds: int) -> tuple[float, float, float]:
    """Medians of seconds, ours and theirs, and of the pairs' ratio. ``restore`` runs untimed before each call."""

    def timed(function):
        restore()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    times = [(timed(ours), timed(theirs)) for _ in range(rounds)][2:]
    return *(statistics.median(side) for side in zip(*times, strict=True)), statistics.median(b / a for a, b in times)


def report(case: str, result: tuple[float, float, float]) -> None:
    ours, theirs, ratio = result
    print(f"{case:<55} {ours * 1e3:9.3f} ms {theirs * 1e3:9.3f} ms {ratio:6.2f}x")


def adaptive(scale: float, rounds: int) -> tuple[float, float, float]:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in models.resnet50()]
    grads = [torch.randn(shape) * scale for shape in models.resnet50()]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

    def restore():
        torch._foreach_copy_([p.grad for p in parameters], grads)

    return pairs(
        lambda: fastclip.clip_grad_adaptive_(parameters), lambda: adaptive_clip_grad(parameters), restore, rounds
    )


def groups(max_norm: float, rounds: int) -> tuple[float, float, float]:
    parameters = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2000)]
    source = [torch.randn(64) for _ in parameters]
    for parameter in parameters:
        parameter.grad = torch.empty(64)
    max_norms = [max_norm] * len(parameters)

    def restore():
        torch._foreach_copy_([p.grad for p in parameters], source)

    def loop():
        return torch.stack([fastclip.clip_grad_norm_(p, m) for p, m in zip(parameters, max_norms, strict=True)])

    return pairs(lambda: fastclip.clip_grad_norms_(parameters, max_norms), loop, restore, rounds)


def main() -> None:
    print(f"torch {torch.__version__}, {fastclip.build_info()['cpu_kernels']}, {torch.get_num_threads()} threads")
    report("adaptive, ResNet-50, fp32, nothing clipped", adaptive(1e-4, 25))
    report("adaptive, ResNet-50, fp32, everything clipped", adaptive(1.0, 25))
    report("2,000 groups of 64, nothing clipped; beside a loop", groups(1e9, 50))
    report("2,000 groups of 64, everything clipped; beside a loop", groups(0.1, 50))


if __name__ == "__main__":
    main()
