"""The statistics of each gradient: against float64, for dtypes, instruction sets, layouts; through optimizers."""

import pytest
import torch
from support import DTYPES, EDGES, INF, NAN, bits, dtypes, make_parameters, norm_types

import fastclip
from fastclip import GradStatistics
from fastclip._native import _C
from fastclip.statistics import by_torch

SIZES = [1, 2, 7, 9, 31, 33, 64, 65, 257, 1000, 4097]
MANY = 700_001  # two threads share it, and the split streams


def expected(grad, norm_type):
    """A row, computed one column at a time in float64."""
    x = grad.detach().reshape(-1).double()
    if x.numel() == 0:
        return torch.zeros(6, dtype=torch.float64)
    magnitude = x.abs()
    largest = magnitude.max()
    subnormal = (magnitude > 0) & (magnitude < torch.finfo(grad.dtype).smallest_normal)
    unit = largest if largest.isfinite() and largest > 0 else 1.0
    norm = torch.linalg.vector_norm(x / unit, norm_type) * unit
    counts = [(x == 0).sum(), x.isinf().sum(), x.isnan().sum(), subnormal.sum()]
    return torch.stack([norm, largest, *(count.double() for count in counts)])


def check(values, grads, norm_type=2.0):
    assert values.shape == (len(grads), 6) and values.dtype == torch.float64
    want = torch.stack([expected(grad, norm_type) for grad in grads])
    torch.testing.assert_close(values[:, 0], want[:, 0], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(values[:, 1:], want[:, 1:], rtol=0, atol=0, equal_nan=True)


def planted(size, dtype, kinds):
    """Random numbers, and some of each kind at the beginning, at the end and in between."""
    grad = torch.randn(size, dtype=torch.float32).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    values = {"zero": 0.0, "-zero": -0.0, "inf": -INF, "nan": NAN, "subnormal": -tiny / 2, "smallest normal": tiny}
    for number, kind in enumerate(kinds):
        grad[torch.randint(size, (1 + size // 50,))] = values[kind]
        grad[-1 - number % size] = values[kind]
        grad[number % size] = values[kind]
    return grad


KINDS = [(), ("zero",), ("-zero", "zero"), ("inf",), ("nan",), ("subnormal",), ("smallest normal",)]
KINDS += [("zero", "-zero", "inf", "nan", "subnormal", "smallest normal")]


@dtypes
@norm_types
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_values(isa, dtype, norm_type, kinds):
    grads = [planted(size, dtype, kinds) for size in SIZES]
    before = [grad.clone() for grad in grads]
    statistics, plain = GradStatistics(), make_parameters([grad.clone() for grad in grads])
    norm = fastclip.clip_grad_norm_(make_parameters(grads), 1.0, norm_type, statistics=statistics)
    check(statistics.values, before, norm_type)
    assert torch.equal(bits(norm), bits(fastclip.clip_grad_norm_(plain, 1.0, norm_type)))
    for grad, parameter in zip(grads, plain, strict=True):
        assert torch.equal(bits(grad), bits(parameter.grad))
    assert fastclip.counters()["native"] == 2


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_shared_by_threads(isa, dtype, threads):
    torch.set_num_threads(threads)
    kinds = KINDS[-1] if threads == 2 else ("zero", "subnormal")
    grads = [planted(size, dtype, kinds) for size in (5, MANY, 3, 2 * MANY, 0x2000)]
    statistics = [GradStatistics(), GradStatistics()]
    copies = [[grad.clone() for grad in grads] for _ in range(3)]
    norms = [
        fastclip.clip_grad_norm_(make_parameters(copy), 1e30, statistics=each)
        for copy, each in zip(copies, statistics, strict=False)
    ]
    check(statistics[0].values, grads)
    assert torch.equal(bits(statistics[0].values), bits(statistics[1].values))
    assert torch.equal(bits(norms[0]), bits(fastclip.clip_grad_norm_(make_parameters(copies[2]), 1e30)))


@dtypes
def test_every_size_around_the_edges(isa, dtype):
    grads = [
        planted(size, dtype, ("zero", "subnormal", "inf")) if size else torch.zeros(0, dtype=dtype) for size in EDGES
    ]
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters([grad.clone() for grad in grads]), 1.0, statistics=statistics)
    check(statistics.values, grads)


@dtypes
def test_extreme_values(isa, dtype):
    info = torch.finfo(dtype)
    grads = [torch.full((100,), value, dtype=dtype) for value in (info.max, info.smallest_normal, info.tiny / 4, 0.0)]
    grads[0] /= 100  # float64: its norm is representable
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters(grads), INF, statistics=statistics)  # never clipped
    check(statistics.values, grads)


def test_order_with_missing_empty_and_gapped_gradients():
    grads = [torch.randn(3), None, torch.zeros(0), torch.randn(600, 700)[:, ::2], torch.randn(4, 5).t().double()]
    grads += [torch.randn(9).half(), torch.randn(8, 8)[::2, ::3]]
    present = [grad for grad in grads if grad is not None]
    before = [grad.clone() for grad in present]
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters(grads), 1.0, statistics=statistics)
    check(statistics.values, before)
    assert fastclip.counters()["native"] == 1


@pytest.mark.parametrize("parameters", [[], [None]], ids=["none", "without gradients"])
def test_no_gradients(parameters):
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters(parameters), 1.0, statistics=statistics)
    assert statistics.values.shape == (0, 6)


