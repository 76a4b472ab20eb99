"""Runs a program on torch's clipping and again on fastclip's, and compares everything that it learned."""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastclip

# Nothing is fetched, nobody is told. Read when the trainers' packages are imported, which is after this module.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

UNCLIPPED = math.inf

# Largest difference between two runs, relative to the largest element of each tensor. torch and fastclip round the norm
# and the clip coefficient differently, together by a few units of 6e-8; a dozen steps of training make 8e-8 to 6e-7 of
# that. A coefficient that is off by 1e-4 is seen.
ROUNDING = 1e-5
# Value clipping computes nothing that could be rounded.
BITWISE = 0.0
# A clip shows something when it changes at least this much, in the same measure. It is 0.4 to 1.5 here.
BITES = 0.1


def check_program(program: Callable[[float], dict[str, Tensor]], clip: float, calls: int, tolerance=ROUNDING):
    """Runs ``program(clip)`` on torch's functions and on fastclip's, from the same seed.

    Args:
        program: trains a model and returns what it learned, see ``learned``. Not changed for fastclip in any way.
        clip: the threshold; it has to be small enough that ``program(UNCLIPPED)`` learns something else.
        calls: how many clipping functions of ``torch.nn.utils`` one run calls. All of them have to be native.
        tolerance: the largest difference, as ``difference`` measures it.
    """
    unclipped, on_torch = run(program, UNCLIPPED), run(program, clip)
    assert fastclip.counters()["calls"] == 0
    with fastclip.patched():
        on_fastclip = run(program, clip)
    assert fastclip.counters() == {"calls": calls, "native": calls, "fallback": 0, "fallback_reasons": {}}
    assert difference(on_torch, unclipped) > BITES
    assert difference(on_fastclip, on_torch) <= tolerance


def run(program: Callable[[float], dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    results = program(clip)
    assert all(result.isfinite().all() for result in results.values())
    return results


def learned(model: nn.Module, **histories) -> dict[str, Tensor]:
    """Copies of a model's parameters, and histories (losses, norms, rewards) as tensors."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return parameters | {name: torch.tensor([float(x) for x in history]) for name, history in histories.items()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference between two results, relative to the largest element of the tensor it is in."""
    assert got.keys() == want.keys()
    largest = 0.0
    for name in want:
        scale = want[name].abs().max().item() or 1.0
        largest = max(largest, (got[name] - want[name]).abs().max().item() / scale)
    return largest


def regression_data(samples: int) -> tuple[Tensor, Tensor]:
    """Inputs [samples, 8] and targets [samples, 1], large enough that gradients start well above a norm of 1."""
    x = torch.randn(samples, 8)
    return x, 10 * x.sin().sum(dim=1, keepdim=True)


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def tokens(batches: int) -> Tensor:
    """Random token ids [batches, 4, 17]: inputs and, one to the right, targets."""
    return torch.randint(TinyLanguageModel.VOCABULARY, (batches, 4, 17))


class TinyLanguageModel(nn.Module):
    """One causal transformer layer between an embedding and a linear head; ids [B, T] to logits [B, T, 64]."""

    VOCABULARY = 64

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(self.VOCABULARY, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, self.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=self.head.weight.dtype)
        return self.head(self.layer(self.embedding(ids), src_mask=mask, is_causal=True))
