"""Puts every measured figure into README.md and docs: make docs-figures, `python -m benchmarks.docs_figures --check`.

The figures come from benchmarks/results/cpu.json and instructions.json. In the Markdown a figure stands between
``<!-- fig: NAME | ARGUMENT | ... -->`` and ``<!-- end -->``, in a line or as a block; NAME is a function below, or, as
FILE.NAME, the same of another file there (``cpu-amd.table``). Charts become files in
docs/figures. ``--check`` changes nothing and exits 1 where something is out of date.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import adaptive, instructions, results, stats, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = ROOT / "docs" / "figures"
MARKER = re.compile(r"<!-- fig: ([^>]+?) -->(.*?)<!-- end -->", re.DOTALL)


class Figures:
    """What the markers can name. Methods take the marker's arguments, texts, and return Markdown."""

    def __init__(self, report: dict, counts: dict | None):
        self.report, self.counts = report, counts

    # ---- in a line -------------------------------------------------------------------------------------------------

    def on_what(self) -> str:
        return table.on_what(self.report)

    def machine(self, name: str) -> str:
        value = self.report["machine"][name]
        return ", ".join(f"{key} {text}" for key, text in value.items()) if isinstance(value, dict) else str(value)

    def started(self) -> str:
        return self.report["started"].replace("T", " ").removesuffix("Z") + " UTC"

    def disturbed(self) -> str:
        rows = [row for row in self.report["results"] if "disturbed" in row]
        return f"{sum(row['disturbed'] for row in rows)} of {len(rows)}"

    def seconds(self) -> str:
        """How long the run took, in minutes."""
        return f"{sum(self.report['seconds'].values()) / 60:.0f}"

    def speedup(self, case: str, mode: str) -> str:
        return f"{self._row(case, mode)['speedup']['median']:.1f}"

    def time(self, case: str, mode: str, who: str) -> str:
        return table.duration(self._row(case, mode)["median_us"][who])

    def gb_per_s(self, case: str, mode: str) -> str:
        return f"{self._row(case, mode)['gb_per_s']:.0f} GB/s"

    def of_ceiling(self, case: str, mode: str) -> str:
        return f"{self._row(case, mode)['of_ceiling']['median']:.0%}"

    def norm_error(self, case: str, mode: str, who: str) -> str:
        return re.sub(r"e-0?", "e-", f"{self._row(case, mode)['norm_error'][who]:.1e}".replace(".0e", "e"))

    def norm(self, case: str, mode: str, who: str) -> str:
        row = self._row(case, mode)
        return f"{row['exact'] if who == 'exact' else row['norms'][who]:.4f}"

    def share(self, case: str, mode: str, who: str) -> str:
        return f"{self._row(case, mode)['share'][who]['median']:.1%}"

    def bytes_moved(self, case: str, mode: str, who: str) -> str:
        """Read and written, as counted, in units of the gradients' bytes."""
        row = self._count(case, mode, who)
        return f"{row['bytes_read'] / row['bytes']:.1f} N read, {row['bytes_written'] / row['bytes']:.1f} N written"

    def instructions_a_call(self, case: str, mode: str, who: str) -> str:
        return f"{self._count(case, mode, who)['instructions']:,}"

    # ---- blocks ----------------------------------------------------------------------------------------------------

    def headline(self) -> str:
        """The table of the README: the models that have aims."""
        rows = [row for row in results.of_part(self.report, "models") if "aim" in row]
        lines = table.grouped([table.case_row(row) for row in rows])
        made = table.Table("", table.CASE_HEAD, lines, table.CASE_NOTE)
        return f"{table.on_what(self.report)}\n\n{table.markdown(made)}"

    def table(self, title: str) -> str:
        """A table of the run by its title, without its note."""
        made = next((one for one in self._tables if one.title == title), None)
        if made is None:
            raise LookupError(f"the results have no table {title!r}")
        return table.markdown(table.Table(made.title, made.head, made.rows))

    def case_note(self) -> str:
        return table.CASE_NOTE + "\n"

    def counts_table(self) -> str:
        return table.markdown(instructions.to_table(self.counts))

    def beyond_torch(self) -> str:
        """Of adaptive.json."""
        return table.markdown(adaptive.to_table(self.report))

    def missed_aims(self) -> str:
        """A line for each aim that the run did not reach."""
        lines = []
        for row in self.report["results"]:
            if "aim" in row and row["aim"]["reached"]["median"] < row["aim"]["speedup"]:
                over = "plain calls" if row["aim"]["over"] == "plain" else row["aim"]["over"]
                missed = f"{table.times(row['aim']['reached'])} over {over}, aim {row['aim']['speedup']:g}x"
            elif "aim_us" in row and row["overhead_us"]["median"] > row["aim_us"]:
                missed = f"{row['overhead_us']['median']:+.1f} us, aim {row['aim_us']:g} us"
            elif row.get("met") is False:
                _, _, value, wanted, _ = table.limit_row(row)
                missed = f"{value}, aim {wanted}"
            else:
                continue
            lines.append(f"{row['case']}, {row['mode']}: {missed}")
        return "".join(f"- {line}\n" for line in lines) or "None: every aim was reached.\n"

    def not_faster(self) -> str:
        """A line for each case and contestant that fastclip does not beat for sure: the interval reaches down to 1."""
        lines = []
        for row in self.report["results"]:
            if row["part"] not in table.CASE_PARTS:
                continue
            for who, samples in row["samples_us"].items():
                if who in (row["ours"], "list", "ceiling"):
                    continue
                ours = row["samples_us"][row["ours"]]
                if all(a > b for a, b in zip(samples, ours, strict=True)):
                    continue  # faster in every round: spares the bootstrap
                ratio = stats.ratio(samples, ours)
                if ratio["interval"][0] <= 1:
                    lines.append(f"{row['case']}, {row['mode']}, over {who}: {table.times(ratio)}")
        return "".join(f"- {line}\n" for line in lines) or "None of the cases measured.\n"

    def left_out(self) -> str:
        lines = [*self.report["left_out"], *(f"{name}: {why}" for name, why in self.report["absent"].items())]
        return "".join(f"- {line}\n" for line in lines) or "Nothing.\n"

    # ---- what they have in common ----------------------------------------------------------------------------------

    @functools.cached_property
    def _tables(self) -> list:
        return table.tables(self.report)

    def _row(self, case: str, mode: str) -> dict:
        return _only(self.report, case=case, mode=mode)

    def _count(self, case: str, mode: str, who: str) -> dict:
        if self.counts is None:
            raise LookupError("benchmarks/results/instructions.json is missing")
        return _only(self.counts, case=case, mode=mode, who=who)

    def text(self, marker: str) -> str:
        name, *arguments = (part.strip() for part in marker.split("|"))
        if "." in name:
            file, name = name.split(".")
            return _of_file(file).text("|".join([name, *arguments]))
        make: Callable[..., str] | None = None if name.startswith("_") or name == "text" else getattr(self, name, None)
        if not callable(make):
            raise LookupError(f"{marker}: expected one of the figures in {Path(__file__).name}, got {name}")
        return make(*arguments)


