"""The statistics of each gradient on a CUDA device: values, launches, graphs, lists over several devices."""

import math

import pytest
import torch
from cuda_support import EDGES, EMULATED, assert_one_launch, cuda, on_host, parameters_of, slices, unaligned, watch
from support import INF, NAN, bits, clone, dtypes, norm_types
from test_statistics import KINDS, check, planted

import fastclip
from fastclip import GradStatistics
from fastclip._native import _C

pytestmark = cuda


def clip(grads, max_norm=1.0, norm_type=2.0, **kwargs):
    statistics = GradStatistics()
    norm = fastclip.clip_grad_norm_(parameters_of(grads), max_norm, norm_type, statistics=statistics, **kwargs)
    return norm, statistics.values


def with_kinds(sizes, dtype, kinds):
    """Gradients in allocations of their own, 0 to 7 elements into them."""
    grads = unaligned(sizes, dtype)
    for grad in grads:
        grad.copy_(planted(grad.numel(), dtype, kinds))
    return grads


@dtypes
@norm_types
@pytest.mark.parametrize("kinds", [KINDS[0], KINDS[3], KINDS[4], KINDS[5], KINDS[-1]], ids="+".join)
def test_values(dtype, norm_type, kinds):
    grads = with_kinds(EDGES, dtype, kinds)
    before, plain = on_host(grads), clone(grads)
    norm, values = clip(grads, 1.0, norm_type)
    assert values.is_cuda
    check(values.cpu(), before, norm_type)
    assert fastclip.counters() == {"calls": 1, "native": 1, "fallback": 0, "fallback_reasons": {}}
    want = fastclip.clip_grad_norm_(parameters_of(plain), 1.0, norm_type)
    torch.testing.assert_close(norm.cpu(), want.cpu(), rtol=3e-7, atol=0, equal_nan=True)
    for grad, other in zip(on_host(grads), on_host(plain), strict=True):
        torch.testing.assert_close(grad, other, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", EDGES)
def test_a_single_gradient(size):
    grads = with_kinds([size], torch.float16, ("zero", "subnormal"))
    before = on_host(grads)
    check(clip(grads)[1].cpu(), before)


@pytest.mark.parametrize("blocks", [1, 2, 7, 0])
@dtypes
def test_gradients_over_many_warps_and_warps_with_many_gradients(blocks, dtype):
    _C.force_cuda_blocks(blocks)
    grads = with_kinds([70_001, 3, 1, 20_000, 5, 5, 5, 5, 300, 8191], dtype, KINDS[-1])
    before, again = on_host(grads), clone(grads)
    first = clip(grads)[1]
    check(first.cpu(), before)
    assert torch.equal(bits(first), bits(clip(again)[1]))


@pytest.mark.parametrize("count", [240, 241, 3_000])
@pytest.mark.parametrize("cooperative", [True, False])
def test_long_lists(count, cooperative):
    _C.allow_cooperative_launches(cooperative)
    grads = slices(count, 33, torch.bfloat16)
    grads[count // 2].zero_()
    grads[-1][5] = NAN
    before = on_host(grads)
    check(clip(grads)[1].cpu(), before)


@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
@norm_types
def test_one_launch(max_norm, norm_type):
    parameters = parameters_of(slices(10, 500, torch.float32))
    statistics = GradStatistics()
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, max_norm, norm_type, statistics=statistics)
    assert (seen.launches, seen.cooperative_launches) == (1, 1)
    assert seen.synchronisations == [] and seen.copies == 0
    if EMULATED:
        assert seen.h2d_bytes == seen.d2h_bytes == seen.d2d_bytes == seen.fills == seen.torch_operations == 0
        assert seen.tensor_allocations == 3 and seen.mallocs == 0  # the norm, the values, what the warps know


def test_a_call_without_statistics_is_what_it_was():
    parameters = parameters_of(slices(10, 500, torch.float32))
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1.0)
    assert_one_launch(seen)


