"""Measures ClippedOptimizer: ``python -m benchmarks.optim [--quick] [--threads N] [--output PREFIX]``.

The optimizer is one fused AdamW, bare for torch's calls and wrapped for fastclip's: the same parameters, gradients and
state for everybody, gradients restored before each step.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fastclip
from benchmarks.__main__ import processor
from benchmarks.cases import gpt2_small, rl_policy
from benchmarks.measure import NEVER, Times, paired
from benchmarks.table import duration, table

SCALE = 2.0**16
HEAD = ["case", "", "plain calls", "fastclip", "result", "aim"]


class Setting:
    """Parameters with gradients, an optimizer and a wrapper around it."""

    def __init__(self, shapes, scale: float = 1.0):
        torch.manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
        self.saved = [torch.randn_like(p) * scale for p in self.parameters]
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        self.restore()
        self.clips = float(fastclip.get_total_norm(self.saved)) / scale / 10  # a threshold that clips
        self.inner = torch.optim.AdamW(self.parameters, 1e-5, fused=True)
        self.wrapper = fastclip.ClippedOptimizer(self.inner, NEVER, fold=True)

    def restore(self) -> None:
        torch._foreach_copy_([p.grad for p in self.parameters], self.saved)

    def plain(self, clip: Callable, max_norm: float) -> Callable:
        def run() -> None:
            clip(self.parameters, max_norm)
            self.inner.step()

        return run

    def wrapped(self, max_norm: float) -> Callable:
        def run() -> None:
            self.wrapper.max_norm = max_norm
            self.wrapper.step()

        return run

    def plain_amp(self, max_norm: float) -> Callable:
        scaler = self.scaler(torch.amp.GradScaler)

        def run() -> None:
            scaler.unscale_(self.inner)
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
            scaler.step(self.inner)
            scaler.update(SCALE)

        return run

    def wrapped_amp(self, scaler_type: type, max_norm: float) -> Callable:
        scaler = self.scaler(scaler_type)

        def run() -> None:
            self.wrapper.max_norm = max_norm
            scaler.step(self.wrapper)
            scaler.update(SCALE)

        return run

    @staticmethod
    def scaler(scaler_type: type) -> torch.amp.GradScaler:
        scaler = scaler_type("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(1))  # makes its tensors
        return scaler


def row(name: str, mode: str, times: Times, plain: str, ours: str, aim: float) -> dict:
    speedup, low, high = times.ratio(plain, ours)
    return {
        "case": name,
        "mode": mode,
        "plain_us": times.median(plain) * 1e6,
        "fastclip_us": times.median(ours) * 1e6,
        "speedup": speedup,
        "quartiles": [low, high],
        "aim": aim,
        "samples_us": {key: [round(s * 1e6, 3) for s in times.samples[key]] for key in (plain, ours)},
    }


def measure(seconds: float) -> list[dict]:
    rows = []
    big = Setting(gpt2_small(layers=6))
    for mode, max_norm, aim in (("unclipped", NEVER, 1.3), ("clipped", big.clips, 1.25)):
        contestants = {
            "plain": big.plain(torch.nn.utils.clip_grad_norm_, max_norm),
            "wrapped": big.wrapped(max_norm),
        }
        times = paired(contestants, big.restore, seconds, max_rounds=200)
        rows.append(row("clip and step", mode, times, "plain", "wrapped", aim))
    del big

    scaled = Setting(gpt2_small(layers=6), SCALE)
    for mode, max_norm in (("unclipped", NEVER), ("clipped", scaled.clips)):
        contestants = {
            "plain": scaled.plain_amp(max_norm),
            "torch": scaled.wrapped_amp(torch.amp.GradScaler, max_norm),
            "fastclip": scaled.wrapped_amp(fastclip.GradScaler, max_norm),
        }
        times = paired(contestants, scaled.restore, seconds, max_rounds=200)
        rows.append(row("AMP, torch's GradScaler", mode, times, "plain", "torch", 1.25))
        rows.append(row("AMP, fastclip's GradScaler", mode, times, "plain", "fastclip", 1.4))
    del scaled

    small = Setting(rl_policy())
    contestants = {
        "plain": small.plain(fastclip.clip_grad_norm_, NEVER),
        "wrapped": small.wrapped(NEVER),
    }
    times = paired(contestants, small.restore, seconds, max_rounds=5000)
    overhead = row("6 tensors", "overhead", times, "plain", "wrapped", 5.0)
    differences = sorted(b - a for a, b in zip(times.samples["plain"], times.samples["wrapped"], strict=True))
    overhead["overhead_us"] = differences[len(differences) // 2] * 1e6
    return [*rows, overhead]


def markdown(report: dict) -> str:
    machine = report["machine"]
    rows = []
    for r in report["results"]:
        result, aim = "{:.2f}x ({:.2f}-{:.2f})".format(r["speedup"], *r["quartiles"]), f"{r['aim']:g}x"
        if "overhead_us" in r:
            result, aim = f"{r['overhead_us']:+.1f} us", f"< {r['aim']:g} us"
        rows.append([r["case"], r["mode"], duration(r["plain_us"]), duration(r["fastclip_us"]), result, aim])
    return "\n".join(
        [
            f"{machine['processor']}, {machine['threads']} threads; torch {report['fastclip']['torch']}, fastclip "
            f"{report['fastclip']['version']} ({report['fastclip']['cpu_kernels']}).",
            "",
            *table([HEAD, *rows]),
            "",
            "DistilGPT-2 (81.9 million parameters, float32) and an RL policy of 6 tensors, fused AdamW. Plain calls: "
            "torch's clip_grad_norm_ and step, with AMP unscale_ before and update after; for the 6 tensors fastclip's "
            "clip_grad_norm_ and step. Medians of paired rounds, with the quartiles of the speed-up.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optim", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seconds a case instead of thirty: shows that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latest-optim"), metavar="PREFIX")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        "machine": {"processor": processor(), "threads": options.threads},
        "fastclip": fastclip.build_info(),
        "results": measure(2 if options.quick else 30),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    print(f"Written: {options.output}.json, {options.output}.md", file=sys.stderr)


if __name__ == "__main__":
    main()
