"""Quantities that several kinds are judged by, computed from a History once. All tensors are float64 on the CPU."""

from functools import cached_property
from math import prod

import torch
from torch import Tensor

from fastclip.health.history import History, Layer
from fastclip.statistics import COLUMNS

NAN = float("nan")

# Profiles over the layers are medians over at most so many records, evenly spread: more change no median that matters
# here, and 10,000 steps of 300 layers would take seconds.
MAX_RECORDS = 256
# A gradient below this share of what it was in the first quarter of the history belongs to a model that has converged:
# nothing is concluded from its zeros and ratios. Healthy models that do not converge stay within a factor of 15.
CONVERGED = 1e-3

RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
HALF = ("float16", "bfloat16")


def check(history: History) -> None:
    """Raises TypeError or ValueError, naming the field, unless the tensors of ``history`` fit together."""
    if not isinstance(history, History):
        raise TypeError(f"history: expected a fastclip.health.history.History, got {type(history).__name__}")
    steps, layers = len(history.steps), len(history.layers)
    shapes = {
        "steps": (steps,),
        "total_norm": (steps,),
        "max_norm": (steps,),
        "values": (steps, layers, len(COLUMNS)),
        "weight_norms": (steps, layers),
    }
    for name, expected in shapes.items():
        found = tuple(getattr(history, name).shape)
        if found != expected:
            raise ValueError(f"history.{name}: expected shape {expected}, got {found}")
    for i, activation in enumerate(history.activations):
        for name in ("saturated", "zeros"):
            found = tuple(getattr(activation, name).shape)
            if found != (steps,):
                raise ValueError(f"history.activations[{i}].{name}: expected shape {(steps,)}, got {found}")
    if not history.norm_type > 0:
        raise ValueError(f"history.norm_type: expected a positive number, got {history.norm_type}")


def number(x: float) -> str:
    """Two significant digits."""
    return f"{x:.0f}" if 10 <= x < 10000 else f"{x:.2g}"


def round_down(x: float) -> float:
    """A threshold to write into a program: two significant digits."""
    return float(f"{x:.1e}")


def times(x: float) -> str:
    return f"{number(x)} times"


