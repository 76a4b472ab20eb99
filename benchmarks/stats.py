"""Medians, ratios of paired samples, and how sure they are."""

import statistics
from collections.abc import Sequence

import torch

RESAMPLES = 1000
CONFIDENCE = 0.95


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]]


def interval(values: Sequence[float]) -> list[float]:
    """A 95% bootstrap interval of the median.

    Rounds that follow each other resemble each other on a machine that drifts, so blocks of n^(1/3) rounds are drawn
    (circular block bootstrap: Politis and Romano 1992), from a fixed seed.
    """
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(count, (RESAMPLES, -(-count // block)), generator=generator)
    positions = (starts[..., None] + torch.arange(block)).flatten(1)[:, :count] % count
    medians = torch.tensor(values, dtype=torch.float64)[positions].quantile(0.5, dim=1)
    tail = (1 - CONFIDENCE) / 2
    return medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict:
    """The rounds' ratios: their median, quartiles, and the median's interval."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> dict:
    """The rounds' differences, likewise."""
    return spread([a - b for a, b in zip(minuend, subtrahend, strict=True)])


def spread(values: Sequence[float]) -> dict:
    return {"median": median(values), "quartiles": quartiles(values), "interval": interval(values)}
