"""The views of the page as a matplotlib figure: norms over time, a heat map of layers by steps, distributions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastclip.health.finding import Finding
from fastclip.health.history import History
from fastclip.health.overview import INF, QUANTILES, ZERO, Overview, overview
from fastclip.health.report import check_findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMES = 40  # of layers, written beside the heat map; of more, evenly chosen ones
_BAD, _ZERO, _NO_GRADIENT = "#d1242f", "#9aa3ad", "#e4e7eb"


def plot(history: History, findings: Sequence[Finding] = ()) -> "Figure":
    """Draws what was recorded; nothing is shown or written: ``plot(history).savefig("gradients.png")``.

    Args:
        history: the recorded steps, at least one. More than 600 are drawn in groups, by the largest norm of each.
        findings: their layers are marked, and the worst one is the title.

    Returns:
        A ``matplotlib.figure.Figure`` of three axes: total norm, heat map, distribution of each layer.

    Raises:
        ImportError: matplotlib is not installed (``pip install "fastclip[health]"``).
        TypeError, ValueError: of ``history`` or ``findings``; no step was recorded.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "fastclip[health]"') from error
    check_findings(findings)
    view = overview(history)
    if not view.records or not view.layers:
        raise ValueError("history: expected at least one recorded step of at least one layer, got none")
    height = min(max(0.18 * len(view.layers), 1.5), 8)
    # A figure of its own and not pyplot's, which keeps every figure until it is closed.
    figure = Figure(figsize=(12, 3.2 + height), layout="constrained")
    (top, corner), (below, right) = figure.subplots(
        2, 2, width_ratios=[4, 1], height_ratios=[2.6, height], squeeze=True
    )
    corner.remove()
    if findings:
        # A dollar in a name is a dollar, here and beside the heat map.
        figure.suptitle(_shortened(f"{findings[0]}", 130), fontsize=10, color=_BAD, parse_math=False)
    _norms(top, view)
    _heat_map(below, view, {finding.layer for finding in findings})
    _distributions(right, view)
    return figure


def _norms(axes: "Axes", view: Overview) -> None:
    place = torch.arange(len(view.first)).numpy()
    axes.fill_between(place, view.total_min.numpy(), view.total_max.numpy(), alpha=0.3, linewidth=0)
    axes.plot(place, view.total_max.numpy(), label="total norm", linewidth=1.2, marker="." if len(place) == 1 else None)
    if not view.threshold.isnan().all():
        axes.plot(place, view.threshold.numpy(), "--", color="#b3541e", label="threshold", linewidth=1.2)
    clipped = place[(view.clipped > 0).numpy()]
    if len(clipped):
        marks: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "label": "clipped", "color": "#e08a3c"}
        axes.plot(clipped, [0.015] * len(clipped), "|", **marks)
    for i, column in enumerate(place[view.nonfinite.numpy()].tolist()):
        axes.axvline(column, color=_BAD, linewidth=1, label="not finite" if i == 0 else None)
    if bool((view.total_max > 0).any()):
        axes.set_yscale("log")
    axes.set(ylabel="total norm", xlim=(-0.5, len(place) - 0.5))
    _step_axis(axes, view)
    axes.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _heat_map(axes: "Axes", view: Overview, found: set[str]) -> None:
    from matplotlib.colors import ListedColormap

    logs = view.norms.where((view.state == 0) & (view.norms > 0), torch.nan).log10().t()
    axes.set_facecolor(_NO_GRADIENT)
    image = axes.imshow(logs.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    for where, color in ((view.state == ZERO, _ZERO), (view.state >= INF, _BAD)):
        cells = torch.where(where.t(), 1.0, torch.nan)
        axes.imshow(cells.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap([color]), vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes, label="log10 of the norm", pad=0.01)
    every = -(-len(view.layers) // MAX_NAMES)
    axes.set_yticks(
        range(0, len(view.layers), every), [_shortened(layer.name, 36, end=True) for layer in view.layers[::every]]
    )
    axes.tick_params("y", labelsize=7)
    for label, layer in zip(axes.get_yticklabels(), view.layers[::every], strict=True):
        label.set_parse_math(False)
        if layer.name in found:
            label.set_color(_BAD)
    axes.set_xlabel("step")
    _step_axis(axes, view)


def _distributions(axes: "Axes", view: Overview) -> None:
    low, quarter, median, three_quarters, high = (
        view.quantiles[QUANTILES.index(q)].numpy() for q in (0, 0.25, 0.5, 0.75, 1)
    )
    place = (high > 0).nonzero()[0]
    axes.hlines(place, low[place], high[place], color="#d5d9df", linewidth=1)
    axes.hlines(place, quarter[place], three_quarters[place], color="#6cb2f0", linewidth=3)
    axes.plot(median[place], place, "|", color="#1f6fb4")
    if len(place):
        axes.set_xscale("log", nonpositive="clip")
    axes.set(ylim=(len(view.layers) - 0.5, -0.5), yticks=[])
    axes.set_xlabel("norm: all, middle half, median", fontsize=8)


def _step_axis(axes: "Axes", view: Overview) -> None:
    every = -(-len(view.first) // 10)
    axes.set_xticks(range(0, len(view.first), every), [str(step) for step in view.first[::every].tolist()])


def _shortened(text: str, length: int, end: bool = False) -> str:
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if end else text[: length - 1] + "…"
