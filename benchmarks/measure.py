"""Times contestants in turn, in one process, and turns the samples into a row of results.

Timings on shared machines drift by tens of percent within seconds. Every round therefore runs all contestants once,
in turn, and a speed-up is the median of the rounds' ratios, not the ratio of two medians.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import ceilings, machine, rivals, stats
from benchmarks.cases import UNCLIPPED, Aim, Case
from benchmarks.clocks import CpuClock, CudaClock
from benchmarks.gradients import WHOLE, Gradients, WrongResult

CEILING = "ceiling"
FIRST = ("norm_error", "largest_difference", "memory_peak")  # what the first call of each contestant shows
LEAST_ROUNDS = 5
MOST_ROUNDS = 200
WARM = 1 << 16  # bytes: up to here a sample is the mean of WARM_CALLS calls in a row, else the cache decides
WARM_CALLS = 20


def nothing(*_) -> None:
    pass


@dataclass(frozen=True)
class Effort:
    """How long to measure. ``quick`` only shows that everything runs; ``factor`` multiplies every case's seconds."""

    quick: bool = False
    factor: float = 1.0

    def seconds(self, wanted: float) -> float:
        return 0.15 if self.quick else wanted * self.factor

    def least_rounds(self, size: int = 0) -> int:
        """Fewer for lists of more than 2 GB: three rounds of them take as long as 50 of others."""
        return 2 if self.quick else 3 if size > 2 << 30 else LEAST_ROUNDS

    @property
    def whole(self) -> int:
        """Elements to look at after the first call."""
        return WHOLE // 8 if self.quick else WHOLE


@dataclass(frozen=True)
class Contestant:
    """A call to be timed; what to do before, and with its result after, outside of the timed part."""

    call: Callable[[], object]
    prepare: Callable[[], None] = nothing
    check: Callable[[object], None] = nothing


@dataclass(frozen=True)
class Times:
    """Seconds a round, for each contestant; on a CUDA device ``host`` has the host's share of each."""

    samples: dict[str, list[float]]
    host: dict[str, list[float]]
    contention: dict

    def median(self, name: str) -> float:
        return stats.median(self.samples[name])

    def ratio(self, slower: str, faster: str) -> dict:
        return stats.ratio(self.samples[slower], self.samples[faster])


def paired(
    contestants: dict[str, Contestant],
    seconds: float,
    effort: Effort = Effort(),
    max_rounds: int = MOST_ROUNDS,
    calls: int = 1,
    clock: CpuClock | CudaClock | None = None,
    size: int = 0,
) -> Times:
    """Runs all contestants in turn until ``seconds`` are used up, at least five rounds, after one for warm-up.

    ``seconds`` are those of a usual effort; a quick one takes fewer, and two rounds are enough for it.

    ``size`` is that of the list in bytes. With ``calls`` above 1 a sample is the mean of so many calls in a row, each
    of them prepared for.
    """
    clock = clock or CpuClock()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    host: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    contention = machine.Contention()
    end = time.perf_counter() + effort.seconds(seconds)
    for number in range(max_rounds + 1):
        for name in order:
            contestant, total, total_host = contestants[name], 0.0, 0.0
            for _ in range(calls):
                contestant.prepare()
                elapsed, elapsed_host, result = clock.time(contestant.call)
                total, total_host = total + elapsed, total_host + elapsed_host
            contestant.check(result)
            if number > 0:
                samples[name].append(total / calls)
                host[name].append(total_host / calls)
        order.append(order.pop(0))  # nobody always follows the same neighbour
        if number >= effort.least_rounds(size) and time.perf_counter() > end:
            break
    return Times(samples, host, contention.so_far())


def run_mode(
    case: Case, gradients: Gradients, mode: str, clock: CpuClock | CudaClock, effort: Effort
) -> tuple[dict, dict[str, str]]:
    """Measures a case in one mode: its row, and the rivals that did not take part, with the reason.

    Raises WrongResult when a call of fastclip did not do what it should have; a rival that did not is left out.
    """
    gradients.set_mode(mode)
    calls, absent = rivals.contestants(gradients, case.rivals, effort.quick)
    first, failed = first_calls(calls, gradients, effort.whole)
    contestants = {
        name: Contestant(calls[name], gradients.restore, nothing if name in failed else _check(name, gradients))
        for name in first
    }
    contestants[rivals.LIST] = Contestant(lambda: [parameter.grad for parameter in gradients.parameters])
    way, move = ceiling(gradients, mode, clock)
    contestants[CEILING] = Contestant(move, gradients.restore)

    on_cpu = isinstance(clock, CpuClock)
    warm = WARM_CALLS if on_cpu and case.bytes <= WARM else 1
    times = paired(contestants, case.seconds, effort, calls=warm, clock=clock, size=case.bytes)
    row = {
        "part": case.part,
        "case": case.name,
        "mode": mode,
        "dtype": case.dtype,
        "norm_type": str(case.norm_type),
        "device": "cpu" if on_cpu else "cuda",
        "threads": torch.get_num_threads(),
        "tensors": len(case.shapes),
        "elements": case.elements,
        "bytes": case.bytes,
        "calls_a_sample": warm,
        "ceiling_way": way,
        **{figure: {name: call[figure] for name, call in first.items()} for figure in FIRST},
        **summary(times, rivals.TORCH, rivals.FASTCLIP, case.aims.get(mode)),
    }
    row["gb_per_s"] = passes(mode) * case.bytes / times.median(rivals.FASTCLIP) / 1e9
    row["of_ceiling"] = times.ratio(CEILING, rivals.FASTCLIP)
    if not on_cpu:
        row["host_us"] = {name: stats.median(values) * 1e6 for name, values in times.host.items()}
    return row, {**absent, **failed}


