"""The charts of the HTML page and of docs, as SVG that follows the reader's light or dark theme. Needs matplotlib."""

import io
import re
from collections.abc import Callable

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks import results, table

# Stand-ins for colours: in the SVG they become CSS variables, which have one value for each theme.
INK, FAINT, BACK = "#010203", "#040506", "#070809"
SERIES = ["#0a0b0c", "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b", "#1c1d1e", "#222324"]
VARIABLES = {INK: "--ink", FAINT: "--faint", BACK: "--back", **{c: f"--series{i + 1}" for i, c in enumerate(SERIES)}}
LIGHT = {"--ink": "#1f2328", "--faint": "#d1d9e0", "--back": "#ffffff"}
DARK = {"--ink": "#e6edf3", "--faint": "#3d444d", "--back": "#0d1117"}
# Blue, orange, green, purple: told apart also without red and green, dark enough on white, light enough on black. The
# paler four are for a second run beside the first.
LIGHT |= {"--series1": "#0969da", "--series2": "#bc4c00", "--series3": "#1a7f37", "--series4": "#8250df"}
LIGHT |= {"--series5": "#7cc0ff", "--series6": "#f0a875", "--series7": "#7fcf95", "--series8": "#c9aef5"}
DARK |= {"--series1": "#58a6ff", "--series2": "#f0883e", "--series3": "#3fb950", "--series4": "#bc8cff"}
DARK |= {"--series5": "#1f5a9e", "--series6": "#9a5524", "--series7": "#23752f", "--series8": "#6f4fa8"}

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def css(theme: dict[str, str]) -> str:
    return " ".join(f"{name}: {value};" for name, value in theme.items())


def svg(figure, name: str, alone: bool) -> str:
    """The figure as text; ``alone`` for a file of its own, which brings the themes with it."""
    stream = io.StringIO()
    # The salt makes identifiers that are the same every time, and differ between the charts of a page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = stream.getvalue()
    text = re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    if alone:
        # A ground of its own: the page around it may be light where the reader prefers dark.
        themes = f":root {{ background: var(--back); {css(LIGHT)} }} "
        themes += f"@media (prefers-color-scheme: dark) {{ :root {{ {css(DARK)} }} }}"
        text = re.sub(r"(<svg [^>]*>)", rf"\1<style>{themes}</style>", text, count=1)
    return text


def draw(name: str, data: object, paint: Callable, size: tuple[float, float], alone: bool = False) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=size)
        paint(axes, data)
        return svg(figure, name, alone)


# ---- what is shown: plain data from reports ------------------------------------------------------------------------

# A report is given with a name: its file's.
Named = tuple[str, dict]


def ratios(reports: list[Named], part: str = "models", quantity: str = "speedup") -> dict:
    """{series: {label: [median, low, high]}}; a series is a mode, of a file where there are several."""
    series: dict[str, dict] = {}
    for name, report in reports:
        for row in results.of_part(report, part):
            if quantity in row:
                label = f"{name}: {row['mode']}" if len(reports) > 1 else row["mode"]
                figure = row[quantity]
                series.setdefault(label, {})[row["case"]] = [figure["median"], *figure["interval"]]
    return series


