"""A History thinned to what fits on a screen, for the page and the plots. Maxima and non-finite steps survive."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.health.diagnosis.record import check
from fastclip.health.history import History, Layer
from fastclip.statistics import COLUMNS

# Columns of the heat map: a screen has about 1,000 pixels for them, and more make the page only larger.
MAX_COLUMNS = 600
# Cells of the heat map, 2 bytes each: models with more than 500 layers get fewer columns, though never under 100.
MAX_CELLS = 300_000
MIN_COLUMNS = 100
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# What a cell is when it is no finite positive norm. In a column of several steps the highest one wins, so that a single
# non-finite step is never lost.
NO_GRADIENT, ZERO, INF, NAN = -2.0, -1.0, 1.0, 2.0


@dataclass
class Overview:
    """Columns are groups of consecutive records, layers are in the order of the forward pass. All float64 or bool."""

    layers: list[Layer]
    records: int
    first: Tensor  # int64 [columns]: the first step of each
    last: Tensor  # int64 [columns]
    total_min: Tensor  # [columns], of the finite total norms; NaN where there is none
    total_max: Tensor
    threshold: Tensor  # [columns]: the largest max_norm, NaN where nothing was clipped by norm
    clipped: Tensor  # [columns]: share of the records that were scaled down
    nonfinite: Tensor  # bool [columns]: a record has a non-finite total norm, or a layer with inf or NaN
    norms: Tensor  # [columns, layers]: the largest finite norm, 0 and NaN (see `state`) where none is positive
    state: Tensor  # [columns, layers]: NO_GRADIENT, ZERO, 0 for a finite positive norm, INF, NAN
    quantiles: Tensor  # [QUANTILES, layers] of the finite norms over all records, NaN where there is none
    newest: Tensor  # [layers]: the norm in the last record; NaN also where there was no gradient
    had_gradient: Tensor  # bool [layers]: in the last record
    nonfinite_records: Tensor  # int64 [layers]
    clipped_records: int
    nonfinite_steps: list[int]  # the training steps, all of them


def overview(history: History, max_columns: int = MAX_COLUMNS) -> Overview:
    """Thins a history. Raises TypeError or ValueError, naming the field, for one whose tensors do not fit together."""
    check(history)
    order = sorted(range(len(history.layers)), key=lambda i: (history.layers[i].depth, i))
    records, layers = len(history.steps), len(order)
    columns = min(max_columns, max(MIN_COLUMNS, MAX_CELLS // max(layers, 1)))
    width = max(1, math.ceil(records / columns))

    values = history.values.detach().cpu()
    norm, abs_max, zeros, infs, nans = (
        values[:, order, COLUMNS.index(name)].double() for name in ("norm", "abs_max", "zeros", "infs", "nans")
    )
    absent = zeros.isnan() & norm.isnan()
    nan = ~absent & ((nans > 0) | norm.isnan())
    inf = ~nan & ((infs > 0) | (abs_max == math.inf) | (norm == math.inf))
    bad = nan | inf
    state = torch.zeros_like(norm)
    for where, code in ((absent, NO_GRADIENT), (norm == 0, ZERO), (inf, INF), (nan, NAN)):
        state[where] = code
    finite_norm = norm.masked_fill(bad | absent, math.nan)

    total = history.total_norm.detach().cpu().double()
    limit = history.max_norm.detach().cpu().double()
    limit = limit.masked_fill(~limit.isfinite(), math.nan)  # inf only measures
    # As clip_coef is computed; comparisons with NaN are false.
    clipped = (limit / (total + 1e-6) < 1) & total.isfinite()
    nonfinite = ~total.isfinite() | bad.any(1)
    finite_total = total.masked_fill(~total.isfinite(), math.nan)
    steps = history.steps.cpu()
    starts = torch.arange(0, records, width)
    ends = (starts + width - 1).clamp(max=records - 1)
    return Overview(
        layers=[history.layers[i] for i in order],
        records=records,
        first=steps[starts],
        last=steps[ends],
        total_min=-_largest(-finite_total, width),
        total_max=_largest(finite_total, width),
        threshold=_largest(limit, width),
        clipped=_grouped(clipped.double(), width, math.nan).nanmean(1),
        nonfinite=_largest(nonfinite.double(), width) > 0,
        norms=_largest(finite_norm, width),
        state=_largest(state, width),
        quantiles=_quantiles(finite_norm),
        newest=norm[-1] if records else torch.full((layers,), math.nan, dtype=torch.float64),
        had_gradient=~absent[-1] if records else torch.zeros(layers, dtype=torch.bool),
        nonfinite_records=bad.sum(0),
        clipped_records=int(clipped.sum()),
        nonfinite_steps=steps[nonfinite].tolist(),
    )


def _grouped(x: Tensor, width: int, fill: float) -> Tensor:
    """[columns, width, …]: the last column is filled up."""
    missing = -len(x) % width
    padding = torch.full((missing, *x.shape[1:]), fill, dtype=x.dtype)
    return torch.cat([x, padding]).unflatten(0, (-1, width)) if len(x) else x.unsqueeze(1)


def _largest(x: Tensor, width: int) -> Tensor:
    """The largest value in each column that is not NaN; NaN where all are."""
    if not len(x):
        return x
    largest = _grouped(x.nan_to_num(nan=-math.inf, neginf=-math.inf), width, -math.inf).amax(1)
    return largest.masked_fill(largest == -math.inf, math.nan)


def _quantiles(x: Tensor) -> Tensor:
    """[QUANTILES, layers] of the values that are not NaN: the nearest one below. torch.quantile ends at 16M values."""
    if not len(x):
        return torch.full((len(QUANTILES), x.shape[1]), math.nan, dtype=torch.float64)
    ordered = x.sort(0).values  # NaN last
    top = (~x.isnan()).sum(0) - 1
    places = (torch.tensor(QUANTILES, dtype=torch.float64)[:, None] * top.clamp(min=0)).floor().long()
    return ordered.gather(0, places)
