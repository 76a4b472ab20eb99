"""exploding: gradients that grow with depth, with time, or are far too large for the weights."""

from typing import Any

import torch

from fastclip.health.diagnosis.record import NAN, RECURRENT, Record, number, round_down, times
from fastclip.health.finding import Finding

SEVERITY = 80.0

# By depth: elements of a weight's gradient so much larger than in the layer nearest to the loss, in one recent record
# of ten. Through a well initialised network they keep their size (Glorot & Bengio 2010); recurrent weights with a
# spectral norm above 1 make them grow with every step back in time (Bengio 1994; Pascanu, Mikolov & Bengio 2013,
# section 2). By experiment: at most 14 in the healthy models of tests/health_models.py, from 150 on in faulty ones.
DEPTH_RATIO = 100.0
RARE = 0.9  # quantile over the records: exploding gradients are heavy-tailed, a median misses them
# Only where that gradient is also larger than the weight itself (a step at learning rate 1 would replace it): a last
# layer with a small gradient, an auxiliary head with a loss weight of 0.001, is no explosion. Healthy: up to 1 where
# the loss is a mean.
WEIGHT_RATIO = 1.0
# By time: the median of the last five norms against that of the first quarter. Pascanu et al. call an explosion a
# growth by orders of magnitude; healthy models of the tests grow by at most 15, a run-away learning rate by 1e8.
GROWTH = 100.0
LATEST = 5
# By size: the norm of all gradients against that of the output layer's bias, which is the loss's own derivative summed:
# what the network multiplies it by, whatever the loss is scaled by. Healthy: at most 120. That bias may come to rest
# near a minimum, so the norm must be ten times that of the weights as well.
AMPLIFICATION = 1000.0
TOTAL_RATIO = 10.0
# Where the output layer has no bias, the norm against the weights alone; losses summed over 256 items reach 13.
TOTAL_RATIO_ALONE = 1e4


def find_exploding(record: Record) -> list[Finding]:
    for find in (_by_time, _by_depth, _by_size):
        finding = find(record)
        if finding:
            return [finding]
    return []


def _by_time(record: Record) -> Finding | None:
    latest = record.finite_records[-LATEST:]
    norm, before = float(record.total[latest].median()), record.early_norm
    if not (before > 0 and norm > GROWTH * before) or set(latest.tolist()) & set(record.early.tolist()):
        return None
    weights = (
        record.known_weight_norms[record.early].square().nansum(1).sqrt().median()
    )  # an explosion takes them along
    gradient = record.column("norm", latest).square().nansum(1).sqrt().median()
    if weights > 0 and gradient < WEIGHT_RATIO * weights:
        return None  # it rose from nearly nothing, as behind a zero-initialised layer
    i = int(record.column("norm", latest).nan_to_num(0).median(0).values.argmax())
    name = record.layers[i].name
    evidence: dict[str, Any] = {
        "growth": norm / before,
        "norm_early": before,
        "norm_latest": norm,
        "early_steps": record.span(record.early),
        "latest_steps": record.span(latest),
    }
    sentence = (
        f"exploding gradients: the norm grew {times(norm / before)}, from {number(before)} to {number(norm)} at step "
        f"{record.step(int(latest[-1]))}, and {name} contributes most."
    )
    return _finding(
        record, i, evidence, sentence, norm / before / GROWTH, float(record.total[record.early].quantile(0.9))
    )


def _by_depth(record: Record) -> Finding | None:
    moving = record.moving
    if len(moving) < 2:
        return None
    last = moving[-1]
    ratio = (record.size[:, moving] / record.size[:, [last]].clamp(min=1e-300)).nan_to_num(0)
    to_weight = record.norm2[:, moving] / record.weights[:, moving]
    high = ratio.quantile(RARE, 0)
    heavy = to_weight.nan_to_num(float("inf")).quantile(RARE, 0) > WEIGHT_RATIO
    far = [j for j in range(len(moving)) if high[j] > DEPTH_RATIO and heavy[j]]
    if not far:
        return None
    # Where there is a recurrence the growth happens in it; what lies before it only receives the gradient.
    worst = max([j for j in far if _recurrent(record, moving[j])] or far, key=lambda j: float(high[j]))
    i, value = _hidden(record, moving[worst]), float(high[worst])
    name = record.layers[i].name
    rest = [j for j in range(len(record.layers)) if j not in {moving[k] for k in far}]
    healthy = record.norm2[:, rest].square().nansum(1).sqrt()
    evidence: dict[str, Any] = {
        "ratio": value,
        "reference": record.layers[last].name,
        "layers": [record.layers[moving[j]].name for j in far][:20],
        "steps": record.span(record.recent),
    }
    sentence = (
        f"exploding gradient in {name}: its elements are up to {times(value)} as large as those of "
        f"{record.layers[last].name}, the layer nearest to the loss, in steps {evidence['steps'][0]} to "
        f"{evidence['steps'][1]}."
    )
    return _finding(record, i, evidence, sentence, value / DEPTH_RATIO, float(healthy.median()))


