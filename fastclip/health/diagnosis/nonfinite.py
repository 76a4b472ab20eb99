"""non-finite: inf or NaN in the gradients."""

from typing import Any

import torch

from fastclip.health.diagnosis.record import Record
from fastclip.health.finding import Finding

# torch.amp.GradScaler starts at a scale of 2^16 and halves it until the float16 gradients fit: up to 16 steps are left
# out until the scale is 1, and 24 until it is 2^-8. That is how it finds its scale.
SCALER_SEARCH = 24
# It doubles the scale after 2,000 good steps (growth_interval) and leaves out a step where that was too much.
SCALER_GROWTH = 2000

SEVERITY = 100.0
SEVERITY_SKIPPED = 45.0


def find_nonfinite(record: Record) -> list[Finding]:
    bad = (~record.finite).nonzero()[:, 0].tolist()
    spoiled = ((record.weight_norms.isinf()) | _lost(record)).any(0) if len(record.steps) else torch.zeros(0)
    recovered = bool(bad) and bool(record.finite[bad[-1] + 1 :].any()) and not bool(spoiled.any())
    if recovered:
        bad = _unexplained(record, bad)
    if not bad:
        return []
    first = bad[0]
    layer, everywhere = _source(record, first)
    name = record.layers[layer].name
    counts = {c: int(record.column(c)[first].nan_to_num(0).sum()) for c in ("infs", "nans")}
    evidence: dict[str, Any] = {
        "first_step": record.step(first),
        "steps": [record.step(i) for i in bad[:20]],
        "records": len(bad),
        **counts,
        "layers": [record.layers[i].name for i in record.bad[first].nonzero()[:, 0].tolist()][:20],
        "trained_on": recovered,
    }
    what = " and ".join(f"{n} {c[:-1]}" for c, n in counts.items() if n) or "an infinite norm of finite elements"
    if everywhere:
        where = f"non-finite gradients in all parameters, {name} among them,"
    elif counts["infs"] + counts["nans"]:
        where = f"non-finite gradient in {name}, the parameter nearest to the loss that has one,"
    else:
        where = f"non-finite norm, to which {name} contributes most,"
    end = (
        f"in {len(bad)} recorded {'step' if len(bad) == 1 else 'steps'}; the weights stayed finite"
        if recovered
        else f"in {len(bad)} of {len(bad) + int(record.finite[first:].sum())} recorded steps since"
    )
    sentence = f"{where} first at step {record.step(first)} ({what}), {end}."
    severity = SEVERITY_SKIPPED if recovered else SEVERITY
    remedy = _remedy(record, first, layer, everywhere, recovered)
    return [Finding("non-finite", "" if everywhere else name, evidence, remedy, severity, sentence)]


def _lost(record: Record) -> torch.Tensor:
    """bool [steps, layers]: a weight whose norm was a number before, and is NaN in a step where others are known."""
    norms = record.weight_norms
    known = norms.isfinite()
    before = known.cummax(0).values if len(norms) else known
    return norms.isnan() & before & known.any(1, keepdim=True)


def _unexplained(record: Record, bad: list[int]) -> list[int]:
    """Bad records without those that GradScaler leaves out while it looks for its scale."""
    search = 0
    while search < len(bad) and bad[search] == search:
        search += 1
    last = record.step(bad[search - 1]) if search else 0
    unexplained = [] if search <= SCALER_SEARCH else bad[:search]
    for i in bad[search:]:
        if record.step(i) - last < SCALER_GROWTH:
            unexplained.append(i)
        last = record.step(i)
    return unexplained


def _source(record: Record, first: int) -> tuple[int, bool]:
    """The layer where it began, and whether all layers with a gradient are bad.

    Backward goes from the loss to the input and takes inf and NaN along: the bad parameter nearest to the loss is where
    they came up. If all are bad, the loss or the forward pass was, unless one weight alone is not finite.
    """
    bad = record.bad[first]
    weights = record.weight_norms[first]
    spoiled = (weights.isinf() | (weights.isnan() & weights.isfinite().any())).nonzero()[:, 0].tolist()
    seen = ~record.column("zeros")[first].isnan()
    if bad.any():
        if bad[seen & (record.numel > 0)].all() and int(bad.sum()) > 1:
            started = [i for i in spoiled if bool(record.weight_norms[:, i].isfinite().any()) or weights[i].isinf()]
            if len(started) == 1:
                return started[0], False
            counts = record.column("infs")[first] + record.column("nans")[first]
            return int((counts.nan_to_num(0) * bad).argmax()), True
        deepest = max(record.layers[i].depth for i in bad.nonzero()[:, 0].tolist())
        near = [i for i in bad.nonzero()[:, 0].tolist() if record.layers[i].depth == deepest]
        return max(near, key=lambda i: (len(record.layers[i].shape) >= 2, i)), False
    norms = record.column("norm")[first].nan_to_num(0, posinf=1e308)
    return int(norms.argmax()), False


def _remedy(record: Record, first: int, layer: int, everywhere: bool, recovered: bool) -> str:
    parts = []
    half = record.layers[layer].dtype == "float16"
    before = record.total[:first]
    before = before[before.isfinite()][-5:]
    grew = len(before) == 5 and record.early_norm > 0 and float(before[-1]) > 100 * record.early_norm
    if grew or (len(before) and not record.bad[first].any()):
        parts.append(
            "the norm grew beyond all bounds before: see the remedies of exploding, a lower learning rate first"
        )
    if half:
        parts.append(
            "float16 ends at 65504: train in bfloat16, or keep the weights in float32 under torch.autocast with "
            "torch.amp.GradScaler"
        )
    if recovered:
        parts.append(
            "these steps were left out, but more often than a GradScaler does: look at the batches of these steps"
        )
    if everywhere:
        parts.append(
            "all parameters have it, so it came from the loss or the forward pass: look for log(0), 0 / 0 or exp of a "
            "large number in the loss (log_softmax, clamp or + eps), and for bad values in the batch of that step"
        )
    elif record.bad[first].any():
        parts.append(
            "look at what the model does right after this layer: the derivatives of sqrt, norm and division at 0, of "
            "log at 0 and of exp of large numbers are inf or NaN; add an eps inside them"
        )
    parts.append("torch.autograd.set_detect_anomaly(True) names the operation")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
