"""A run: which cases fit, measured one after the other, and the report of all of them."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import accuracy, ceilings, display, experiments, limits, machine, optim, training
from benchmarks.cases import Case, cases
from benchmarks.clocks import card, clock
from benchmarks.gradients import Gradients
from benchmarks.measure import Effort, run_mode

CASE_PARTS = ("models", "kinds", "tensors", "bytes", "threads")
CPU_PARTS = (*CASE_PARTS, "accuracy", "limits", "experiments", "optim", "end-to-end")
CUDA_PARTS = ("models", "optim", "tensors", "kinds")  # what --budget may cut off comes last
QUICK_PARTS = ("models", "kinds", "tensors", "bytes", "accuracy", "limits", "optim")
QUICK_BYTES, QUICK_TENSORS = 300 << 20, 20_000  # --quick leaves out what takes longer to make than to measure
ROOM = 2 << 30  # bytes of memory that stay free
STRICT_TRIES = 3

# Exit codes.
OK, WRONG, NO_CASE, REFUSED = 0, 1, 2, 3


@dataclass(frozen=True)
class Step:
    """A piece of a run: yields rows, and fills what it says of absent rivals into a dict."""

    part: str
    name: str
    rows: Callable[[dict[str, str]], Iterator[dict]]


class Disturbed(Exception):
    """Under --strict: somebody else used the machine."""


def plan(parts: list[str], text: str, device: str, effort: Effort, threads: int) -> tuple[list[Step], list[str]]:
    """The steps of a run in the order of the parts, and the cases that are left out, with the reason."""
    steps, left_out = [], []
    for case in cases(threads):
        if case.part in parts and text.lower() in case.name.lower():
            fitting, why = fit(case, device, effort.quick)
            left_out += why
            if fitting.modes:
                steps.append(Step(case.part, case.name, _case(fitting, device, effort, threads)))
    whole = {
        "limits": lambda _: limits.measure(effort),
        "experiments": lambda _: experiments.measure(effort),
        "accuracy": lambda _: accuracy.measure(),
        "optim": lambda _: optim.measure(effort, device),
        "end-to-end": lambda _: training.measure(effort),
    }
    # These are chosen by --part; --case, which means cases, takes them by the part's name.
    steps += [Step(part, part, rows) for part, rows in whole.items() if part in parts and text.lower() in part]
    return sorted(steps, key=lambda step: parts.index(step.part)), left_out


def fit(case: Case, device: str, quick: bool) -> tuple[Case, list[str]]:
    """The case with the modes for which there is memory, and text for each that has none."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else machine.memory()
    modes, left_out = [], []
    for mode in case.modes:
        needed = case.memory(mode)
        if device == "cuda":
            needed += case.bytes  # the rivals make copies
        if quick and (case.bytes > QUICK_BYTES or len(case.shapes) > QUICK_TENSORS):
            left_out.append(f"{case.name}, {mode}: too large for --quick")
        elif needed + ROOM > free:
            room = max(0, free - ROOM)
            left_out.append(f"{case.name}, {mode}: needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")
        else:
            modes.append(mode)
    return dataclasses.replace(case, modes=tuple(modes)), left_out


def _case(case: Case, device: str, effort: Effort, threads: int) -> Callable[[dict[str, str]], Iterator[dict]]:
    def rows(absent: dict[str, str]) -> Iterator[dict]:
        if device == "cpu":
            torch.set_num_threads(case.threads or threads)
        try:
            gradients, watch = Gradients(case, device), clock(device)
            for mode in case.modes:
                row, missing = run_mode(case, gradients, mode, watch, effort)
                for name, why in missing.items():
                    absent[f"{name} ({case.name}, {mode})"] = why
                yield row
        finally:
            if device == "cpu":
                torch.set_num_threads(threads)

    return rows


