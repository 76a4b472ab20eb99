"""The CUDA kernels against the float64 oracle: sizes, dtypes, alignment, extreme values, grids."""

import math

import pytest
import torch
from cuda_support import EDGES, EMULATED, cuda, cudaemu, on_host, parameters_of, slices, unaligned
from oracle import check_norm, check_scaled, coefficient, total_norm
from support import DTYPES, INF, dtypes, norm_types

import fastclip
from fastclip._native import _C

pytestmark = cuda


def check_clip(grads, max_norm, norm_type=2, value=None):
    """Clips; compares the norm and every gradient with the oracle. max_norm may come as a tensor of that value."""
    before = on_host(grads)
    got = fastclip.clip_grad_norm_(parameters_of(grads), max_norm if value is None else value, norm_type)
    check_norm(got, before, norm_type)
    coef = coefficient(max_norm, total_norm(before, norm_type))
    for after, was in zip(on_host(grads), before, strict=True):
        check_scaled(after, was, coef)
        if coef == 1:
            assert torch.equal(after.cpu(), was)


@dtypes
@norm_types
def test_list_of_every_size_and_alignment(dtype, norm_type):
    for max_norm in (0.5, 1e9):
        check_clip(unaligned(EDGES, dtype), max_norm, norm_type)
    assert fastclip.counters()["fallback"] == 0


@dtypes
def test_single_tensors_of_every_size(dtype):
    for i, size in enumerate(EDGES):
        check_clip([torch.randn(size + i % 5).to(dtype).cuda()[i % 5 :]], 0.25)


@dtypes
@norm_types
def test_every_element_counts(dtype, norm_type):
    base = torch.zeros(50, dtype=dtype, device="cuda")
    view = base[3:45]
    for position in range(42):
        base[:3], base[45:] = 7, 7  # not part of the gradient
        view[position] = -3
        assert fastclip.get_total_norm([view], norm_type).item() == 3, position
        view[position] = 0


@norm_types
def test_mixed_dtypes(norm_type):
    grads = [g for i, size in enumerate(EDGES) for g in unaligned([size], DTYPES[i % 4])]
    check_clip(grads, 0.5, norm_type)
    check_clip([g for g in grads if g.dtype != torch.float64], 0.1, norm_type)


def test_empty_tensors_and_a_trailing_one():
    empty = torch.empty(0, device="cuda")
    check_clip([empty, torch.ones(5, device="cuda"), torch.empty(3, 0, device="cuda"), empty], 1.0)
    assert fastclip.clip_grad_norm_(parameters_of([empty]), 1.0).item() == 0


