"""ClippedOptimizer and GradScaler on a CUDA device: launches, waits, bytes, and the same steps as on the CPU."""

import pytest
import torch
from cuda_support import EMULATED, assert_one_launch, cuda, watch
from support import INF
from torch.optim import SGD, AdamW

import fastclip
from fastclip import ClippedOptimizer

pytestmark = cuda
POLLS = 100_000  # bytes: partial norms, and the polls of the barrier, whose number depends on the order of blocks
scalers = pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, fastclip.GradScaler], ids=["torch", "fastclip"])


def make(device, fold=True, max_norm=1.0, sizes=(300, 17, 4), **kwargs):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size).to(device)) for size in sizes]
    inner = AdamW(parameters, 0.1, fused=True, **kwargs) if fold else SGD(parameters, 0.1)
    return parameters, ClippedOptimizer(inner, max_norm, fold=fold)


def set_grads(parameters, step, scale=1.0):
    for i, p in enumerate(parameters):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)) * scale
        p.grad = grad.to(p.device)


@pytest.mark.parametrize("fold", [True, False])
def test_the_same_steps_as_on_the_cpu(fold):
    (here, on_cpu), (there, on_cuda) = make("cpu", fold), make("cuda", fold)
    for step in range(6):
        on_cpu.max_norm = on_cuda.max_norm = 1e9 if step % 2 else 1.0
        for parameters, optimizer in ((here, on_cpu), (there, on_cuda)):
            set_grads(parameters, step)
            optimizer.step()
        torch.testing.assert_close(on_cuda.last_total_norm.cpu(), on_cpu.last_total_norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(on_cuda.last_clip_coef.cpu(), on_cpu.last_clip_coef, rtol=1e-6, atol=0)
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-5, atol=1e-6)


@scalers
@pytest.mark.parametrize("fold", [True, False])
def test_a_planted_inf(scaler_type, fold):
    (here, bare), (there, optimizer) = make("cpu", fold), make("cuda", fold)
    bare = bare.optimizer
    ours = scaler_type("cuda", init_scale=1024.0, growth_interval=2)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    ours.scale(torch.ones(1, device="cuda"))
    theirs.scale(torch.ones(1))
    for step in range(1, 7):
        for parameters in (here, there):
            set_grads(parameters, step, theirs.get_scale())
            if step == 3:
                parameters[1].grad[2] = INF
        theirs.unscale_(bare)
        torch.nn.utils.clip_grad_norm_(here, 1.0)
        theirs.step(bare)
        theirs.update()
        ours.step(optimizer)
        ours.update()
        assert ours.state_dict() == theirs.state_dict()
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_a_folded_step_waits_for_nothing_and_clips_in_one_launch(max_norm):
    parameters, optimizer = make("cuda", max_norm=max_norm, sizes=(300_000, 17))
    set_grads(parameters, 0)
    with watch() as seen:
        optimizer._clipping.clip()
    assert_one_launch(seen)
    if EMULATED:
        (kernel,) = seen.kernels
        total, blocks = 4 * 300_017, kernel.grid[0]
        # Reads the gradients once, each block all partial norms; writes partial norms and results only.
        assert 32 * kernel.stats.global_read_sectors <= total + POLLS
        assert kernel.stats.global_written_bytes <= 16 * blocks + 64
    optimizer.step()  # makes the optimizer's state
    with watch() as seen:
        optimizer.step()
        _ = optimizer.last_total_norm, optimizer.last_clip_coef
    assert seen.synchronisations == []


@pytest.mark.parametrize("fold", [True, False])
def test_an_amp_step_is_one_launch(fold):
    parameters, optimizer = make("cuda", fold, sizes=(300_000, 17))
    scaler = fastclip.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones(1, device="cuda"))
    set_grads(parameters, 0, 1024.0)
    with watch() as seen:
        found_inf = optimizer._clipping.prepare_scaled(scaler._scale)
    assert_one_launch(seen)
    if EMULATED:
        (kernel,) = seen.kernels
        total, blocks = 4 * 300_017, kernel.grid[0]
        assert 32 * kernel.stats.global_read_sectors <= (1 if fold else 2) * total + POLLS
        assert kernel.stats.global_written_bytes <= (0 if fold else total) + 16 * blocks + 64
    assert found_inf.item() == 0
    optimizer._clipping.prepared = None
    if fold:
        set_grads(parameters, 1, 1024.0)
        scaler.step(optimizer)
        scaler.update()
        set_grads(parameters, 2, 1024.0)
        with watch() as seen:
            scaler.step(optimizer)
        assert seen.synchronisations == []


def test_a_threshold_on_the_device():
    parameters, optimizer = make("cuda", max_norm=torch.tensor(0.5, device="cuda"))
    set_grads(parameters, 0)
    with watch() as seen:
        optimizer._clipping.clip()
    assert_one_launch(seen)
    scale = optimizer.optimizer.grad_scale
    assert scale.is_cuda and scale.dtype == torch.float32
    torch.testing.assert_close(scale.cpu() * 0.5, optimizer.last_total_norm.cpu() + 1e-6, rtol=1e-6, atol=0)


def test_in_a_graph():
    (here, eager), (there, optimizer) = (make("cuda", capturable=True) for _ in range(2))
    for parameters, o in ((here, eager), (there, optimizer)):
        set_grads(parameters, 0)
        o.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    for step in range(1, 4):
        set_grads(here, step)
        grads = [p.grad.clone() for p in here]
        eager.step()
        for grad, q in zip(grads, there, strict=True):
            q.grad.copy_(grad)
        graph.replay()
        torch.testing.assert_close(optimizer.last_total_norm.cpu(), eager.last_total_norm.cpu())
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu())
