"""The CPU kernel against what the machine can do: ceilings, instruction sets, plain loops, other processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import fastclip
from benchmarks import ceilings, models, rivals, stats
from benchmarks.cases import BOTH, UNCLIPPED, Case
from benchmarks.clocks import CpuClock
from benchmarks.gradients import Gradients
from benchmarks.measure import CEILING, Contestant, Effort, Times, ceiling, paired, summary
from fastclip._native import _C

PART = "limits"
OF_READ, OF_CLIP = 0.90, 0.85  # of the ceilings, for lists over 64 MB
OF_AVX512 = 0.95
OVER_PLAIN_LOOP = 1.3
OVER_WALK = 2.0
SIX_TENSORS_US = 4.0


def limit(case: str, mode: str, value: dict, unit: str, aim: float, times: Times, higher: bool = True) -> dict:
    """A row: what was measured, its aim, and whether the aim was reached."""
    reached = value["median"] >= aim if higher else value["median"] <= aim
    figures = summary(times, *list(times.samples)[:2])
    return {
        "part": PART,
        "case": case,
        "mode": mode,
        "value": value,
        "unit": unit,
        "aim_value": aim,
        "higher_is_better": higher,
        "met": reached,
        **{figure: figures[figure] for figure in ("median_us", "samples_us", "contention")},
    }


def measure(effort: Effort) -> Iterator[dict]:
    for dtype in ("fp32", "bf16"):
        yield from against_ceilings(dtype, effort)
    yield from against_plain_loops(effort)
    yield from against_walking(effort)
    yield from six_tensors(effort)
    yield from under_contention(effort)


def clip(gradients: Gradients) -> Contestant:
    parameters, max_norm, order = gradients.parameters, gradients.max_norm, gradients.case.norm_type
    return Contestant(
        lambda: fastclip.clip_grad_norm_(parameters, max_norm, order),
        gradients.restore,
        lambda norm: gradients.check(rivals.FASTCLIP, norm, exact=True),
    )


def with_kernels(name: str, contestant: Contestant) -> Contestant:
    """The same call with one instruction set; the choice is made outside of the timed part."""

    def prepare() -> None:
        contestant.prepare()
        _C.select_kernels(name)

    def check(result: object) -> None:
        _C.select_kernels(chosen)
        contestant.check(result)

    chosen = _C.kernels()
    return Contestant(contestant.call, prepare, check)


def against_ceilings(dtype: str, effort: Effort) -> Iterator[dict]:
    """Lists over 64 MB: the share of the memory's speed, and AVX2 beside AVX-512 where there are both."""
    gradients = Gradients(Case(PART, f"GPT-2 small, {dtype}", models.gpt2_small(), dtype))
    several = {"avx2", "avx512"} <= set(_C.available_kernels())
    between_sets = []
    for mode in BOTH:
        gradients.set_mode(mode)
        contestants = {
            CEILING: Contestant(ceiling(gradients, mode, CpuClock())[1], gradients.restore),
            rivals.FASTCLIP: clip(gradients),
        }
        if several:
            contestants |= {name: with_kernels(name, clip(gradients)) for name in ("avx512", "avx2")}
        times = paired(contestants, 3.0, effort)
        name = f"{gradients.case.name}: of the ceiling"
        wanted = OF_READ if mode == UNCLIPPED else OF_CLIP
        yield limit(name, mode, times.ratio(CEILING, rivals.FASTCLIP), "%", wanted, times)
        if several:
            name = f"{gradients.case.name}: AVX2, of AVX-512's speed"
            between_sets.append(limit(name, mode, times.ratio("avx512", "avx2"), "%", OF_AVX512, times))
    yield from between_sets


def against_plain_loops(effort: Effort) -> Iterator[dict]:
    """Lists that stay in the cache, beside a hand-written clip of one buffer of the same size."""
    if ceilings.missing_because():
        return
    inside = [("23 MB", models.lstm_text_model()), ("1 MB", [(2**14,)] * 16), ("64 KB", [(2**10,)] * 16)]
    for name, shapes in inside:
        gradients = Gradients(Case(PART, name, shapes, "fp32"))
        for mode in BOTH:
            gradients.set_mode(mode)
            flat, max_norm = gradients.flat(), gradients.max_norm
            loop = Contestant(lambda flat=flat, m=max_norm: ceilings.native().plain_clip(flat, m), gradients.restore)
            calls = 20 if gradients.case.bytes <= 1 << 20 else 1
            times = paired({rivals.FASTCLIP: clip(gradients), "plain loop": loop}, 1.0, effort, calls=calls)
            value = times.ratio(rivals.FASTCLIP, "plain loop")
            what = f"{name}: time of a plain loop over one buffer"
            yield limit(what, mode, value, "x", OVER_PLAIN_LOOP, times, higher=False)


