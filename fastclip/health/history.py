"""What a monitor has recorded: plain tensors on the CPU, the input of diagnosis, reports and plots."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Layer:
    """What is known of one parameter beside its gradients."""

    name: str  # as in named_parameters()
    shape: tuple[int, ...]
    dtype: str  # of the gradient, "float32"
    module: str = ""  # class of the module that owns it, "LSTM"
    depth: int = -1  # position of that module in the order of the forward pass where it was seen, else of definition

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass
class Activation:
    """What forward hooks saw of one module's output, a value for each recorded step (NaN where it did not run)."""

    name: str  # as in named_modules()
    module: str  # class, "Sigmoid"
    saturated: Tensor  # float64 [steps]: share of outputs where the derivative is below 5% of its largest value
    zeros: Tensor  # float64 [steps]: share of outputs that are exactly 0


@dataclass
class History:
    """Recorded steps of a model's parameters: gradients as before clipping, without a GradScaler's factor."""

    layers: list[Layer]
    steps: Tensor  # int64 [steps]: the training step of each record, rising; not every step has to be there
    total_norm: Tensor  # float64 [steps]
    max_norm: Tensor  # float64 [steps]: the threshold, NaN where nothing was clipped by norm
    values: Tensor  # float64 [steps, layers, 6], columns as in fastclip.statistics.COLUMNS; NaN: had no gradient
    weight_norms: Tensor  # float64 [steps, layers]: L2 norm of the parameter itself, NaN where it was not looked at
    norm_type: float = 2.0
    activations: list[Activation] = field(default_factory=list)
    # float64 [steps]: the factor of a GradScaler that was taken out of the values, NaN where none is known. Gradients
    # that are not finite may be its doing there, and such a step is skipped.
    grad_scale: Tensor | None = None
