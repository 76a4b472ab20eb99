"""Counts instructions and bytes instead of timing: ``python -m benchmarks.instructions [-o FILE]``.

Valgrind's callgrind executes the calls with a simulated cache, on one thread and without AVX-512, which it does not
know; the same counts come out every time, also on a busy machine. It takes about two minutes.
"""

import argparse
import ctypes
import gc
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, models, results, table
from benchmarks.cases import BOTH, Case

HERE = Path(__file__).resolve().parent
LINE = 64
CACHE = 4 << 20  # bytes of the simulated last level: less than the large list, as memory is beyond every real cache
CALLS = 3
CASES = [
    Case("instructions", "RL policy, fp32", models.rl_policy(), "fp32"),
    Case("instructions", "2,000 tensors of 64, fp32", [(64,)] * 2000, "fp32"),
    Case("instructions", "LSTM text model, fp32", models.lstm_text_model(), "fp32"),
    Case("instructions", "LSTM text model, bf16", models.lstm_text_model(), "bf16"),
]
HEAD = ["case", "", "who", "instructions", "a tensor", "a byte", "bytes read, times N", "written, times N"]
NOTE = (
    "One call, counted by callgrind on one thread with AVX2 and a last-level cache of 4 MB; N: bytes of all gradients. "
    "Lists that fit this cache move no bytes worth counting."
)


def count_here(library: str) -> None:
    """Inside callgrind: every call between begin() and end()."""
    import torch

    import fastclip
    from benchmarks.gradients import Gradients

    gc.disable()  # a collection in the middle would be counted
    counter = ctypes.CDLL(library)
    torch.set_num_threads(1)
    clips = {"torch": torch.nn.utils.clip_grad_norm_, "fastclip": fastclip.clip_grad_norm_}
    for i, case in enumerate(CASES):
        gradients = Gradients(case)
        for mode in BOTH:
            gradients.set_mode(mode)
            for who, clip in clips.items():
                _counted(counter, f"{i}|{mode}|{who}", clip, gradients)
    print(fastclip.build_info()["cpu_kernels"])


def _counted(counter: ctypes.CDLL, label: str, clip: Callable, gradients) -> None:
    call = lambda: clip(gradients.parameters, gradients.max_norm)  # noqa: E731
    # The interpreter specialises code that has run a few times.
    for _ in range(20 if gradients.case.bytes < CACHE else 1):
        gradients.restore()
        call()
    for _ in range(CALLS):
        gradients.restore()
        counter.begin()
        call()
        counter.end(label.encode())


def read_dumps(folder: Path) -> dict[str, dict[str, int]]:
    """The events of each label, of the last call."""
    counts = {}
    for file in sorted(folder.glob("out.*"), key=lambda f: int(f.suffix[1:] or 0)):
        text = file.read_text()
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        events = re.search(r"^events: (.+)$", text, re.MULTILINE)
        totals = re.search(r"^(?:totals|summary): (.+)$", text, re.MULTILINE)
        if label and events and totals:
            names, numbers = events[1].split(), map(int, totals[1].split())
            # Zeros at the end are not written.
            counts[label[1].strip()] = dict.fromkeys(names, 0) | dict(zip(names, numbers, strict=False))
    return counts


def rows(counts: dict[str, dict[str, int]]) -> list[dict]:
    found = []
    for label, events in counts.items():
        number, mode, who = label.split("|")
        case = CASES[int(number)]
        found.append(
            {
                "part": "instructions",
                "case": case.name,
                "mode": mode,
                "who": who,
                "tensors": len(case.shapes),
                "bytes": case.bytes,
                "instructions": events["Ir"],
                "bytes_read": (events["DLmr"] + events["DLmw"]) * LINE,
                "bytes_written": (events["DLdmr"] + events["DLdmw"]) * LINE,
                "events": events,
            }
        )
    return found


def to_table(report: dict) -> table.Table:
    lines = []
    for row in report["results"]:
        large = row["bytes"] > CACHE
        line = [
            row["case"],
            row["mode"],
            row["who"],
            f"{row['instructions']:,}",
            f"{row['instructions'] / row['tensors']:,.0f}",
            f"{row['instructions'] / row['bytes']:.2f}",
            *(f"{row[f'bytes_{what}'] / row['bytes']:.2f}" if large else "" for what in ("read", "written")),
        ]
        lines.append(line)
    return table.Table("Instructions and bytes", HEAD, table.grouped(lines), NOTE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/latest-instructions.json"))
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        count_here(options.here)
        return 0
    missing = [name for name in ("valgrind", "cc") if not shutil.which(name)]
    if missing:
        print(f"expected {' and '.join(missing)} on the PATH; found none. Nothing was counted.", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "instructions.so"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(HERE / "instructions.c"), "-o", str(library)], check=True)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes", "--simulate-wb=yes"]
        command += [f"--LL={CACHE},16,{LINE}", f"--callgrind-out-file={folder / 'out'}", "-q"]
        command += [sys.executable, "-m", "benchmarks.instructions", "--here", str(library)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        counted = rows(read_dumps(folder))
    if not counted:
        print("expected counts from callgrind, found none", file=sys.stderr)
        return 1

    report = {
        "machine": {"processor": machine.processor()},
        "fastclip": {**machine.build(), "cpu_kernels": done.stdout.split()[-1], "threads": 1},
        "results": counted,
    }
    results.save(report, options.output)
    print(table.markdown(to_table(report)))
    print(f"Written: {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