@functools.cache
def _of_file(name: str) -> Figures:
    return Figures(results.load(RESULTS / f"{name}.json"), None)


def _only(report: dict, **wanted: str) -> dict:
    found = [row for row in report["results"] if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"expected one result with {wanted}, found {len(found)}")
    return found[0]


def fill(text: str, figures: Figures) -> str:
    """The Markdown with all its figures: a block where the marker's end stands on another line."""

    def replace(marker: re.Match) -> str:
        made = figures.text(marker[1])
        name = " ".join(marker[1].split())
        return f"<!-- fig: {name} -->{chr(10) + made if marker[2].startswith(chr(10)) else made}<!-- end -->"

    return MARKER.sub(replace, text)


def charts(report: dict) -> dict[str, tuple[str, Callable[[], str]]]:
    """{file name: (digest of what it shows, a function that draws it)}. Drawing needs matplotlib, the digest not."""
    named = [("cpu", report)]

    def draw(name: str) -> Callable[[], str]:
        def run() -> str:
            from benchmarks import plots

            return getattr(plots, name)(named, alone=True)

        return run

    parts = {"speedup": "models", "tensors": "tensors", "bytes": "bytes", "steps": "end-to-end"}
    return {
        f"{name}.svg": (chart_digest(report, part), draw(f"{name}_chart"))
        for name, part in parts.items()
        if results.of_part(report, part)
    }


def chart_digest(report: dict, part: str) -> str:
    return results.digest([row["samples_us"] for row in results.of_part(report, part)])


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RESULTS / "README.md"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs_figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where something is out of date")
    options = parser.parse_args(arguments)
    report = results.load(RESULTS / "cpu.json")
    counts_file = RESULTS / "instructions.json"
    figures = Figures(report, results.load(counts_file) if counts_file.exists() else None)
    stale = []
    for page in pages():
        before = page.read_text()
        after = fill(before, figures)
        if after != before:
            stale.append(page)
            if not options.check:
                page.write_text(after)
    for name, (digest, draw) in charts(report).items():
        file = CHARTS / name
        if not file.exists() or f"<!-- {digest} -->" not in file.read_text():
            stale.append(file)
            if not options.check:
                file.parent.mkdir(exist_ok=True)
                file.write_text(f"<!-- {digest} -->\n{draw()}")
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
