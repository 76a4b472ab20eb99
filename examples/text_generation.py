"""A text generator that will not train, and what cures it.

    pip install "fastclip[health]"
    python examples/text_generation.py                       # all runs; writes text_generation.html
    python examples/text_generation.py --run exploding norm  # some of them; --list names them
    python examples/text_generation.py --quick               # half of the steps

Characters are predicted from the characters before them. Each run changes one thing against another one, and what the
page says of a run is computed from that run. docs/stable-training.md walks through it. The text: the Declaration of
Independence (1776) and the Constitution of the United States (1787) with its amendments, public domain, as in GNU
miscfiles 1.5.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fastclip
from fastclip.health.finding import Finding

TEXT = (Path(__file__).parent / "us_documents.txt").read_text(encoding="utf-8")
ALPHABET = sorted(set(TEXT))
CONTEXT = 64  # the most characters that a model looks back


def encode(text: str) -> Tensor:
    return torch.tensor([ALPHABET.index(character) for character in text])


# ---- models: (batch, length) characters in, (batch, length, alphabet) logits out ----


class CharLSTM(nn.Module):
    def __init__(self, width: int = 96, gain: float = 1.0):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))
        with torch.no_grad():
            self.lstm.weight_hh_l0.mul_(gain)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(characters))[0])


class CharRNN(nn.Module):
    """Recurrent without gates or bounds: its hidden state, and so its loss, can grow to any size."""

    def __init__(self, width: int = 48, gain: float = 1.0):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 32)
        self.rnn = nn.RNN(32, width, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(gain)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(characters))[0])


class CharTransformer(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.blocks(self.embedding(characters) + self.position[:length], mask=mask, is_causal=True))


class Deep(nn.Module):
    """Twelve layers on top of each other, which look at one character to guess the next one."""

    def __init__(
        self,
        activation: Callable[[], nn.Module] = nn.Sigmoid,
        he: bool = False,
        batch_norm: bool = False,
        residual: bool = False,
        width: int = 48,
        layers: int = 12,
    ):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if batch_norm else nn.Identity() for _ in range(layers))
        self.activations = nn.ModuleList(activation() for _ in range(layers))
        self.residual = residual
        self.head = nn.Linear(width, len(ALPHABET))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight) if he else nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.embedding(characters).flatten(0, 1)
        for layer, norm, activation in zip(self.layers, self.norms, self.activations, strict=True):
            out = activation(norm(layer(hidden)))
            hidden = hidden + out if self.residual else out
        return self.head(hidden).unflatten(0, characters.shape)


# ---- runs ----


@dataclass(frozen=True)
class Run:
    """How a training run is made."""

    name: str
    group: str  # runs of a group are drawn together
    what: str  # what is special, for the page
    model: Callable[[], nn.Module]
    steps: int
    learning_rate: float = 0.5
    clip_norm: float | Callable[[], Any] = math.inf  # inf: measures only; a callable makes a policy, which holds state
    clip_value: float = math.inf
    length: int = 16  # characters in a training sequence
    batch: int = 16  # sequences in a step, all micro-batches together
    accumulate: int = 1  # micro-batches in a step
    bad_every: int = 0  # in every so many-th step the loss is multiplied by 1,000; 0: never
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD


@dataclass(frozen=True)
class Result:
    """What came of a run. The losses end with the first one that is not finite."""

    run: Run
    losses: list[float]
    norms: list[float]  # before clipping
    findings: list[Finding]
    learnt: dict[str, float]  # weight matrix: norm of its change over its first norm
    parameters: list[Tensor]
    sample: str  # "" if the run did not train
    seconds: float

    @property
    def diverged_at(self) -> int | None:
        return next((step for step, loss in enumerate(self.losses) if not math.isfinite(loss)), None)

    @property
    def last_loss(self) -> float:
        return last_loss(self.losses)

    @property
    def trained(self) -> bool:
        return has_trained(self.losses)


RUNS = (
    Run("exploding", "exploding", "recurrent weights ten times too large, no clipping", lambda: CharRNN(gain=10), 600),
    Run("value", "exploding", "the same, clipped by value", lambda: CharRNN(gain=10), 600, clip_value=0.1),
    Run("norm", "exploding", "the same, clipped by norm", lambda: CharRNN(gain=10), 600, clip_norm=1.0),
    Run("lstm-times-ten", "exploding", "an LSTM with such weights, no clipping", lambda: CharLSTM(gain=10), 150, 2.0),
    Run("vanishing", "vanishing", "12 sigmoid layers, weights of 0.01", lambda: Deep(), 150, 0.2),
    Run("relu", "vanishing", "cure: ReLU", lambda: Deep(nn.ReLU), 150, 0.2),
    Run("he", "vanishing", "cure: He initialisation", lambda: Deep(he=True), 150, 0.2),
    Run("relu-he", "vanishing", "cure: ReLU and He", lambda: Deep(nn.ReLU, he=True), 150, 0.2),
    Run("batch-norm", "vanishing", "cure: BatchNorm1d", lambda: Deep(batch_norm=True), 150, 0.2),
    Run("residual", "vanishing", "cure: residual connections", lambda: Deep(residual=True), 150, 0.2),
    Run("1x32", "accumulation", "one batch of 32 a step", lambda: CharLSTM(), 40, 2.0, 0.3, batch=32),
    Run("8x4", "accumulation", "8 of 4, one clip", lambda: CharLSTM(), 40, 2.0, 0.3, batch=32, accumulate=8),
    Run("lstm", "generators", "LSTM, 2 x 16", lambda: CharLSTM(), 500, 2.0, 0.5, length=64, batch=32, accumulate=2),
    Run(
        "transformer",
        "generators",
        "transformer, 2 x 16, AdamW",
        lambda: CharTransformer(),
        400,
        3e-3,
        0.5,
        length=64,
        batch=32,
        accumulate=2,
        optimizer=torch.optim.AdamW,
    ),
    *(
        Run(name, "spikes", what, lambda: CharLSTM(), 300, 2.0, clip_norm, bad_every=40)
        for name, what, clip_norm in (
            ("spikes", "every 40th loss times 1,000, no clipping", math.inf),
            ("spikes-high", "threshold 10", 10.0),
            ("spikes-low", "threshold 0.03", 0.03),
            ("spikes-zclip", "ZClip, nothing chosen", fastclip.ZClip),
            ("spikes-autoclip", "AutoClip, 90th percentile", lambda: fastclip.AutoClip(90)),
        )
    ),
)


def entropy_of_characters() -> float:
    shares = torch.bincount(encode(TEXT)).double() / len(TEXT)
    return float(-(shares * shares.log()).sum())


# The loss of a model that knows how frequent each character is, and nothing else.
UNIGRAM = entropy_of_characters()


def last_loss(losses: list[float]) -> float:
    """The mean of the last tenth of the steps."""
    last = losses[-max(len(losses) // 10, 1) :]
    return sum(last) / len(last)


def has_trained(losses: list[float]) -> bool:
    """A model has to have learnt from the context: 5% better than without any. Comparisons with NaN are false."""
    return last_loss(losses) < 0.95 * UNIGRAM


def batches(size: int, length: int, seed: int) -> Iterator[Tensor]:
    text, random = encode(TEXT), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (size,), generator=random)
        yield torch.stack([text[start : start + length + 1] for start in starts])


def train(run: Run, seed: int = 0, tick: Callable[[], None] = lambda: None) -> Result:
    torch.manual_seed(seed)
    model = run.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    optimizer = run.optimizer(model.parameters(), run.learning_rate)
    monitor = fastclip.GradientMonitor(model, activations=True)
    max_norm = run.clip_norm() if callable(run.clip_norm) else run.clip_norm
    losses, norms = [], []
    started = time.perf_counter()
    for step, batch in zip(range(run.steps), batches(run.batch, run.length, seed), strict=False):
        is_bad = run.bad_every and step % run.bad_every == run.bad_every - 1
        loss_of_step = 0.0
        for part in batch.chunk(run.accumulate):
            logits = model(part[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            loss = loss / run.accumulate  # the gradients of the parts add up to that of the mean
            (loss * 1000 if is_bad else loss).backward()
            loss_of_step += loss.item()
        # Once a step, after the last part: the norm of the sum is not the sum of the norms.
        norms.append(monitor.clip_grad_norm_(max_norm).item())
        if run.clip_value < math.inf:
            fastclip.clip_grad_value_(model.parameters(), run.clip_value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
        tick()
        if not math.isfinite(loss_of_step):
            break
    seconds = time.perf_counter() - started
    findings = monitor.diagnose()
    monitor.close()
    return Result(
        run,
        losses,
        norms,
        findings,
        {
            n: float((p.detach() - before[n]).norm() / before[n].norm())
            for n, p in model.named_parameters()
            if n in before
        },
        [p.detach() for p in model.parameters()],
        generate(model, "We the People of ") if has_trained(losses) else "",
        seconds,
    )


@torch.no_grad()
def generate(model: nn.Module, start: str, length: int = 160, temperature: float = 0.7) -> str:
    model.eval()
    random, text = torch.Generator().manual_seed(0), encode(start)
    for _ in range(length):
        logits = model(text[-CONTEXT:].unsqueeze(0))[0, -1] / temperature
        text = torch.cat([text, torch.multinomial(logits.softmax(0), 1, generator=random)])
    return "".join(ALPHABET[index] for index in text)


def main() -> None:
    names = [run.name for run in RUNS]
    parser = argparse.ArgumentParser(description="A text generator that will not train, and what cures it.")
    parser.add_argument(
        "--run", nargs="+", default=["all"], choices=["all", *names], metavar="NAME", help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="name the runs, and end")
    parser.add_argument("--quick", action="store_true", help="half of the steps; some runs need more to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("text_generation.html"), help="the page")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write curves and tables for docs/ there")
    options = parser.parse_args()
    if not options.output.parent.is_dir():  # said now, not after the training
        parser.error(f"--output: expected a file in an existing folder, got {options.output}")
    console = Console()
    if options.list:
        for run in RUNS:
            console.print(f"{run.name:16}{run.what}")
        return

    from text_generation_page import statement, write_page, write_pictures

    chosen = [run for run in RUNS if "all" in options.run or run.name in options.run]
    if options.quick:
        chosen = [dataclasses.replace(run, steps=max(run.steps // 2, 10)) for run in chosen]
    results = []
    with Progress(console=console) as progress:
        for run in chosen:
            task = progress.add_task(run.name, total=run.steps)
            results.append(train(run, options.seed, lambda task=task: progress.advance(task)))
    table = Table("run", "what", "outcome", "diagnose()")
    for result in results:
        found = ", ".join(f"{f.kind} {f.layer}".strip() for f in result.findings) or "nothing"
        table.add_row(result.run.name, result.run.what, statement(result), found)
    console.print(table)
    for result in results:
        if result.run.group == "generators" and result.sample:
            console.print(f"\n{result.run.name}:\n{result.sample}", markup=False)
    write_page(results, options.output)
    if options.pictures:
        write_pictures(results, options.pictures)
    console.print(f"\n{sum(r.seconds for r in results):.0f} s of training; page: {options.output}")


if __name__ == "__main__":
    main()
