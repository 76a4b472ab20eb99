"""The cases, as data: parameter shapes of real models, and what fastclip aims at for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """Gradients to clip. Targets are speed-ups over ``rival``, whose time is the numerator."""

    name: str
    shapes: Shapes
    dtype: torch.dtype
    rival: str  # "torch", or "list": the time of [p.grad for p in parameters]
    unclipped_target: float
    clipped_target: float

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def gpt2_small(layers: int = 12) -> Shapes:
    """GPT-2 small (Radford et al. 2019): 12 layers of width 768, tied head; 148 tensors, 124.4 million elements.

    With 6 layers it is DistilGPT-2: 76 tensors, 81.9 million elements.
    """
    width = 768
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(layers * (norm + attention + norm + mlp)), *norm]


def lstm_text_model() -> Shapes:
    """Two LSTM layers of width 512 over 256-wide embeddings of 7,600 words; 11 tensors, 23 MB in float32."""
    words, embedding, width = 7600, 256, 512

    def layer(inputs: int) -> Shapes:
        return [(4 * width, inputs), (4 * width, width), (4 * width,), (4 * width,)]

    return [(words, embedding), *layer(embedding), *layer(width), (256, width), (256,)]


def rl_policy() -> Shapes:
    """A two-layer policy for four observations and two actions: 6 tensors, 4,610 elements."""
    return [(64, 4), (64,), (64, 64), (64,), (2, 64), (2,)]


CASES = [
    Case("GPT-2 small, fp32", gpt2_small(), torch.float32, "torch", 3.0, 1.3),
    Case("GPT-2 small, bf16", gpt2_small(), torch.bfloat16, "torch", 4.0, 2.0),
    Case("LSTM text model, fp32", lstm_text_model(), torch.float32, "torch", 2.5, 1.5),
    Case("2,000 tensors of 64, fp32", [(64,)] * 2000, torch.float32, "list", 1.0, 1 / 1.25),
    Case("RL policy, fp32", rl_policy(), torch.float32, "torch", 10.0, 10.0),
]
