"""Fixtures: the devices and CPU instruction sets that tests run on, and the same state of torch for every test."""

import importlib.util

import pytest
import torch

import fastclip
from fastclip._native import _C

ISAS = _C.available_kernels() if _C else []
CUDA = ["cuda"] if fastclip.build_info().get("cuda") else []


def _with_kernels(name):
    before = _C.kernels()
    _C.select_kernels(name)
    yield "cpu"
    _C.select_kernels(before)


def _has_cuda():
    if torch.cuda.is_available():
        return True
    return importlib.util.find_spec("cudaemu") is not None and importlib.import_module("cudaemu").active()


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test that is about the CPU once for each instruction set of this processor."""
    for _ in _with_kernels(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, *CUDA])
def device(request):
    """Runs a test on every device; on the CPU once for each instruction set."""
    if request.param != "cuda":
        yield from _with_kernels(request.param)
    elif _has_cuda():
        yield "cuda"
    else:
        pytest.skip("neither a CUDA device nor the emulator")


@pytest.fixture(autouse=True)
def fixed_state():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    fastclip.reset_counters()
    yield
    torch.set_num_threads(threads)
