"""Layers and their statistics in the terminal."""

import math
from typing import TYPE_CHECKING

import torch

from fastclip.health.history import History
from fastclip.statistics import COLUMNS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BAD, _NOTABLE = "bold red", "yellow"


def print_table(history: History, console: "Console | None" = None, rows: int | None = None) -> "Table":
    """See ``GradientMonitor.table``."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('table() needs rich: pip install "fastclip[health]"') from error
    table = make_table(history, rows)
    (console or Console()).print(table)
    return table


def make_table(history: History, rows: int | None = None) -> "Table":
    """The layers of a history by the newest record, beside the median of all.

    Red are gradients with inf or NaN, those that were all zero, and norms 10 times above or 100 times below the usual
    one of the layer; yellow the layers with the largest and the smallest norm.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(history), title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("shape", "norm", "median", "abs max", "zeros", "inf + nan", "weight norm"):
        table.add_column(name, justify="right")
    entries = [_entry(history, place) for place in range(len(history.layers))] if len(history.steps) else []
    norms = [entry["norm"] for entry in entries if math.isfinite(entry["norm"])]
    for entry in entries:
        if len(norms) > 1 and not entry["style"] and entry["norm"] in (max(norms), min(norms)):
            entry["style"] = _NOTABLE
    if rows is not None:
        urgency = {_BAD: 0, _NOTABLE: 1, "": 2}
        entries = sorted(entries, key=lambda entry: urgency[entry["style"]])[:rows]
    for entry in entries:
        table.add_row(*(Text(cell) for cell in entry["cells"]), style=entry["style"])
    return table


def _title(history: History) -> str:
    if not len(history.steps):
        return "no step recorded"
    total, limit = history.total_norm[-1].item(), history.max_norm[-1].item()
    threshold = "" if math.isnan(limit) else f", max_norm {limit:.4g}"
    return f"step {history.steps[-1].item()}: total_norm {total:.4g}{threshold}; {len(history.steps)} records"


def _entry(history: History, place: int) -> dict:
    layer = history.layers[place]
    norm, abs_max, zeros, infs, nans, _ = history.values[-1, place].tolist()
    norms = history.values[:, place, COLUMNS.index("norm")]
    norms = norms[norms.isfinite()]
    median = torch.median(norms).item() if len(norms) else math.nan
    weights = history.weight_norms[:, place]
    weights = weights[~weights.isnan()]
    is_bad = infs + nans > 0 or (layer.numel > 0 and zeros == layer.numel) or norm > 10 * median or norm < median / 100
    has_gradient = not math.isnan(zeros)
    return {
        "norm": norm,
        "style": _BAD if has_gradient and is_bad else "",
        "cells": [
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{norm:.3g}" if has_gradient else "no grad",
            "" if math.isnan(median) else f"{median:.3g}",
            f"{abs_max:.3g}" if has_gradient else "",
            f"{zeros / max(layer.numel, 1):.1%}" if has_gradient else "",
            f"{infs + nans:.0f}" if has_gradient else "",
            f"{weights[-1].item():.3g}" if len(weights) else "",
        ],
    }
