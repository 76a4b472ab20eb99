"""What records look like to their readers: one as a flat dict, all of them as a History."""

import math

import torch

from fastclip.health.history import Activation, History, Layer
from fastclip.health.recording import Record
from fastclip.statistics import COLUMNS

_NORM, _ABS_MAX, _ZEROS, _INFS, _NANS = map(COLUMNS.index, ("norm", "abs_max", "zeros", "infs", "nans"))


def flat(record: Record, layers: list[Layer]) -> dict[str, float]:
    """See ``GradientMonitor.last``."""
    coefficient = record.max_norm / (record.total_norm + 1e-6)
    rows = record.values.tolist()
    result = {
        "grad/step": record.step,
        "grad/total_norm": record.total_norm,
        "grad/max_norm": record.max_norm,
        "grad/clip_coef": min(coefficient, 1.0) if coefficient == coefficient else math.nan,
        "grad/nonfinite": int(sum(row[_INFS] + row[_NANS] for row in rows)),
    }
    for number, row in zip(record.numbers, rows, strict=True):
        if number >= 0:
            layer = layers[number]
            result[f"grad/norm/{layer.name}"] = row[_NORM]
            result[f"grad/abs_max/{layer.name}"] = row[_ABS_MAX]
            result[f"grad/zeros/{layer.name}"] = row[_ZEROS] / layer.numel if layer.numel else 0.0
    for name, (saturated, zeros) in record.activations.items():
        result[f"activation/saturated/{name}"] = saturated
        result[f"activation/zeros/{name}"] = zeros
    return result


def history(records: list[Record], layers: list[Layer], norm_type: float, classes: dict[str, str]) -> History:
    """All records; ``classes`` has the class of each module whose activations were watched."""
    values = torch.full((len(records), len(layers), len(COLUMNS)), math.nan, dtype=torch.float64)
    weight_norms = torch.full((len(records), len(layers)), math.nan, dtype=torch.float64)
    numbers: tuple[int, ...] | None = None
    for place, record in enumerate(records):
        if record.numbers != numbers:
            numbers = record.numbers
            own = torch.tensor([number >= 0 for number in numbers], dtype=torch.bool)
            where = torch.tensor([number for number in numbers if number >= 0], dtype=torch.long)
        values[place, where] = record.values if own.all() else record.values[own]
        for number, norm in (record.weight_norms or {}).items():
            weight_norms[place, number] = norm
    names = dict.fromkeys([*classes, *(name for record in records for name in record.activations)])
    seen = {name: torch.full((2, len(records)), math.nan, dtype=torch.float64) for name in names}
    for place, record in enumerate(records):
        for name, shares in record.activations.items():
            seen[name][:, place] = torch.tensor(shares, dtype=torch.float64)
    return History(
        layers=layers,
        steps=torch.tensor([record.step for record in records], dtype=torch.int64),
        total_norm=_floats(record.total_norm for record in records),
        max_norm=_floats(record.max_norm for record in records),
        values=values,
        weight_norms=weight_norms,
        norm_type=norm_type,
        activations=[Activation(name, classes.get(name, ""), *shares) for name, shares in seen.items()],
        grad_scale=_floats(record.grad_scale for record in records),
    )


def _floats(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)
