"""What the pass that computes the norm also knows of every single gradient."""

from dataclasses import dataclass

from torch import Tensor

# The columns of GradStatistics.values.
COLUMNS = ("norm", "abs_max", "zeros", "infs", "nans", "subnormals")


@dataclass
class GradStatistics:
    """Filled by ``clip_grad_norm_(parameters, max_norm, statistics=…)``: one row a gradient, as it was before clipping.

    Rows are in the order of the parameters whose ``.grad`` is not None. ``values`` is a float64 tensor of shape
    (gradients, 6) on the device of the returned norm; nothing waits for it. Its columns:

    - ``norm``: the gradient's own norm, of the call's ``norm_type``
    - ``abs_max``: the largest absolute value; NaN if there is a NaN; 0 of an empty gradient
    - ``zeros``, ``infs``, ``nans``, ``subnormals``: how many elements are that. Subnormal in the gradient's own dtype.
    """

    values: Tensor | None = None
