"""What a monitor has recorded: plain tensors on the CPU, the input of diagnosis, reports and plots."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Layer:
    """What is known of one parameter beside its gradients.

    Attributes:
        name: as in ``named_parameters()``.
        shape: of the parameter.
        dtype: of the gradient, ``"float32"``.
        module: the class of the module that owns it, ``"LSTM"``.
        depth: the position of that module in the order of the forward pass where it was seen, else of definition.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    module: str = ""
    depth: int = -1

    @property
    def numel(self) -> int:
        """The number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass
class Activation:
    """What forward hooks saw of one module's output, a value for each recorded step (NaN where it did not run).

    Attributes:
        name: as in ``named_modules()``.
        module: its class, ``"Sigmoid"``.
        saturated: float64 [steps], the share of outputs where the derivative is below 5% of its largest value.
        zeros: float64 [steps], the share of outputs that are exactly 0.
    """

    name: str
    module: str
    saturated: Tensor
    zeros: Tensor


@dataclass
class History:
    """Recorded steps of a model's parameters: gradients as before clipping, without a GradScaler's factor.

    Attributes:
        layers: the parameters, in the order of the columns below.
        steps: int64 [steps], the training step of each record, rising; not every step has to be there.
        total_norm: float64 [steps], the norm of all gradients.
        max_norm: float64 [steps], the threshold; NaN where nothing was clipped by norm.
        values: float64 [steps, layers, 6], columns as in ``GradStatistics.values``; NaN where there was no gradient.
        weight_norms: float64 [steps, layers], L2 norm of the parameter itself; NaN where it was not looked at.
        norm_type: order of the norms of gradients.
        activations: of the modules that were watched.
        grad_scale: float64 [steps], the factor of a GradScaler that was taken out of the values; NaN where none is
            known. Gradients that are not finite may be its doing there, and such a step is skipped.
    """

    layers: list[Layer]
    steps: Tensor
    total_norm: Tensor
    max_norm: Tensor
    values: Tensor
    weight_norms: Tensor
    norm_type: float = 2.0
    activations: list[Activation] = field(default_factory=list)
    grad_scale: Tensor | None = None
