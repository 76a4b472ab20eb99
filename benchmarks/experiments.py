"""What was tried to make clipping faster, each against the same thing without it: part ``experiments``.

They are variations of a plain clip of one buffer (ceilings.cpp), so that one thing changes at a time and the next
reader can try it on another machine.
"""

import functools
from collections.abc import Iterator

import torch

from benchmarks import ceilings, models, stats
from benchmarks.cases import CLIPPED, UNCLIPPED, Case
from benchmarks.gradients import Gradients
from benchmarks.measure import Contestant, Effort, Times, paired

PART = "experiments"
SIZES = [("498 MB", models.gpt2_small()), ("23 MB", models.lstm_text_model()), ("1 MB", [(2**14,)] * 16)]
BACK = {"backwards": True}

# What is changed, in which mode it shows, and the options of plain_clip: of the variation, and of what it varies.
VARIATIONS = [
    ("two forward streams in a thread instead of one", UNCLIPPED, {"streams": 2}, {}),
    ("prefetch 512 bytes ahead", UNCLIPPED, {"ahead": 512}, {}),
    ("prefetch 4,096 bytes ahead", UNCLIPPED, {"ahead": 4096}, {}),
    ("second pass backwards", CLIPPED, BACK, {}),
    ("non-temporal stores in the second pass", CLIPPED, {"nontemporal": True, **BACK}, BACK),
    ("one parallel region with OpenMP's barrier", CLIPPED, {"region": "one", **BACK}, BACK),
    ("one parallel region with a spinning barrier", CLIPPED, {"region": "spin", **BACK}, BACK),
]


def row(change: str, where: str, times: Times, varied: str, base: str) -> dict:
    ratio = stats.spread([a / b - 1 for a, b in zip(times.samples[varied], times.samples[base], strict=True)])
    names = (varied, base)
    return {
        "part": PART,
        "case": change,
        "mode": where,
        "change": ratio,
        "median_us": {name: times.median(name) * 1e6 for name in names},
        "contention": times.contention,
        "samples_us": {name: [round(s * 1e6, 3) for s in times.samples[name]] for name in names},
    }


def measure(effort: Effort) -> Iterator[dict]:
    if ceilings.missing_because():
        return
    rows = [row for size, shapes in SIZES for row in of_one_size(size, shapes, effort)]
    # One change beside itself on all sizes reads better than one size after the other.
    yield from sorted(rows, key=lambda row: [name for name, *_ in VARIATIONS].index(row["case"]))
    for count, elements in ((2000, 64), (6, 768)):
        yield from cached_table(count, elements, effort)


def of_one_size(size: str, shapes: models.Shapes, effort: Effort) -> Iterator[dict]:
    gradients = Gradients(Case(PART, size, shapes, "fp32"))
    for mode in (UNCLIPPED, CLIPPED):
        gradients.set_mode(mode)
        chosen = [variation for variation in VARIATIONS if variation[1] == mode]
        contestants = {}
        for _, _, *options in chosen:
            for one in options:
                call = functools.partial(ceilings.native().plain_clip, gradients.flat(), gradients.max_norm, **one)
                check = functools.partial(_check, gradients)
                contestants[str(one)] = Contestant(call, gradients.restore, check)
        calls = 5 if gradients.case.bytes <= 1 << 20 else 1
        times = paired(contestants, 3.0, effort, calls=calls)
        for change, _, varied, base in chosen:
            yield row(change, f"{size}, {mode}", times, str(varied), str(base))


def _check(gradients: Gradients, norm: object) -> None:
    """Sums in float32 are as good as torch's."""
    gradients.check("plain clip", torch.tensor(norm), exact=False)


def cached_table(count: int, elements: int, effort: Effort) -> Iterator[dict]:
    """A table of pointers kept from the last call and validated, against one that is made anew."""
    gradients = Gradients(Case(PART, f"{count} tensors", [(elements,)] * count, "fp32"))
    parameters, native = gradients.parameters, ceilings.native()

    def expect(found: object) -> None:
        if found != count:
            raise AssertionError(f"expected a table of {count} gradients, got {found}")

    contestants = {
        "made anew": Contestant(lambda: native.make_table(parameters), check=expect),
        "validated": Contestant(lambda: native.validate_table(parameters), check=expect),
    }
    times = paired(contestants, 1.0, effort, calls=20)
    change = "pointer table kept and validated instead of made anew"
    yield row(change, f"{count:,} tensors", times, "validated", "made anew")
