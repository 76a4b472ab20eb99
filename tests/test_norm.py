"""The total norm against the float64 oracle: sizes, dtypes, alignment, extreme and adversarial values."""

import pytest
import torch
from oracle import check_norm
from support import DTYPES, EDGES, EMULATED, INF, LARGE, NAN, dtypes, norm_types

import fastclip


def check(grads, norm_type):
    check_norm(fastclip.get_total_norm(grads, norm_type), grads, norm_type)


@dtypes
@norm_types
def test_every_size(device, dtype, norm_type):
    for size in [*EDGES, LARGE]:
        if size or norm_type != INF:
            check([torch.randn(size, device=device).to(dtype)], norm_type)
    assert fastclip.counters()["fallback"] == 0


@dtypes
@norm_types
def test_every_element_counts(device, dtype, norm_type):
    for size in [1, 9, 31, 65, 300, 1025]:
        for position in range(0, size, 41 if size > 64 and EMULATED else 1):
            grad = torch.zeros(size, dtype=dtype, device=device)
            grad[position] = -3
            assert fastclip.get_total_norm([grad], norm_type).item() == 3, (size, position)


@dtypes
@norm_types
def test_unaligned_views(device, dtype, norm_type):
    base = torch.randn(5000, device=device).to(dtype)
    for offset in range(8):
        for size in [1, 31, 33, 1025, 4097]:
            check([base[offset : offset + size]], norm_type)


@norm_types
def test_many_tensors_of_mixed_dtypes(device, norm_type):
    grads = [torch.randn(size, device=device).to(DTYPES[i % 4]) for i, size in enumerate(EDGES[1:] * 3)]
    check(grads, norm_type)
    check([g for g in grads if g.dtype != torch.float64], norm_type)


@norm_types
@pytest.mark.parametrize("halves", [(torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)])
def test_dtype_of_half_types_is_float32(device, norm_type, halves):
    grads = [torch.randn(100, device=device).to(dtype) for dtype in halves]
    assert fastclip.get_total_norm(grads, norm_type).dtype == torch.float32
    check(grads, norm_type)


@pytest.mark.parametrize("norm_type", [1, 2])
@pytest.mark.parametrize("first", [5, LARGE])
def test_empty_tensors_anywhere(device, norm_type, first):
    empty, full = torch.empty(0, 3, device=device), torch.randn(first, device=device)
    for grads in ([full, empty], [empty, full], [empty, full, empty, full, empty], [empty]):
        check(grads, norm_type)


@dtypes
@norm_types
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_non_finite_at_any_place(device, dtype, norm_type, value):
    for size in [1, 7, 33, 1025, LARGE]:
        for position in {0, size // 2, size - 1}:
            grad = torch.ones(size, dtype=dtype, device=device)
            grad[position] = value
            check([torch.ones(3, device=device), grad, torch.ones(3, device=device)], norm_type)


@dtypes
@norm_types
def test_nan_wins_over_inf(device, dtype, norm_type):
    for values in ([NAN, INF], [INF, NAN], [-INF, 1, NAN, INF]):
        check([torch.tensor(values, dtype=dtype, device=device)], norm_type)
        check([torch.tensor([value], dtype=dtype, device=device) for value in values], norm_type)


# The last four are the float32 numbers for which 16 equal terms, or their squares, accumulate the largest rounding
# errors downwards and upwards.
BIASED = [0.1, 1 / 3, 16777217.0, 0.7, 1 - 2**-24, 1.7777801, 1.7777818, 1.3332520, 1.3335493]


@pytest.mark.parametrize("norm_type", [1, 2])
@pytest.mark.parametrize("value", BIASED)
def test_systematic_rounding(device, norm_type, value):
    for size in [100, 4097, 1 << 15 if EMULATED else 1 << 21]:
        check([torch.full((size,), value, device=device)], norm_type)
    check([torch.full((64,), value, device=device) for _ in range(500)], norm_type)


@pytest.mark.parametrize("norm_type", [1, 2])
def test_one_large_then_many_small(device, norm_type):
    for large, small in [(1.0, 2.0**-13), (2.0**24, 1.0), (1.0, 2.0**-24), (1e4, 1e-3)]:
        grad = torch.full((1 << 15 if EMULATED else 1 << 20,), small, device=device)
        grad[0] = large
        check([grad], norm_type)
        check([grad[:1], grad[1:]], norm_type)


@norm_types
@pytest.mark.parametrize("scale", [1e25, 1e-18, 1e-20, 1e-30, 1e-40, 3e37, 1e-45])
def test_extreme_float32(device, norm_type, scale):
    for size in [1, 17, 4097, LARGE]:
        grad = (torch.rand(size, dtype=torch.float64, device=device) + 0.5).mul(scale).float()
        check([grad], norm_type)


@norm_types
@pytest.mark.parametrize("scale", [1e25, 1e-30, 1e-39])
def test_extreme_bfloat16(device, norm_type, scale):
    check([(torch.rand(5000, device=device) + 0.5).double().mul(scale).bfloat16()], norm_type)


@norm_types
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e300, 1e-300, 1e-310, 1e154, 1e-154, 1.0])
def test_extreme_float64(device, norm_type, scale):
    for size in [1, 17, 4097, LARGE]:
        check([(torch.rand(size, dtype=torch.float64, device=device) + 0.5) * scale], norm_type)


