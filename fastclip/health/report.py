"""The page: findings, norms over time, a heat map of layers by steps, distributions, in one file without network."""

import base64
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastclip._version import __version__
from fastclip.health.diagnosis import MIN_RECORDS
from fastclip.health.finding import Finding
from fastclip.health.history import History
from fastclip.health.overview import INF, NAN, NO_GRADIENT, ZERO, Overview, overview

# A cell of the heat map is a 16-bit number: one of these, or the logarithm of the norm in between.
_CODES = {NO_GRADIENT: 0, ZERO: 1, INF: 65534, NAN: 65535}
_LOWEST, _HIGHEST = 2, 65533


def write_report(history: History, findings: Sequence[Finding], path: str | os.PathLike) -> None:
    """Writes one self-contained HTML page; a file that exists is replaced. Nothing is loaded when it is opened.

    Args:
        history: the recorded steps; one without any gives a page that says so. More than 600 are shown in groups, by
            the largest norm of each.
        findings: what ``diagnose(history)`` returned.
        path: of the page.

    Raises:
        ImportError: jinja2 is not installed (``pip install "fastclip[health]"``).
        TypeError, ValueError: of ``history`` or ``findings``; the file is not touched.
        OSError: the file cannot be written.
    """
    check_findings(findings)
    page = render(overview(history), findings, history)
    # xmlcharrefreplace: a name may hold what UTF-8 does not, a lone surrogate.
    Path(path).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def check_findings(findings: Sequence[Finding]) -> None:
    if isinstance(findings, str | bytes) or not isinstance(findings, Sequence):
        raise TypeError(f"findings: expected a list of Finding, got {type(findings).__name__}")
    for i, finding in enumerate(findings):
        if not isinstance(finding, Finding):
            raise TypeError(f"findings[{i}]: expected a Finding, got {type(finding).__name__}")


def render(view: Overview, findings: Sequence[Finding], history: History) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('report() needs jinja2: pip install "fastclip[health]"') from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.j2").render(
        version=__version__,
        view=view,
        findings=findings,
        min_records=MIN_RECORDS,
        facts=facts(view, history),
        rows=rows(view),
        activations=activations(history),
        data=drawn(view, findings) if view.records else None,
    )


def number(x: float | None) -> str:
    """Three significant digits; nothing for a value that is not there."""
    if x is None:
        return ""
    return f"{x:.3g}" if math.isfinite(x) else {math.inf: "inf", -math.inf: "-inf"}.get(x, "nan")


def facts(view: Overview, history: History) -> list[tuple[str, str]]:
    """What the head of the page says."""
    if not view.records:
        return []
    total = history.total_norm.double()
    total = total[total.isfinite()]
    limits = view.threshold[~view.threshold.isnan()]
    threshold = "none" if not len(limits) else number(float(limits[-1]))
    if len(limits) and float(limits.min()) != float(limits.max()):
        threshold += f" (from {number(float(limits.min()))} to {number(float(limits.max()))})"
    steps = f"{int(view.first[0])} to {int(view.last[-1])}" if view.records > 1 else f"{int(view.first[0])}"
    clipped = f"{view.clipped_records:,} of {view.records:,} ({view.clipped_records / view.records:.0%})"
    return [
        ("steps", steps),
        ("records", f"{view.records:,}"),
        ("parameter tensors", f"{len(view.layers):,}"),
        ("median total norm", number(float(total.median())) if len(total) else "none is finite"),
        ("threshold", threshold),
        ("clipped", clipped if len(limits) else "never: no threshold"),
        ("non-finite steps", f"{len(view.nonfinite_steps):,}"),
        ("norm", f"L{number(history.norm_type)}"),
    ]


def rows(view: Overview) -> list[dict]:
    """The table of layers."""
    return [
        {
            "name": layer.name,
            "module": layer.module,
            "shape": "x".join(map(str, layer.shape)) or "scalar",
            "dtype": layer.dtype,
            "last": float(view.newest[i]) if view.had_gradient[i] else None,
            "median": _or_none(view.quantiles[3, i]),
            "max": _or_none(view.quantiles[-1, i]),
            "nonfinite": int(view.nonfinite_records[i]),
        }
        for i, layer in enumerate(view.layers)
    ]


def activations(history: History) -> list[dict]:
    def median(x: Tensor) -> float | None:
        return _or_none(x.double().nanmedian()) if len(x) else None

    return [
        {"name": a.name, "module": a.module, "saturated": median(a.saturated), "zeros": median(a.zeros)}
        for a in history.activations
    ]


def drawn(view: Overview, findings: Sequence[Finding]) -> dict:
    """What the script draws, ready for JSON: no NaN in it."""
    cells, low, high = encoded(view)
    return {
        "names": [layer.name for layer in view.layers],
        "found": sorted({finding.layer for finding in findings} - {""}),
        "first": view.first.tolist(),
        "last": view.last.tolist(),
        "totalMin": _plain(view.total_min),
        "totalMax": _plain(view.total_max),
        "threshold": _plain(view.threshold),
        "clipped": _plain(view.clipped),
        "nonfinite": view.nonfinite.int().tolist(),
        "quantiles": [_plain(row) for row in view.quantiles],
        "low": low,
        "high": high,
        "lowest": _LOWEST,
        "highest": _HIGHEST,
        "cells": base64.b64encode(cells).decode(),
    }


def encoded(view: Overview) -> tuple[bytes, float, float]:
    """The cells, layer after layer, little-endian 16 bits each; the log10 of what the lowest and highest stand for."""
    positive = (view.state == 0) & (view.norms > 0)
    logs = view.norms.log10()
    seen = logs[positive]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    scaled = _LOWEST + (logs - low) / (high - low) * (_HIGHEST - _LOWEST)
    codes = scaled.nan_to_num(nan=0).round().long()
    for state, code in _CODES.items():
        codes[view.state == state] = code
    flat = codes.t().flatten()
    pairs = torch.stack([flat & 255, flat >> 8], dim=1).flatten()
    return bytes(pairs.tolist()), low, high


def _or_none(x: Tensor) -> float | None:
    return None if math.isnan(x) else float(x)


def _plain(x: Tensor) -> list[float | None]:
    """Four significant digits: what can be seen and read."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in x.tolist()]
