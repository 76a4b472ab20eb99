"""Norms in figures: torch's, fastclip's, and what is right. Part ``accuracy``; nothing is timed."""

from collections.abc import Iterator

import torch

import fastclip

PART = "accuracy"
# float32: as long as a large embedding. bfloat16: a layer's bias.
CASES = [("30 million values, fp32", 30_000_000, torch.float32), ("10 values, bf16", 10, torch.bfloat16)]


def measure() -> Iterator[dict]:
    for name, count, dtype in CASES:
        values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
        exact = float(torch.linalg.vector_norm(values.double()))
        norms = {
            "torch": float(torch.nn.utils.get_total_norm([values])),
            "fastclip": float(fastclip.get_total_norm([values])),
        }
        yield {
            "part": PART,
            "case": name,
            "mode": "L2",
            "exact": exact,
            "norms": norms,
            "norm_error": {who: abs(norm / exact - 1) for who, norm in norms.items()},
        }
