"""The page and the plot: everything that was recorded is in, whatever it is, and nothing comes from elsewhere."""

import base64
import json
import math
import re
import struct

import pytest
import torch

from fastclip.health.diagnosis import diagnose
from fastclip.health.finding import Finding
from fastclip.health.history import Activation, History, Layer
from fastclip.health.overview import MAX_COLUMNS, overview

pytest.importorskip("jinja2")
from fastclip.health.report import write_report


def make_history(layers: int = 3, steps: int = 20, names=None) -> History:
    names = names or [f"layers.{i}.weight" for i in range(layers)]
    random = torch.Generator().manual_seed(0)
    values = torch.zeros(steps, layers, 6, dtype=torch.float64)
    values[:, :, 0] = torch.rand(steps, layers, generator=random, dtype=torch.float64) + 0.5
    values[:, :, 1] = values[:, :, 0] / 4
    return History(
        layers=[
            Layer(names[i] if names else f"layers.{i}.weight", (8, 4), "float32", "Linear", i) for i in range(layers)
        ],
        steps=torch.arange(steps) * 2,
        total_norm=values[:, :, 0].square().sum(1).sqrt(),
        max_norm=torch.full((steps,), 1.0, dtype=torch.float64),
        values=values,
        weight_norms=torch.ones(steps, layers, dtype=torch.float64),
    )


def page_of(tmp_path, history, findings=()) -> str:
    write_report(history, list(findings), tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1], parse_constant=pytest.fail)


def cells_of(data: dict) -> list[list[int]]:
    """[layers][columns] codes."""
    raw, columns = base64.b64decode(data["cells"]), len(data["first"])
    flat = struct.unpack(f"<{len(raw) // 2}H", raw)
    return [list(flat[i : i + columns]) for i in range(0, len(flat), columns)]


def test_everything_is_in(tmp_path):
    history = make_history()
    history.activations = [Activation("act.0", "Sigmoid", torch.full((20,), 0.25), torch.zeros(20))]
    finding = Finding("spike", "layers.1.weight", {"steps": [4, 8]}, "Look at step 4.", 1.0, "spike in layers.1.weight")
    page = page_of(tmp_path, history, [finding])
    for text in ("spike in layers.1.weight", "Look at step 4.", "[4, 8]", "layers.2.weight", "act.0", "25.0%", "8x4"):
        assert text in page
    data = data_of(page)
    assert data["names"] == [layer.name for layer in history.layers] and data["found"] == ["layers.1.weight"]
    assert data["first"] == history.steps.tolist()
    torch.testing.assert_close(torch.tensor(data["totalMax"]).double(), history.total_norm, rtol=1e-3, atol=0)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = page_of(tmp_path, make_history())
    assert not re.search(r"https?:|//[a-z]|@import|src=|<link|url\(", page.replace("// ", ""))


def test_cells_are_the_norms(tmp_path):
    history = make_history(layers=2, steps=5)
    values = history.values
    values[:, 0, 0] = torch.tensor([1e-3, 1.0, 1e3, math.inf, math.nan])
    values[3, 0, 1:4] = torch.tensor([math.inf, 0.0, 1.0])
    values[4, 0, 1], values[4, 0, 4] = math.nan, 1
    values[:, 1, 0] = 0
    values[2, 1] = math.nan
    data = data_of(page_of(tmp_path, history))
    first, second = cells_of(data)
    assert (first[0], first[2], first[3], first[4]) == (data["lowest"], data["highest"], 65534, 65535)
    assert second == [1, 1, 0, 1, 1]
    exponent = data["low"] + (first[1] - data["lowest"]) / (data["highest"] - data["lowest"]) * (
        data["high"] - data["low"]
    )
    assert exponent == pytest.approx(0, abs=1e-4)
    assert data["nonfinite"] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "</script>", "a&b", 'quo"te', "$x^2$", "ümlaut.重み", "\ud800"]
)
def test_names_are_text(tmp_path, name):
    history = make_history(names=[name, "b", "c"])
    finding = Finding("spike", name, {name: name}, name, 1.0, f"spike in {name}")
    page = page_of(tmp_path, history, [finding])
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert data_of(page)["names"][0] == name


