"""The tests that torch has for its own clipping functions, restated for fastclip."""

import copy
import itertools

import pytest
import torch
from support import INF, NAN

import fastclip

FOREACH = [False, True, None]
foreach_values = pytest.mark.parametrize("foreach", FOREACH)


def norm_of(grads, norm_type):
    if norm_type == INF:
        return max(g.abs().max().item() for g in grads)
    return sum(g.double().abs().pow(norm_type).sum().item() for g in grads) ** (1 / norm_type)


def scale_between(layer, grads):
    """The one factor between the gradients given and those of the layer."""
    factors = torch.cat([(p.grad / g).view(-1) for p, g in zip(layer.parameters(), grads, strict=True)])
    assert factors.std() < 1e-6
    return factors[0].item()


def layer_with_gradients(device, factor=1.0):
    layer = torch.nn.Linear(10, 10).to(device)
    grads = [torch.arange(1.0, 101, device=device).view(10, 10) * factor, torch.ones(10, device=device).div(1000)]
    for p, g in zip(layer.parameters(), grads, strict=True):
        p.grad = g.clone()
    return layer, grads


@foreach_values
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
def test_clip_grad_norm(device, foreach, norm_type):
    layer, grads = layer_with_gradients(device)
    want = norm_of(grads, float(norm_type))
    norm = fastclip.clip_grad_norm_(layer.parameters(), 2, norm_type=norm_type, foreach=foreach)
    assert norm.item() == pytest.approx(want, rel=1e-5)
    assert norm_of([p.grad for p in layer.parameters()], float(norm_type)) == pytest.approx(2, rel=1e-5)
    assert scale_between(layer, grads) == pytest.approx(2 / want, rel=1e-5)


@foreach_values
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2, 4, "inf"])
def test_clip_grad_norm_of_small_gradients_changes_nothing(device, foreach, norm_type):
    layer, _ = layer_with_gradients(device)
    grads = [torch.rand(10, 10, device=device).div(10_000), torch.ones(10, device=device).div(500)]
    for p, g in zip(layer.parameters(), grads, strict=True):
        p.grad.copy_(g)
    before = norm_of(grads, float(norm_type))
    norm = fastclip.clip_grad_norm_(layer.parameters(), 2, norm_type=norm_type, foreach=foreach)
    after = norm_of([p.grad for p in layer.parameters()], float(norm_type))
    assert norm.item() == pytest.approx(before, rel=1e-5) and after == before and before <= 2
    assert scale_between(layer, grads) == 1


@foreach_values
def test_clip_grad_norm_of_one_parameter(device, foreach):
    p1, p2 = torch.randn(10, 10, device=device), torch.randn(10, 10, device=device)
    g = torch.arange(1.0, 101, device=device).view(10, 10)
    p1.grad, p2.grad = g.clone(), g.clone()
    fastclip.clip_grad_norm_(p1, 2, norm_type="inf", foreach=foreach)
    fastclip.clip_grad_norm_([p2], 2, norm_type="inf", foreach=foreach)
    assert torch.equal(p1.grad, p2.grad) and p1.grad.max().item() == pytest.approx(2)


@foreach_values
def test_clip_grad_norm_on_several_devices(foreach):
    if not torch.cuda.is_available():
        pytest.skip("no second device")
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).cuda()])
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    norm = fastclip.clip_grad_norm_(layers.parameters(), 0.5, foreach=foreach)
    assert norm.device.type == "cpu" and norm.item() == pytest.approx(40**0.5)
    total = sum(p.grad.cpu().pow(2).sum() for p in layers.parameters())
    assert total.sqrt().item() == pytest.approx(0.5, rel=1e-5)


