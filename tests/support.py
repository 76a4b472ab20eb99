"""Helpers: parameters from gradients, clones that keep the layout, comparison with torch's own functions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastclip

try:
    import cudaemu
except ImportError:
    cudaemu = None

EMULATED = cudaemu is not None and cudaemu.active()  # a CUDA device is emulated: some 10^7 elements a second
ROOT = Path(__file__).parents[1]
INF = float("inf")
NAN = float("nan")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NORM_TYPES = [1, 2, INF]
# Astride the edges of registers (4 to 32 elements), blocks (256 to 4096) and steps of every instruction set and dtype.
EDGES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513]
EDGES += [1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 32769, 65535, 65536, 65537]
# More than 1 MB of every dtype: two threads share it. On an emulated device some blocks do.
LARGE = 20_011 if EMULATED else 600_001

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
norm_types = pytest.mark.parametrize("norm_type", NORM_TYPES)
small_and_large = pytest.mark.parametrize("size", [100, LARGE])


def make_parameter(grad):
    """A parameter with this gradient, or without one; it takes no memory of its own where that is possible."""
    if grad is None:
        return torch.nn.Parameter(torch.zeros(3))
    if grad.layout == torch.strided:
        data = torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape)
    else:
        data = grad.detach().clone()
    parameter = torch.nn.Parameter(data, requires_grad=grad.dtype.is_floating_point or grad.dtype.is_complex)
    parameter.grad = grad
    return parameter


def make_parameters(grads):
    return [make_parameter(grad) for grad in grads]


def clone(grads, dtype=None, device=None):
    """Copies with the same strides; gradients that shared memory share it again. Others than strided: clone()."""
    storages, copies = {}, []
    for grad in grads:
        if grad is None or grad.layout != torch.strided or type(grad) is not torch.Tensor or grad.is_meta:
            copies.append(grad if grad is None else grad.clone())
            continue
        key = grad.untyped_storage()._cdata
        if key not in storages:
            whole = torch.empty(0, dtype=grad.dtype, device=grad.device).set_(grad.untyped_storage())
            storages[key] = whole.to(device or grad.device, dtype or grad.dtype, copy=True).untyped_storage()
        empty = torch.empty(0, dtype=dtype or grad.dtype, device=device or grad.device)
        copies.append(empty.set_(storages[key], grad.storage_offset(), grad.shape, grad.stride()))
    return copies


def clone_for_torch(grads, dtype=None):
    """Copies for torch's own functions. The emulated device runs these on the CPU, and reports their errors late."""
    return clone(grads, dtype, "cpu" if EMULATED else None)


def outcome(function, *args, **kwargs):
    """("returned", result), or the type and the text of the exception."""
    try:
        return "returned", function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def assert_equal(got, want, rtol=2e-6):
    """Close in the sense of two roundings; NaN equals NaN, -0 equals 0."""
    got, want = (x.to_dense() if x.layout != torch.strided else x for x in (got, want))
    rtol = max(rtol, torch.finfo(want.dtype).eps)
    torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True, check_stride=False)


def check_against_torch(name, grads, *args, twice=(), reference=None, rtol=2e-6, **kwargs):
    """Calls `name` of fastclip and of torch.nn.utils on clones: same result or error, same gradients.

    `twice` has the indices of parameters that are listed a second time; `reference` is the dtype in which torch works,
    float64 where its own float32 sums are too far off. Returns fastclip's outcome.
    """
    outcomes, lists = [], []
    for module, copies in ((fastclip, clone(grads)), (torch.nn.utils, clone_for_torch(grads, reference))):
        items = copies if name == "get_total_norm" else make_parameters(copies)
        items = items + [items[i] for i in twice]
        outcomes.append(outcome(getattr(module, name), items, *args, **kwargs))
        lists.append(copies)
    (got, result), (want, expected) = outcomes
    assert got == want, (outcomes[0], outcomes[1])
    if isinstance(result, torch.Tensor):
        if EMULATED:
            result = result.to(expected.device)
        assert result.device == expected.device
        assert_equal(result.double(), expected.double(), max(rtol, torch.finfo(expected.dtype).eps))
    elif got is RuntimeError and "is non-finite, so it cannot be clipped" in expected:
        assert result.startswith(expected)  # and then says which gradient it is
    else:
        assert result == expected
    for mine, theirs in zip(*lists, strict=True):
        if mine is not None and not mine.is_meta:
            assert_equal(mine, theirs.to(mine), rtol)
    return outcomes[0]


def bits(tensor):
    """The bit patterns of a tensor, for comparisons in which NaN equals itself and -0 is not 0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.detach().clone().contiguous().view(integer)


def run_python(code, *args, env=None, timeout=120):
    """Runs code in a fresh interpreter that finds fastclip and these helpers; returns the completed process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
