"""clip_grad_norms_ against clip_grad_norm_ group by group: norms, thresholds, dtypes, threads, errors."""

import math

import numpy as np
import pytest
import torch
from cuda_support import watch
from oracle import check_norm, check_scaled, total_norm
from support import DTYPES, INF, LARGE, NAN, clone, dtypes, make_parameters, norm_types

import fastclip
from fastclip._native import _C


def on_device(count, size=70):
    """A group for each of `count` gradients, cut from one tensor."""
    return [[p] for p in make_parameters(torch.randn(count * size, device="cuda").split(size))]


def make_groups(device, dtype=torch.float32, large=5000):
    """Groups of none, one and several gradients, of very different sizes, one with an empty gradient."""
    sizes = [[5], [], [1, 700, 64], [large // 3], [2000, 0, 3], [33] * 7, [large], [9]]
    return [[(torch.randn(n) * 10 ** (i - 3)).to(dtype).to(device) for n in of] for i, of in enumerate(sizes)]


def check(grads, max_norms, norm_type=2.0, given=None, native=True):
    """Clips copies in one call and group by group. The norms are the same to one unit of float32."""
    before = [clone(group) for group in grads]
    groups, alone = ([make_parameters(clone(group)) for group in grads] for _ in range(2))
    norms = fastclip.clip_grad_norms_(groups, max_norms if given is None else given, norm_type)
    counters = fastclip.counters()
    assert norms.shape == (len(grads),) and not norms.requires_grad
    assert (counters["fallback"] == 0 and counters["native"] == 1) is native
    for i, (group, other, was) in enumerate(zip(groups, alone, before, strict=True)):
        max_norm = max_norms[i] if isinstance(max_norms, list) else max_norms
        if not was:
            assert norms[i].item() == 0
            continue
        check_norm(norms[i].to(norms.dtype), was, norm_type)
        want = fastclip.clip_grad_norm_(other, INF if max_norm is None else max_norm, norm_type)
        assert want.item() == pytest.approx(norms[i].item(), rel=2**-23, nan_ok=True)
        for mine, theirs, g in zip(group, other, was, strict=True):
            if max_norm in (None, INF):
                assert torch.equal(mine.grad, g)
            else:
                coef = min(1.0, max_norm / (total_norm(was, norm_type) + 1e-6))
                check_scaled(mine.grad, g, coef)
                # One rounding of the product, and one of the norm on a device that adds up in another order.
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=2 * torch.finfo(g.dtype).eps, atol=0)
    return norms


@dtypes
@norm_types
def test_each_group_as_alone(device, dtype, norm_type):
    grads = make_groups(device, dtype, LARGE if norm_type == 2 else 5000)
    if norm_type == INF:
        grads = [[g for g in group if g.numel()] for group in grads]
    check(grads, [0.5, 1.0, 1e9, 3.0, None, 1e-3, 2.0, INF], norm_type)


def test_forms_of_thresholds(device):
    grads = make_groups(device)[:3]
    for given in ([0.5, torch.tensor(1.0), 2], (0.5, 1, 2.0), torch.tensor([0.5, 1.0, 2.0])):
        fastclip.reset_counters()
        check(grads, [0.5, 1.0, 2.0], given=given)
    for given in (0.25, torch.tensor(0.25)):
        fastclip.reset_counters()
        check(grads, [0.25] * 3, given=given)


def test_groups_of_any_kind(device):
    grads = [torch.full((4,), float(i + 1), device=device) for i in range(4)]
    a, b, c, d = make_parameters(grads)
    norms = fastclip.clip_grad_norms_(iter([a, (b,), iter([c]), {d: 1}.keys()]), 1.0)
    assert norms.tolist() == [2, 4, 6, 8]
    for grad in grads:
        assert grad.norm().item() == pytest.approx(1, rel=1e-5)


def test_dtypes_mixed():
    grads = [[torch.randn(100).to(dtype)] for dtype in DTYPES]
    assert check([[g.double() for g in group] for group in grads], 0.5).dtype == torch.float64
    assert fastclip.clip_grad_norms_([make_parameters(group) for group in grads], 0.5).dtype == torch.float64
    assert fastclip.clip_grad_norms_([make_parameters(group) for group in grads[2:]], 0.5).dtype == torch.float32


def test_thousands_of_groups(device):
    count = 2500
    grads = [[g] for g in torch.randn(count * 7, device=device).split(7)]
    before = torch.stack([g[0] for g in grads]).cpu().double()
    norms = fastclip.clip_grad_norms_([make_parameters(group) for group in grads], [1.0 + i % 3 for i in range(count)])
    want = before.norm(dim=1)
    torch.testing.assert_close(norms.cpu().double(), want, rtol=1e-6, atol=0)
    coef = (torch.tensor([1.0 + i % 3 for i in range(count)]) / (want + 1e-6)).clamp(max=1)
    after = torch.stack([g[0] for g in grads]).cpu().double()
    torch.testing.assert_close(after, before * coef[:, None], rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_nonfinite_groups_as_alone(device, bad):
    grads = [torch.ones(50, device=device) for _ in range(4)]
    grads[1][3], grads[2][7] = bad, bad
    groups = make_parameters(grads)
    norms = fastclip.clip_grad_norms_(groups, [1.0, 1.0, None, 1e3])
    want = torch.ones(50)
    want[3] = bad
    alone = make_parameters([want])
    norm = torch.nn.utils.clip_grad_norm_(alone, 1.0)
    torch.testing.assert_close(norms[1].cpu(), norm, equal_nan=True)
    torch.testing.assert_close(grads[1].cpu(), want, equal_nan=True)
    assert grads[0].norm().item() == pytest.approx(1, rel=1e-5)
    assert grads[2].isfinite().sum() == 49 and grads[2][0] == 1
    assert torch.equal(grads[3], torch.ones_like(grads[3]))


def test_error_if_nonfinite_modifies_nothing(device):
    grads = [torch.ones(50, device=device), torch.full((3,), INF, device=device), torch.ones(5, device=device)]
    before = clone(grads)
    with pytest.raises(RuntimeError, match=r"The total norm of order 2.0 .*`groups\[1\]` is non-finite"):
        fastclip.clip_grad_norms_(make_parameters(grads), 1.0, error_if_nonfinite=True)
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    norms = fastclip.clip_grad_norms_(make_parameters([grads[0], grads[2]]), 1.0, error_if_nonfinite=True)
    assert norms[0].item() == pytest.approx(math.sqrt(50)) and grads[0].norm().item() == pytest.approx(1)


def test_nothing_to_clip_is_not_written():
    grads = [torch.ones(4), torch.ones(9)]
    versions = [g._version for g in grads]
    fastclip.clip_grad_norms_(make_parameters(grads), [2.5, 1.0])
    assert [g._version - v for g, v in zip(grads, versions, strict=True)] == [0, 1]


def test_no_groups_and_no_gradients():
    assert fastclip.clip_grad_norms_([], []).shape == (0,)
    assert fastclip.clip_grad_norms_([[], [torch.nn.Parameter(torch.ones(2))]], 1.0).tolist() == [0, 0]
    (empty,) = make_parameters([torch.empty(0)])
    assert fastclip.clip_grad_norms_([[empty], []], 1.0).tolist() == [0, 0]


@pytest.mark.parametrize("case", ["gaps", "shared", "norm_type", "complex"])
def test_a_call_for_each_group_where_no_kernel_does_all(case):
    grads = [[torch.randn(6, 10)], [], [torch.randn(7), torch.randn(3)]]
    norm_type, reason = 2.0, "groups with gaps"
    if case == "gaps":
        grads[0] = [torch.randn(6, 20)[:, ::2]]
    elif case == "shared":
        grads[0], reason = [grads[2][0], grads[2][0]], "gradients that share memory"
        grads[2] = grads[2][1:]
    elif case == "norm_type":
        norm_type, reason = 3.0, "norm_type"
    elif case == "complex":
        grads[0], reason = [torch.randn(6, dtype=torch.complex64)], "complex"
    groups, alone = ([make_parameters(clone(group)) for group in grads] for _ in range(2))
    norms = fastclip.clip_grad_norms_(groups, [0.5, 1.0, None], norm_type)
    assert fastclip.counters()["fallback_reasons"][reason] >= 1
    want = torch.nn.utils.clip_grad_norm_(alone[0], 0.5, norm_type)
    torch.testing.assert_close(norms[0], want)
    for mine, theirs in zip(groups[0], alone[0], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert norms[1] == 0 and all(torch.equal(p.grad, g) for p, g in zip(groups[2], grads[2], strict=True))


@pytest.mark.parametrize("native", [True, False])
def test_errors_modify_nothing(native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastclip.groups._C", None)
    a, b, c = make_parameters([torch.ones(5), torch.ones(6), torch.ones(7)])
    call = fastclip.clip_grad_norms_
    for groups, max_norms, error, message in [
        ([[a], [b, c], [c]], 1.0, ValueError, r"each parameter in one group, got one in groups\[1\] and groups\[2\]"),
        ([[a], [b, 3]], 1.0, TypeError, r"groups\[1\]\[1\]: expected a torch.Tensor, got int"),
        ([[a], 3], 1.0, TypeError, r"groups\[1\]: expected a torch.Tensor or an iterable of them, got int"),
        (3, 1.0, TypeError, r"groups: expected .* got int"),
        (a, 1.0, TypeError, r"groups: expected an iterable of groups, got a tensor"),
        ([[a], [b]], [1.0], ValueError, r"max_norms: expected one for each of 2 groups, got 1"),
        ([[a], [b]], torch.ones(3), ValueError, r"max_norms: expected one for each of 2 groups, got 3"),
        ([[a], [b]], torch.ones(1, 2), ValueError, r"max_norms: expected at most 1 dimension, got 2"),
        ([[a], [b]], [1.0, "x"], ValueError, r"max_norms\[1\]: expected a number, got 'x'"),
        ([[a], [b]], "x", ValueError, r"max_norms: expected a number, got 'x'"),
        ([[a], [b]], {0: 1.0, 1: 1.0}, TypeError, r"max_norms: expected a number, got {0: 1.0, 1: 1.0}"),
    ]:
        with pytest.raises(error, match=message):
            call(groups, max_norms)
    assert all(p.grad.eq(1).all() for p in (a, b, c))
    assert fastclip.counters()["fallback_reasons"] == {}


def test_one_threshold_from_numpy():
    parameters = make_parameters([torch.ones(4), torch.ones(9)])
    fastclip.clip_grad_norms_(parameters, np.array(1.0))
    assert [p.grad.norm().item() for p in parameters] == pytest.approx([1, 1])


@pytest.mark.parametrize("native", [True, False])
def test_expanded_gradients_modify_nothing(native, monkeypatch):
    if not native:
        monkeypatch.setattr("fastclip.groups._C", None)
    first, second = make_parameters([torch.ones(9), torch.ones(1, 4).expand(3, 4)])
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        fastclip.clip_grad_norms_([[first], [second]], 1.0)
    assert first.grad.eq(1).all()


def check_device(groups, max_norms):
    before = [[p.grad.cpu() for p in group] for group in groups]
    norms = fastclip.clip_grad_norms_(groups, max_norms).cpu()
    for i, (group, was) in enumerate(zip(groups, before, strict=True)):
        check_norm(norms[i].clone(), was, 2)
        for parameter, g in zip(group, was, strict=True):
            check_scaled(parameter.grad, g, min(1.0, float(max_norms[i]) / (total_norm(was, 2) + 1e-6)))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("count", [3, 300])
def test_one_launch(count):
    groups = on_device(count)
    fastclip.clip_grad_norms_(groups, 0.5)
    with watch() as seen:
        fastclip.clip_grad_norms_(groups, 0.25)
    assert (seen.launches, seen.cooperative_launches, seen.synchronisations, seen.copies) == (1, 1, [], 0)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
def test_long_tables_and_any_number_of_blocks():
    for count, blocks in ((1100, 3), (40, 1), (40, 100)):  # 1,100 gradients and as many groups: beyond the parameters
        _C.force_cuda_blocks(blocks)
        check_device(on_device(count, 21), [0.1 + i % 5 for i in range(count)])
    groups = on_device(9, 5000)  # more warps than groups: each group is many warps' work
    check_device([[p for group in groups[:4] for p in group], *groups[4:]], [0.5] * 6)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize("error", [False, True])
def test_several_launches_where_a_cooperative_one_is_refused(error):
    groups = on_device(40)
    copies = [make_parameters([p.grad.clone() for p in group]) for group in groups]
    want = fastclip.clip_grad_norms_(copies, 0.5)
    _C.allow_cooperative_launches(False)
    with watch() as seen:
        norms = fastclip.clip_grad_norms_(groups, 0.5, error_if_nonfinite=error)
    assert seen.launches == 3 and seen.cooperative_launches == 0
    # Copies begin at other addresses, so that other warps add up other elements.
    torch.testing.assert_close(norms, want, rtol=2**-22, atol=0)
    for (mine,), (theirs,) in zip(groups, copies, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2**-22, atol=0)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_device")
def test_thresholds_on_the_device_are_not_waited_for():
    groups = on_device(5)
    thresholds = torch.tensor([0.5, INF, 1.0, 1e9, 0.1], device="cuda", dtype=torch.float64)
    with watch() as seen:
        fastclip.clip_grad_norms_(groups, thresholds)
    assert seen.synchronisations == []
    thresholds = thresholds.float()
    check_device(groups, thresholds)


def test_torch_compile_leaves_the_graph():
    from torch._dynamo.testing import CompileCounter

    grads = [torch.ones(4), torch.ones(9)]
    groups = make_parameters(grads)

    @torch.compile(backend=CompileCounter())
    def step(x):
        norms = fastclip.clip_grad_norms_(groups, 1.0)
        fastclip.clip_grad_adaptive_([], 0.5)
        return norms + x

    assert step(torch.ones(2)).tolist() == [3, 4]
    assert grads[1].norm().item() == pytest.approx(1, rel=1e-5)
