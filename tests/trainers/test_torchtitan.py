"""A loop in the manner of torchtitan, which computes the norm and clips with it in two calls."""

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from trainer_support import TinyLanguageModel, check_program, learned, tokens

STEPS = 6


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None):
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    total_norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    # What torchtitan does between pipeline stages, here with one of them: the norm is changed in place.
    total_norm **= norm_type
    total_norm **= 1.0 / norm_type
    clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return total_norm


def train(clip):
    model = TinyLanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, norms = [], []
    for batch in tokens(STEPS):
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        norms.append(clip_grad_norm_(model.parameters(), clip, foreach=True))
        optimizer.step()
        losses.append(loss.item())
    return learned(model, losses=losses, norms=norms)


def test_loop():
    check_program(train, clip=0.1, calls=2 * STEPS)