def _by_size(record: Record) -> Finding | None:
    moving = record.moving
    if not moving or not len(record.recent):
        return None
    weights = record.weights.square().nansum(1).sqrt()
    gradient = record.norm2.square().nansum(1).sqrt()
    relative = float((gradient / torch.where(weights > 0, weights, NAN)).nanmedian())
    bias = _output_bias(record)
    gain = float((gradient / record.norm2[:, bias]).nanmedian()) if bias is not None else NAN
    if not relative > TOTAL_RATIO or not (gain > AMPLIFICATION if gain == gain else relative > TOTAL_RATIO_ALONE):
        return None
    i = _hidden(record, max(moving, key=lambda j: float(record.share[j])))
    evidence: dict[str, Any] = {"to_weights": relative, "steps": record.span(record.recent)}
    if bias is not None:
        evidence |= {"amplification": gain, "output": record.layers[bias].name}
    sentence = (
        f"exploding gradients: their norm is {times(relative)} that of the weights"
        + (f" and {times(gain)} that of {record.layers[bias].name}" if bias is not None else "")
        + f" in steps {evidence['steps'][0]} to {evidence['steps'][1]}, and {record.layers[i].name} contributes most."
    )
    return _finding(record, i, evidence, sentence, relative / TOTAL_RATIO, float("inf"))


def _recurrent(record: Record, i: int) -> bool:
    return record.layers[i].module in RECURRENT


def _hidden(record: Record, i: int) -> int:
    """The recurrent weight that belongs to a recurrent module's input weight."""
    name = record.layers[i].name.replace("weight_ih", "weight_hh")
    return next((j for j, layer in enumerate(record.layers) if layer.name == name), i)


def _output_bias(record: Record) -> int | None:
    """The bias of the module that has the last matrix."""
    owner = record.layers[record.moving[-1]].name.rpartition(".")[0]
    for i, layer in enumerate(record.layers):
        if len(layer.shape) == 1 and layer.name.rpartition(".")[0] == owner and "bias" in layer.name:
            return i if not record.zero[i] and record.typical_size[i] > 0 and not _recurrent(record, i) else None
    return None


def _finding(record: Record, i: int, evidence: dict, sentence: str, excess: float, healthy: float) -> Finding:
    """``healthy``: a norm that the model has, or would have, without the explosion."""
    norms = record.total[record.finite_records]
    # The lowest tenth of the norms is AutoClip's threshold (Seetharaman et al. 2020).
    threshold = round_down(min(float(norms.quantile(0.1)), healthy if healthy > 0 else float("inf")))
    evidence["suggested_max_norm"] = threshold
    used = record.max_norm[record.max_norm.isfinite()]
    now = float(used[-1]) if len(used) else None
    evidence["max_norm"] = now
    if now is None:
        parts = [f"Clip by norm: the recorded norms suggest max_norm={threshold:g}"]
    elif now <= 2 * threshold:
        parts = [f"Keep clipping: max_norm={now:g} holds the step (the recorded norms suggest {threshold:g})"]
    else:
        parts = [f"Clip harder: the recorded norms suggest max_norm={threshold:g} in place of {now:g}"]
    if _recurrent(record, i):
        parts.append(
            "initialise the recurrent weights orthogonally (torch.nn.init.orthogonal_), or constrain their norm; "
            "shorten the sequences that are backpropagated through"
        )
    he = record.against_he(i)
    if he > 3 and not _recurrent(record, i):
        evidence["weights_to_he"] = he
        parts.append(f"initialise it with He's or Xavier's scheme, its weights are {times(he)} as large as He's")
    parts.append("lower the learning rate or warm it up")
    if not _recurrent(record, i):
        parts.append("normalise inputs and targets, or add LayerNorm or BatchNorm")
    severity = SEVERITY + min(9.0, max(0.0, float(torch.tensor(excess).log10())))
    return Finding("exploding", record.layers[i].name, evidence, "; ".join(parts) + ".", severity, sentence)
