"""python -m fastclip run, and FASTCLIP_AUTOPATCH: unchanged programs on fastclip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
import torch
from torch.nn.utils import clip_grad_norm_

p = torch.nn.Parameter(torch.zeros(4))
p.grad = torch.ones(4)
clip_grad_norm_([p], 1.0)
clip_grad_norm_([p], 1.0, norm_type=3)
print(__name__, sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "helper.py").write_text("value = 5\n")
    (tmp_path / "program.py").write_text(PROGRAM + "import helper\nsys.exit(helper.value)\n")
    (tmp_path / "failing.py").write_text(PROGRAM + "raise KeyError('lost')\n")
    return tmp_path


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("how", [["{folder}/program.py"], ["-m", "program"]])
def test_a_program_runs_as_it_would_alone(folder, how):
    done = python("-m", "fastclip", "run", *(a.format(folder=folder) for a in how), "-x", "--lr=1", cwd=folder)
    assert done.returncode == 5, done.stderr
    assert done.stdout == "__main__ ['-x', '--lr=1']\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fastclip: 2 calls, 1 native, 1 fallback (norm_type: 1), ") and last.endswith(" s")


def test_an_exception_is_the_programs_own(folder):
    done = python("-m", "fastclip", "run", "failing.py", cwd=folder)
    assert done.returncode == 1
    assert "KeyError: 'lost'" in done.stderr and "fastclip: 2 calls" in done.stderr


def test_autopatch(folder):
    code = "import fastclip; exec(open('program.py').read().replace('helper.value', 'fastclip.counters()[\"native\"]'))"
    assert python("-c", code, cwd=folder, FASTCLIP_AUTOPATCH="1").returncode == 1
    assert python("-c", code, cwd=folder).returncode == 0
