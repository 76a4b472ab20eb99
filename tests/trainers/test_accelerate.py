"""Accelerator.clip_grad_norm_ and clip_grad_value_, with gradient accumulation, in fp32 and bf16 autocast."""

import pytest
import torch
from trainer_support import BITWISE, ROUNDING, check_program, learned, regression_data, regressor

accelerate = pytest.importorskip("accelerate")

BATCHES, ACCUMULATED = 12, 2


@pytest.fixture(autouse=True)
def no_state_left():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(clip, method, mixed_precision):
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATED
    )
    model = regressor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression_data(8 * BATCHES)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                getattr(accelerator, method)(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return learned(accelerator.unwrap_model(model), losses=losses)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("method", "clip", "tolerance"), [("clip_grad_norm_", 1.0, ROUNDING), ("clip_grad_value_", 0.1, BITWISE)]
)
def test_accelerator(method, clip, tolerance, mixed_precision):
    check_program(
        lambda limit: train(limit, method, mixed_precision), clip, calls=BATCHES // ACCUMULATED, tolerance=tolerance
    )
