"""clip_grad_adaptive_ against the formula in float64: shapes, dtypes, layouts, threads, edges, errors."""

import itertools
import math

import pytest
import torch
from cuda_support import watch
from oracle import check_scaled
from ranks import gloo_averages, needs_fully_shard
from support import DTYPES, INF, NAN, dtypes, norm_types

import fastclip

# Scalar, gain and bias, linear, convolutions (one depthwise, one whose filters are no whole registers), embedding.
SHAPES = [(), (1,), (70,), (5, 33), (1, 8), (16, 3, 7, 7), (9, 1, 3, 3), (4, 64, 1, 1), (300, 24), (7, 2, 3, 4, 5)]


def make(shape, dtype=torch.float32, grad_dtype=None, scale=1.0, device="cpu"):
    """A parameter whose units differ, some within their limit and some beyond it."""
    parameter = torch.nn.Parameter(torch.randn(shape).to(dtype).to(device))
    grad = torch.randn(shape) * scale
    if grad.ndim > 1:
        grad *= torch.logspace(-4, 1, grad.shape[0]).view(-1, *[1] * (grad.ndim - 1))
    if grad_dtype not in (None, dtype):
        parameter.grad_dtype = grad_dtype
    parameter.grad = grad.to(grad_dtype or dtype).to(device)
    return parameter


def units(tensor):
    """A row for each unit."""
    tensor = tensor.detach().cpu()
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, tensor.numel())


def coefficients(weight, grad, clipping, eps, norm_type):
    """Those of all units, in float64, whose range is enough for the squares of these tests."""
    weight_norm, norm = (torch.linalg.vector_norm(x.double(), norm_type, dim=1, keepdim=True) for x in (weight, grad))
    max_norm = clipping * weight_norm.clamp(min=eps)
    return torch.where(norm < max_norm, 1.0, max_norm / norm.clamp(min=1e-6))


def check(parameters, clipping=0.01, eps=1e-3, norm_type=2.0, native=True):
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    assert fastclip.clip_grad_adaptive_(parameters, clipping, eps, norm_type=norm_type) is None
    clipped = 0
    for parameter, weight, was in zip(parameters, weights, before, strict=True):
        assert torch.equal(parameter.detach(), weight)
        if was is None:
            continue
        w, after, g = units(weight), units(parameter.grad), units(was)
        if not g.numel():
            continue
        coef = coefficients(w, g, clipping, eps, norm_type)
        clipped += (coef != 1).sum().item()
        check_scaled(after, g, coef, tolerance=3e-6)
        within = coef[:, 0] == 1
        assert torch.equal(after[within], g[within])
    assert (fastclip.counters()["native"] > 0) is native
    return clipped


@dtypes
@norm_types
def test_shapes(device, dtype, norm_type):
    parameters = [make(shape, dtype, device=device) for shape in SHAPES]
    parameters.insert(2, torch.nn.Parameter(torch.ones(3, device=device)))
    clipped = check(parameters, 0.1, norm_type=norm_type)
    assert 100 < clipped < 330


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_dtypes_that_differ(device, weight_dtype, grad_dtype):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch before 2.10 has gradients of the parameter's dtype only")
    check(
        [make((20, 37), weight_dtype, grad_dtype, device=device), make((11,), weight_dtype, grad_dtype, device=device)]
    )


def test_large_units_and_threads(device):
    size = 20_000 if device == "cuda" else 270_000
    parameters = [make((size,)), make((3, size), scale=0.01), make((200, 997)), make((2, 50))]
    check([to(p, device) for p in parameters])


def to(parameter, device):
    moved = torch.nn.Parameter(parameter.detach().to(device))
    moved.grad = parameter.grad.to(device)
    return moved


@pytest.mark.parametrize("weight_last", [True, False])
def test_channels_last_is_native(device, weight_last):
    parameter = make((16, 6, 3, 3), device=device)
    if weight_last:
        parameter.data = parameter.data.to(memory_format=torch.channels_last)
    parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
    assert parameter.grad.stride() == (54, 1, 18, 6)
    assert check([parameter]) > 0


