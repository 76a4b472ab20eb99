"""README and docs say what is so: their code runs, their commands exist, the tests and files that they name too.

Python blocks of a page run one after the other, with the names that a reader has anyway (GIVEN). A comment before a
block, `<!-- test: ranks -->`, has the page run on two ranks; any other text there says why the block is not run.
"""

import ast
import contextlib
import doctest
import inspect
import io
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import needs_fully_shard
from support import ROOT

import fastclip
from fastclip.__main__ import main as fastclip_main

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^(?:<!-- test: (?P<mark>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# Blocks that are not run, by their marks and languages: what a new one adds to has to be said here.
NOT_RUN = {
    ("docs/contributing.md", "python"): 4,  # of the walk-through: the function is not in fastclip
    ("docs/contributing.md", "cpp"): 5,
    ("docs/health-kinds.md", ""): 1,  # what is printed
}
PROGRAM = """
import torch
model = torch.nn.Linear(4, 1)
model(torch.ones(2, 4)).sum().backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
"""


def blocks(page):
    return [match.groupdict() for match in BLOCK.finditer((ROOT / page).read_text())]


def is_run(block):
    return block["language"] in ("python", "sh") and block["mark"] in (None, "ranks")


def needs_ranks(page):
    return any(block["mark"] == "ranks" for block in blocks(page))


def given():
    """The names that pages take for granted: a program that trains something."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    class Trainer:
        def train(self):
            model(torch.randn(4, 8)).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return {
        "fastclip": fastclip,
        "torch": torch,
        "math": math,
        "model": model,
        "optimizer": optimizer,
        "inner": torch.optim.SGD(model.parameters(), 0.1),
        "trainer": Trainer(),
        "data": torch.randn(12, 4, 8).unbind(),
        "batch": torch.randn(8, 8),
        "targets": torch.randn(4, 1),
        "accumulate": 2,
        "max_norm": 1.0,
        "cross_entropy": torch.nn.functional.mse_loss,
        "monitor": fastclip.GradientMonitor(model),
    }


def run_python(page, names):
    model = names["model"]
    for number, block in enumerate(blocks(page)):
        if block["language"] != "python" or not is_run(block):
            continue
        text, name = block["text"], f"{page}, block {number}"
        if not callable(names.get("loss")):  # a tensor that each block may go back from
            names["loss"] = model(torch.randn(4, 8)).square().mean()
        if text.startswith(">>> "):
            run_doctest(text, names, name)
        else:
            exec(compile(text, name, "exec"), names)


def run_doctest(text, names, name):
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    report = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=report.write, clear_globs=False)
    assert not report.getvalue(), report.getvalue()


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("page", [page for page in PAGES if not needs_ranks(page)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    if "report(" in (ROOT / page).read_text():
        pytest.importorskip("matplotlib")
        pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    names = given()
    if page == "docs/health.md":  # a function there
        names["loss"] = lambda model, batch: model(batch).square().mean()
    with contextlib.redirect_stdout(io.StringIO()):
        run_python(page, names)
    counts = fastclip.counters()
    assert counts["fallback"] == (page == "README.md")  # the norm of order 3 that is shown there
    assert fastclip.is_patched() is False


def run_on_a_rank():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = given()["model"]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stage = torch.nn.Linear(8, 1)
    stage(torch.randn(4, 8)).sum().backward()
    names = given() | {"model": model, "fully_shard": fully_shard, "pp_mesh": mesh, "stage": stage}
    names |= {"ep_group": dist.group.WORLD, "pp_group": dist.group.WORLD}
    with contextlib.redirect_stdout(io.StringIO()):
        run_python("docs/distributed.md", names)
    counts = fastclip.counters()
    assert counts["native"] >= 3 and counts["fallback"] == 0


@pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed")
@needs_fully_shard
def test_blocks_for_several_ranks_run_on_two(two):
    assert [page for page in PAGES if any(block["mark"] == "ranks" for block in blocks(page))] == [
        "docs/distributed.md"
    ]
    two.run(run_on_a_rank)


def test_blocks_that_are_not_run_are_counted():
    left = Counter((page, b["language"]) for page in PAGES for b in blocks(page) if not is_run(b))
    assert left == NOT_RUN
    fences = sum((ROOT / page).read_text().count("\n```") for page in PAGES)
    assert fences == 2 * sum(len(blocks(page)) for page in PAGES)  # none is written in another way
    for page in PAGES:
        for block in blocks(page):
            if block["language"] == "python" and not block["text"].startswith(">>> "):
                ast.parse(block["text"])


# ---- commands ----


def commands():
    for page in PAGES:
        for block in blocks(page):
            if block["language"] == "sh":
                for line in block["text"].replace("\\\n", " ").splitlines():
                    if words := shlex.split(line, comments=True):
                        yield pytest.param(words, id=f"{Path(page).stem}: {' '.join(words)}")


@pytest.mark.parametrize("words", [*commands()])
def test_commands(words, tmp_path, monkeypatch, capsys):
    words = list(words)
    while "=" in words[0]:
        assert words.pop(0).split("=")[0] in ("FASTCLIP_REQUIRE_NATIVE", "FASTCLIP_CUDA", "OMP_WAIT_POLICY")
    what = " ".join(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets and all("=" in word for word in words[2:])
    elif what.startswith("pip install"):
        extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        wanted = re.findall(r"fastclip\[([\w,-]+)\]", what)
        assert wanted or words[-1] == "."
        assert {extra for group in wanted for extra in group.split(",")} <= set(extras)
    elif "-m fastclip run" in what:
        pytest.importorskip("jinja2")
        pytest.importorskip("matplotlib")
        (tmp_path / "train.py").write_text(PROGRAM)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fastclip", *words[words.index("fastclip") + 1 :]])
        monkeypatch.setattr(sys, "path", [*sys.path])
        fastclip_main()
        assert "1 native" in capsys.readouterr().err
        assert ("--monitor" in words) == (tmp_path / "gradients.html").exists()
    elif what.startswith("python -m fastclip "):
        monkeypatch.setattr(sys, "argv", ["fastclip", words[3], "--help"])
        with pytest.raises(SystemExit) as ended:
            fastclip_main()
        assert ended.value.code == 0 and len(words) == 4
    elif what.startswith("python -m benchmarks "):
        from benchmarks.__main__ import parser

        arguments = words[3:]
        parser().parse_args(arguments if arguments[0] in ("report", "compare") else ["run", *arguments])
    elif words[0] == "python" and words[1].endswith(".py"):
        text = (ROOT / words[1]).read_text()
        assert words[1] == "setup.py" or all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))
    elif words[0] == "pytest" or what.startswith("python -m pytest"):
        paths = [word for word in words[words.index("pytest") + 1 :] if not word.startswith("-")]
        assert paths and all((ROOT / path).exists() for path in paths)
    else:
        pytest.fail(f"no check for this command: {what}")


# ---- names ----


@pytest.mark.parametrize(("page", "least"), [("semantics.md", 50), ("reliability.md", 15)])
def test_named_tests_exist(page, least):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > least and len(named) == len(set(re.findall(r"`(\w+\.py::\w+)`", text)))
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing


def test_design_names_every_source_file():
    words = set(re.findall(r"\w+", (ROOT / "docs" / "design.md").read_text()))
    sources = [path for path in (ROOT / "csrc").rglob("*.*")]
    sources += [path for folder in ("fastclip", "fastclip/health") for path in (ROOT / folder).glob("*.py")]
    assert not {path.name for path in sources if path.stem not in words}


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    shown = {name.split(".")[-1] for name in re.findall(r"^::: (fastclip\.[\w.]+)$", page, re.M)}
    public = {name for name in fastclip.__all__ if not name.startswith("__")}
    assert not public - shown


@pytest.mark.parametrize("name", [name for name in fastclip.__all__ if not name.startswith("__")])
def test_docstrings_name_every_argument(name):
    thing = getattr(fastclip, name)
    arguments = [name for name in inspect.signature(thing).parameters if name not in ("args", "kwargs")]
    if name == "GradScaler":  # torch's arguments, which torch documents
        arguments = []
    assert not [argument for argument in arguments if not re.search(rf"\b{argument}(``)?( \(|:|``)", thing.__doc__)]


# ---- the site ----


def test_links_lead_somewhere():
    for page in [ROOT / "CHANGELOG.md", *(ROOT / page for page in PAGES)]:
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", page.read_text()))
        assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_navigation_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\nvalidation:")[0]
    listed = set(re.findall(r"^ +- [^#\n]+: (\S+\.md)$", navigation, re.M))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {"changelog.md", "measured.md"}
