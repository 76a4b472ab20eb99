"""The page of text_generation.py: runs side by side, with what is computed from them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from text_generation import UNIGRAM, Result

GREY = "#808080"  # of text and axes: to be read on white and on black


def statement(result: Result) -> str:
    """What came of a run, in one sentence or two."""
    first, last = result.losses[0], result.last_loss
    if result.diverged_at is not None:
        said = (
            f"Diverged: the loss is {result.losses[-1]} in step {result.diverged_at}, after {first:.3g} in the first."
        )
    elif result.trained:
        said = f"Trained: the loss fell from {first:.3g} to {last:.3g}."
    else:
        said = f"Did not train: the loss went from {first:.3g} to {last:.3g}; without any context it is {UNIGRAM:.3g}."
    if result.run.group == "vanishing":
        first_layer, head = result.learnt["layers.0.weight"], result.learnt["head.weight"]
        said += f" layers.0.weight changed by {first_layer:.2g} of its norm, head.weight by {head:.2g}."
    return said


def largest_difference(a: Result, b: Result) -> float:
    """The largest difference between two runs' parameters."""
    return max(float((x - y).abs().max()) for x, y in zip(a.parameters, b.parameters, strict=True))


def comparison(results: Sequence[Result]) -> str:
    """What a group says as a whole."""
    runs = {result.run.name: result for result in results}
    if {"1x32", "8x4"} <= runs.keys():
        a, b = runs["1x32"], runs["8x4"]
        same = all(torch.allclose(x, y, 1e-4, 1e-5) for x, y in zip(a.parameters, b.parameters, strict=True))
        return (
            f"The parameters of 1x32 and 8x4 after {len(a.losses)} steps are {'the same' if same else 'not the same'} "
            f"within 1e-4 of their size: they differ by {largest_difference(a, b):.1e} at most."
        )
    return ""


def curves(results: Sequence[Result]) -> Figure:
    """Losses and gradient norms of a group's runs over the steps."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    loss, norm = figure.subplots(1, 2)
    for number, result in enumerate(results):
        # A run of few steps is a dot; one that diverged ends with a cross.
        finite = [x for x in result.losses if x == x and x != float("inf")]
        style = {
            "color": f"C{number}",
            "label": result.run.name,
            "linewidth": 1.2 if number else 2.6,
        }  # seen where runs are alike
        marker = "o" if len(finite) < 3 else None
        loss.plot(finite, marker=marker, **style)
        norm.plot(result.norms[: len(finite)], marker=marker, **style)
        if result.diverged_at is not None and finite:
            loss.plot(len(finite) - 1, finite[-1], "x", color=f"C{number}", markersize=12, markeredgewidth=3)
            loss.annotate(
                f" then {result.losses[-1]}", (len(finite) - 1, finite[-1]), (8, -3), color=GREY,
                textcoords="offset points",
            )  # fmt: skip
    for axes, title in ((loss, "loss"), (norm, "norm of the gradients, before clipping")):
        axes.set_title(title, color=GREY, fontsize=10)
        axes.set_xlabel("step", color=GREY)
        axes.tick_params(colors=GREY, which="both")
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_color(GREY)
    if any(value > 20 for result in results for value in result.losses):
        loss.set_yscale("log")
    loss.axhline(UNIGRAM, color=GREY, linestyle=":", linewidth=1)
    norm.set_yscale("log")
    loss.legend(labelcolor=GREY, framealpha=0, fontsize=8)
    figure.patch.set_alpha(0)
    return figure


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.run.group, []).append(result)
    return found


def image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()


def write_pictures(results: Sequence[Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in groups(results).items():
        figure = curves(members)
        figure.savefig(folder / f"stable-training-{name}.png", dpi=90, facecolor="white", transparent=False)
    (folder / "stable-training-runs.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Sequence[Result]) -> str:
    """The tables of the page, for the tutorial."""
    lines = ["# The runs of examples/text_generation.py", "", "Written by the example; not to be edited."]
    for name, members in groups(results).items():
        lines += ["", f"## {name.capitalize()}", "", f"![losses and norms](stable-training-{name}.png)", ""]
        if comparison(members):
            lines += [comparison(members), ""]
        lines += ["| run | what | outcome | diagnose() |", "|---|---|---|---|"]
        for result in members:
            found = " ".join(map(str, result.findings)) or "no finding"
            lines.append(f"| {result.run.name} | {result.run.what} | {statement(result)} | {found} |")
        for result in members:
            if name == "generators" and result.sample:
                lines += ["", f"What {result.run.name} writes:", "", "```", *result.sample.split("\n"), "```"]
    return "\n".join(lines) + "\n"


def write_page(results: Sequence[Result], path: Path) -> None:
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    sections = [
        (name, members, comparison(members), image(curves(members))) for name, members in groups(results).items()
    ]
    path.write_text(page.render(sections=sections, statement=statement, unigram=UNIGRAM), encoding="utf-8")


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Stable training of a text generator</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4em .6em; border-bottom: 1px solid #8886; }
td p { margin: 0 0 .4em; }
td:first-child { white-space: nowrap; font-weight: 600; }
.remedy { opacity: .75; }
img { width: 100%; }
pre { white-space: pre-wrap; border-left: 3px solid #8886; padding-left: 1em; }
</style>
<h1>Stable training of a text generator</h1>
<p>Each row is computed from its run. A loss of {{ "%.2f"|format(unigram) }} (dotted) needs no context: it is the
entropy of single characters. A run has trained when the mean loss of its last tenth is 5% below.</p>
{% for name, results, comparison, image in sections %}
<h2>{{ name|capitalize }}</h2>
<img alt="losses and norms: {{ name }}" src="data:image/svg+xml;base64,{{ image }}">
{% if comparison %}<p>{{ comparison }}</p>{% endif %}
<table>
<tr><th>run</th><th>what</th><th>outcome</th><th>diagnose()</th></tr>
{% for result in results %}
<tr><td>{{ result.run.name }}</td><td>{{ result.run.what }}</td><td>{{ statement(result) }}</td><td>
{% for finding in result.findings %}<p>{{ finding }} <span class="remedy">{{ finding.remedy }}</span></p>
{% else %}no finding
{% endfor %}</td></tr>
{% endfor %}
</table>
{% for result in results if name == "generators" and result.sample %}
<h3>What {{ result.run.name }} writes</h3>
<pre>{{ result.sample }}</pre>
{% endfor %}
{% endfor %}
</html>
"""