@dtypes
@pytest.mark.parametrize("case", ["transposed", "gaps", "large"])
def test_units_with_gaps_go_through_torch(case, dtype):
    """With the same results: norms beyond float32 too, where the elements are not."""
    parameter = make((6, 40), dtype)
    if case == "large" and dtype != torch.float16:
        parameter.data.mul_(1e22)
        parameter.grad.mul_(1e22)
    grad = torch.randn(6, 80).to(dtype)[:, ::2]
    parameter.grad = grad if case == "gaps" else parameter.grad.t().contiguous().t()
    assert check([make((3, 7), dtype), parameter], native=False) > 0
    assert fastclip.counters()["fallback_reasons"] == {"units with gaps": 1}


def test_other_orders_go_through_torch():
    parameter = make((6, 40))
    before = parameter.grad.clone()
    fastclip.clip_grad_adaptive_(parameter, norm_type=3)
    w, g = (x.double().abs().pow(3).sum(1, keepdim=True) ** (1 / 3) for x in (parameter.detach(), before))
    torch.testing.assert_close(parameter.grad, (before * (0.01 * w / g).clamp(max=1)).float())
    assert fastclip.counters()["fallback_reasons"] == {"norm_type": 1}


def test_gradients_that_share_memory_are_clipped_in_turn():
    first, second = make((6, 40)), torch.nn.Parameter(torch.zeros(6, 40))
    second.grad = first.grad
    before = first.grad.clone()
    fastclip.clip_grad_adaptive_([first, second])
    norms = before.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(first.grad, (before * (1e-5 / norms).clamp(max=1)).float())
    assert fastclip.counters()["fallback_reasons"] == {"gradients that share memory": 1}


def reference(parameters, clip_factor=0.01, eps=1e-3, norm_type=2):
    """The reference formula, written out for one dtype."""
    for p in parameters:
        dims = tuple(range(1, p.ndim)) if p.ndim > 1 else None
        norms = [torch.linalg.vector_norm(x.detach(), norm_type, dim=dims, keepdim=p.ndim > 1) for x in (p, p.grad)]
        max_norm = norms[0].clamp(min=eps) * clip_factor
        p.grad.copy_(torch.where(norms[1] < max_norm, p.grad, p.grad * (max_norm / norms[1].clamp(min=1e-6))))


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["weight", "grad", "both"])
def test_nonfinite_values(device, where, bad):
    mine, theirs = ([make((4, 9), torch.float64), make((5,), torch.float64)] for _ in range(2))
    for one, other in zip(mine, theirs, strict=True):
        one.data.view(-1)[3] = bad if where != "grad" else 1
        one.grad.view(-1)[3] = bad if where != "weight" else 1
        other.data.copy_(one.data)
        other.grad.copy_(one.grad)
    mine = [to(p, device) for p in mine]
    reference(theirs)
    fastclip.clip_grad_adaptive_(mine)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, equal_nan=True)


@pytest.mark.parametrize(
    "clipping, eps", [(0.0, 1e-3), (0.01, 0.0), (1e-7, 1e-3), (1.0, 1e-6), (INF, 1e-3), (1e-20, 1e-20)]
)
def test_edges_of_the_formula(device, clipping, eps):
    """Zero weights, zero gradients, norms under the floor of 1e-6, coefficients that float32 cannot hold."""
    weights = torch.stack([torch.zeros(8), torch.ones(8), torch.full((8,), 1e-9), torch.full((8,), 1e30)] * 3)
    grads = torch.stack([torch.full((8,), x) for x in (0, 1e-8, 1e-5, 1.0, 1e-9, 1e30) for _ in range(2)])
    parameter = torch.nn.Parameter(weights.to(device))
    parameter.grad = grads.to(device)
    check([parameter], clipping, eps)


