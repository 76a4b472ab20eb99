"""What GradientMonitor costs: ``python -m benchmarks.monitor [--quick] [--threads N]``, beside plain clipping."""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

import fastclip
from benchmarks.gradients import NEVER
from benchmarks.machine import processor
from benchmarks.measure import Contestant, Times, paired
from benchmarks.models import gpt2_small, rl_policy
from benchmarks.table import Table, duration, markdown

HEAD = ["case", "plain clipping", "recorded", "recorded, with a file", "step between records"]


def measure(shapes: list[tuple[int, ...]], seconds: float, max_rounds: int) -> Times:
    torch.manual_seed(0)
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(shape)) for shape in shapes)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        monitors = {
            "recorded": fastclip.GradientMonitor(model, weight_norms=0),
            "file": fastclip.GradientMonitor(model, weight_norms=0, path=Path(folder) / "run.jsonl"),
            "between": fastclip.GradientMonitor(model, weight_norms=0, every=1 << 60),
        }
        monitors["between"].clip_grad_norm_(NEVER)  # the one step that it records
        calls = {name: lambda m=monitor: m.clip_grad_norm_(NEVER) for name, monitor in monitors.items()}
        calls["plain"] = lambda: fastclip.clip_grad_norm_(model.parameters(), NEVER)
        times = paired({name: Contestant(call) for name, call in calls.items()}, seconds, max_rounds=max_rounds)
        for monitor in monitors.values():
            monitor.close()
    return times


def row(name: str, times: Times) -> list[str]:
    cells = [name, duration(times.median("plain") * 1e6)]
    for contestant in ("recorded", "file", "between"):
        samples = zip(times.samples[contestant], times.samples["plain"], strict=True)
        more = statistics.median(a - b for a, b in samples) * 1e6
        cells.append(f"{more:+,.1f} us ({more / 1e6 / times.median('plain'):+.1%})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seconds a case instead of twenty: shows that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = 2 if options.quick else 20
    rows = [
        row("RL policy, 6 tensors", measure(rl_policy(), seconds, 5000)),
        row("GPT-2 small, 148 tensors", measure(gpt2_small(), seconds, 300)),
    ]
    print(f"{processor()}, {options.threads} threads; torch {torch.__version__}, fastclip {fastclip.__version__}.\n")
    note = "float32, nothing clipped. Medians of paired rounds; what a monitor adds to plain clipping."
    print(markdown(Table("Monitoring", HEAD, rows, note)))


if __name__ == "__main__":
    main()
