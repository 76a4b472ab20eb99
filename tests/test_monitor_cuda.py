"""A monitor on a CUDA device: nothing in a training step waits, and what arrives later is right."""

import pytest
import torch
from cuda_support import cuda, watch
from support import EMULATED, INF
from torch import nn

import fastclip

pytestmark = cuda


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).cuda()


def set_grads(model, step):
    """Gradients without a backward pass, which might wait."""
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full(parameter.shape, float(step + 1) * (index + 1)).cuda()


def expected(model, steps):
    sizes = torch.tensor([p.numel() for p in model.parameters()], dtype=torch.float64)
    values = torch.tensor([[(s + 1) * (i + 1) for i in range(len(sizes))] for s in steps], dtype=torch.float64)
    return values * sizes.sqrt(), values


def assert_right(history, model, steps):
    norms, values = expected(model, steps)
    assert history.steps.tolist() == list(steps)
    torch.testing.assert_close(history.values[..., 0], norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(history.values[..., 1], values, rtol=1e-6, atol=0)
    torch.testing.assert_close(history.total_norm, norms.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold", ["number", "tensor"])
def test_no_step_waits(threshold):
    model = make_model()
    max_norm = 1e9 if threshold == "number" else torch.tensor(1e9, device="cuda")
    monitor = fastclip.GradientMonitor(model, weight_norms=5)
    copies = 0
    for step in range(70):
        set_grads(model, step)
        torch.cuda.synchronize()
        with watch() as seen:
            monitor.clip_grad_norm_(max_norm)
            monitor.last(wait=False)
        assert seen.synchronisations == []
        copies += seen.copies
        if EMULATED:
            assert seen.h2d_bytes == 0
    # Records travel together; beside those copies there are the ones on the device.
    assert copies <= 70 / 16 + (70 if threshold == "tensor" else 0) + 70
    assert monitor._store.newest() is not None  # some have come by themselves
    assert_right(monitor.history(), model, range(70))
    assert monitor.history().max_norm.tolist() == [1e9] * 70


def test_between_recorded_steps_it_is_plain_clipping():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, every=50)
    set_grads(model, 0)
    for _ in range(3):
        monitor.clip_grad_norm_(1e9)
    with watch() as seen:
        monitor.clip_grad_norm_(1e9)
    assert (seen.launches, seen.synchronisations, seen.copies) == (1, [], 0)


def test_the_newest_record_that_has_come():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    for step in range(3):
        set_grads(model, step)
        monitor.clip_grad_norm_(1e9)
    assert monitor.last(wait=False) == {}
    assert monitor.last()["grad/step"] == 2


def test_what_is_changed_in_place_later():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    limit = torch.tensor(2.0, device="cuda")
    set_grads(model, 0)
    norm = monitor.clip_grad_norm_(limit)
    norm.zero_()
    limit.fill_(7.0)
    history = monitor.history()
    assert history.max_norm.tolist() == [2.0] and history.total_norm[0] > 2


def test_streams_may_change():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    streams = [torch.cuda.Stream(), torch.cuda.current_stream(), torch.cuda.Stream()]
    for step in range(24):
        stream = streams[step // 5 % 3]
        with torch.cuda.stream(stream):
            set_grads(model, step)
            monitor.clip_grad_norm_(1e9)
    assert_right(monitor.history(), model, range(24))


def test_activations_and_weight_norms():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, activations=True, weight_norms=1)
    with torch.no_grad():
        model[0].weight.mul_(100)
    x = torch.randn(8, 4).cuda()
    wanted = (model[1](model[0](x)).abs() > 0.95**0.5).float().mean().item()
    monitor._activations.take()
    for step in range(2):
        model(x)
        set_grads(model, step)
        monitor.clip_grad_norm_(1e9)
    history = monitor.history()
    assert history.activations[0].saturated.tolist() == pytest.approx([wanted] * 2) and wanted > 0.5
    norms = torch.stack([p.detach().double().norm() for p in model.parameters()]).cpu()
    torch.testing.assert_close(history.weight_norms, torch.stack([norms, norms]), rtol=1e-6, atol=0)


def test_a_scaler_does_not_wait():
    model = make_model()
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 0.0, fused=True), 1e9)
    monitor = fastclip.GradientMonitor(model, weight_norms=0)
    monitor.attach(optimizer)
    optimizer.optimizer.step = lambda: None  # torch's may look at found_inf
    scale = torch.tensor(8.0, device="cuda")
    for step in range(20):
        set_grads(model, step)
        optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros((), device="cuda")
        torch.cuda.synchronize()
        with watch() as seen:
            optimizer.step()
        assert seen.synchronisations == []
    scale.fill_(1.0)
    history = monitor.history()
    norms, _ = expected(model, range(20))
    torch.testing.assert_close(history.values[..., 0], norms / 8, rtol=1e-6, atol=0)
    torch.testing.assert_close(history.total_norm, norms.norm(dim=1) / 8, rtol=1e-6, atol=0)
    assert history.grad_scale.tolist() == [8.0] * 20


def test_a_model_on_two_devices():
    model = make_model()
    model[0].cpu()
    monitor = fastclip.GradientMonitor(model, activations=True)
    for step in range(18):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full(parameter.shape, float(step + 1) * (index + 1)).to(parameter.device)
        monitor.clip_grad_norm_(1e9)
    assert_right(monitor.history(), model, range(18))
    assert not monitor.history().weight_norms[0].isnan().any()


def test_inf_on_the_device():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    set_grads(model, 0)
    model[0].weight.grad[0, 0] = INF
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert history.values[0, :, 3].tolist() == [1, 0, 0, 0] and history.total_norm[0] == INF


def test_a_captured_call_is_not_recorded():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    set_grads(model, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        monitor.clip_grad_norm_(1e9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="captured in a CUDA graph is not recorded"), torch.cuda.graph(graph):
        monitor.clip_grad_norm_(1e9)
    graph.replay()
    torch.cuda.synchronize()
    assert_right(monitor.history(), model, [0])
