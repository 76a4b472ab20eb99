"""Times torch, fastclip and the machine's own ceiling on one case: alternating, in one process.

Timings on shared machines drift by tens of percent within seconds. Every round therefore runs all contestants once,
in turn, and a speed-up is the median of the rounds' ratios, not the ratio of two medians.
"""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastclip
from benchmarks.cases import Case

NEVER = 1e30  # a threshold that no norm reaches


@dataclass(frozen=True)
class Times:
    """Seconds a round, for each contestant."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, slower: str, faster: str) -> tuple[float, float, float]:
        """Median and quartiles of the paired ratios: how many times faster ``faster`` is."""
        ratios = sorted(a / b for a, b in zip(self.samples[slower], self.samples[faster], strict=True))
        return statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def run_case(case: Case, seconds: float, max_rounds: int) -> dict:
    """Measures a case unclipped and clipped; returns plain numbers, ready for JSON."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=case.dtype)) for shape in case.shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    saved = [parameter.grad.clone() for parameter in parameters]
    exact_norm = sum(float(grad.double().square().sum()) for grad in saved) ** 0.5
    threshold = exact_norm / 10

    def restore() -> None:
        torch._foreach_copy_([parameter.grad for parameter in parameters], saved)

    def keep() -> None:
        pass

    ceiling = Ceiling(case.bytes, case.dtype)
    unclipped = paired(
        {
            "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, NEVER),
            "fastclip": lambda: fastclip.clip_grad_norm_(parameters, NEVER),
            "list": lambda: [parameter.grad for parameter in parameters],
            **ceiling.reads(),
        },
        prepare=keep,
        seconds=seconds,
        max_rounds=max_rounds,
    )
    clipped = paired(
        {
            "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, threshold),
            "fastclip": lambda: fastclip.clip_grad_norm_(parameters, threshold),
            "list": lambda: [parameter.grad for parameter in parameters],
            **ceiling.read_writes(),
        },
        prepare=restore,
        seconds=seconds,
        max_rounds=max_rounds,
    )
    restore()
    torch_norm = float(torch.nn.utils.clip_grad_norm_(parameters, threshold))
    torch_clipped = [parameter.grad.clone() for parameter in parameters]
    restore()
    fastclip_norm = float(fastclip.clip_grad_norm_(parameters, threshold))
    largest = max(float(grad.abs().max()) for grad in torch_clipped)
    difference = max(
        float((a - parameter.grad).abs().max()) for a, parameter in zip(torch_clipped, parameters, strict=True)
    )
    return {
        "case": case.name,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "bytes": case.bytes,
        "unclipped": summary(unclipped, case, case.unclipped_target, passes=1),
        "clipped": summary(clipped, case, case.clipped_target, passes=3),
        "norm_error_torch": abs(torch_norm / exact_norm - 1),
        "norm_error_fastclip": abs(fastclip_norm / exact_norm - 1),
        "largest_difference": difference / largest,
    }


def summary(times: Times, case: Case, target: float, passes: int) -> dict:
    """The figures of one row. ``passes``: how often fastclip moves every byte over the memory bus."""
    speedup, low, high = times.ratio("torch", "fastclip")
    rival_speedup = times.ratio(case.rival, "fastclip")[0]
    ceiling = min((name for name in times.samples if name.startswith("ceiling")), key=times.median)
    return {
        "torch_us": times.median("torch") * 1e6,
        "fastclip_us": times.median("fastclip") * 1e6,
        "list_us": times.median("list") * 1e6,
        "speedup": speedup,
        "speedup_quartiles": [low, high],
        "rival": case.rival,
        "rival_speedup": rival_speedup,
        "target": target,
        "gb_per_s": passes * case.bytes / times.median("fastclip") / 1e9,
        "ceiling": ceiling.removeprefix("ceiling "),
        "ceiling_us": times.median(ceiling) * 1e6,
        "of_ceiling": times.ratio(ceiling, "fastclip")[0],
        "rounds": len(times.samples["torch"]),
        "samples_us": {name: [round(s * 1e6, 3) for s in values] for name, values in times.samples.items()},
    }


def paired(contestants: dict[str, Callable], prepare: Callable[[], None], seconds: float, max_rounds: int) -> Times:
    """Runs all contestants in turn until ``seconds`` are used up, at least five rounds, after one for warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    end = time.perf_counter() + seconds
    for number in range(max_rounds + 1):
        for name in order:
            prepare()
            start = time.perf_counter()
            contestants[name]()
            elapsed = time.perf_counter() - start
            if number > 0:
                samples[name].append(elapsed)
        order.append(order.pop(0))  # nobody always follows the same neighbour
        if number >= 5 and time.perf_counter() > end:
            break
    return Times(samples)


class Ceiling:
    """What the machine can do at best with the same bytes in one buffer: the fastest of several ways to read it."""

    COPY_BYTES = 1 << 18  # a destination that stays in the second-level cache

    def __init__(self, size: int, dtype: torch.dtype):
        self.flat = torch.randn(size // dtype.itemsize).to(dtype)
        self.floats = self.flat.view(torch.uint8)[: size // 4 * 4].view(torch.float32)

    def reads(self) -> dict[str, Callable]:
        return {
            "ceiling sum": lambda: torch.sum(self.floats),
            "ceiling dot": lambda: torch.dot(self.floats, self.floats),
            "ceiling memcpy": self._read_by_memcpy,
        }

    def read_writes(self) -> dict[str, Callable]:
        """One of the reads, then a multiplication in place: the bytes that clipping has to move."""

        def followed_by_multiplication(read: Callable) -> Callable:
            def run() -> None:
                read()
                self.flat.mul_(0.999)

            return run

        return {name: followed_by_multiplication(read) for name, read in self.reads().items()}

    def _read_by_memcpy(self) -> None:
        """memcpy of the whole buffer into small ones, on as many threads as torch uses."""
        source = self.flat.view(torch.uint8).numpy()
        share = -(-len(source) // torch.get_num_threads())

        def copy(part) -> None:
            target = bytearray(min(self.COPY_BYTES, len(part)))
            for start in range(0, len(part), self.COPY_BYTES):
                chunk = part[start : start + self.COPY_BYTES]
                memoryview(target)[: len(chunk)] = chunk

        if len(source) < 2 * self.COPY_BYTES:
            return copy(source)
        threads = [
            threading.Thread(target=copy, args=(source[start : start + share],))
            for start in range(0, len(source), share)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
