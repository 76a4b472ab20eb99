"""vanishing: gradients that shrink on their way to the input, or fall below what their dtype can hold."""

import math
from typing import Any

from fastclip.health.diagnosis.record import HALF, RECURRENT, Record, number, times
from fastclip.health.finding import Finding

SEVERITY = 70.0

# All weights up to some depth have gradients whose elements are below this share of the largest beyond it. Glorot &
# Bengio 2010: with a fitting initialisation they keep their size; Bengio 1994, Pascanu et al. 2013: otherwise they
# shrink by a factor a layer. By experiment, the middle of: at least 0.025 in the healthy models of
# tests/health_models.py, at most 1.4e-4 in the faulty ones.
DEPTH_RATIO = 1e-3
# One weight alone, against the largest. Query and key weights of an attention that has not learned yet come to 6e-5.
SINGLE_RATIO = 1e-8
# Share of the elements that are not zero which are subnormal in a half type: these have lost digits, smaller ones are
# zeros (Micikevicius et al. 2018, section 3.2).
UNDERFLOW = 0.5
# The gradient of the whole model against its weights, from the first steps on: the resolution of float32. At a learning
# rate of 1 no weight would change.
NOTHING = 2.0**-23

# A saturated activation: half of its outputs where the slope is below 5% of the largest (Glorot & Bengio 2010).
SATURATED = 0.5
# Weights that much smaller than He's initialisation are named as a cause.
SMALL_WEIGHTS = 0.3


def find_vanishing(record: Record) -> list[Finding]:
    for find in (_by_underflow, _by_depth, _single, _everywhere):
        finding = find(record)
        if finding:
            return [finding]
    return []


def _by_underflow(record: Record) -> Finding | None:
    if not len(record.recent):
        return None
    subnormal = record.column("subnormals", record.recent)
    zeros = record.column("zeros", record.recent)
    lost = (subnormal / (record.numel - zeros).clamp(min=1)).nanmedian(0).values
    found = [i for i in record.matrices if record.layers[i].dtype in HALF and lost[i] > UNDERFLOW]
    if not found:
        return None
    # Layers before them that have nothing but zeros are further down the same way.
    found = [j for j in record.matrices if j in found or (record.zero[j] and j < max(found))]
    gone = ((subnormal + zeros) / record.numel).nanmedian(0).values
    i = max(found, key=lambda j: (float(gone[j]), -j))
    small, nothing = (float((x[:, i] / record.numel[i]).nanmedian()) for x in (subnormal, zeros))
    layer = record.layers[i]
    evidence: dict[str, Any] = {
        "dtype": layer.dtype,
        "subnormal_share": small,
        "zero_share": nothing,
        "layers": [record.layers[j].name for j in found][:20],
        "steps": record.span(record.recent),
    }
    sentence = (
        f"vanishing gradient in {layer.name}: {small:.0%} of its elements are subnormal in {layer.dtype} and "
        f"{nothing:.0%} are zero in steps {evidence['steps'][0]} to {evidence['steps'][1]}."
    )
    remedy = (
        "Scale the loss (torch.amp.GradScaler with float32 weights under torch.autocast), or train in bfloat16, whose "
        "range is that of float32"
    )
    if layer.dtype == "bfloat16":
        remedy = "Scale the loss up; then see what makes the gradient so small: " + _causes(record, [i], {})
    return Finding("vanishing", layer.name, evidence, remedy + ".", SEVERITY + 5 * small, sentence)


def _by_depth(record: Record) -> Finding | None:
    moving = record.moving
    size = [float(record.typical_size[i]) for i in moving]
    best, cut = 1.0, 0
    for k in range(1, len(moving)):
        ratio = max(size[:k]) / max(size[k:])
        if ratio < best:
            best, cut = ratio, k
    if best >= DEPTH_RATIO:
        return None
    top = max(range(cut, len(moving)), key=lambda k: size[k])
    # Beyond the smallest numbers there are only zeros: layers before the fading ones that are zero belong to them.
    fading = [i for i in record.matrices if i <= moving[cut - 1]]
    below = [i for i in fading if not record.typical_size[i] >= DEPTH_RATIO * size[top]]
    worst = min(below, key=lambda i: (float(record.typical_size[i]), i))
    return _finding(record, worst, moving[top], below)


def _single(record: Record) -> Finding | None:
    moving = record.moving
    if len(moving) < 2:
        return None
    worst = min(moving, key=lambda i: float(record.typical_size[i]))
    top = max(moving, key=lambda i: float(record.typical_size[i]))
    if float(record.typical_size[worst]) >= SINGLE_RATIO * float(record.typical_size[top]):
        return None
    return _finding(record, worst, top, [worst])


