"""How much of a whole training step is clipping: part ``end-to-end`` of ``python -m benchmarks``.

The models are plain torch modules with the parameter shapes of models.py; batches are small, for the CPU.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

import fastclip
from benchmarks import machine, rivals, stats
from benchmarks.cases import BOTH, CLIPPED
from benchmarks.gradients import NEVER
from benchmarks.measure import Effort

PART = "end-to-end"
CLIPS = 1e-3  # a threshold under every step's norm


class Block(nn.Module):
    """A GPT-2 layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    def __init__(self, width: int = 768, layers: int = 12, words: int = 50257, length: int = 1024):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.words.weight)


class LSTMTextModel(nn.Module):
    """Classifies the next word into 256 groups."""

    def __init__(self, words: int = 7600, embedding: int = 256, width: int = 512):
        super().__init__()
        self.words = nn.Embedding(words, embedding)
        self.lstm = nn.LSTM(embedding, width, num_layers=2, batch_first=True)
        # 256 x 512: its transpose would project back to the embedding
        self.head = nn.Linear(width, embedding)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0])


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, project: bool):
        super().__init__()

        def convolution(inputs, outputs, kernel, stride=1):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
            )

        self.one, self.two = convolution(inputs, width, 1), convolution(width, width, 3, stride)
        self.three = convolution(width, 4 * width, 1)
        self.project = convolution(inputs, 4 * width, 1, stride) if project else nn.Identity()

    def forward(self, x):
        y = self.three(torch.relu(self.two(torch.relu(self.one(x)))))
        return torch.relu(y + self.project(x))


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        layers, inputs = [], 64
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(blocks):
                layers.append(Bottleneck(inputs, width, stride if i == 0 else 1, i == 0))
                inputs = 4 * width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, 1000)

    def forward(self, images):
        return self.head(self.layers(self.stem(images)).mean((2, 3)))


def _tokens(words: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(words, (batch, length))


# Name, what is trained, input and target. Batches are of a size that a step takes about a second at most.
MODELS: list[tuple[str, Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = [
    ("GPT-2 small, 2 x 64 tokens", GPT2, lambda: (_tokens(50257, 2, 64), _tokens(50257, 2, 64))),
    ("LSTM text model, 16 x 32 tokens", LSTMTextModel, lambda: (_tokens(7600, 16, 32), _tokens(256, 16, 32))),
    ("ResNet-50, 4 images of 96 x 96", ResNet50, lambda: (torch.randn(4, 3, 96, 96), torch.randint(1000, (4,)))),
]


def measure(effort: Effort) -> Iterator[dict]:
    clips = {rivals.TORCH: torch.nn.utils.clip_grad_norm_, rivals.FASTCLIP: fastclip.clip_grad_norm_}
    for name, make, batch in MODELS:
        torch.manual_seed(0)
        model, (inputs, target) = make(), batch()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        parameters = list(model.parameters())
        # mode, who clips -> seconds: [rest of the step, clipping]
        rest: dict = {(mode, who): [] for mode in BOTH for who in clips}
        clipping: dict = {key: [] for key in rest}
        contention = machine.Contention()
        end = time.perf_counter() + effort.seconds(15.0)
        order, number = list(rest), 0
        while number <= effort.least_rounds() or time.perf_counter() < end:
            for key in order:
                mode, who = key
                start = time.perf_counter()
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs).flatten(0, -2), target.flatten()).backward()
                before = time.perf_counter()
                clips[who](parameters, CLIPS if mode == CLIPPED else NEVER)
                after = time.perf_counter()
                optimizer.step()
                done = time.perf_counter()
                if number > 0:
                    rest[key].append(before - start + done - after)
                    clipping[key].append(after - before)
            order.append(order.pop(0))
            number += 1
        for mode in BOTH:
            yield _row(name, mode, {w: rest[mode, w] for w in clips}, {w: clipping[mode, w] for w in clips}, contention)


def _row(case: str, mode: str, rest: dict, clipping: dict, contention: machine.Contention) -> dict:
    samples = {"rest": [s for values in rest.values() for s in values], **clipping}
    return {
        "part": PART,
        "case": case,
        "mode": mode,
        "plain": rivals.TORCH,
        "ours": rivals.FASTCLIP,
        "median_us": {name: stats.median(values) * 1e6 for name, values in samples.items()},
        "ours_us": stats.spread([s * 1e6 for s in clipping[rivals.FASTCLIP]]),
        "speedup": stats.ratio(clipping[rivals.TORCH], clipping[rivals.FASTCLIP]),
        "share": {
            who: stats.spread([c / (r + c) for r, c in zip(rest[who], clipping[who], strict=True)]) for who in clipping
        },
        "rounds": len(clipping[rivals.TORCH]),
        "contention": contention.so_far(),
        "samples_us": {name: [round(s * 1e6, 3) for s in values] for name, values in samples.items()},
    }
