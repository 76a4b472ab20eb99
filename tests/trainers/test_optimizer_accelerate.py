"""accelerate.prepare with a ClippedOptimizer: scheduler, gradient accumulation, saved and loaded state."""

import pytest
import torch

import fastclip

accelerate = pytest.importorskip("accelerate")


def train(wrap, folder=None):
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(8, 1)
    inner = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    optimizer = fastclip.ClippedOptimizer(inner, 0.5) if wrap else inner
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward((model(batch) - 5).square().mean())
            if not wrap and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if folder:
        accelerator.save_state(folder)
        before = inner.state[inner.param_groups[0]["params"][0]]["exp_avg"].clone()
        accelerator.load_state(folder)
        assert torch.equal(inner.state[inner.param_groups[0]["params"][0]]["exp_avg"], before)
    return model.weight.detach().clone(), optimizer.param_groups[0]["lr"]


def test_prepare(tmp_path):
    weight, lr = train(wrap=False)
    clipped, clipped_lr = train(wrap=True, folder=tmp_path)
    assert clipped_lr == lr < 0.01
    torch.testing.assert_close(clipped, weight, rtol=1e-5, atol=1e-6)