def test_equality_writes_nothing():
    parameter = torch.nn.Parameter(torch.full((3, 4), 1.0))
    parameter.grad = torch.full((3, 4), 0.5)
    version = parameter.grad._version
    fastclip.clip_grad_adaptive_(parameter, 0.5)
    assert parameter.grad._version == version
    parameter.grad[1, 0] = 2
    version = parameter.grad._version
    fastclip.clip_grad_adaptive_(parameter, 0.5)
    assert parameter.grad._version == version + 1
    assert parameter.grad[0].tolist() == [0.5] * 4 and parameter.grad[1].norm().item() == pytest.approx(1)


def test_empty_tensors_and_no_gradients(device):
    empty = [torch.nn.Parameter(torch.empty(shape, device=device)) for shape in ((0,), (0, 3), (3, 0))]
    for parameter in empty:
        parameter.grad = torch.empty_like(parameter)
    assert check([empty[0], make((4, 5), device=device), *empty[1:]]) > 0
    assert fastclip.clip_grad_adaptive_([torch.nn.Parameter(torch.ones(2))]) is None
    assert fastclip.clip_grad_adaptive_([]) is None
    assert fastclip.counters()["fallback"] == 0


def test_results_do_not_depend_on_native_code(monkeypatch):
    mine = [make(shape) for shape in SHAPES]
    theirs = [to(p, "cpu") for p in mine]
    for p in theirs:
        p.grad = p.grad.clone()
    fastclip.clip_grad_adaptive_(mine)
    monkeypatch.setattr("fastclip.adaptive._C", None)
    fastclip.clip_grad_adaptive_(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert fastclip.counters()["fallback_reasons"] == {"extension not built": 1}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "bad, error, message",
    [
        (3, TypeError, r"parameters\[1\]: expected a torch.Tensor, got int"),
        ("sparse", TypeError, r"parameters\[1\]: expected a gradient of layout torch.strided, got torch.sparse_coo"),
    ],
)
def test_errors_name_the_item_and_modify_nothing(bad, error, message, native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastclip.adaptive._C", None)
    first = make((4, 5))
    if bad == "sparse":
        bad = torch.nn.Parameter(torch.ones(3, 2))
        bad.grad = torch.ones(3, 2).to_sparse()
    before = first.grad.clone()
    with pytest.raises(error, match=message):
        fastclip.clip_grad_adaptive_([first, bad])
    assert torch.equal(first.grad, before) and fastclip.counters()["calls"] == 0


@pytest.mark.parametrize("name", ["clipping", "eps"])
def test_numbers(name):
    for given, error in ((-1, ValueError), (math.nan, ValueError), ("x", ValueError), (None, TypeError)):
        with pytest.raises(error, match=f"{name}: expected a number"):
            fastclip.clip_grad_adaptive_([make((2, 3))], **{name: given})
    parameter = make((2, 3))
    check([parameter], **{name: torch.tensor(0.25)})


@dtypes
@pytest.mark.parametrize("exponent", [-19, -26, -33])
def test_coefficients_beyond_float32(device, dtype, exponent):
    """Coefficients down to 3e-75 are applied as two factors; in float32 the products are normal numbers."""
    largest = 6e4 if dtype == torch.float16 else 1e38
    parameter = torch.nn.Parameter(torch.zeros(2, 9, dtype=dtype, device=device))
    parameter.grad = torch.full((2, 9), largest, dtype=dtype, device=device)
    check([parameter], 10.0**exponent, 1e-3)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (3, 1), (4, 4), (3, 4, 1)])