def curves(reports: list[Named], part: str, along: str) -> dict:
    """{series: [[x, median us, low, high], ...]} for fastclip and its rival, unclipped and clipped."""
    series: dict[str, list] = {}
    for name, report in reports:
        for row in results.of_part(report, part):
            for who in (row["plain"], row["ours"]):
                label = f"{who}, {row['mode']}" + (f" ({name})" if len(reports) > 1 else "")
                samples = sorted(row["samples_us"][who])
                low, high = samples[len(samples) // 4], samples[-1 - len(samples) // 4]
                series.setdefault(label, []).append([row[along], row["median_us"][who], low, high])
    return {label: sorted(points) for label, points in series.items()}


def by_threads(reports: list[Named]) -> dict:
    """{series: [[threads, GB/s]]} of fastclip, for each case."""
    series: dict[str, list] = {}
    for name, report in reports:
        for row in results.of_part(report, "threads"):
            case = row["case"].rsplit(",", 1)[0]
            label = f"{case}, {row['mode']}" + (f" ({name})" if len(reports) > 1 else "")
            series.setdefault(label, []).append([row["threads"], row["gb_per_s"]])
    return {label: sorted(points) for label, points in series.items()}


def memory_peaks(reports: list[Named]) -> dict:
    """{contestant: {case: bytes}}: the largest of a case's modes."""
    series: dict[str, dict] = {}
    for name, report in reports:
        for row in results.of_part(report, "models"):
            for who, peak in row["memory_peak"].items():
                if peak is not None:
                    label = f"{who} ({name})" if len(reports) > 1 else who
                    cases = series.setdefault(label, {})
                    cases[row["case"]] = max(peak, cases.get(row["case"], 0))
    return series


def step_shares(reports: list[Named]) -> dict:
    """{"torch, unclipped": {model: [median, low, high]}}."""
    series: dict[str, dict] = {}
    for name, report in reports:
        for row in results.of_part(report, "end-to-end"):
            for who, share in row["share"].items():
                label = f"{who}, {row['mode']}" + (f" ({name})" if len(reports) > 1 else "")
                series.setdefault(label, {})[row["case"]] = [100 * v for v in (share["median"], *share["interval"])]
    return series


# ---- how it is shown -----------------------------------------------------------------------------------------------


def bars(axes, data: dict, label: str, mark: float | None = None, number: str = "{:.1f}") -> None:
    """Horizontal bars, grouped by case, with intervals. Series of the same mode have the same colour."""
    cases = list(dict.fromkeys(case for values in data.values() for case in values))
    height = 0.8 / max(1, len(data))
    largest = max(value[2] for values in data.values() for value in values.values())
    for i, (name, values) in enumerate(data.items()):
        places = [cases.index(case) + (i + 0.5) * height - 0.4 for case in values]
        medians = [value[0] for value in values.values()]
        spans = [[v[0] - v[1] for v in values.values()], [v[2] - v[0] for v in values.values()]]
        axes.barh(
            places, medians, height * 0.9, xerr=spans, label=name, color=SERIES[i % len(SERIES)], ecolor=INK, capsize=2
        )
        for place, value in zip(places, values.values(), strict=True):
            axes.text(value[2] + largest * 0.01, place, number.format(value[0]), va="center", fontsize=8)
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.margins(x=0.08, y=0.01)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(data)))


