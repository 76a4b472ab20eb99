"""always-clipped and never-clipped: a threshold that does not fit the norms."""

import torch
from torch import Tensor

from fastclip.health.diagnosis.record import Record, number, round_down
from fastclip.health.finding import Finding

SEVERITY_ALWAYS = 20.0
SEVERITY_NEVER = 10.0

# Pascanu, Mikolov & Bengio 2013, section 3.2: "look at statistics on the average norm over a sufficiently large number
# of updates"; half to ten times that average works. Healthy transformers with the usual max_norm of 1 have norms of 2
# to 3 in their first steps, so a fifth of the median is where the finding begins.
LOWEST = 0.2
HIGHEST = 10.0  # times the largest norm: a model that learns well has small norms later
ALWAYS = 0.95  # share of the recent steps that are clipped
MIN_CLIPPED_RECORDS = 10


def find_always_clipped(record: Record) -> list[Finding]:
    records, ratio = _against_threshold(record)
    recent = records[len(records) // 2 :]
    ratio = ratio[len(records) // 2 :]
    if not len(ratio) or not (float((ratio > 1).double().mean()) >= ALWAYS and float(ratio.median()) > 1 / LOWEST):
        return []
    threshold, now = round_down(float(record.total[recent].quantile(0.9))), float(record.max_norm[recent[-1]])
    share, median = float((ratio > 1).double().mean()), float(record.total[recent].median())
    evidence = _evidence(record, recent, share, median, now, threshold)
    sentence = (
        f"always-clipped: {share:.0%} of steps {evidence['steps'][0]} to {evidence['steps'][1]} are clipped at "
        f"max_norm={now:g}, their median norm is {number(median)}{_most(record)}."
    )
    remedy = (
        f"Every gradient is scaled to the same norm, so that the threshold acts as a learning rate: set max_norm="
        f"{threshold:g}, which one recorded step in ten exceeds, and lower the learning rate by as much; or keep it if "
        "normalised gradients are meant."
    )
    severity = SEVERITY_ALWAYS + min(4.0, float(ratio.median().log10()))
    return [Finding("always-clipped", "", evidence, remedy, severity, sentence)]


def find_never_clipped(record: Record) -> list[Finding]:
    records, ratio = _against_threshold(record)
    if not len(ratio) or float(ratio.max()) * HIGHEST >= 1:
        return []
    norms = record.total[records]
    threshold, now = round_down(float(norms.quantile(0.9))), float(record.max_norm[records[-1]])
    median = float(norms.median())
    evidence = _evidence(record, records, 0.0, median, now, threshold)
    sentence = (
        f"never-clipped: no norm in steps {evidence['steps'][0]} to {evidence['steps'][1]} comes near max_norm={now:g}"
        f", the largest is {number(float(norms.max()))}{_most(record)}."
    )
    remedy = (
        f"The threshold does nothing: set max_norm={threshold:g}, which one recorded step in ten exceeds, or leave "
        "clipping out."
    )
    return [Finding("never-clipped", "", evidence, remedy, SEVERITY_NEVER, sentence)]


def _against_threshold(record: Record) -> tuple[Tensor, Tensor]:
    """Finite records that were clipped by a norm, and norm over threshold; none where they are too few to tell.

    A threshold of inf is the usual way to ask for the norm alone, it clips nothing.
    """
    clipped = record.finite & record.max_norm.isfinite() & (record.max_norm >= 0) & (record.total > 0)
    records = clipped.nonzero()[:, 0]
    if len(records) < MIN_CLIPPED_RECORDS:
        return records[:0], torch.zeros(0, dtype=torch.float64)
    return records, record.total[records] / record.max_norm[records]


def _evidence(record: Record, records: Tensor, share: float, median: float, now: float, threshold: float) -> dict:
    return {
        "clipped_share": share,
        "median_norm": median,
        "max_norm": now,
        "suggested_max_norm": threshold,
        "steps": record.span(records),
    }


def _most(record: Record) -> str:
    return f", to which {record.largest().name} contributes most"