def test_weights_of_another_shape_are_an_error(shape, native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastclip.adaptive._C", None)
    first, second = make((4, 5)), make((3, 4))
    before = [first.grad.clone(), second.grad.clone()]
    second.data = torch.ones(shape)
    with pytest.raises(ValueError, match=r"parameters\[1\]: expected a weight of its gradient's shape \(3, 4\), got"):
        fastclip.clip_grad_adaptive_([first, second])
    assert torch.equal(first.grad, before[0]) and torch.equal(second.grad, before[1])


def test_a_weight_that_has_lost_its_memory_is_named():
    first, second = make((4, 5)), make((3, 4))
    before = first.grad.clone()
    second.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameters\[1\]: expected a weight with memory for its elements, got 0"):
        fastclip.clip_grad_adaptive_([first, second])
    assert torch.equal(first.grad, before)


@pytest.mark.parametrize("native", [True, False])
def test_expanded_gradients_modify_nothing(native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastclip.adaptive._C", None)
    first, second = make((4, 5)), torch.nn.Parameter(torch.ones(3, 4))
    second.grad = torch.ones(1, 4).expand(3, 4)
    before = first.grad.clone()
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        fastclip.clip_grad_adaptive_([first, second])
    assert torch.equal(first.grad, before)


def test_float8_goes_through_torch():
    parameter = torch.nn.Parameter(torch.ones(3, 8).to(torch.float8_e4m3fn))
    parameter.grad = torch.full((3, 8), 2.0).to(torch.float8_e4m3fn)
    fastclip.clip_grad_adaptive_([parameter], 0.25)
    assert parameter.grad.float().eq(0.25).all()


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check_dtensors(norm_type):
    """Every layout of weight and gradient: those of the whole tensors, on every rank."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    layouts = [Shard(0), Shard(1), Replicate()]
    partial = [Partial(), Partial("avg")] if gloo_averages() else [Partial()]
    for shape in [(5, 6), (1, 7), (7,), (), (3, 4, 2, 2)]:
        for of_weight, of_grad in itertools.product(layouts, [*layouts, *partial]):
            if any(isinstance(p, Shard) and p.dim >= len(shape) for p in (of_weight, of_grad)):
                continue
            whole = make(shape)
            parameter = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [of_weight]))
            if isinstance(of_grad, Partial):
                part = whole.grad * (0.5 + rank) / (2 if of_grad.reduce_op == "sum" else 1)  # 1/4 + 3/4, 1/2 and 3/2
                parameter.grad = DTensor.from_local(part, mesh, [of_grad])
            else:
                parameter.grad = distribute_tensor(whole.grad, mesh, [of_grad])
            reference([whole], norm_type=norm_type)
            fastclip.clip_grad_adaptive_([parameter], norm_type=norm_type)
            assert parameter.grad.placements == (of_grad,)
            torch.testing.assert_close(full(parameter.grad), whole.grad, rtol=3e-6, atol=0)


@pytest.mark.parametrize("norm_type", [1, 2, INF])
def test_units_of_dtensors(two, norm_type):
    two.run(check_dtensors, norm_type)


def check_fsdp():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    def model():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Conv1d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(30, 7))

    mine, alone = model(), model()
    fully_shard(mine, mesh=init_device_mesh("cpu", (2,)))
    for each in (mine, alone):
        each(torch.ones(2, 3, 8)).square().sum().backward()
    parameters = list(mine.parameters())
    if dist.get_rank() == 1:  # a rank without a gradient goes to the same collectives
        parameters[3].grad = None
    reference(alone.parameters())
    fastclip.clip_grad_adaptive_(parameters)
    for parameter, whole in zip(parameters[:3], alone.parameters(), strict=False):
        torch.testing.assert_close(parameter.grad.full_tensor(), whole.grad, rtol=1e-5, atol=1e-9)


@needs_fully_shard
def test_units_under_fsdp(two):
    two.run(check_fsdp)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("count, launches", [(1, 1), (300, 1), (900, 2)])
def test_launches(count, launches):
    """One launch for some 800 tensors; nothing is waited for, nothing copied."""
    data = torch.randn(2, count * 12, device="cuda")
    parameters = [torch.nn.Parameter(w.view(3, 4)) for w in data[0].split(12)]
    for parameter, grad in zip(parameters, data[1].split(12), strict=True):
        parameter.grad = grad.view(3, 4)
    with watch() as seen:
        fastclip.clip_grad_adaptive_(parameters)
    assert (seen.launches, seen.synchronisations, seen.copies) == (launches, [], 0)