def passes(mode: str) -> int:
    """How often fastclip moves every byte between processor and memory: read; or read, read again, and written."""
    return 1 if mode == UNCLIPPED else 3


def summary(times: Times, plain: str, ours: str, aim: Aim | None = None) -> dict:
    """The figures that every row has, whatever was measured."""
    row = {
        "plain": plain,
        "ours": ours,
        "median_us": {name: times.median(name) * 1e6 for name in times.samples},
        "ours_us": _in_us(stats.spread(times.samples[ours])),
        "speedup": times.ratio(plain, ours),
        "rounds": len(times.samples[ours]),
        "contention": times.contention,
        "samples_us": {name: [round(s * 1e6, 3) for s in values] for name, values in times.samples.items()},
    }
    if aim:
        row["aim"] = {"over": aim.over, "speedup": aim.speedup, "reached": times.ratio(aim.over, ours)}
    return row


def _in_us(spread: dict) -> dict:
    return {
        name: [v * 1e6 for v in value] if isinstance(value, list) else value * 1e6 for name, value in spread.items()
    }


def first_calls(
    calls: dict[str, Callable], gradients: Gradients, whole: int = WHOLE
) -> tuple[dict[str, dict], dict[str, str]]:
    """Warms up, and looks at the whole result: what FIRST names of each call, and why others have nothing to show.

    Raises what goes wrong with fastclip, or torch's own function; of a rival it is noted.
    """
    first, failed = {}, {}
    for name, call in calls.items():
        try:
            first[name] = _first_call(name, call, gradients, whole)
        except WrongResult as wrong:
            if name == rivals.FASTCLIP:
                raise
            failed[name] = f"wrong result: {wrong}"
            if name == rivals.TORCH:  # it is what others are compared with, wrong or not
                first[name] = dict.fromkeys(FIRST)
        except Exception as error:  # rivals fail in their own ways
            if name in (rivals.FASTCLIP, rivals.TORCH):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return first, failed


def _first_call(name: str, call: Callable, gradients: Gradients, whole: int) -> dict:
    result: list[torch.Tensor] = []
    gradients.restore()
    call()  # what is compiled or loaded now is no memory of the call
    gradients.restore()
    if gradients.grads[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result.append(call())
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = machine.peak_of(lambda: result.append(call()))
    exact = name == rivals.FASTCLIP
    largest = gradients.check_whole(name, result[0], exact, whole)
    gradients.check(name, result[0], exact)
    return {"norm_error": gradients.norm_error(result[0]), "largest_difference": largest, "memory_peak": peak}


def _check(name: str, gradients: Gradients) -> Callable[[object], None]:
    return lambda norm: gradients.check(name, norm, exact=name == rivals.FASTCLIP)


def ceiling(gradients: Gradients, mode: str, clock: CpuClock | CudaClock) -> tuple[str, Callable]:
    """The fastest way to move the bytes that clipping has to move, and its name."""

    def seconds(call: Callable) -> float:
        return clock.time(call)[0]

    buffers = list(gradients.buffers.values())
    flat = gradients.flat()
    tries = 3 if flat.nbytes < 1 << 26 else 1
    ways = ceilings.reads(flat)
    way = ceilings.fastest(ways, seconds, tries)
    reads = [ceilings.reads(buffer)[way] for buffer in buffers]
    if mode == UNCLIPPED:
        return way, _all(reads)
    ways = ceilings.read_writes(flat)
    second = ceilings.fastest(ways, seconds, tries)
    writes = [ceilings.read_writes(buffer)[second] for buffer in buffers]
    return f"{way}; {second}", _all([*reads, *writes])


def _all(calls: list[Callable]) -> Callable:
    if len(calls) == 1:
        return calls[0]

    def run() -> None:
        for call in calls:
            call()

    return run