@pytest.mark.skipif(not EMULATED, reason="needs the emulator's counters")
def test_bytes_read_and_written():
    count, size = 64, 65_536
    parameters = parameters_of(slices(count, size, torch.bfloat16))
    total = 2 * count * size
    statistics = GradStatistics()
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1e9, statistics=statistics)
    (kernel,) = seen.kernels
    blocks = kernel.grid[0]
    assert not any((p.grad == 0).any() for p in parameters)  # what has a zero is read again
    parts = 64 * (16 * blocks + count)
    assert 32 * kernel.stats.global_read_sectors <= 1.02 * total + 64 * blocks * blocks + 2 * parts
    assert kernel.stats.global_written_bytes <= parts + 48 * count + 16 * blocks + 64


def test_order_with_empty_and_gapped_gradients():
    grads = [torch.randn(3), torch.zeros(0), torch.randn(60, 70)[:, ::2], torch.randn(4, 5).t().double()]
    grads += [torch.randn(9).half(), torch.randn(8, 8)[::2, ::3]]
    grads = clone(grads, device="cuda")
    before = [grad.cpu() for grad in grads]
    check(clip(grads)[1].cpu(), before)
    assert fastclip.counters()["native"] == 1


def test_only_empty_gradients():
    check(clip([torch.zeros(0, device="cuda")] * 2)[1].cpu(), [torch.zeros(0)] * 2)


def test_gradients_that_overlap():
    whole = torch.randn(1000, device="cuda")
    grads = [whole[:600], whole[300:], whole[:10]]
    before = on_host(grads)
    check(clip(grads)[1].cpu(), before)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_cpu_and_cuda_in_one_list(first):
    grads = [torch.randn(100, device="cuda"), torch.randn(50), torch.randn(7, device="cuda"), torch.randn(6, 6)[:, ::2]]
    grads = grads[1:] + grads[:1] if first == "cpu" else grads
    grads[0][3] = 0
    before = [grad.cpu().clone() for grad in grads]
    norm, values = clip(grads)
    assert values.device == norm.device and values.device.type == first
    check(values.cpu(), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_list():
    grads = [torch.randn(3000, device=f"cuda:{i % 2}") for i in range(5)]
    before = on_host(grads)
    check(clip(grads)[1].cpu(), before)


def test_error_if_nonfinite():
    grads = [torch.tensor([1.0, INF], device="cuda"), torch.tensor([NAN, 0.0], device="cuda")]
    before = on_host(grads)
    statistics = GradStatistics()
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(parameters_of(grads), 1.0, error_if_nonfinite=True, statistics=statistics)
    check(statistics.values.cpu(), before)
    assert grads[0][0].item() == 1


@pytest.mark.parametrize("count", [10, 300])
def test_replays_of_a_graph_fill_the_same_values(count):
    grads = slices(count, 40, torch.bfloat16)
    parameters, statistics = parameters_of(grads), GradStatistics()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastclip.clip_grad_norm_(parameters, 1.5, statistics=statistics)
    whole = torch.empty(0, dtype=torch.bfloat16, device="cuda").set_(grads[0].untyped_storage())
    for seed in range(3):
        torch.manual_seed(seed)
        whole.copy_(torch.randn(whole.numel()) * (torch.rand(whole.numel()) > 0.1))
        before = on_host(grads)
        graph.replay()
        check(statistics.values.cpu(), before)


@pytest.mark.parametrize("fold", ["auto", False])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_optimizer(fold, norm_type):
    grads = slices(5, 300, torch.float32)
    grads[1][:7] = 0
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    before = on_host(grads)
    statistics = GradStatistics()
    inner = torch.optim.SGD(parameters, lr=0.1, fused=fold == "auto")
    fastclip.ClippedOptimizer(inner, 1.0, norm_type, fold=fold, statistics=statistics).step()
    check(statistics.values.cpu(), before, norm_type)
    assert fastclip.counters()["fallback"] == 0


def test_in_a_pass_of_their_own():
    grads = slices(5, 300, torch.float32)
    before = on_host(grads)
    norm, values = _C.norm_and_statistics_of(grads, 2.0)
    check(values.cpu(), before)
    assert norm.dtype == torch.float64
