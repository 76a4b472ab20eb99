"""clip_grad_value_ against torch's own function, bit by bit."""

import pytest
import torch
from support import (
    DTYPES,
    EDGES,
    EMULATED,
    INF,
    LARGE,
    NAN,
    bits,
    check_against_torch,
    clone,
    clone_for_torch,
    dtypes,
    make_parameters,
    outcome,
    small_and_large,
)

import fastclip


def check_value(grads, clip_value):
    """The same numbers as torch, and the same bits where the number is not 0 or NaN."""
    copies, want = clone(grads), clone_for_torch(grads)
    fastclip.clip_grad_value_(make_parameters(copies), clip_value)
    torch.nn.utils.clip_grad_value_(make_parameters(want), clip_value)
    for got, expected, before in zip(copies, want, grads, strict=True):
        expected = expected.to(got.device)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0, 9e4, -9e4), expected.nan_to_num(0, 9e4, -9e4)), clip_value
        kept = got == before
        assert torch.equal(bits(got)[kept], bits(before)[kept]) or clip_value == 0


@dtypes
def test_every_size(device, dtype):
    for size in [*EDGES, LARGE]:
        check_value([torch.randn(size, device=device).to(dtype)], 0.7)
    assert fastclip.counters()["fallback"] == 0


@dtypes
def test_every_element_is_clamped_alone(device, dtype):
    for size in [1, 9, 33, 300, 2100]:
        for position in range(0, size, 7 if size > 400 or EMULATED else 1):
            grad = torch.ones(size, dtype=dtype, device=device)
            grad[position] = -3
            fastclip.clip_grad_value_(make_parameters([grad]), 2)
            assert grad[position] == -2 and grad.sum() == size - 3, (size, position)


@dtypes
def test_unaligned_views_and_nothing_beyond_them(device, dtype):
    for offset in range(8):
        for size in [1, 15, 33, 1025, 4097]:
            base = torch.randn(size + 16, device=device).to(dtype)
            want = base.clone()
            want[offset : offset + size].clamp_(-0.5, 0.5)
            fastclip.clip_grad_value_(make_parameters([base[offset : offset + size]]), 0.5)
            assert torch.equal(base, want)


LIMITS = [0, 0.0, -0.0, INF, -INF, NAN, -1.0, 1, 0.1, 1 / 3, 1e-3, 1e-8, 6e-8, 1e-40, 65504.0, 1e-320]


@dtypes
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("size", [333, LARGE])
def test_limits(device, dtype, limit, size):
    special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-8, 0.1, -0.1, 1 / 3, 7e4, -7e4, 1.0], device=device)
    check_value([torch.cat([torch.randn(size, device=device), special]).to(dtype), special.to(dtype)], limit)


@dtypes
@pytest.mark.parametrize("limit", [0.3, 1e-3, 5.0])
def test_every_bit_pattern(device, dtype, limit):
    every = torch.arange(-(1 << 15), 1 << 15, device=device).short()
    grad = every.view(dtype) if dtype.itemsize == 2 else torch.randint(-(2**31), 2**31, (1 << 16,)).int().view(dtype)
    check_value([grad], limit)


def test_mixed_dtypes_and_layouts(device):
    grads = [torch.randn(20, 30, device=device).to(dtype) for dtype in DTYPES]
    grads += [torch.randn(20, 30, device=device).t(), torch.randn(20, 60, device=device)[:, ::2]]
    grads += [torch.tensor(-2.0, device=device), torch.empty(0, 4, device=device), None]
    check_against_torch("clip_grad_value_", grads, 0.5)
    check_against_torch("clip_grad_value_", grads, clip_value=0.25, foreach=False)


OVERFLOWS = [
    (torch.float16, 65519.0),
    (torch.float16, 1e6),
    (torch.float16, -1e6),
    (torch.bfloat16, 1e39),
    (torch.float32, 1e39),
]


@pytest.mark.parametrize(("dtype", "limit"), OVERFLOWS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (LARGE,), (0,), ()])
def test_limit_that_the_dtype_cannot_hold(device, dtype, limit, shape):
    check_against_torch("clip_grad_value_", [torch.ones(shape, dtype=dtype, device=device)], limit)
    grads = [torch.full((3,), INF, dtype=torch.float64, device=device), torch.ones(shape, dtype=dtype, device=device)]
    kind, message = outcome(fastclip.clip_grad_value_, make_parameters(grads), limit)
    assert kind is RuntimeError and "without overflow" in message
    assert grads[0].min() == INF and grads[0]._version == 0


@small_and_large
def test_version_counters(device, size):
    grads = [torch.zeros(size, device=device) for _ in range(3)]
    grads[1].data[-1] = 5  # through .data: the version stays
    fastclip.clip_grad_value_(make_parameters(grads), 1.0)
    assert grads[1]._version == 1 and grads[1][-1] == 1
    fastclip.clip_grad_value_(make_parameters(grads), 1.0)
    if device == "cpu":  # on a CUDA device the host does not know which of them changed
        assert [g._version for g in grads] == [0, 1, 0]


def test_version_counter_of_a_gapped_gradient(device):
    grad = torch.full((5, 4), 3.0, device=device)[:, ::2]
    version = grad._version
    fastclip.clip_grad_value_(make_parameters([grad]), 1.0)
    assert grad._version > version and grad.max() == 1


@pytest.mark.parametrize("parameters", [[], (), torch.zeros(3), [torch.zeros(3), torch.zeros(2)]])
def test_no_gradient_is_no_error(device, parameters):
    fastclip.clip_grad_value_(parameters, 1.0)
    fastclip.clip_grad_value_((p for p in []), 1.0)
    assert fastclip.counters()["calls"] == fastclip.counters()["native"] == 2


@pytest.mark.parametrize("limit", [torch.tensor(0.5), "0.5", True], ids=repr)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_kinds_of_numbers(device, limit, foreach):
    check_against_torch("clip_grad_value_", [torch.randn(9, device=device)], limit, foreach)
