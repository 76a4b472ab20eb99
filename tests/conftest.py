"""Fixtures: the devices and CPU instruction sets that tests run on, and the same state of torch for every test."""

import signal
import sys
import zlib

import pytest
import torch
from ranks import Ranks
from support import EMULATED, ROOT, cudaemu

import fastclip
from fastclip._native import _C

sys.path.append(str(ROOT))  # benchmarks is no part of an installed fastclip
# A shell's background jobs ignore SIGINT, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
ISAS = _C.available_kernels() if _C else []
CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if fastclip.build_info().get("cuda") else []


def _with_kernels(name):
    before = _C.kernels()
    _C.select_kernels(name)
    yield "cpu"
    _C.select_kernels(before)


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
    else:
        request.getfixturevalue("cuda_device")
        yield "cuda"


@pytest.fixture
def cuda_device(request):
    """A CUDA device, real or emulated, in its usual state, and no work left on it in the end.

    On the emulated one every test has its own order of streams, blocks and warps (0: the plain one, and three random
    ones), and ends with a look at what the checks found.
    """
    if not CUDA:
        pytest.skip("built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("neither a CUDA device nor the emulator")
    if EMULATED:
        cudaemu.set_seed(zlib.crc32(request.node.nodeid.encode()) % 4)
    yield
    _C.force_cuda_blocks(0)
    _C.allow_cooperative_launches(True)
    torch.cuda.synchronize()
    assert not EMULATED or cudaemu.reset() == []


@pytest.fixture(scope="session")
def two():
    """Two ranks, for all test modules: starting them takes seconds."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(autouse=True)
def fixed_state():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    fastclip.reset_counters()
    yield
    torch.set_num_threads(threads)