def run(
    steps: list[Step],
    left_out: list[str],
    device: str,
    effort: Effort,
    threads: int,
    strict: bool = False,
    budget: float = math.inf,
) -> dict:
    """Measures all steps; those that ``budget`` seconds do not reach are named as left out.

    Raises WrongResult, and under ``strict`` Disturbed.
    """
    end = time.perf_counter() + budget
    torch.set_num_threads(threads)
    description = machine.describe(threads)
    # Compiling the ceilings would count as somebody's work.
    no_ceilings = ceilings.missing_because() if device == "cpu" else None
    if device == "cuda":
        description["gpu"] = card()
    report = {
        "machine": description,
        "fastclip": machine.build(),
        "options": {"quick": effort.quick, "factor": effort.factor, "device": device, "strict": strict},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": {},
        "absent": {},
        "left_out": left_out,
        "results": [],
    }
    absent: dict[str, str] = {}
    with display.choose(len(steps)) as shown:
        _look_around(report, shown, strict)
        if no_ceilings:
            shown.note(f"ceilings.cpp could not be built ({no_ceilings}): the ceilings are torch's own operations.")
            report["left_out"].append(f"ceilings in C++: {no_ceilings}")
        for step in steps:
            if time.perf_counter() > end:
                report["left_out"].append(f"{step.name}: the {budget:g} seconds of --budget were used up")
                continue
            shown.begin(step.name)
            start = time.perf_counter()
            report["results"] += _measured(step, absent, shown, strict)
            spent = report["seconds"].get(step.part, 0.0) + time.perf_counter() - start
            report["seconds"][step.part] = round(spent, 1)
        report["absent"] = _summed_up(absent)
        if device == "cuda":
            description["gpu"]["clocks_at_end"] = card()["clocks"]
        busy = sum(row.get("disturbed", False) for row in report["results"])
        if busy:
            shown.note(f"Others used the machine during {busy} of {len(report['results'])} measurements: see the end.")
    shown.finish(report)
    return report


def _measured(step: Step, absent: dict[str, str], shown, strict: bool) -> list[dict]:
    """The rows of a step; under ``strict`` measured anew when somebody disturbed them, a few times."""
    for _ in range(STRICT_TRIES if strict else 1):
        rows = []
        for row in step.rows(absent):
            if "contention" in row:  # something was timed
                row["disturbed"] = machine.disturbed(row["contention"])
            rows.append(row)
            shown.row(row)
        busy = [row for row in rows if row.get("disturbed")]
        if not busy or not strict:
            return rows
    raise Disturbed(f"{busy[0]['case']}, {busy[0]['mode']}: {_others(busy[0]['contention'])}")


def _look_around(report: dict, shown, strict: bool) -> None:
    there = machine.who_is_there()
    report["machine"]["contention_at_start"] = there
    if machine.disturbed(there):
        if strict:
            raise Disturbed(_others(there))
        shown.note(f"The machine is busy ({_others(there)}): figures will be off.")


def _others(contention: dict) -> str:
    return f"others use {contention['others_cores']:.1f} cores, {contention['steal']:.0%} of the time is stolen"


def _summed_up(absent: dict[str, str]) -> dict[str, str]:
    """One line for each rival and reason, with the cases where they are not all."""
    lines: dict[tuple[str, str], list[str]] = {}
    for who, why in absent.items():
        name, _, case = who.partition(" (")
        lines.setdefault((name, why), []).append(case.rstrip(")"))
    several = {name for name, _ in lines if sum(n == name for n, _ in lines) > 1}
    return {
        (f"{name}, {cases[0]}" + (f" and {len(cases) - 1} more" if cases[1:] else "") if name in several else name): why
        for (name, why), cases in lines.items()
    }


def list_cases(steps: list[Step], left_out: list[str]) -> None:
    part = None
    for step in steps:
        if step.part != part:
            part = step.part
            print(f"{part}:")
        print(f"  {step.name}")
    for line in left_out:
        print(f"left out: {line}")