def against_walking(effort: Effort) -> Iterator[dict]:
    """2,000 tiny tensors, beside reading their .grad in C++."""
    if ceilings.missing_because():
        return
    gradients = Gradients(Case(PART, "2,000 tensors of 64", [(64,)] * 2000, "fp32"))
    walk = Contestant(lambda: ceilings.native().walk(gradients.parameters))
    gradients.set_mode(UNCLIPPED)
    for warmth, calls in (("unclipped, warm", 20), ("unclipped, cold", 1)):
        contestants = {rivals.FASTCLIP: clip(gradients), "walk": walk}
        if calls == 1:
            contestants["other work"] = Contestant(_other_work())
        times = paired(contestants, 1.0, effort, calls=calls)
        name = f"{gradients.case.name}: time of reading .grad in C++"
        yield limit(name, warmth, times.ratio(rivals.FASTCLIP, "walk"), "x", OVER_WALK, times, False)


def six_tensors(effort: Effort) -> Iterator[dict]:
    gradients = Gradients(Case(PART, "6 tensors", models.rl_policy(), "fp32"))
    for mode in BOTH:
        gradients.set_mode(mode)
        torch_call = Contestant(
            lambda g=gradients, m=gradients.max_norm: torch.nn.utils.clip_grad_norm_(g.parameters, m), gradients.restore
        )
        times = paired({rivals.FASTCLIP: clip(gradients), rivals.TORCH: torch_call}, 1.0, effort, calls=20)
        value = stats.spread([s * 1e6 for s in times.samples[rivals.FASTCLIP]])
        yield limit("6 tensors: time of a call", mode, value, "us", SIX_TENSORS_US, times, False)


def _other_work() -> Callable[[], object]:
    """What turns the second-level cache over, as a backward pass does between two calls."""
    block = torch.zeros(8 << 20, dtype=torch.uint8)
    return lambda: block.add_(1)


# ---- while others use the cores ------------------------------------------------------------------------------------


# Ends with its parent, whatever happens to that.
SPIN = "import os\nwhile os.getppid() == {}:\n    for _ in range(10**6):\n        pass"


class Spinners:
    """A process on each core that does nothing but spin; halted and continued by signals."""

    def __enter__(self) -> "Spinners":
        pinned = hasattr(os, "sched_setaffinity")
        cores = sorted(os.sched_getaffinity(0)) if pinned else range(os.cpu_count() or 1)
        self.processes = [subprocess.Popen([sys.executable, "-c", SPIN.format(os.getpid())]) for _ in cores]
        if pinned:
            for process, core in zip(self.processes, cores, strict=True):
                os.sched_setaffinity(process.pid, {core})
        time.sleep(0.3)  # until they have started
        self.busy = True
        self.set(False)
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def set(self, busy: bool) -> None:
        if busy != self.busy:
            self.busy = busy
            for process in self.processes:
                os.kill(process.pid, signal.SIGCONT if busy else signal.SIGSTOP)
                if not busy:
                    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # until it stands
            time.sleep(0.02)


def under_contention(effort: Effort) -> Iterator[dict]:
    """A process spins on each core: how many times longer torch takes than in quiet, over the same for fastclip."""
    gradients = Gradients(Case(PART, "LSTM text model, fp32", models.lstm_text_model(), "fp32"))
    with Spinners() as spinners:
        for mode in BOTH:
            gradients.set_mode(mode)
            contestants = {}
            for busy in (False, True):
                for name, contestant in ((rivals.TORCH, _torch(gradients)), (rivals.FASTCLIP, clip(gradients))):

                    def prepare(busy: bool = busy, restore: Callable = contestant.prepare) -> None:
                        spinners.set(busy)
                        restore()

                    key = f"{name}, {'busy' if busy else 'quiet'}"
                    contestants[key] = Contestant(contestant.call, prepare, contestant.check)
            times = paired(contestants, 5.0, effort)
            samples = times.samples
            slower = {
                name: [b / q for b, q in zip(samples[f"{name}, busy"], samples[f"{name}, quiet"], strict=True)]
                for name in (rivals.TORCH, rivals.FASTCLIP)
            }
            value = stats.ratio(slower[rivals.TORCH], slower[rivals.FASTCLIP])
            row = limit("a process spins on each core: torch's loss over fastclip's", mode, value, "x", 1.0, times)
            row["contention"] = {"others_cores": 0.0, "steal": row["contention"]["steal"]}  # these others are wanted
            row["slower_by"] = {name: stats.spread(values) for name, values in slower.items()}
            yield row


def _torch(gradients: Gradients) -> Contestant:
    parameters, max_norm = gradients.parameters, gradients.max_norm
    return Contestant(
        lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm),
        gradients.restore,
        lambda norm: gradients.check(rivals.TORCH, norm, exact=False),
    )