def lines(axes, data: dict, across: str, up: str, logarithmic: bool = True) -> None:
    """One line a series, its quartiles behind it where there are any; clipped and unclipped of one kind in one colour.

    torch is dashed, what is clipped has hollow points.
    """
    kinds = list(dict.fromkeys(name.replace("unclipped", "clipped") for name in data))
    for name, points in data.items():
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        colour = SERIES[kinds.index(name.replace("unclipped", "clipped")) % len(SERIES)]
        dashes = "--" if name.startswith("torch") else "-"
        hollow = BACK if ", clipped" in name else colour
        axes.plot(xs, ys, dashes, color=colour, label=name, marker="o", markersize=5, markerfacecolor=hollow)
        if len(points[0]) == 4:
            axes.fill_between(xs, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_xticks(sorted({p[0] for points in data.values() for p in points}))
        axes.set_ylim(bottom=0)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid()
    axes.legend(fontsize=9, loc="upper left" if logarithmic else "lower right")


def height_of(data: dict) -> float:
    cases = {case for values in data.values() for case in values}
    return 1.0 + 0.2 * len(cases) * max(2, len(data))


def speedup_chart(reports: list[Named], alone: bool = False) -> str:
    data = ratios(reports)
    paint = lambda axes, d: bars(axes, d, "times faster than torch (95% interval)", 1.0)  # noqa: E731
    return draw("Speed-up over torch", data, paint, (8, height_of(data)), alone)


def ceiling_chart(reports: list[Named], alone: bool = False) -> str:
    data = {
        label: {case: [100 * v for v in value] for case, value in values.items()}
        for label, values in ratios(reports, quantity="of_ceiling").items()
    }
    paint = lambda axes, d: bars(axes, d, "% of the ceiling's speed (95% interval)", 100, "{:.0f}")  # noqa: E731
    return draw("Share of the ceiling", data, paint, (8, height_of(data)), alone)


def bandwidth_chart(reports: list[Named], alone: bool = False) -> str:
    """GB/s of fastclip and of the ceiling."""
    data: dict[str, dict] = {}
    for name, report in reports:
        for row in results.of_part(report, "models"):
            for who in ("fastclip", "ceiling"):
                label = f"{who}, {row['mode']}" + (f" ({name})" if len(reports) > 1 else "")
                value = row["gb_per_s"] * row["median_us"]["fastclip"] / row["median_us"][who]
                data.setdefault(label, {})[row["case"]] = [value, value, value]
    paint = lambda axes, d: bars(axes, d, "GB/s (bytes that clipping has to move, over time)")  # noqa: E731
    return draw("GB/s against the ceiling", data, paint, (8, height_of(data)), alone)


def tensors_chart(reports: list[Named], alone: bool = False) -> str:
    data = curves(reports, "tensors", "tensors")
    paint = lambda axes, d: lines(axes, d, "tensors of 64 elements, fp32", "us (median, quartiles)")  # noqa: E731
    return draw("Time over the number of tensors", data, paint, (8, 4.5), alone)


def bytes_chart(reports: list[Named], alone: bool = False) -> str:
    data = curves(reports, "bytes", "bytes")
    paint = lambda axes, d: lines(axes, d, "bytes in 16 tensors, fp32", "us (median, quartiles)")  # noqa: E731
    return draw("Time over the bytes", data, paint, (8, 4.5), alone)


def threads_chart(reports: list[Named], alone: bool = False) -> str:
    data = by_threads(reports)
    paint = lambda axes, d: lines(axes, d, "threads", "fastclip, GB/s", logarithmic=False)  # noqa: E731
    return draw("GB/s over the threads", data, paint, (8, 4.5), alone)


def memory_chart(reports: list[Named], alone: bool = False) -> str:
    """Of the cases in which somebody takes a megabyte; a sentence where nobody does."""
    peaks = memory_peaks(reports)
    largest = max((peak for cases in peaks.values() for peak in cases.values()), default=0)
    if largest < 1e6:
        return f"<p>Nobody makes the process grow by more than {table.size(largest)} during a call.</p>"
    shown = {case for cases in peaks.values() for case, peak in cases.items() if peak >= 1e6}
    data = {
        who: {case: [peak / 1e6] * 3 for case, peak in cases.items() if case in shown} for who, cases in peaks.items()
    }
    paint = lambda axes, d: bars(axes, d, "MB by which the process grows at most", number="{:.2g}")  # noqa: E731
    return draw("Peak of memory", data, paint, (8, height_of(data)), alone)


def steps_chart(reports: list[Named], alone: bool = False) -> str:
    data = step_shares(reports)
    paint = lambda axes, d: bars(axes, d, "% of a training step spent clipping (95% interval)")  # noqa: E731
    return draw("Share of a training step", data, paint, (8, height_of(data)), alone)


# Title, the parts of a run that it needs, the chart.
CHARTS = [
    ("Speed-up over torch", "models", speedup_chart),
    ("GB/s against the ceiling", "models", bandwidth_chart),
    ("Share of the ceiling's speed", "models", ceiling_chart),
    ("From 1 to 100,000 tensors", "tensors", tensors_chart),
    ("From 1 KB up", "bytes", bytes_chart),
    ("Threads", "threads", threads_chart),
    ("Share of a training step", "end-to-end", steps_chart),
    ("Peak of memory", "models", memory_chart),
]
