"""Adaptive clipping and clipping by groups beside what they replace: ``python -m benchmarks.adaptive [-o FILE]``.

Adaptive: ResNet-50's 161 tensors, float32, beside timm's ``adaptive_clip_grad`` (or, without timm, the same operations
written here). Groups: 2,000 tensors of 64, a group each, beside a loop of ``clip_grad_norm_``. Both sides take turns,
and the ratio is the median of the rounds'. It takes half a minute.
"""

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastclip
from benchmarks import machine, models, results, rivals, stats, table


def timm() -> tuple[str, Callable]:
    """Its function, with what it is called in the table; imported here, since reading results needs no timm."""
    module = rivals.optional_module("timm.utils.agc")
    if isinstance(module, str):
        return "timm's operations", timms_operations
    return f"timm {importlib.metadata.version('timm')}", module.adaptive_clip_grad


def timms_operations(parameters, clip_factor=0.01, eps=1e-3):
    for p in parameters:
        dims = tuple(range(1, p.ndim)) if p.ndim > 1 else None
        weight, grad = p.detach(), p.grad.detach()
        max_norm = weight.norm(2, dim=dims, keepdim=p.ndim > 1).clamp_(min=eps).mul_(clip_factor)
        norm = grad.norm(2, dim=dims, keepdim=p.ndim > 1)
        clipped = grad * (max_norm / norm.clamp(min=1e-6))
        grad.copy_(torch.where(norm < max_norm, grad, clipped))


def rounds(ours: Callable, theirs: Callable, restore: Callable, count: int) -> dict[str, list[float]]:
    """Microseconds of each round. ``restore`` runs untimed before each call."""

    def timed(function):
        restore()
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6

    samples = [(timed(ours), timed(theirs)) for _ in range(count + 2)][2:]  # the first ones find cold memory
    return {"fastclip": [pair[0] for pair in samples], "beside": [pair[1] for pair in samples]}


def adaptive(adaptive_clip_grad: Callable, scale: float) -> dict[str, list[float]]:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in models.resnet50()]
    grads = [torch.randn(shape) * scale for shape in models.resnet50()]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

    def restore():
        torch._foreach_copy_([p.grad for p in parameters], grads)

    return rounds(lambda: fastclip.clip_grad_adaptive_(parameters), lambda: adaptive_clip_grad(parameters), restore, 40)


def groups(max_norm: float) -> dict[str, list[float]]:
    parameters = [torch.nn.Parameter(torch.zeros(64)) for _ in range(2000)]
    source = [torch.randn(64) for _ in parameters]
    for parameter in parameters:
        parameter.grad = torch.empty(64)
    max_norms = [max_norm] * len(parameters)

    def restore():
        torch._foreach_copy_([p.grad for p in parameters], source)

    def loop():
        return torch.stack([fastclip.clip_grad_norm_(p, m) for p, m in zip(parameters, max_norms, strict=True)])

    return rounds(lambda: fastclip.clip_grad_norms_(parameters, max_norms), loop, restore, 80)


def measure() -> dict:
    name, adaptive_clip_grad = timm()
    cases = [
        ("clip_grad_adaptive_, ResNet-50, fp32", "unclipped", name, lambda: adaptive(adaptive_clip_grad, 1e-4)),
        ("clip_grad_adaptive_, ResNet-50, fp32", "clipped", name, lambda: adaptive(adaptive_clip_grad, 1.0)),
        ("clip_grad_norms_, 2,000 groups of 64", "unclipped", "a loop of clip_grad_norm_", lambda: groups(1e9)),
        ("clip_grad_norms_, 2,000 groups of 64", "clipped", "a loop of clip_grad_norm_", lambda: groups(0.1)),
    ]
    rows = []
    for case, mode, beside, run in cases:
        samples = run()
        speedup = stats.ratio(samples["beside"], samples["fastclip"])
        rows.append({"case": case, "mode": mode, "beside": beside, "samples_us": samples, "speedup": speedup})
    there = machine.describe(torch.get_num_threads())
    return {"machine": there, "fastclip": machine.build(), "results": rows}


def to_table(report: dict) -> table.Table:
    lines = []
    for row in report["results"]:
        theirs, ours = (table.duration(stats.median(row["samples_us"][who])) for who in ("beside", "fastclip"))
        lines.append([row["case"], row["mode"], row["beside"], theirs, ours, table.times(row["speedup"])])
    head = ["case", "", "beside", "that", "fastclip", "speed-up"]
    return table.Table("Beyond torch", head, table.grouped(lines))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/latest-adaptive.json"))
    options = parser.parse_args()
    report = measure()
    results.save(report, options.output)
    print(table.markdown(to_table(report)))
    print(f"Written: {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