@pytest.mark.parametrize("size", [48, 5000])
@pytest.mark.parametrize(
    "dtype, value",
    [
        (torch.float32, 1e25),
        (torch.float32, 1e-30),
        (torch.float32, 3e-39),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-32),
        (torch.float16, 60000.0),
        (torch.float16, 6e-8),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float64, 1e155),
    ],
)
def test_no_overflow_and_no_underflow(dtype, value, size):
    for norm_type in (1, 2):
        check_clip([torch.full((size,), value, dtype=dtype, device="cuda")], value / 3, norm_type)
    mixed = torch.full((size,), value, dtype=dtype, device="cuda")
    mixed[: size // 2] = 1
    check_clip([mixed], 1e-3)


def test_coefficient_that_float32_cannot_hold():
    check_clip([torch.full((1000,), 1e37, device="cuda"), torch.full((7,), -1e37, device="cuda")], 1e-3)


@norm_types
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_nonfinite_values_as_in_torch(norm_type, bad):
    for position in (0, 700, 1500):
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.ones(1501, dtype=dtype)
            grad[position] = bad
            mine, theirs = parameters_of([grad.clone().cuda()]), parameters_of([grad.clone()])
            got = fastclip.clip_grad_norm_(mine, 1.0, norm_type)
            want = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
            torch.testing.assert_close(got.cpu(), want.to(got.dtype), equal_nan=True)
            torch.testing.assert_close(mine[0].grad.cpu(), theirs[0].grad, equal_nan=True)


def test_error_if_nonfinite_writes_nothing():
    grads = [torch.ones(1000, device="cuda"), torch.full((3,), INF, device="cuda")]
    before = on_host(grads)
    with pytest.raises(RuntimeError, match=r"total norm of order 2.0 .* is non-finite"):
        fastclip.clip_grad_norm_(parameters_of(grads), 1.0, error_if_nonfinite=True)
    assert all(torch.equal(g.cpu(), b) for g, b in zip(grads, before, strict=True))
    assert fastclip.clip_grad_norm_(parameters_of(grads[:1]), 1.0, error_if_nonfinite=True).item() > 31


@pytest.mark.parametrize("blocks", [1, 2, 132])
@pytest.mark.parametrize("count", [1, 50, 3000])
def test_grids(blocks, count):
    _C.force_cuda_blocks(blocks)
    check_clip(slices(count, 20_001 // count, torch.bfloat16), 0.5)


def blocks_that_fit():
    """More than fit the device cannot be resident together."""
    return 2 * torch.cuda.get_device_properties(0).multi_processor_count


@pytest.mark.parametrize("refused", ["too many blocks", "not allowed"])
def test_two_launches_where_a_cooperative_one_is_refused(refused):
    grads = slices(40, 1501, torch.float32)
    copies = [g.clone() for g in grads]
    _C.force_cuda_blocks(blocks_that_fit() + 1 if refused == "too many blocks" else 20)
    if refused == "not allowed":
        want = fastclip.clip_grad_norm_(parameters_of(copies), 0.5)
        _C.allow_cooperative_launches(False)
    if EMULATED:
        before = on_host(grads)
        with cudaemu.record() as seen:
            got = fastclip.clip_grad_norm_(parameters_of(grads), 0.5)
        assert (seen.launches, seen.cooperative_launches, seen.synchronisations) == (2, 0, [])
        check_norm(got, before, 2)
    else:
        got = fastclip.clip_grad_norm_(parameters_of(grads), 0.5)
    if refused == "not allowed":
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


def test_same_bits_in_any_order_of_blocks_and_warps():
    grads = slices(97, 513, torch.float32)
    _C.force_cuda_blocks(9)
    results = []
    for seed in range(4):
        if EMULATED:
            cudaemu.set_seed(seed)
        copies = [g.clone() for g in grads]
        norm = fastclip.clip_grad_norm_(parameters_of(copies), 1.0)
        results.append(torch.cat([norm.reshape(1), *copies]).cpu())
    assert all(torch.equal(result, results[0]) for result in results)


@dtypes
def test_max_norm_on_the_device(dtype):
    value = torch.tensor(0.75, dtype=dtype, device="cuda")
    check_clip(slices(3, 700, torch.float32), 0.75, value=value)
    check_clip(slices(3, 700, torch.float32), 2.0, value=torch.tensor(2, dtype=torch.float32))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, INF, math.nan])
def test_odd_thresholds_as_in_torch(max_norm):
    grads = torch.randn(2, 100)
    mine, theirs = parameters_of([g.clone().cuda() for g in grads]), parameters_of([g.clone() for g in grads])
    fastclip.clip_grad_norm_(mine, max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, equal_nan=True)


@dtypes
def test_value_clipping(dtype):
    grads = unaligned(EDGES, dtype)
    grads[3][1], grads[9][60] = math.nan, -INF
    before = on_host(grads)
    fastclip.clip_grad_value_(parameters_of(grads), 0.7)
    for after, was in zip(grads, before, strict=True):
        torch.testing.assert_close(after.cpu(), was.clamp(-0.7, 0.7), rtol=0, atol=0, equal_nan=True)


@norm_types
def test_the_two_halves_make_the_whole(norm_type):
    grads = slices(5, 999, torch.bfloat16)
    copies = [g.clone() for g in grads]
    norm = fastclip.get_total_norm(grads, norm_type)
    check_norm(norm, on_host(grads), norm_type)
    fastclip.clip_grads_with_norm_(parameters_of(grads), 0.5, norm)
    assert torch.equal(norm, fastclip.clip_grad_norm_(parameters_of(copies), 0.5, norm_type))
    for a, b in zip(grads, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
    with_number = slices(2, 10, torch.float32)
    before = on_host(with_number)
    fastclip.clip_grads_with_norm_(parameters_of(with_number), 1.0, torch.tensor(4.0))
    for a, b in zip(with_number, before, strict=True):
        check_scaled(a, b, 1 / (4 + 1e-6))


def test_a_parameter_listed_twice_is_scaled_twice():
    grad = torch.randn(2000)
    mine, theirs = parameters_of([grad.cuda(), torch.ones(5, device="cuda")]), parameters_of([grad, torch.ones(5)])
    got = fastclip.clip_grad_norm_([mine[0], mine[1], mine[0]], 1.0)
    want = torch.nn.utils.clip_grad_norm_([theirs[0], theirs[1], theirs[0]], 1.0)
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(mine[0].grad.cpu(), theirs[0].grad)
    torch.testing.assert_close(mine[1].grad.cpu(), theirs[1].grad)


def test_overlapping_gradients_are_written_one_after_the_other():
    base = torch.randn(1000)
    on_device = base.cuda()
    views = [(0, 600), (400, 1000), (0, 600)]
    norm = math.sqrt(sum(float((base[a:b].double() ** 2).sum()) for a, b in views))
    fastclip.clip_grad_norm_(parameters_of([on_device[a:b] for a, b in views]), 1.0)
    want = base.double()
    for a, b in views:
        want[a:b] *= coefficient(1.0, norm)
    torch.testing.assert_close(on_device.cpu(), want.float(), rtol=1e-5, atol=0)


@dtypes
def test_any_strides(dtype):
    def build():
        torch.manual_seed(3)
        return [
            torch.randn(30, 20).to(dtype).cuda().t(),
            torch.randn(2, 3, 4, 5).to(dtype).cuda().contiguous(memory_format=torch.channels_last),
            torch.randn(40, 30).to(dtype).cuda()[:, ::3],
            torch.randn(()).to(dtype).cuda(),
        ]

    check_clip(build(), 0.5)
    check_clip(build(), 1e6)
    grads = build()
    before = on_host(grads)
    fastclip.clip_grad_value_(parameters_of(grads), 0.5)
    assert all(torch.equal(g.cpu(), b.clamp(-0.5, 0.5)) for g, b in zip(grads, before, strict=True))


def test_version_counters_rise():
    grads = slices(3, 100, torch.float32)
    before = [g._version for g in grads]
    fastclip.clip_grad_norm_(parameters_of(grads), 1e-3)
    assert all(g._version > was for g, was in zip(grads, before, strict=True))
    before = [g._version for g in grads]
    fastclip.get_total_norm(grads)
    assert [g._version for g in grads] == before


def test_the_norm_is_the_callers_own():
    grads = slices(2, 50, torch.float32)
    first = fastclip.clip_grad_norm_(parameters_of(grads), 1e9)
    value = first.item()
    second = fastclip.clip_grad_norm_(parameters_of(grads), 1e9)
    second.add_(1)
    assert first.item() == value and not first.requires_grad and first.shape == () and first.device.type == "cuda"


def test_a_launch_that_is_refused_raises_with_the_cause():
    _C.force_cuda_blocks(-1)
    with pytest.raises(RuntimeError, match="invalid"):
        fastclip.clip_grad_value_(parameters_of(slices(2, 50, torch.float32)), 0.5)
    _C.force_cuda_blocks(0)
    check_clip(slices(2, 50, torch.float32), 0.5)


@pytest.mark.skipif(not EMULATED, reason="needs the emulator's checks")
def test_many_seeds():
    for seed in (1, 2, 3):
        cudaemu.set_seed(seed)
        check_clip(unaligned(EDGES, torch.bfloat16), 0.5)
        check_clip(slices(2500, 9, torch.float32), 0.5)


def test_more_than_2_31_elements_in_one_tensor():
    """One of 2^31 elements and some, unaligned, and with a smaller one a list of more."""
    if EMULATED:
        cudaemu.set_checks("none")  # they make it ten times slower
    try:
        size = 2**31 + 4_611
        x = torch.zeros(size + 3, dtype=torch.bfloat16, device="cuda")[3:]
        y = torch.zeros(40, dtype=torch.bfloat16, device="cuda")
        places = [0, 2**31 - 1, 2**31, size - 1]
        for place in places:
            x[place] = 32
        y[-1] = 32
        assert fastclip.get_total_norm([x, y], 1).item() == 5 * 32
        if EMULATED:  # minutes for a second and a third pass
            return
        norm = fastclip.clip_grad_norm_(parameters_of([x, y]), 8.0)
        assert norm.item() == pytest.approx(32 * 5**0.5, rel=1e-6)
        want = torch.tensor(32 * 8 / norm.item()).bfloat16().item()
        assert [x[place].item() for place in places] == [want] * 4 and x[1:5].tolist() == [0] * 4
    finally:
        if EMULATED:
            torch.cuda.synchronize()
            cudaemu.set_checks("race,init")