@norm_types
def test_extremes_of_both_ends_in_one_list(device, norm_type):
    values = [1e25, 1e-30, 0.0, 1.0, 1e-40]
    check([torch.full((1000,), value, device=device) for value in values], norm_type)
    check([torch.full((1000,), value, device=device) for value in reversed(values)], norm_type)
    check([torch.tensor(values * 1000, device=device)], norm_type)
    doubles = [torch.full((99,), value, dtype=torch.float64, device=device) for value in (1e200, 1e-200, 1.0)]
    check(doubles, norm_type)
    check([*doubles, torch.full((1000,), 1e-40, device=device)], norm_type)


@pytest.mark.parametrize("norm_type", [1, 2])
def test_norm_beyond_float32_is_inf(device, norm_type):
    assert fastclip.get_total_norm([torch.full((100,), 3e38, device=device)], norm_type).item() == INF


@pytest.mark.parametrize("norm_type", [1, 2])
def test_float16_list_beyond_its_own_range(device, norm_type):
    grads = [torch.full((size,), 6e4, device=device).half() for size in (1000, 50_000, LARGE)]
    norm = fastclip.get_total_norm(grads, norm_type)
    assert 65504 < norm.item() < INF
    check_norm(norm, grads, norm_type)


@dtypes
@norm_types
def test_subnormal_values_of_half_types(device, dtype, norm_type):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    check([torch.full((1000,), tiny, dtype=dtype, device=device)], norm_type)


@dtypes
@norm_types
def test_zeros(device, dtype, norm_type):
    for size in [1, 33, 5000, LARGE]:
        assert fastclip.get_total_norm([torch.zeros(size, dtype=dtype, device=device)], norm_type).item() == 0
        assert fastclip.get_total_norm([-torch.zeros(size, dtype=dtype, device=device)], norm_type).item() == 0


@norm_types
@pytest.mark.parametrize("tiny", [1e-30, 1e-40, 1e-20])
def test_zero_blocks_with_tiny_values(device, norm_type, tiny):
    for every in [1000, 4096, 50_001]:
        grad = torch.zeros(LARGE, device=device)
        grad[::every] = tiny
        check([grad], norm_type)
    check([torch.zeros(5000, device=device), torch.full((3,), tiny, device=device)], norm_type)


def test_gpt2_small():
    """124 million elements with the spread of scales of a real model; torch is off by 1e-3 here."""
    width = 768
    block = [(width,)] * 4 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    shapes = [(50257, width), (1024, width), *block * 12, (width,), (width,)]
    grads = [torch.empty(shape).uniform_(0, 1e-3 * (i % 7 + 1)) for i, shape in enumerate(shapes)]
    assert sum(g.numel() for g in grads) == 124_439_808
    for norm_type in (1, 2):
        check(grads, norm_type)
