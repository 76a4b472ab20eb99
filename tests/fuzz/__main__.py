"""Clips random lists and compares with the oracle: python tests/fuzz [--lists N] [--seed S].

List number i has the seed S + i, and is run with one of the processor's instruction sets, which the seed decides too:
--seed alone repeats a list that failed. Two processes work at a time, and another instruction set is another process.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
MOST_FAILURES = 5  # that a process shows before it gives up


def work(first: int, step: int, last: int, report: str) -> int:
    """Runs the seeds first, first + step, ... below last, in this process. The report names the seed at hand."""
    import faulthandler

    import torch
    from checks import run

    faulthandler.enable()
    torch.set_num_threads(1)
    failures, place = 0, os.open(report, os.O_WRONLY)
    for seed in range(first, last, step):
        os.pwrite(place, b"%20d" % seed, 0)
        try:
            run(seed)
        except AssertionError as error:
            failures += 1
            print(f"FAILED SEED={seed} kernels={os.environ['FASTCLIP_CPU']}: {error}", flush=True)
            if failures == MOST_FAILURES and seed + step < last:
                print(f"gives up: seeds {seed + step} to {last - 1} are not run", flush=True)
                break
    return failures


def instruction_sets() -> list[str]:
    code = "import json, fastclip; print(json.dumps(fastclip.build_info()['cpu_kernels_available']))"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    return json.loads(subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=-1).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, help="how many (20,000; with --seed: 1)")
    parser.add_argument("--seed", type=int, help="of the first list (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time (one a processor)")
    parser.add_argument("--work", nargs=4, metavar=("FIRST", "STEP", "LAST", "REPORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        first, step, last = map(int, args.work[:3])
        return 1 if work(first, step, last, args.work[3]) else 0
    lists = args.lists or (20_000 if args.seed is None else 1)
    start, sets, began = args.seed or 0, instruction_sets(), time.time()

    blocks = max(1, lists // 100_000)  # a new process takes as long as 5,000 lists
    bounds = [start + lists * i // blocks for i in range(blocks + 1)]
    jobs = []
    for low, high in itertools.pairwise(bounds):
        for number, name in enumerate(sets):
            first = low + (number - low) % len(sets)
            if first < high:
                jobs.append((name, first, high))

    def one(job: tuple[str, int, int]) -> tuple[int, int]:
        name, first, last = job
        report = HERE.parents[1] / "build" / f"fuzz-{os.getpid()}-{name}-{first}"
        report.parent.mkdir(exist_ok=True)
        report.touch()
        command = [sys.executable, __file__, "--work", str(first), str(len(sets)), str(last), str(report)]
        environment = {**os.environ, "FASTCLIP_CPU": name, "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
        failed = 0
        with subprocess.Popen(command, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                failed += line.startswith("FAILED SEED")
        if process.returncode != 0 and not failed:
            failed = 1
            seed = report.read_text().strip()
            print(f"FAILED SEED={seed} kernels={name}: the process ended with {process.returncode}", flush=True)
        report.unlink()
        return len(range(first, last, len(sets))), failed

    finished, failed = 0, 0
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        for count, failures in pool.map(one, jobs):
            finished += count
            failed += failures
            print(f"{finished:,} of {lists:,} lists, {failed} failed, {time.time() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
