"""The cases, as data: what is clipped, how, and what fastclip aims at for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks import models
from benchmarks.models import Shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNCLIPPED, CLIPPED, NONFINITE = "unclipped", "clipped", "non-finite"
BOTH = (UNCLIPPED, CLIPPED)


@dataclass(frozen=True)
class Aim:
    """A speed-up over a contestant: 3.0 over "torch", or 0.8 over "list" for at most 1.25 times its time."""

    over: str
    speedup: float


@dataclass(frozen=True)
class Case:
    """Gradients to clip, in one or several modes.

    ``dtype`` is one of DTYPES, or "mixed": matrices in bf16, vectors (norms, biases) in fp32. ``threads`` None takes
    what the run was started with. ``seconds`` is the time to measure each mode; ``rivals`` says whether others than
    torch's default take part.
    """

    part: str
    name: str
    shapes: Shapes
    dtype: str
    modes: tuple[str, ...] = BOTH
    norm_type: float = 2.0
    threads: int | None = None
    seconds: float = 1.5
    rivals: bool = False
    aims: Mapping[str, Aim] = field(default_factory=dict)

    def dtype_of(self, shape: tuple[int, ...]) -> torch.dtype:
        if self.dtype == "mixed":
            return torch.bfloat16 if len(shape) > 1 else torch.float32
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        return models.elements(self.shapes)

    @property
    def bytes(self) -> int:
        return sum(models.elements([shape]) * self.dtype_of(shape).itemsize for shape in self.shapes)

    def memory(self, mode: str) -> int:
        """Bytes to allocate: the gradients, and a copy to restore them from unless nothing is clipped."""
        return self.bytes * (1 if mode == UNCLIPPED else 2)


def _aims(unclipped: float, clipped: float, over: str = "torch") -> dict[str, Aim]:
    return {UNCLIPPED: Aim(over, unclipped), CLIPPED: Aim(over, clipped)}


def _model(name: str, shapes: Shapes, dtype: str, **options) -> Case:
    return Case("models", f"{name}, {dtype}", shapes, dtype, **options)


def _models() -> list[Case]:
    """The first five have aims: they are measured longest."""
    small, policy = models.gpt2_small(), models.rl_policy()
    main = {"seconds": 5.0, "rivals": True}
    other = {"seconds": 2.0, "rivals": True}
    return [
        _model("GPT-2 small", small, "fp32", aims=_aims(3.0, 1.3), **main),
        _model("GPT-2 small", small, "bf16", aims=_aims(4.0, 2.0), **main),
        _model("LSTM text model", models.lstm_text_model(), "fp32", aims=_aims(2.5, 1.5), **main),
        _model("2,000 tensors of 64", [(64,)] * 2000, "fp32", aims=_aims(1.0, 1 / 1.25, over="list"), **main),
        _model("RL policy", policy, "fp32", aims=_aims(10.0, 10.0), **{**main, "seconds": 3.0}),
        _model("RL actor and critic", models.actor_critic(), "fp32", **{**other, "seconds": 1.0}),
        _model("Nature DQN", models.nature_dqn(), "fp32", **{**other, "seconds": 1.5}),
        _model("ResNet-50", models.resnet50(), "fp32", **other),
        _model("BERT-base", models.bert_base(), "fp32", **other),
        _model("ViT-L/16", models.vit_large(), "bf16", **other),
        _model("OLMoE-1B-7B, 1 of 64 shards", models.shard(models.olmoe(), 64), "bf16", **other),
        _model("Llama 3 8B, 1 of 8 shards", models.shard(models.llama3_8b(), 8), "bf16", **{**other, "rivals": False}),
        _model("GPT-2 XL", models.gpt2_xl(), "bf16", **{**other, "rivals": False}),
    ]


def _kinds() -> list[Case]:
    """Other dtypes, norms, and gradients that are not finite: GPT-2 small."""
    small = models.gpt2_small()
    found = [Case("kinds", f"GPT-2 small, {dtype}", small, dtype, (*BOTH, NONFINITE)) for dtype in ("fp16", "mixed")]
    for dtype in ("fp32", "bf16"):
        found.append(Case("kinds", f"GPT-2 small, {dtype}, not finite", small, dtype, (NONFINITE,)))
    for norm_type, name in ((1.0, "L1"), (float("inf"), "inf norm")):
        found.append(Case("kinds", f"GPT-2 small, fp32, {name}", small, "fp32", norm_type=norm_type))
    return found


def _tensors() -> list[Case]:
    """1 to 100,000 tensors of 64 elements."""
    counts = [10**power for power in range(6)]
    return [Case("tensors", f"{n:,} x 64, fp32", [(64,)] * n, "fp32", seconds=1.0) for n in counts]


def _bytes() -> list[Case]:
    """1 KB to 16 GB in 16 tensors. The largest that memory has no room for are left out, by name."""
    sizes = [(f"{n} {unit}", n * factor) for unit, factor in (("KB", 2**10), ("MB", 2**20)) for n in (1, 16, 256)]
    sizes += [("1 GB", 2**30), ("4 GB", 2**32), ("16 GB", 2**34)]
    return [Case("bytes", f"{name}, fp32", [(size // 64,)] * 16, "fp32", seconds=1.0) for name, size in sizes]


def _threads(most: int) -> list[Case]:
    """1, 2, 4 ... threads, up to all of them."""
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    small, lstm = models.gpt2_small(), models.lstm_text_model()
    kinds = [("GPT-2 small", small, "fp32"), ("GPT-2 small", small, "bf16"), ("LSTM text model", lstm, "fp32")]
    return [
        Case("threads", f"{name}, {dtype}, {n} thread{'s' * (n > 1)}", shapes, dtype, threads=n)
        for name, shapes, dtype in kinds
        for n in counts
    ]


def cases(threads: int) -> list[Case]:
    """All cases, for a run with up to ``threads`` threads."""
    return [*_models(), *_kinds(), *_tensors(), *_bytes(), *_threads(threads)]
