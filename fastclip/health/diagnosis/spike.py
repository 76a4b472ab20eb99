"""spike: single steps whose norm stands far out of those around."""

import math
from typing import Any

import torch
from torch import Tensor

from fastclip.health.diagnosis.record import NAN, Record, number, round_down, times
from fastclip.health.finding import Finding

SEVERITY = 40.0

# A norm so many times the median of the records around it. By experiment: at most 7 in healthy models.
RATIO = 10.0
# And so many standard deviations of the logarithm, from the median absolute deviation: gradient noise is heavy-tailed
# (Zhang et al. 2020), and wild norms that are this run's habit are no spikes.
DEVIATIONS = 5.0
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# Records on each side that a norm is compared with. The first ones are not judged: norms fall steeply there.
WINDOW = 10
MIN_BEFORE = 5
MIN_AFTER = 3
# A spike reaches this share of the median of the first five norms: near a loss of zero norms jump about, harmlessly. By
# experiment: a healthy model that overfits 16 items had one of 0.0045, where it began with 0.3.
SHARE_OF_START = 0.1
# One parameter is named if it makes up half of the squared norm.
DOMINANT = 0.5


def find_spikes(record: Record) -> list[Finding]:
    records = record.finite_records
    norms = record.total[records]
    around = _around(norms)
    logs = (norms / around).log()
    known = logs[logs.isfinite()]
    if not len(known):
        return []
    deviation = MAD_TO_DEVIATION * float((known - known.median()).abs().median())
    limit = max(math.log(RATIO), DEVIATIONS * deviation)
    harmful = norms >= SHARE_OF_START * norms[:MIN_BEFORE].median()
    found = (logs.isfinite() & (logs > limit) & harmful).nonzero()[:, 0]
    if not len(found):
        return []
    worst = int(found[logs[found].argmax()])
    at = int(records[worst])
    ratio = float(norms[worst] / around[worst])
    i, dominant = _loudest(record, at, [int(r) for r in records[max(0, worst - WINDOW) : worst]])
    name = record.layers[i].name
    threshold = round_down(float(norms.quantile(0.9)))
    evidence: dict[str, Any] = {
        "step": record.step(at),
        "norm": float(norms[worst]),
        "norm_around": float(around[worst]),
        "ratio": ratio,
        "steps": [record.step(int(records[j])) for j in found[:20]],
        "count": len(found),
        "suggested_max_norm": threshold,
    }
    more = f"; {len(found)} of {len(records)} recorded steps are such" if len(found) > 1 else ""
    who = f"spike in the gradient of {name}: the norm" if dominant else "spike: the norm of all gradients"
    end = "" if dominant else f", {name} contributes most"
    sentence = (
        f"{who} is {number(float(norms[worst]))} at step {record.step(at)}, {times(ratio)} that of the steps around"
        f"{end}{more}."
    )
    steps = ", ".join(str(s) for s in evidence["steps"][:5])
    plural = "s" if len(found) > 1 else ""
    remedy = f"Look at the batches of step{plural} {steps} (wrong labels, outliers, a different scale)"
    used = record.max_norm[at]
    if not used.isfinite():
        remedy += f"; clip by norm, the recorded norms suggest max_norm={threshold:g}"
    elif float(used) > 2 * threshold:
        remedy += f"; clip harder, the recorded norms suggest max_norm={threshold:g} in place of {float(used):g}"
    remedy += "; with Adam or AdamW lower beta2 (0.95) or warm the learning rate up."
    severity = SEVERITY + min(4.0, math.log10(ratio))
    return [Finding("spike", name if dominant else "", evidence, remedy, severity, sentence)]


def _around(norms: Tensor) -> Tensor:
    """[records]: the larger one of the medians before and after each record; NaN where it is not judged.

    The larger one, so that neither the start nor the end of a lasting change counts as a spike.
    """
    nan = torch.full((WINDOW,), NAN, dtype=norms.dtype)
    padded = torch.cat([nan, norms, nan]).unfold(0, WINDOW, 1)
    n = len(norms)
    before, after = padded[:n].nanmedian(1).values, padded[WINDOW + 1 : WINDOW + 1 + n].nanmedian(1).values
    place = torch.arange(n)
    after = torch.where(place < n - MIN_AFTER, after, -math.inf)
    return torch.where(place >= MIN_BEFORE, torch.maximum(before, after), NAN)


def _loudest(record: Record, at: int, before: list[int]) -> tuple[int, bool]:
    """The layer with the largest gradient in a record, and whether it alone makes the spike."""
    norms = record.column("norm")
    square = norms[at].nan_to_num(0).square()
    usual = norms[before].nanmedian(0).values.square().nan_to_num(0)
    i = int(square.argmax())
    rise = square / usual.clamp(min=1e-300)
    others = torch.cat([rise[:i], rise[i + 1 :]])
    alone = not len(others) or float(rise[i]) > 10 * float(others.median())
    return i, bool(square[i] > DOMINANT * square.sum()) and alone