@pytest.mark.parametrize("fallback", [False, True])
def test_filled_where_a_norm_that_is_not_finite_is_an_error(fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(fastclip.clip, "_C", None)
    grads = [torch.tensor([1.0, INF]), torch.tensor([NAN, 0.0])]
    statistics = GradStatistics()
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(make_parameters(grads), 1.0, error_if_nonfinite=True, statistics=statistics)
    check(statistics.values, grads)
    assert grads[0][0] == 1


def test_none_after_other_errors():
    statistics = GradStatistics(torch.zeros(1, 6))
    with pytest.raises(TypeError, match=r"parameters\[1\]"):
        fastclip.clip_grad_norm_([*make_parameters([torch.ones(2)]), 3], 1.0, statistics=statistics)
    assert statistics.values is None
    with pytest.raises(TypeError, match=r"statistics: expected a fastclip\.GradStatistics or None, got dict"):
        fastclip.clip_grad_norm_(make_parameters([torch.ones(2)]), 1.0, statistics={})


@dtypes
@pytest.mark.parametrize("norm_type", [1, 2, INF, 3.0, 0.5])
def test_through_torch(dtype, norm_type, monkeypatch):
    monkeypatch.setattr(fastclip.clip, "_C", None)
    grads = [planted(size, dtype, kinds) for size in (3, 1000) for kinds in KINDS]
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters([grad.clone() for grad in grads]), 1.0, norm_type, statistics=statistics)
    check(statistics.values, grads, norm_type)
    assert fastclip.counters()["fallback"] == 1


def test_what_the_kernels_do_not_do_is_counted_as_a_fallback():
    grads = [torch.randn(4), torch.sparse_coo_tensor([[1, 3]], [2.0, 0.0], (5,))]
    dense = [grads[0].clone(), grads[1].to_dense()]
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters(grads[:1]), 1.0, 3.0, statistics=statistics)
    check(statistics.values, dense[:1], 3.0)
    check(by_torch(grads[1:], 2.0), dense[1:])
    assert fastclip.counters()["fallback_reasons"] == {"norm_type": 1}


def test_compiled_calls_leave_the_graph():
    parameters = make_parameters([torch.tensor([3.0, 0.0, 4.0])])
    statistics = GradStatistics()

    def clip():
        return fastclip.clip_grad_norm_(parameters, 1e9, statistics=statistics) * 2

    assert torch.compile(clip, backend="eager")() == 10
    check(statistics.values, [parameters[0].grad])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(clip, backend="eager", fullgraph=True)()


# ---- optimizers


def model_with_gradients(dtype=torch.float32, scale=1.0):
    grads = [planted(size, dtype, ("zero",)) for size in (7, 300, 5)]
    return make_leaves([grad * scale for grad in grads]), grads


def make_leaves(grads):
    leaves = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    return leaves


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm_type", [2.0, INF, 3.0])
def test_optimizer(fused, norm_type):
    parameters, grads = model_with_gradients()
    statistics = GradStatistics()
    inner = torch.optim.SGD(parameters, lr=0.1, fused=fused)
    optimizer = fastclip.ClippedOptimizer(inner, 1.0, norm_type, fold=fused, statistics=statistics)
    optimizer.step()
    check(statistics.values, grads, norm_type)


@pytest.mark.parametrize("scaler_type", [fastclip.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_gets_unscaled_values(scaler_type, fused):
    parameters, grads = model_with_gradients(scale=1024.0)
    statistics = GradStatistics()
    fold = "auto" if fused else False
    inner = torch.optim.SGD(parameters, lr=0.1, fused=fused)
    optimizer = fastclip.ClippedOptimizer(inner, 1.0, fold=fold, statistics=statistics)
    scaler = scaler_type("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    check(statistics.values, grads)


def test_groups_with_thresholds_of_their_own_keep_the_order():
    parameters, grads = model_with_gradients()
    groups = [
        {"params": parameters[:1]},
        {"params": parameters[1:2], "max_norm": 0.5},
        {"params": parameters[2:], "max_norm": None},
    ]
    statistics = GradStatistics()
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(groups, lr=0.1), 1.0)
    optimizer.statistics = statistics
    optimizer.step()
    check(statistics.values, grads)


def test_optimizer_that_clips_values():
    parameters, grads = model_with_gradients()
    statistics = GradStatistics()
    inner = torch.optim.SGD(parameters, lr=0.1)
    fastclip.ClippedOptimizer(inner, clip_value=0.1, statistics=statistics).step()
    check(statistics.values, grads)


def test_optimizer_refuses_other_objects():
    with pytest.raises(TypeError, match=r"statistics: expected a fastclip\.GradStatistics"):
        fastclip.ClippedOptimizer(torch.optim.SGD(make_leaves([torch.ones(2)]), lr=0.1), 1.0, statistics=[])


@pytest.mark.skipif(_C is None, reason="the counts are those of native calls")
def test_dtypes_mixed(isa):
    grads = [planted(1000, dtype, KINDS[-1]) for dtype in DTYPES]
    statistics = GradStatistics()
    fastclip.clip_grad_norm_(make_parameters([grad.clone() for grad in grads]), 1.0, statistics=statistics)
    check(statistics.values, grads)
