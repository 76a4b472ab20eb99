"""The random lists of `make fuzz`: a few of them, and that what is wrong is found."""

import sys

import pytest
import torch
from support import ROOT

import fastclip

sys.path.append(str(ROOT / "tests" / "fuzz"))

from checks import run


def failures(seeds):
    count = 0
    for seed in seeds:
        try:
            run(seed)
        except AssertionError as error:
            assert "threads=" in str(error)  # the list is described
            count += 1
    return count


def test_some_lists(isa):
    assert failures(range(150)) == 0


def wrong_norm(clip):
    return lambda *args, **keywords: clip(*args, **keywords) * 1.00001


def wrong_neighbour(clip):
    """Writes the element behind each gradient."""

    def wrong(parameters, *args, **keywords):
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        norm = clip(parameters, *args, **keywords)
        for grad in (p.grad for p in parameters if p.grad is not None):
            behind = grad.storage_offset() + grad.numel()
            if grad.is_contiguous() and (behind + 1) * grad.element_size() <= grad.untyped_storage().nbytes():
                grad.as_strided((1,), (1,), behind).add_(1.0)
        return norm

    return wrong


@pytest.mark.parametrize("fault", [wrong_norm, wrong_neighbour])
def test_a_fault_is_found(monkeypatch, fault):
    monkeypatch.setattr(fastclip, "clip_grad_norm_", fault(fastclip.clip_grad_norm_))
    assert failures(range(100)) > 5
