"""examples/text_generation.py: what diverges, what trains, and what is diagnosed."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
from support import ROOT

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import text_generation
        import text_generation_page

        text_generation.page = text_generation_page
        yield text_generation
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def trained(example):
    """Runs by name, each trained once; ``steps`` for fewer."""
    results = {}

    def train(name, steps=None):
        if (name, steps) not in results:
            run = next(run for run in example.RUNS if run.name == name)
            results[name, steps] = example.train(dataclasses.replace(run, steps=steps or run.steps), seed=0)
        return results[name, steps]

    return train


def test_exploding_diverges_at_once_and_is_diagnosed(example, trained):
    result = trained("exploding")
    assert result.diverged_at is not None and result.diverged_at < 5 and not result.trained
    assert result.findings[0].kind == "non-finite"
    assert "Diverged" in example.page.statement(result) and not result.sample


@pytest.mark.parametrize("name", ["value", "norm"])
def test_clipping_alone_makes_it_train(example, trained, name):
    result = trained(name)
    assert result.losses[0] == trained("exploding").losses[0] > 1e5  # the same start
    assert result.trained and "Trained" in example.page.statement(result)


@pytest.mark.parametrize("name", ["vanishing", "relu", "he"])
def test_first_layers_do_not_learn(example, trained, name):
    result = trained(name, 60)
    assert not result.trained and "Did not train" in example.page.statement(result)
    assert result.learnt["layers.0.weight"] < 1e-4 < 1e-2 < result.learnt["head.weight"]
    assert result.findings[0].kind == "vanishing" and "vanishing" in str(result.findings[0])


@pytest.mark.parametrize("name", ["relu-he", "batch-norm", "residual"])
def test_cures(trained, name):
    result = trained(name, 110)
    assert result.trained and result.learnt["layers.0.weight"] > 1e-2
    assert not [f for f in result.findings if f.kind == "vanishing"]


def test_accumulation_gives_the_same_parameters(example, trained):
    one, eight = trained("1x32", 10), trained("8x4", 10)
    assert max(one.learnt.values()) > 0 and len(one.losses) == len(eight.losses) == 10
    assert min(one.norms) > one.run.clip_norm / 2 and max(one.norms) > one.run.clip_norm  # clipping took part
    assert example.page.largest_difference(one, eight) < 1e-4
    assert "are the same" in example.page.comparison([one, eight])
    other = dataclasses.replace(eight, parameters=[p + 0.1 for p in eight.parameters])
    assert "are not the same" in example.page.comparison([one, other])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_generators_write(example, trained, name):
    result = trained(name, 50)
    assert result.trained and not result.findings
    assert result.sample.startswith("We the People of ") and len(result.sample) == len("We the People of ") + 160


def test_a_run_is_judged_by_its_losses(example):
    assert not example.has_trained([math.nan]) and not example.has_trained([1.0] * 20 + [math.inf])
    assert not example.has_trained([example.UNIGRAM] * 20) and example.has_trained([5.0] * 18 + [2.0] * 2)


def test_policies_need_no_chosen_threshold_where_batches_are_bad(example, trained):
    last = {name: trained(f"spikes{name}").last_loss for name in ("", "-high", "-low", "-zclip", "-autoclip")}
    assert last[""] > 100
    for policy in ("-zclip", "-autoclip"):
        assert trained(f"spikes{policy}").trained and last[policy] < last["-low"] - 0.5 and last[policy] < last["-high"]


def test_page_holds_all_runs_and_needs_no_network(example, trained, tmp_path):
    results = [trained("exploding"), trained("vanishing", 60), trained("1x32", 10), trained("8x4", 10)]
    example.page.write_page(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for result in results:
        assert f"<td>{result.run.name}</td>" in page
    assert page.count("data:image/svg+xml") == 3 and "http" not in page
    example.page.write_pictures(results, tmp_path)
    assert len(list(tmp_path.glob("stable-training-*.png"))) == 3
    table = (tmp_path / "stable-training-runs.md").read_text(encoding="utf-8")
    assert all(f"| {result.run.name} |" in table and example.page.statement(result) in table for result in results)


def test_command_line(example, tmp_path):
    script = ROOT / "examples" / "text_generation.py"
    command = [sys.executable, str(script), "--run", "exploding", "vanishing", "--quick"]
    command += ["--output", str(tmp_path / "x.html")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "non-finite" in done.stdout and (tmp_path / "x.html").exists()
    steps = next(run.steps for run in example.RUNS if run.name == "vanishing") // 2
    assert f"to {steps - 1}." in (tmp_path / "x.html").read_text(encoding="utf-8")  # the finding names the last step


def test_missing_output_folder_is_said_before_the_training(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["text_generation.py", "--output", str(tmp_path / "no" / "x.html")])
    monkeypatch.setattr(example, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert "--output: expected a file in an existing folder" in capsys.readouterr().err