def test_no_record_at_all(tmp_path):
    history = make_history(steps=0)
    page = page_of(tmp_path, history)
    assert "No step has been recorded" in page and "<canvas" not in page


@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (1, 9), (5, 1), (0, 3)])
def test_few(tmp_path, layers, steps):
    page = page_of(tmp_path, make_history(layers, steps))
    assert len(cells_of(data_of(page))) == layers
    assert "diagnosis begins with 10 records" in " ".join(page.split())


def test_nothing_is_finite(tmp_path):
    history = make_history()
    history.values[:, :, :2] = math.nan
    history.values[:, :, 4] = 3
    history.total_norm[:] = math.nan
    page = page_of(tmp_path, history, diagnose(history))
    data = data_of(page)
    assert data["totalMax"] == [None] * 20 and all(code == 65535 for row in cells_of(data) for code in row)
    assert "none is finite" in page and "non-finite" in page


def test_thinning_keeps_what_matters():
    """The largest norm, a single step that is not finite, and which steps they were."""
    history = make_history(layers=2, steps=10_007)
    history.values[7001, 1, 0], history.values[7001, 1, 4] = math.nan, 1
    history.values[123, 0, 0] = history.total_norm[123] = 1e6
    view = overview(history)
    assert len(view.first) <= MAX_COLUMNS and view.records == 10_007
    assert view.first[0] == 0 and view.last[-1] == 2 * 10_006
    assert torch.equal(view.first[1:], view.last[:-1] + 2)
    assert view.total_max.max() == 1e6 and view.norms.max() == 1e6
    bad = view.nonfinite.nonzero().flatten()
    assert len(bad) == 1 and view.first[bad] <= 14_002 <= view.last[bad] and view.nonfinite_steps == [14_002]
    assert view.nonfinite_records.tolist() == [0, 1]
    assert view.clipped_records == int((history.total_norm > 1).sum())


def test_layers_are_in_the_order_of_the_forward_pass():
    history = make_history()
    history.layers[0].depth, history.layers[2].depth = 2, 0
    view = overview(history)
    assert [layer.name for layer in view.layers] == ["layers.2.weight", "layers.1.weight", "layers.0.weight"]
    assert torch.equal(view.newest, history.values[-1, [2, 1, 0], 0])


def test_a_large_page_is_small(tmp_path):
    page = page_of(tmp_path, make_history(layers=300, steps=10_000))
    assert len(page) < 1_000_000


def test_what_is_no_finding(tmp_path):
    path = tmp_path / "page.html"
    for findings, message in (("spike", "findings: expected a list"), ([1], r"findings\[0\]: expected a Finding")):
        with pytest.raises(TypeError, match=message):
            write_report(make_history(), findings, path)
    with pytest.raises(TypeError, match="history"):
        write_report(None, [], path)
    assert not path.exists()


@pytest.mark.parametrize("layers", [1, 3, 90])
@pytest.mark.parametrize("steps", [1, 20, 1500])
def test_a_plot(tmp_path, layers, steps):
    pytest.importorskip("matplotlib")
    from fastclip.health.plots import MAX_NAMES, plot

    history = make_history(layers, steps, names=["$x_$", *(f"b{i}" for i in range(1, layers))])
    history.values[steps // 2, 0, 0], history.values[steps // 2, 0, 4] = math.nan, 1
    finding = Finding("spike", "$x_$", {}, "", 1.0, "spike in $x_$")
    figure = plot(history, [finding])
    figure.savefig(tmp_path / "plot.png")
    norms, heat = figure.axes[:2]
    assert norms.get_lines()[0].get_ydata().max() == pytest.approx(float(history.total_norm.max()))
    assert heat.get_yticklabels()[0].get_text() == "$x_$" and len(heat.get_yticks()) <= MAX_NAMES


def test_a_plot_of_nothing():
    pytest.importorskip("matplotlib")
    from fastclip.health.plots import plot

    with pytest.raises(ValueError, match="at least one recorded step"):
        plot(make_history(steps=0))
