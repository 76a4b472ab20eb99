"""dead: layers that get no gradient at all, or hardly a unit of which does."""

import re
from dataclasses import dataclass
from typing import Any

from fastclip.health.diagnosis.record import HALF, Record
from fastclip.health.finding import Finding

SEVERITY = 60.0

# Share of a layer's units that get no gradient, in nine of ten recent records in which the layer gets one: dying ReLU
# (Maas et al. 2013; Lu et al. 2019). By experiment: up to 0.7 in healthy models, where few of the inputs of a small
# batch reach a unit.
DEAD_UNITS = 0.9


@dataclass
class Unit:
    """The parameters of one module (of one layer of a multi-layer RNN)."""

    members: list[int]
    matrices: list[int]


def find_dead(record: Record, vanishing: list[Finding]) -> list[Finding]:
    if not len(record.recent):
        return _nowhere(record)
    units = [u for u in _units(record) if u.matrices]
    dead = [all(record.zero[i] for i in u.matrices) for u in units]
    findings: list[Finding] = []
    run: list[Unit] = []
    for unit, is_dead in zip([*units, None], [*dead, False], strict=True):
        if unit is not None and is_dead:
            run.append(unit)
            continue
        if run and not _faded(record, run, vanishing):
            findings.append(_layer(record, run))
        run = []
    if not any(dead):
        vectors = [u for u in _units(record) if not u.matrices and all(record.zero[i] for i in u.members)]
        findings += [_layer(record, [u]) for u in vectors]
    alive = [u for u, is_dead in zip(units, dead, strict=True) if not is_dead]
    return findings + [f for f in (_partly(record, u) for u in alive[:-1]) if f]


def _units(record: Record) -> list[Unit]:
    units: dict[str, list[int]] = {}
    for i, layer in enumerate(record.layers):
        if layer.numel and not record.typical_size[i].isnan():
            owner, _, own = layer.name.rpartition(".")
            part = re.fullmatch(r"(?:weight|bias)_(?:ih|hh|hr)(.*)", own)
            units.setdefault(f"{owner}{part[1] if part else ''}", []).append(i)
    return [Unit(m, [i for i in m if len(record.layers[i].shape) >= 2]) for m in units.values()]


def _faded(record: Record, run: list[Unit], vanishing: list[Finding]) -> bool:
    """The zeros are what is left of a gradient that vanishes: it was found to fade away in these layers."""
    names = {record.layers[i].name for u in run for i in u.matrices}
    return any(names & set(finding.evidence.get("layers", [])) for finding in vanishing)


def _layer(record: Record, run: list[Unit]) -> Finding:
    # A layer whose own output is dead has no gradient in its bias either. The one after it has no input: its weight is
    # zero, its bias is not. So the last one without any is where it happens.
    silent = [u for u in run if all(record.zero[i] for i in u.members)]
    unit = (silent or run)[-1]
    i = (unit.matrices or unit.members)[0]
    name = record.layers[i].name
    zeros = record.column("zeros")[:, i]
    nonzero = ((zeros < record.numel[i]) & record.finite).nonzero()[:, 0]
    evidence: dict[str, Any] = {
        "steps": record.span(record.recent),
        "last_step_with_gradient": record.step(int(nonzero[-1])) if len(nonzero) else None,
        "layers": [record.layers[j].name for u in run for j in u.members][:20],
    }
    since = evidence["last_step_with_gradient"]
    sentence = (
        f"dead layer {name}: all elements of its gradient are zero in steps {evidence['steps'][0]} to "
        f"{evidence['steps'][1]}, and "
        + ("it never had any" if since is None else f"the last one that was not came at step {since}")
        + "."
    )
    parts = []
    zero = _silent_activations(record)
    if zero:
        evidence["silent_activations"] = zero
        parts.append(f"the output of {zero[0]} is always zero: use LeakyReLU or GELU, and check the biases before it")
    if since is None:
        parts.append("check that its output reaches the loss: not detached, not multiplied by zero, really used")
    else:
        parts.append("lower the learning rate or warm it up: a step has pushed the units where they get no gradient")
    if not zero:
        parts.append("if a ReLU follows, use LeakyReLU or GELU, and initialise its bias with zero")
    text = "; ".join(parts)
    return Finding("dead", name, evidence, text[0].upper() + text[1:] + ".", SEVERITY + 5, sentence)


def _silent_activations(record: Record) -> list[str]:
    return [
        a.name
        for a in record.history.activations
        if a.module not in ("Dropout",) and float(a.zeros.double()[record.recent].nan_to_num(0).median()) > 0.99
    ]


def _partly(record: Record, unit: Unit) -> Finding | None:
    """Most units of a layer are dead. Its bias shows that: zeros in the weight's gradient may be the input's."""
    i = unit.matrices[0]
    own = record.layers[i].name.rpartition(".")[2]
    biases = [j for j in unit.members if record.layers[j].name.rpartition(".")[2] == own.replace("weight", "bias")]
    if (
        not biases
        or biases[0] == i
        or (record.layers[i].dtype in HALF and record.column("subnormals")[:, i].nansum() > 0)
    ):
        return None
    j = biases[0]
    shares = record.column("zeros", record.recent)[:, j] / record.numel[j]
    shares = shares[(shares < 1) & ~shares.isnan()]
    if len(shares) < 5 or not float(shares.quantile(0.1)) >= DEAD_UNITS:
        return None
    share = float(shares.median())
    evidence: dict[str, Any] = {"dead_share": share, "bias": record.layers[j].name, "steps": record.span(record.recent)}
    sentence = (
        f"dead units in {record.layers[i].name}: {share:.0%} of them get no gradient in steps {evidence['steps'][0]} "
        f"to {evidence['steps'][1]}."
    )
    remedy = "Use LeakyReLU or GELU; lower the learning rate or warm it up; initialise the biases with zero."
    return Finding("dead", record.layers[i].name, evidence, remedy, SEVERITY + 4 * share, sentence)


def _nowhere(record: Record) -> list[Finding]:
    """No parameter had a gradient other than zero in any record."""
    zeros = record.column("zeros")
    seen = (~zeros.isnan()).any(0) & (record.numel > 0)
    if not seen.any() or not bool((record.total[record.finite] == 0).all()):
        return []
    name = record.layers[int(seen.nonzero()[-1, 0])].name
    evidence: dict[str, Any] = {
        "steps": record.span(record.finite_records),
        "layers": [record.layers[int(i)].name for i in seen.nonzero()][:20],
    }
    sentence = (
        f"dead model: all gradients, that of {name} among them, are zero in steps {evidence['steps'][0]} to "
        f"{evidence['steps'][1]}."
    )
    remedy = "Check that the loss depends on the model: not detached, not multiplied by zero, not constant."
    return [Finding("dead", "", evidence, remedy, SEVERITY + 9, sentence)]
