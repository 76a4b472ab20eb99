"""Micro-cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``, with its compare and histogram tools."""

import pytest
import torch

import fastclip
from benchmarks import models
from benchmarks.cases import CLIPPED, UNCLIPPED, Case
from benchmarks.gradients import Gradients

CASES = [
    Case("micro", "RL policy, fp32", models.rl_policy(), "fp32"),
    Case("micro", "RL actor and critic, fp32", models.actor_critic(), "fp32"),
    Case("micro", "RL policy, bf16", models.rl_policy(), "bf16"),
    Case("micro", "64 KB in 16 tensors, fp32", [(1024,)] * 16, "fp32"),
    Case("micro", "2,000 tensors of 64, fp32", [(64,)] * 2000, "fp32"),
]
CLIPS = {"torch": torch.nn.utils.clip_grad_norm_, "fastclip": fastclip.clip_grad_norm_}


@pytest.mark.parametrize("who", CLIPS)
@pytest.mark.parametrize("mode", [UNCLIPPED, CLIPPED])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clip_grad_norm(benchmark, case, mode, who):
    gradients = Gradients(case)
    gradients.set_mode(mode)
    clip, arguments = CLIPS[who], (gradients.parameters, gradients.max_norm)
    benchmark.group = f"{case.name}, {mode}"
    if mode == UNCLIPPED:
        norm = benchmark(clip, *arguments)
    else:
        norm = benchmark.pedantic(clip, arguments, setup=gradients.restore, rounds=200, warmup_rounds=5)
    gradients.check(who, norm, exact=who == "fastclip")


@pytest.mark.parametrize("what", ["get_total_norm", "clip_grad_value_"])
@pytest.mark.parametrize("module", [torch.nn.utils, fastclip], ids=["torch", "fastclip"])
def test_others(benchmark, what, module):
    """The other two functions that read all gradients; nothing is beyond the limit of the second."""
    gradients = Gradients(CASES[0])
    items, arguments = (gradients.grads, ()) if what == "get_total_norm" else (gradients.parameters, (1e9,))
    benchmark.group = what
    benchmark(getattr(module, what), items, *arguments)
