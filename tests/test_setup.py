"""setup.py: finds the CUDA toolkit by itself, and says why the CUDA part is left out."""

import importlib.util
import os
import stat

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
    assert setup.cuda_home() == str(home)
    assert setup.cuda_version(str(home)) == (13, 0)
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert setup.cuda_home() == "/elsewhere"


def test_no_nvcc(setup, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup.cuda_home() is None


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
    monkeypatch.setattr(setup, "cudart_directory", lambda home: "/with/cudart")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    extension = setup.extension(home)
    assert any(source.endswith("launch.cu") for source in extension.sources)
    assert "/with/cudart" in extension.library_dirs


def test_libcudart_comes_from_the_wheels_where_the_toolkit_has_none(setup, toolkit, monkeypatch, tmp_path):
    home = toolkit("13.0")
    library = tmp_path / "site-packages" / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr("sys.path", [])
    assert setup.cudart_directory(str(home)) is None
    monkeypatch.setattr("sys.path", [str(tmp_path / "site-packages")])
    for _ in range(2):
        directory = setup.cudart_directory(str(home))
        assert os.path.samefile(f"{directory}/libcudart.so", library)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert setup.cudart_directory(str(home)) is None