def _finding(record: Record, worst: int, top: int, below: list[int]) -> Finding:
    ratio = float(record.typical_size[worst]) / float(record.typical_size[top])
    name, reference = record.layers[worst].name, record.layers[top].name
    evidence: dict[str, Any] = {
        "ratio": ratio,
        "reference": reference,
        "layers": [record.layers[i].name for i in below][:20],
        "steps": record.span(record.recent),
    }
    others = len(below) - 1
    size = (
        f"{number(ratio)} of the size of those of {reference}"
        if ratio
        else f"all zero, and below {reference} they fade"
    )
    sentence = (
        f"vanishing gradient in {name}: its elements are {size} in steps {evidence['steps'][0]} to "
        f"{evidence['steps'][1]}"
        + (f", and {others} more {'layer is' if others == 1 else 'layers are'} below {DEPTH_RATIO:g}" if others else "")
        + "."
    )
    remedy = _causes(record, below, evidence)
    severity = SEVERITY + min(9.0, -math.log10(max(ratio, 1e-30)) / 3)
    return Finding("vanishing", name, evidence, remedy[0].upper() + remedy[1:] + ".", severity, sentence)


def _everywhere(record: Record) -> Finding | None:
    """The whole model's gradient is nothing against its weights, and was from the start."""
    early = record.early
    weights = record.known_weight_norms[early].square().nansum(1).sqrt().median()
    gradient = record.column("norm", early).square().nansum(1).sqrt().max()  # a model that converged had more before
    if not record.moving or not 0 < gradient < NOTHING * weights:
        return None
    i = max(record.moving, key=lambda j: float(record.share[j]))
    ratio = float(gradient / weights)
    evidence: dict[str, Any] = {"to_weights": ratio, "steps": record.span(early)}
    sentence = (
        f"vanishing gradients in the whole model: their norm is {number(ratio)} of that of the weights in steps "
        f"{evidence['steps'][0]} to {evidence['steps'][1]}, and {record.layers[i].name} contributes most."
    )
    remedy = (
        "Look at the loss: a factor that makes it tiny, or an output behind a saturated sigmoid (take the loss of the "
        "logits: binary_cross_entropy_with_logits, cross_entropy)."
    )
    return Finding("vanishing", "", evidence, remedy, SEVERITY, sentence)


def _causes(record: Record, below: list[int], evidence: dict) -> str:
    """What makes a gradient fade, the causes that the record shows first."""
    parts = []
    squashing = [a for a in record.history.activations if a.module in ("Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh")]
    if squashing and len(record.recent):
        shares = {a.name: float(a.saturated.double()[record.recent].nanmedian()) for a in squashing}
        saturated = {n: s for n, s in shares.items() if s >= SATURATED}
        kinds = " and ".join(sorted({a.module for a in squashing}))
        if saturated:
            evidence["saturated"] = saturated
            parts.append(
                f"{len(saturated)} of {len(squashing)} activations are saturated, {max(saturated.values()):.0%} of the "
                f"outputs of {max(saturated, key=saturated.__getitem__)}: replace {kinds} by ReLU or GELU"
            )
        elif any(a.module == "Sigmoid" for a in squashing):
            parts.append("replace Sigmoid, whose slope is at most 1/4, by ReLU or GELU")
        else:
            parts.append(f"replace {kinds} by ReLU or GELU")
    ratios = [r for r in (record.against_he(i) for i in below) if r == r]
    smallest = min(ratios, default=1.0)
    if smallest < SMALL_WEIGHTS:
        evidence["weights_to_he"] = smallest
        scale = times(1 / smallest) if smallest else "infinitely many times"
        parts.append(f"initialise with He's or Xavier's scheme, whose weights are up to {scale} as large")
    elif not parts:
        parts.append("initialise with He's or Xavier's scheme")
    if any(record.layers[i].module in ("RNN", "RNNCell") for i in below):
        parts.append("use an LSTM or GRU, and orthogonal recurrent weights")
    elif any(record.layers[i].module in RECURRENT for i in below):
        parts.append("shorten the sequences, or set the forget gate's bias to 1")
    if not squashing:
        parts.append("use ReLU or GELU where there are saturating activations (sigmoid, tanh)")
    parts.append("add residual connections, add BatchNorm or LayerNorm, or use fewer layers")
    return "; ".join(parts)
