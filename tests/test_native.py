"""The extension is loaded only where it was built for what is here; FASTCLIP_FORCE; where it may come from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT

from fastclip import _build, _native

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
    assert last.endswith(f"run: {sys.executable} -m fastclip build")


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


def test_a_user_without_a_home_imports_and_is_told_what_to_set(monkeypatch):
    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert not _build.cached().is_absolute() and not _build.cached().exists()
    message = r"got ~/.* \(a relative path: .*no home directory\): set TORCH_EXTENSIONS_DIR"
    with pytest.raises(SystemExit, match=message):
        _build.build()


def test_a_cache_that_cannot_be_looked_into_is_none(copy):
    cache = str(copy / ("a" * 300))  # no system has such names: like a folder of another user, an OSError
    done = python("-c", SHOW, cwd=copy, env={"TORCH_EXTENSIONS_DIR": cache})
    assert done.returncode == 0 and done.stdout.startswith("False None there is no _C."), done.stderr


def test_nothing_is_loaded_from_whatever_folder_this_is(copy):
    environment = {"TORCH_EXTENSIONS_DIR": "cache"}
    cached = "from fastclip import _build; print(_build.cached())"
    path = python("-c", cached, cwd=copy, env={**environment, "FASTCLIP_FORCE": "torch"}).stdout.strip()
    assert path.startswith("cache/fastclip-")
    put(copy / path)
    done = python("-c", SHOW, cwd=copy, env=environment)
    assert done.stdout.startswith("False None there is no _C."), done.stderr


def test_a_record_that_does_not_say_whether_cuda_is_in_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(_build, "mismatch", lambda extension: None)
    monkeypatch.setattr(_build, "read_record", lambda extension: {})
    assert _native._choose() == OWN


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=f"can be written, got {tmp_path}/file/fastclip.*: set TORCH_EXTENSIONS_DIR"):
        _build.build()


WAIT_FOR_THE_OTHER = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
with build.only_builder(pathlib.Path(sys.argv[2])):
    print("alone")
"""


def test_one_build_waits_for_another_and_never_for_a_dead_one(tmp_path):
    lock = tmp_path / "lock"  # torch's
    lock.touch()
    with _build.only_builder(tmp_path):
        assert not lock.exists()
        lock.touch()
        command = [sys.executable, "-c", WAIT_FOR_THE_OTHER, _build.__file__, str(tmp_path)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert other.stderr.readline() == f"fastclip: waiting for another build in {tmp_path}\n"
        assert lock.exists() and other.poll() is None
    assert other.communicate(timeout=60)[0] == "alone\n" and not lock.exists()


@pytest.mark.parametrize("touched", [False, True])
def test_a_build_that_fails_leaves_in_use_what_it_did_not_touch(tmp_path, monkeypatch, touched):
    def load(**arguments):
        assert _build.mismatch(path).endswith("has no record of what it was built for")
        if touched:
            path.write_text("half of it")
        raise RuntimeError("Error building extension")

    monkeypatch.setenv("FASTCLIP_CUDA", "0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    path = put(_build.cached(), "an extension")
    with pytest.raises(RuntimeError, match="Error building"):
        _build.build()
    assert (_build.mismatch(path) is None) == (not touched)


def test_a_damaged_record_does_not_keep_a_build_from_its_work(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCLIP_CUDA", "0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **arguments: None)
    path = put(_build.cached(), "an extension")
    _build.record_of(path).write_bytes(b"\xff\xfe{")
    assert _build.build() == path and _build.mismatch(path) is None


@pytest.mark.parametrize("force", ["", "native"])
@pytest.mark.parametrize(
    ("command", "first", "last"),
    [
        ("-m fastclip build", "fastclip: compiling ", "fastclip: the extension could not be built, see above."),
        ("-m fastclip doctor", "fastclip ", "not all is well"),
        ("-Bmfastclip doctor --json", "{", "}"),
    ],
)
def test_commands_need_no_advice_to_run_themselves_and_no_traceback(copy, command, first, last, force):
    env = {"CXX": "/bin/false", "FASTCLIP_CUDA": "0", "FASTCLIP_FORCE": force}
    done = python(*command.split(), cwd=copy, env=env)
    lines = (done.stderr + done.stdout).splitlines()
    assert done.returncode == 1 and not {"Traceback", "RuntimeWarning"} & set(done.stderr.replace(":", " ").split())
    assert any(line.startswith(first) for line in lines) and lines[-1].startswith(last), lines
    assert "/bin/false" in lines[-2] or "doctor" in command


def test_the_command_interrupted(copy):
    compiler = copy / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in -v|--version|-dump*) exec c++ "$@";; esac\necho started >&2; exec sleep 60\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "FASTCLIP_CUDA": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "fastclip", "build"]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("fastclip: compiling ") for line in lines)
    (folder,) = (copy / "cache").iterdir()
    while process.poll() is None and not (folder / "build.ninja").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in rest, rest
    assert rest.endswith("fastclip: interrupted; the same command goes on with what is not compiled yet\n")
