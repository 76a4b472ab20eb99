"""The table packing and the norm arithmetic, by a C++ program that needs neither torch nor a device."""

import shutil
import subprocess

import pytest
from support import ROOT

COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
CASES = ["packing", "cut", "overlaps", "nan_max", "combine_norms", "clip_coef", "must_scale", "factors"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not COMPILER:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("table") / "test_table"
    sources = [ROOT / "tests" / "cpp" / "test_table.cpp", ROOT / "csrc" / "tensor_table.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", "-I", ROOT / "csrc", *sources, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("case", CASES)
def test_program(program, case):
    done = subprocess.run([program, case], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{case}: good\n"
