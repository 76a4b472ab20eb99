"""A loop in the manner of nanoGPT: autocast, GradScaler, micro steps, unscale_, clip, step."""

import pytest
import torch
from trainer_support import TinyLanguageModel, check_program, learned, tokens

STEPS, MICRO_STEPS = 6, 2


def train(clip, dtype, init_scale):
    model = TinyLanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=(dtype == torch.float16))
    batches = iter(tokens(STEPS * MICRO_STEPS))
    losses, scales = [], []
    for _ in range(STEPS):
        for _ in range(MICRO_STEPS):
            batch = next(batches)
            with torch.amp.autocast("cpu", dtype=dtype):
                logits = model(batch[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / MICRO_STEPS
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert (scales[0] < init_scale) == (init_scale == OVERFLOWS)
    return learned(model, losses=losses, scales=scales)


OVERFLOWS = 2.0**24  # times gradients of about 0.01: beyond float16's 65504


@pytest.mark.parametrize(
    ("dtype", "init_scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**10), (torch.float16, OVERFLOWS)]
)
def test_loop(dtype, init_scale):
    check_program(lambda clip: train(clip, dtype, init_scale), clip=0.1, calls=STEPS)
