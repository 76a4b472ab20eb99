"""The HTML page of one or several runs: ``python -m benchmarks report a.json b.json -o report.html``."""

from pathlib import Path

import jinja2

from benchmarks import plots, results, table

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(reports: list[plots.Named]) -> str:
    """One file without anything from elsewhere: charts are inline SVG, both themes are in it."""
    charts = [
        (title, draw([(name, report) for name, report in reports if results.of_part(report, part)]))
        for title, part, draw in plots.CHARTS
        if any(results.of_part(report, part) for _, report in reports)
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        runs=[
            {
                "name": name,
                "on_what": table.on_what(report),
                "started": report["started"],
                "quick": report["options"]["quick"],
                "machine": _flat(report["machine"]),
                "tables": table.tables(report),
                "asides": [(title, lines) for title, lines in table.asides(report) if lines],
            }
            for name, report in reports
        ],
        charts=charts,
        light=plots.css(plots.LIGHT),
        dark=plots.css(plots.DARK),
    )


def _flat(machine: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in machine.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[f"{prefix}{name}".replace("_", " ")] = str(value)
    return flat
