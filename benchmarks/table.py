"""A report as tables, for the terminal, Markdown and the HTML page alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import results, stats

CASE_PARTS = {
    "models": "Models",
    "kinds": "Other dtypes, norms, and gradients that are not finite",
    "tensors": "From 1 to 100,000 tensors",
    "bytes": "From 1 KB up",
    "threads": "Threads",
}


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def duration(microseconds: float) -> str:
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:,.2f} s"
    return f"{microseconds / 1000:,.2f} ms" if microseconds >= 1000 else f"{microseconds:.1f} us"


def size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def times(spread: dict) -> str:
    return "{:.2f}x ({:.2f}-{:.2f})".format(spread["median"], *spread["interval"])


def share(spread: dict) -> str:
    return "{:.0%} ({:.0%}-{:.0%})".format(spread["median"], *spread["interval"])


# ---- one row of each kind ------------------------------------------------------------------------------------------

CASE_HEAD = ["case", "", "torch", "fastclip", "speed-up", "aim", "GB/s", "of the ceiling", "norm error"]
CASE_NOTE = (
    "Medians of paired rounds, in brackets their 95% bootstrap interval. GB/s: bytes that clipping has to move (read "
    "once; clipped: read twice, written once) over time, caches included. The ceiling is the fastest way found to "
    "read the same bytes (clipped: then to read and write them), above 100% where fastclip is faster than that. Norm "
    "error: relative to float64, torch and fastclip."
)


def case_row(row: dict) -> list[str]:
    errors = row["norm_error"]
    return [
        row["case"],
        row["mode"],
        duration(row["median_us"][row["plain"]]),
        duration(row["median_us"][row["ours"]]),
        times(row["speedup"]),
        aim(row),
        f"{row['gb_per_s']:.1f}",
        share(row["of_ceiling"]),
        " / ".join("wrong" if errors[row[who]] is None else f"{errors[row[who]]:.0e}" for who in ("plain", "ours")),
    ]


def aim(row: dict) -> str:
    """The aim, and against what it is measured if that is not torch."""
    if "aim" not in row:
        return ""
    wanted, reached = row["aim"]["speedup"], row["aim"]["reached"]["median"]
    if row["aim"]["over"] == row["plain"]:
        return f"{wanted:g}x"
    return f"<= {1 / wanted:g} x {row['aim']['over']}: {1 / reached:.2f}"


RIVAL_NOTE = "Memory: by how much the process grew at most during a call."
RIVAL_HEAD = ["case", "", "contestant", "time", "host", "fastclip is faster by", "memory"]


def rival_rows(row: dict) -> list[list[str]]:
    """All contestants of a case. On a GPU the host's time is another one, and fastclip's own is of interest."""
    rows, host = [], row.get("host_us", {})
    for name in row["median_us"]:
        if name in ("list", "ceiling") or (name == row["ours"] and not host):
            continue
        speedup = (
            "" if name == row["ours"] else times(stats.ratio(row["samples_us"][name], row["samples_us"][row["ours"]]))
        )
        peak = row["memory_peak"].get(name)
        took, on_host = duration(row["median_us"][name]), duration(host[name]) if name in host else ""
        rows.append([row["case"], row["mode"], name, took, on_host, speedup, "" if peak is None else size(peak)])
    return rows


OPTIM_HEAD = ["case", "", "plain calls", "fastclip", "result", "aim"]
OPTIM_NOTE = (
    "DistilGPT-2 (81.9 million parameters, float32) and an RL policy of 6 tensors, fused AdamW. Plain calls: torch's "
    "clip_grad_norm_ and step, with AMP unscale_ before and update after; for the 6 tensors fastclip's clip_grad_norm_ "
    "and AdamW's step, or one that does nothing. Medians of paired rounds, in brackets their 95% "
    "bootstrap interval."
)


def optim_row(row: dict) -> list[str]:
    if "overhead_us" in row:
        result = "{:+.1f} us ({:+.1f} to {:+.1f})".format(row["overhead_us"]["median"], *row["overhead_us"]["interval"])
        wanted = f"< {row['aim_us']:g} us"
    else:
        result, wanted = times(row["speedup"]), aim(row)
    plain, ours = (duration(row["median_us"][row[name]]) for name in ("plain", "ours"))
    return [row["case"], row["mode"], plain, ours, result, wanted]


LIMIT_HEAD = ["what", "", "measured", "aim", "reached"]


def limit_row(row: dict) -> list[str]:
    value, unit = row["value"], row["unit"]
    text = {"x": times, "%": share}.get(unit, lambda v: "{:.2f} us ({:.2f}-{:.2f})".format(v["median"], *v["interval"]))
    wanted = {"x": f"{row['aim_value']:.2g}x", "%": f"{row['aim_value']:.0%}"}.get(unit, f"{row['aim_value']:g} us")
    sign = ">=" if row["higher_is_better"] else "<="
    return [row["case"], row["mode"], text(value), f"{sign} {wanted}", "yes" if row["met"] else "no"]


EXPERIMENT_HEAD = ["change", "list", "effect on the time"]


def experiment_row(row: dict) -> list[str]:
    change = row["change"]
    return [row["case"], row["mode"], "{:+.0%} ({:+.0%} to {:+.0%})".format(change["median"], *change["interval"])]


ACCURACY_HEAD = ["values", "exact norm", "torch", "fastclip", "torch is off by", "fastclip is off by"]


def accuracy_row(row: dict) -> list[str]:
    norms = [row["exact"], *row["norms"].values()]
    return [row["case"], *(f"{norm:.6g}" for norm in norms), *(f"{error:.0e}" for error in row["norm_error"].values())]


STEP_HEAD = [
    "model",
    "",
    "rest of the step",
    "torch clips in",
    "fastclip clips in",
    "torch's share",
    "fastclip's share",
]
STEP_NOTE = (
    "Whole training steps on the CPU: forward, backward, clipping, fused AdamW; torch and fastclip clip in turn. "
    "Share: of the step with its clipping."
)


def step_row(row: dict) -> list[str]:
    median = row["median_us"]
    return [
        row["case"],
        row["mode"],
        *(duration(median[name]) for name in ("rest", "torch", "fastclip")),
        *("{:.1%}".format(row["share"][name]["median"]) for name in ("torch", "fastclip")),
    ]


# ---- all of them ---------------------------------------------------------------------------------------------------


def tables(report: dict) -> list[Table]:
    """Every table that a report has rows for."""
    found = [
        Table(title, CASE_HEAD, grouped([case_row(row) for row in results.of_part(report, part)]), CASE_NOTE)
        for part, title in CASE_PARTS.items()
    ]
    rivals = [line for row in results.of_part(report, "models") for line in rival_rows(row)]
    kinds = [
        ("accuracy", "Norms", ACCURACY_HEAD, accuracy_row, ""),
        ("limits", "The kernel against its limits", LIMIT_HEAD, limit_row, ""),
        ("experiments", "What was tried", EXPERIMENT_HEAD, experiment_row, ""),
        ("optim", "Clipping inside the optimizer's step", OPTIM_HEAD, optim_row, OPTIM_NOTE),
        ("end-to-end", "Share of a training step", STEP_HEAD, step_row, STEP_NOTE),
    ]
    found.append(Table("All contestants", RIVAL_HEAD, grouped(rivals), RIVAL_NOTE))
    for part, title, head, to_row, note in kinds:
        found.append(Table(title, head, grouped([to_row(row) for row in results.of_part(report, part)]), note))
    return [without_empty_columns(table) for table in found if table.rows]


def without_empty_columns(table: Table) -> Table:
    full = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    return Table(table.title, [table.head[i] for i in full], [[row[i] for i in full] for row in table.rows], table.note)


def grouped(rows: list[list[str]]) -> list[list[str]]:
    """The name of a case only in its first row."""
    return [["" if i and rows[i - 1][0] == row[0] else row[0], *row[1:]] for i, row in enumerate(rows)]


def on_what(report: dict) -> str:
    """One sentence about the machine and the versions."""
    machine, build = report["machine"], report["fastclip"]
    where = f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores"
    if machine.get("gpu"):
        where = machine["gpu"]["name"]
    return f"{where}; torch {build['torch']}, fastclip {build['version']} ({build['cpu_kernels']})."


def markdown(table: Table) -> str:
    """Padded columns, so that it reads well in a terminal too."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = ["| " + " | ".join(cells) + " |" for cells in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*text, *(["", table.note] if table.note else [])]) + "\n"


def document(report: dict) -> str:
    """Everything, as a Markdown page."""
    parts = [on_what(report) + "\n"]
    parts += [f"## {table.title}\n\n{markdown(table)}" for table in tables(report)]
    parts += [f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines) for title, lines in asides(report) if lines]
    return "\n".join(parts)


def asides(report: dict) -> list[tuple[str, list[str]]]:
    """What did not take part, and what was disturbed."""
    busy = [
        f"{row['case']}, {row['mode']}: others used {row['contention']['others_cores']:.1f} cores, "
        f"{row['contention']['steal']:.0%} stolen"
        for row in report["results"]
        if row.get("disturbed")
    ]
    absent = [f"{name}: {why}" for name, why in report["absent"].items()]
    return [("Rivals that did not take part", absent), ("Left out", report["left_out"]), ("Disturbed by others", busy)]
