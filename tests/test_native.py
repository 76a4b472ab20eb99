"""The extension is loaded only where it was built for what is here; FASTCLIP_FORCE; where it may come from."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT

from fastclip import _build

OWN = _build.packaged()
pytestmark = pytest.mark.skipif(not OWN.exists(), reason="the extension is not built in place")
SHOW = (
    "import fastclip; info = fastclip.build_info(); print(info['native'], info['extension'], info['missing_because'])"
)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package without its extension, and an empty cache; the folder that it is in."""
    shutil.copytree(ROOT / "fastclip", tmp_path / "fastclip", ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("FASTCLIP_FORCE", "FASTCLIP_CPU"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def put(path, content=None, **changes):
    """Lays an extension there, the real one or a file with `content`, with a record that says `changes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(OWN) if content is None else path.write_text(content)
    _build.record_of(path).write_text(json.dumps({**_build.read_record(OWN), **changes}))
    return path


def python(*arguments, cwd, env=None):
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("fastclip", "fastclip", "0.0.1"),
        ("torch", "torch", "2.5.1+cpu"),
        ("torch_cuda", "CUDA", "11.8"),
        ("cxx11_abi", "C++11 ABI", "neither"),
        ("python", "Python", "cpython-39-x86_64-linux-gnu"),
    ],
)
def test_whatever_differs_is_named(tmp_path, key, name, value):
    path = put(tmp_path / "_C.so", "", **{key: value})
    assert _build.mismatch(path) == (f"{path} was built for {name} {value}, this is {name} {_build.target()[key]}")
    put_back = {key: _build.target()[key]}
    path.unlink()
    assert _build.mismatch(put(path, "", **put_back)) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_without_a_record_that_can_be_read_nothing_is_loaded(tmp_path, text):
    path = put(tmp_path / "_C.so", "")
    record = _build.record_of(path)
    record.unlink() if text is None else record.write_text(text)
    assert _build.mismatch(path) == f"{path} has no record of what it was built for"
    path.unlink()
    assert _build.mismatch(path) == f"there is no _C.so in {tmp_path}"


def test_an_extension_for_another_torch_is_never_opened_and_the_command_is_said(copy):
    path = put(copy / "fastclip" / OWN.name, torch="2.6.0+cpu")  # one that would load
    done = python("-c", SHOW, cwd=copy)
    assert done.returncode == 0 and done.stdout.startswith("False None "), done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"{path} was built for torch 2.6.0+cpu, this is torch " in done.stderr
    assert f"run: {sys.executable} -m fastclip build\n" in done.stderr
    done = python("-c", SHOW, cwd=copy, env={"FASTCLIP_FORCE": "native"})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: fastclip's native extension cannot be used (")
    assert "was built for torch 2.6.0+cpu" in last and "FASTCLIP_FORCE=native is set" in last
    assert last.endswith(f"run: FASTCLIP_FORCE=torch {sys.executable} -m fastclip build")


def test_the_built_one_is_found_where_the_packages_own_will_not_do(copy):
    show_cached = "from fastclip import _build; print(_build.cached())"
    cached = python("-c", show_cached, cwd=copy, env={"FASTCLIP_FORCE": "torch"}).stdout.strip()
    assert cached.startswith(str(copy / "cache" / "fastclip-"))
    put(type(OWN)(cached))
    for _ in range(2):  # without one of its own, and with one of another torch
        done = python("-W", "error", "-c", SHOW, cwd=copy, env={"FASTCLIP_FORCE": "native"})
        assert done.stdout == f"True {cached} None\n", done.stderr
        own = copy / "fastclip" / OWN.name
        if not own.exists():
            put(own, torch="2.6.0+cpu")


def test_a_broken_file_is_a_warning(copy):
    put(copy / "fastclip" / OWN.name, "not an extension")
    done = python("-c", SHOW, cwd=copy)
    assert done.stdout.startswith("False None ") and "native extension cannot be used" in done.stderr


def test_forced(copy):
    done = python("-W", "error", "-c", SHOW, cwd=ROOT, env={"FASTCLIP_FORCE": "torch", "PYTHONPATH": str(ROOT)})
    assert done.stdout == "False None FASTCLIP_FORCE=torch\n", done.stderr
    count = "import fastclip; fastclip.clip_grad_norm_([], 1.0); print(fastclip.counters()['fallback_reasons'])"
    done = python("-c", count, cwd=ROOT, env={"FASTCLIP_FORCE": "torch", "PYTHONPATH": str(ROOT)})
    assert done.stdout == "{'FASTCLIP_FORCE=torch': 1}\n", done.stderr
    done = python("-c", SHOW, cwd=ROOT, env={"FASTCLIP_FORCE": "Native"})
    assert done.stderr.splitlines()[-1] == "ValueError: FASTCLIP_FORCE: expected native or torch, got 'Native'"
