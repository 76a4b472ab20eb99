"""A benchmark's report as Markdown."""

HEAD = ["case", "", "torch", "fastclip", "speed-up", "aim", "GB/s", "of the ceiling", "norm error", "difference"]


def markdown(report: dict) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores; "
        f"torch {report['fastclip']['torch']}, fastclip {report['fastclip']['version']} "
        f"({report['fastclip']['cpu_kernels']}).",
        "",
        *table([HEAD, *(row for result in report["results"] for row in _rows(result))]),
        "",
        "Medians of paired rounds, with the quartiles of the speed-up. GB/s: bytes that clipping has to move (read "
        "once; clipped: read twice, written once) over time, caches included. The ceiling is the fastest way found to "
        "read the same bytes from one buffer (clipped: then to multiply them in place), above 100% where fastclip is "
        "faster than that. Norm error: relative to float64, torch and fastclip. Difference: largest between torch's "
        "and fastclip's clipped gradients, relative to the largest gradient.",
    ]
    return "\n".join(lines) + "\n"


def _rows(result: dict) -> list[list[str]]:
    rows = []
    for mode in ("unclipped", "clipped"):
        row = result[mode]
        first = mode == "unclipped"
        aim = f"{row['target']:g}x"
        if row["rival"] == "list":
            aim = f"<= {1 / row['target']:g} x list ({row['list_us']:,.0f} us): {1 / row['rival_speedup']:.2f}"
        rows.append(
            [
                result["case"] if first else "",
                mode,
                duration(row["torch_us"]),
                duration(row["fastclip_us"]),
                "{:.2f}x ({:.2f}-{:.2f})".format(row["speedup"], *row["speedup_quartiles"]),
                aim,
                f"{row['gb_per_s']:.1f}",
                f"{row['of_ceiling']:.0%} ({row['ceiling']})",
                f"{result['norm_error_torch']:.0e} / {result['norm_error_fastclip']:.0e}" if first else "",
                "" if first else f"{result['largest_difference']:.0e}",
            ]
        )
    return rows


def duration(microseconds: float) -> str:
    return f"{microseconds / 1000:,.2f} ms" if microseconds >= 1000 else f"{microseconds:.1f} us"


def table(rows: list[list[str]]) -> list[str]:
    """Markdown with padded columns, so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
