"""A small training loop in plain torch that records a History, so that diagnosis is tested without the monitor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastclip.health.history import Activation, History, Layer

# Smallest output derivative, as a share of the largest, that still counts as not saturated (Activation.saturated).
SATURATED = 0.05


@dataclass
class Trial:
    """A model, and the loss of a training step."""

    model: nn.Module
    loss: Callable[[int], Tensor]
    lr: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    max_norm: float | None = None  # None: not clipped by norm
    norm_type: float = 2.0
    steps: int = 40
    plant: Callable[[int, nn.Module], None] = lambda step, model: None  # called between backward and clipping
    warm_up: int = 0
    skip_nonfinite: bool = False  # leave the step out as GradScaler does


def statistics(gradient: Tensor, norm_type: float) -> list[float]:
    """One row of History.values, see fastclip.statistics.COLUMNS."""
    if gradient.numel() == 0:
        return [0.0] * 6
    tiny = torch.finfo(gradient.dtype).tiny
    magnitude = np.abs(gradient.detach().double().numpy().ravel())
    order = np.inf if norm_type == float("inf") else norm_type
    return [
        float(np.linalg.norm(magnitude, order)),
        float(magnitude.max()),
        magnitude.size - np.count_nonzero(magnitude),
        np.count_nonzero(np.isinf(magnitude)),
        np.count_nonzero(np.isnan(magnitude)),
        np.count_nonzero((magnitude > 0) & (magnitude < tiny)),
    ]


class Saturation:
    """A forward hook's view of one activation."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, type(module).__name__
        self.saturated: list[float] = []
        self.zeros: list[float] = []
        module.register_forward_hook(self.look)
        self.latest = (float("nan"), float("nan"))

    def look(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        y = output.detach().float()
        slope = {"Sigmoid": 4 * y * (1 - y), "Tanh": 1 - y * y}.get(self.module, (y > 0).float())
        self.latest = (float((slope < SATURATED).float().mean()), float((y == 0).float().mean()))

    def record(self) -> None:
        self.saturated.append(self.latest[0])
        self.zeros.append(self.latest[1])


def layers_of(model: nn.Module, dtype: torch.dtype | None = None) -> list[Layer]:
    layers = []
    modules = dict(model.named_modules())
    depths = {name: depth for depth, name in enumerate(modules)}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        layers.append(
            Layer(
                name,
                tuple(parameter.shape),
                str(parameter.dtype).removeprefix("torch."),
                type(modules[owner]).__name__,
                depths[owner],
            )
        )
    return layers


def record(trial: Trial) -> History:
    """Trains, and returns what a monitor would have recorded."""
    model = trial.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = trial.optimizer(trainable, lr=trial.lr)
    watched = [Saturation(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Sigmoid, nn.Tanh, nn.ReLU))]
    rows, norms, thresholds, weights = [], [], [], []
    for step in range(trial.steps):
        if trial.warm_up:
            for group in optimizer.param_groups:
                group["lr"] = trial.lr * min(1.0, (step + 1) / trial.warm_up)
        optimizer.zero_grad()
        trial.loss(step).backward()
        trial.plant(step, model)
        rows.append(
            [[float("nan")] * 6 if p.grad is None else statistics(p.grad, trial.norm_type) for p in model.parameters()]
        )
        weights.append([float(np.linalg.norm(p.detach().double().numpy())) for p in model.parameters()])
        for activation in watched:
            activation.record()
        gradients = [p.grad for p in trainable if p.grad is not None]
        present = [row[0] for row in rows[-1] if row[0] == row[0]]
        total = float(np.linalg.norm(present, trial.norm_type)) if len(present) == len(gradients) else float("nan")
        if trial.max_norm is not None:
            for gradient in gradients:
                gradient.mul_(min(1.0, trial.max_norm / (total + 1e-6)) if total == total else total)
        norms.append(total)
        thresholds.append(float("nan") if trial.max_norm is None else trial.max_norm)
        if trial.skip_nonfinite and not torch.isfinite(torch.tensor(total)):
            continue
        optimizer.step()
    return History(
        layers=layers_of(model),
        steps=torch.arange(trial.steps),
        total_norm=torch.tensor(norms, dtype=torch.float64),
        max_norm=torch.tensor(thresholds, dtype=torch.float64),
        values=torch.tensor(rows, dtype=torch.float64).reshape(trial.steps, -1, 6),
        weight_norms=torch.tensor(weights, dtype=torch.float64),
        norm_type=trial.norm_type,
        activations=[
            Activation(
                a.name,
                a.module,
                torch.tensor(a.saturated, dtype=torch.float64),
                torch.tensor(a.zeros, dtype=torch.float64),
            )
            for a in watched
        ],
    )