@foreach_values
def test_clip_grad_value(device, foreach):
    layer = torch.nn.Linear(10, 10).to(device)
    for parameter_list in (list(layer.parameters()), layer.parameters()):
        grads = [torch.arange(-50.0, 50, device=device).view(10, 10).div(5), torch.ones(10, device=device).mul(2)]
        for p, g in zip(layer.parameters(), grads, strict=True):
            p.grad = g.clone()
        fastclip.clip_grad_value_(parameter_list, 2.5, foreach=foreach)
        for p, g in zip(layer.parameters(), grads, strict=True):
            assert torch.equal(p.grad, g.clamp(-2.5, 2.5))
    p1, p2 = torch.randn(10, 10, device=device), torch.randn(10, 10, device=device)
    p1.grad, p2.grad = grads[0].clone(), grads[0].clone()
    fastclip.clip_grad_value_(p1, 2.5, foreach=foreach)
    fastclip.clip_grad_value_([p2], 2.5, foreach=foreach)
    assert torch.equal(p1.grad, p2.grad)


NOTHING_WRONG = [[1.0, 2.0], [0.0], [3e38, 3e38], [1e-45]]
WRONG = [[INF], [-INF], [NAN], [1.0, INF], [INF, NAN], [1.0, 1.0, -INF]]


@foreach_values
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize(("values", "wrong"), [*[(v, False) for v in NOTHING_WRONG[:2]], *[(v, True) for v in WRONG]])
def test_clip_grad_norm_error_if_nonfinite(device, foreach, norm_type, values, wrong):
    for prefix in ([], [torch.ones(10, 10)]):
        parameters = [torch.ones(g.shape) for g in prefix] + [torch.ones(len(values))]
        parameters = [p.to(device).requires_grad_() for p in parameters]
        for p, g in zip(parameters, [*prefix, torch.tensor(values)], strict=True):
            p.grad = g.to(device, copy=True)
        before = copy.deepcopy([p.grad for p in parameters])
        if wrong:
            with pytest.raises(RuntimeError, match=f"The total norm of order {norm_type} for gradients from"):
                fastclip.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True, foreach=foreach)
            for p, g in zip(parameters, before, strict=True):
                assert torch.equal(p.grad.nan_to_num(7), g.nan_to_num(7))
            norm = fastclip.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=False, foreach=foreach)
            assert not norm.isfinite()
        else:
            assert fastclip.clip_grad_norm_(parameters, 1.0, norm_type, True, foreach).isfinite()


@pytest.mark.parametrize("values", NOTHING_WRONG)
def test_error_if_nonfinite_is_about_the_norm_not_its_squares(device, values):
    # torch raises for the third: its squares overflow
    p = torch.ones(len(values), device=device)
    p.grad = torch.tensor([v / 2 for v in values], device=device)
    assert fastclip.clip_grad_norm_(p, 1.0, error_if_nonfinite=True).isfinite()


@foreach_values
@pytest.mark.parametrize("norm_type", [0.5, 1.5, 2.0, 4.0, INF])
def test_get_total_norm_then_clip_is_clip_grad_norm(device, foreach, norm_type):
    (first, grads), second = layer_with_gradients(device), torch.nn.Linear(10, 10).to(device)
    for p, g in zip(second.parameters(), grads, strict=True):
        p.grad = g.clone()
    norm = fastclip.get_total_norm([p.grad for p in first.parameters()], norm_type, foreach=foreach)
    fastclip.clip_grads_with_norm_(first.parameters(), 1.0, norm, foreach=foreach)
    assert torch.equal(norm, fastclip.clip_grad_norm_(second.parameters(), 1.0, norm_type, foreach=foreach))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@foreach_values
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_clips_when_the_norm_is_larger_only(device, foreach, factor):
    layer, grads = layer_with_gradients(device, factor)
    norm = norm_of(grads, 2)
    for ratio in (0.5, 2.0):
        for p, g in zip(layer.parameters(), grads, strict=True):
            p.grad = g.clone()
        fastclip.clip_grad_norm_(layer.parameters(), norm * ratio, foreach=foreach)
        assert scale_between(layer, grads) == pytest.approx(min(1.0, ratio), rel=1e-3)


def test_parameters_of_a_trained_model(device):
    """A few steps of a small model with torch's and with fastclip's clipping end in the same weights."""
    weights = []
    for module in (torch.nn.utils, fastclip):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(64, 8, device=device)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
            module.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        weights.append(list(itertools.chain(p.detach() for p in model.parameters())))
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
