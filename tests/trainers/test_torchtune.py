"""A loop in the manner of torchtune's recipes: gradients of several batches, divided by their tokens, then clipped."""

import torch
from trainer_support import TinyLanguageModel, check_program, learned, tokens

STEPS, ACCUMULATED, IGNORED = 6, 2, -100


def train(clip):
    model = TinyLanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, norms = [], []
    running_loss, num_tokens = 0, 0
    for index, batch in enumerate(tokens(STEPS * ACCUMULATED)):
        labels = batch[:, 1:].masked_fill(batch[:, 1:] < 8, IGNORED)
        current_num_tokens = (labels != IGNORED).sum()
        num_tokens += current_num_tokens
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        current_loss = loss * current_num_tokens
        running_loss += current_loss.detach()
        current_loss.backward()
        if (index + 1) % ACCUMULATED == 0:
            for parameter in model.parameters():
                parameter.grad *= 1 / num_tokens
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=float(clip)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(running_loss / num_tokens)
            running_loss, num_tokens = 0, 0
    return learned(model, losses=losses, norms=norms)


def test_loop():
    check_program(train, clip=0.1, calls=STEPS)
