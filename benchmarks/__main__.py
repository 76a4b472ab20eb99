"""The command line: ``python -m benchmarks [--quick] [--case TEXT] [--threads N] [--output PREFIX]``."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

import fastclip
from benchmarks.cases import CASES
from benchmarks.measure import run_case
from benchmarks.table import markdown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second a case instead of ten: shows that it runs")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/latest"), metavar="PREFIX", help=".json and .md"
    )
    options = parser.parse_args()
    cases = [case for case in CASES if options.case.lower() in case.name.lower()]
    if options.list or not cases:
        print("\n".join(case.name for case in CASES))
        return 0 if options.list else 2
    if not fastclip.build_info()["native"]:
        print(f"fastclip's extension is missing: {fastclip.build_info()['missing_because']}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): figures will be off.", file=sys.stderr)

    results = []
    for case in cases:
        print(f"{case.name}: {len(case.shapes):,} tensors, {case.bytes / 1e3:,.0f} KB ...", file=sys.stderr, flush=True)
        results.append(run_case(case, seconds=0.5 if options.quick else 10, max_rounds=400))
    report = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "load_at_start": load,
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "fastclip": fastclip.build_info(),
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    options.output.with_suffix(".md").write_text(text)
    print(text)
    print(f"Written: {options.output}.json, {options.output}.md", file=sys.stderr)
    return 0


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
