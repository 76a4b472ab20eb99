"""setup.py: finds the CUDA toolkit by itself, and says why the CUDA part is left out; needs no torch for metadata."""

import importlib.util
import os
import stat
import subprocess
import sys
import tarfile

import pytest
import torch
from support import ROOT


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("fastclip_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit whose nvcc is reached through a wrapper in another directory, and which has no libcudart."""

    def make(version):
        home = tmp_path / "toolkit"
        script(home / "bin" / "nvcc", f'echo "#$ TOP={home}/bin/.." >&2; echo "tools, release {version}"')
        script(tmp_path / "path" / "nvcc", f'exec {home}/bin/nvcc "$@"')
        return home

    def script(path, line):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{os.environ['PATH']}")
    for name in ("CUDA_HOME", "FASTCLIP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return make


def test_nvcc_that_is_a_wrapper_says_where_its_toolkit_is(setup, toolkit, monkeypatch):
    home = toolkit("13.0, V13.0.88")
    assert setup._build.cuda_home() == str(home)
    assert setup._build.cuda_version(str(home)) == (13, 0)
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert setup._build.cuda_home() == "/elsewhere"


def test_no_nvcc(setup, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup._build.cuda_home() is None


def test_an_nvcc_that_is_no_program(setup, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    (tmp_path / "nvcc").write_text("junk")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup._build.cuda_home() is None


@pytest.mark.parametrize("version", ["11.8", "12.0"])
def test_a_toolkit_that_is_too_old_builds_the_cpu_part_and_says_so(setup, toolkit, monkeypatch, capsys, version):
    home = str(toolkit(version))
    message = f"expected CUDA 12.1 or later, got {version} in {home}"
    extension = setup.extension(home)
    assert not any("cuda" in source for source in extension.sources)
    assert capsys.readouterr().err.endswith(f"fastclip: only the CPU part is built: {message}\n")
    monkeypatch.setenv("FASTCLIP_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FASTCLIP_CUDA=1: {message}"):
        setup.extension(home)


def test_a_toolkit_without_nvcc_builds_the_cpu_part_and_says_so(setup, toolkit, tmp_path, capsys):
    extension = setup.extension(str(tmp_path))
    assert not any("cuda" in source for source in extension.sources)
    assert f"only the CPU part is built: expected a toolkit with bin/nvcc, got {tmp_path}" in capsys.readouterr().err


def test_a_toolkit_of_another_major_version_than_torchs_builds_the_cpu_part_and_says_so(setup, toolkit, capsys):
    extension = setup.extension(str(toolkit("12.6")))
    assert not any("cuda" in source for source in extension.sources)
    assert "expected the major version of torch's CUDA 13.0, got 12.6 in" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["12.1", "13.0"])
def test_a_toolkit_that_is_new_enough_builds_both_parts(setup, toolkit, monkeypatch, version):
    home = str(toolkit(version))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("CUDA_HOME", home)
    monkeypatch.setattr(setup._build, "cudart_directory", lambda home, build: "/with/cudart")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    extension = setup.extension(home)
    assert any(source.endswith("launch.cu") for source in extension.sources)
    assert "/with/cudart" in extension.library_dirs


def test_libcudart_comes_from_the_wheels_where_the_toolkit_has_none(setup, toolkit, monkeypatch, tmp_path):
    home = toolkit("13.0")
    library = tmp_path / "site-packages" / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr("sys.path", [])
    assert setup._build.cudart_directory(str(home), tmp_path) is None
    monkeypatch.setattr("sys.path", [str(tmp_path / "site-packages")])
    for _ in range(2):
        directory = setup._build.cudart_directory(str(home), tmp_path)
        assert os.path.samefile(f"{directory}/libcudart.so", library)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert setup._build.cudart_directory(str(home), tmp_path) is None


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_a_source_archive_is_made_without_torch_and_has_all_that_a_build_needs(tmp_path):
    (tmp_path / "info").mkdir()
    arguments = ["egg_info", "--egg-base", tmp_path / "info", "sdist", "--dist-dir", tmp_path]
    command = [sys.executable, "-c", WITHOUT_TORCH, "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        (metadata,) = (name for name in file.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        assert "\nLicense: BSD-3-Clause\n" in file.extractfile(metadata).read().decode()
    assert "SetuptoolsDeprecationWarning" not in done.stderr + done.stdout
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {path.rpartition(".")[2] for path in sources} == {"cpp", "h", "cu", "cuh"}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastclip/_build.py", "tests/oracle.py"}
    assert sources | needed <= names
    assert not [name for name in names if name.endswith((".so", ".so.json", ".pyc"))]


def test_the_command_builds_with_the_same_sources_and_flags(setup, monkeypatch, tmp_path):
    seen = {}

    def load(build_directory, **arguments):
        seen.update(arguments)
        assert not record.exists()  # a build that is broken off leaves nothing that is loaded
        (tmp_path / os.path.relpath(build_directory, tmp_path) / "_C.so").touch()

    for name, value in (("FASTCLIP_CUDA", "0"), ("TORCH_EXTENSIONS_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    record = setup._build.record_of(setup._build.cached())
    record.parent.mkdir()
    record.touch()
    path = setup._build.build()
    extension = setup.extension(None)
    assert [os.path.relpath(source, ROOT) for source in seen["sources"]] == extension.sources
    assert [flag for flag in extension.extra_compile_args["cxx"] if flag in seen["extra_cflags"]] == seen[
        "extra_cflags"
    ]
    assert not [flag for flag in seen["extra_cflags"] if flag.startswith(("-march", "-mtune", "-ffast-math"))]
    assert path.is_relative_to(tmp_path) and setup._build.mismatch(path) is None
    # torch's builder names objects by the files' names alone, CUDA's apart from the others.
    names = [
        (source.stem, source.suffix) for source in setup._build.SOURCES.rglob("*") if source.suffix in (".cpp", ".cu")
    ]
    assert len(names) == len(set(names))