class Record:
    """A History, its layers in the order of the forward pass."""

    def __init__(self, history: History) -> None:
        self.history = history
        order = sorted(range(len(history.layers)), key=lambda i: (history.layers[i].depth, i))
        self.layers: list[Layer] = [history.layers[i] for i in order]
        self.steps = history.steps
        self.total = history.total_norm.double().cpu()
        self.max_norm = history.max_norm.double().cpu()
        # Copied only where the order is another one: [10,000 steps, 300 layers, 6] are 144 MB.
        same = order == list(range(len(order)))
        self.values = (history.values if same else history.values[:, order]).double().cpu()
        self.weight_norms = (history.weight_norms if same else history.weight_norms[:, order]).double().cpu()
        self.numel = torch.tensor([layer.numel for layer in self.layers], dtype=torch.float64)

    def step(self, record: int) -> int:
        return int(self.steps[record])

    def column(self, name: str, records: Tensor | slice = slice(None)) -> Tensor:
        """[records, layers]"""
        return self.values[records, :, COLUMNS.index(name)]

    @cached_property
    def bad(self) -> Tensor:
        """bool [steps, layers]: the gradient has inf or nan."""
        return (self.column("infs") > 0) | (self.column("nans") > 0) | (self.column("abs_max") == float("inf"))

    @cached_property
    def finite(self) -> Tensor:
        """bool [steps]"""
        return self.total.isfinite() & ~self.bad.any(1)

    @cached_property
    def finite_records(self) -> Tensor:
        return self.finite.nonzero()[:, 0]

    @cached_property
    def early(self) -> Tensor:
        """The first quarter of the finite records, at least five."""
        return self.finite_records[: max(5, len(self.finite_records) // 4)]

    @cached_property
    def early_norm(self) -> float:
        return float(self.total[self.early].median())

    @cached_property
    def active(self) -> Tensor:
        """bool [steps]: finite, and the model has not converged."""
        return self.finite & (self.total > 0) & (self.total >= CONVERGED * self.early_norm)

    @cached_property
    def recent(self) -> Tensor:
        """Records that tell how training goes now: the last half of those that are active, at most MAX_RECORDS."""
        records = self.active.nonzero()[:, 0]
        records = records[len(records) // 2 :]
        return records[:: -(-len(records) // MAX_RECORDS)] if len(records) else records

    def span(self, records: Tensor) -> list[int]:
        """First and last step of some records."""
        return [self.step(int(records[0])), self.step(int(records[-1]))] if len(records) else []

    # ---- per layer, over the recent records

    @cached_property
    def size(self) -> Tensor:
        """[recent, layers]: size of a typical element of the gradient that is not zero; NaN without a gradient.

        Root mean square for the 2-norm, mean for the 1-norm, largest element for the inf-norm. Zeros do not count, so
        that an embedding of which a batch uses few rows compares with a dense layer. The spread of a weight's gradient
        by depth is what Glorot & Bengio 2010 (figure 7, equation 14) look at.
        """
        count = (self.numel - self.column("zeros", self.recent)).clamp(min=1)
        return self.column("norm", self.recent) / count ** (1 / self.history.norm_type)

    @cached_property
    def norm2(self) -> Tensor:
        """[recent, layers]: the gradient's 2-norm; from the size of its elements where another norm was recorded."""
        return self.size * (self.numel - self.column("zeros", self.recent)).clamp(min=0).sqrt()

    @cached_property
    def weights(self) -> Tensor:
        """[recent, layers]: 2-norm of the parameters; NaN where unknown or 0."""
        norms = self.known_weight_norms[self.recent]
        return torch.where(norms > 0, norms, NAN)

    @cached_property
    def known_weight_norms(self) -> Tensor:
        """[steps, layers]: weight norms, those that were not looked at as they were last, or else first, seen."""
        known = self.weight_norms.isfinite()
        place = torch.arange(len(known))[:, None]
        last = torch.where(known, place, -1).cummax(0).values
        first = torch.where(known, place, len(known) - 1).min(0).values
        return self.weight_norms.gather(0, torch.where(last < 0, first, last))

    @cached_property
    def typical_size(self) -> Tensor:
        """[layers]: median of size; NaN without a gradient."""
        return self.size.nanmedian(0).values if len(self.recent) else torch.full_like(self.numel, NAN)

    @cached_property
    def share(self) -> Tensor:
        """[layers]: the layer's part of the squared norm of all gradients, median of the recent records."""
        squares = self.norm2.square().nan_to_num(0)
        parts = squares / squares.sum(1, keepdim=True).clamp(min=1e-300)
        return parts.median(0).values if len(parts) else torch.zeros_like(self.numel)

    def largest(self) -> Layer:
        """The layer that contributes most to the norm."""
        return self.layers[int(self.share.argmax())]

    @cached_property
    def zero(self) -> Tensor:
        """bool [layers]: all recent gradients are zero in all elements, and there were some."""
        zeros = self.column("zeros", self.recent)
        seen = ~zeros.isnan()
        nothing = ((zeros == self.numel) | ~seen).all(0)
        return nothing & seen.any(0) & (self.numel > 0)

    @cached_property
    def matrices(self) -> list[int]:
        """Layers with two dimensions or more that had a gradient: those that carry it from depth to depth.

        Biases and the parameters of norms are left out: the gradient of a key's bias in attention, or of a bias before
        BatchNorm, is rounding noise in the best of models.
        """
        seen = ~self.typical_size.isnan()
        return [i for i, layer in enumerate(self.layers) if len(layer.shape) >= 2 and layer.numel and seen[i]]

    @cached_property
    def moving(self) -> list[int]:
        """Matrices whose gradient is not zero all the time."""
        return [i for i in self.matrices if not self.zero[i] and self.typical_size[i] > 0]

    def against_he(self, i: int) -> float:
        """Root mean square of a weight, relative to He et al. 2015 (sqrt(2 / fan_in)); NaN where it is not known."""
        shape = self.layers[i].shape
        fan_in = prod(shape[1:])
        weight = float(self.weights[:, i].nanmedian()) if len(self.weights) else NAN
        return weight / (prod(shape) * 2 / fan_in) ** 0.5 if prod(shape) else NAN
