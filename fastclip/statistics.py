"""What the pass that computes the norm also knows of every single gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    Each call makes a new tensor. ``values`` is None after a call that raised, but for one that raised because the norm
    is not finite (``error_if_nonfinite``): that one has filled it.
    """

    values: Tensor | None = None


def check(statistics: object) -> None:
    if not isinstance(statistics, GradStatistics):
        raise TypeError(f"statistics: expected a fastclip.GradStatistics or None, got {type(statistics).__name__}")


def by_torch(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """The values of GradStatistics, through torch's own operations, on the first gradient's device.

    Several passes over each gradient. Of a DTensor they are those of the whole gradient, which takes collectives.
    """
    if not grads:
        return torch.zeros(0, len(COLUMNS), dtype=torch.float64)
    with torch.no_grad():
        rows = [_row(grad.detach(), float(norm_type)) for grad in grads]
        device = rows[0].device
        return torch.stack([row.to(device) for row in rows])


def _row(grad: Tensor, norm_type: float) -> Tensor:
    if hasattr(grad, "full_tensor"):
        grad = grad.full_tensor()
    missing = 0  # elements that a sparse gradient does not store
    if grad.layout != torch.strided:
        numel = grad.numel()
        grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.to_dense()
        missing = numel - grad.numel()
    if grad.numel() == 0:
        row = torch.zeros(len(COLUMNS), dtype=torch.float64, device=grad.device)
        row[2] = missing
        return row
    magnitude = grad.abs()
    smallest_normal = torch.finfo(magnitude.dtype).smallest_normal
    # In float64, where no square of a smaller dtype overflows. One of float64 can: then the norm of the quotients.
    wide = magnitude.to(torch.float64)
    largest = wide.amax()
    norm = torch.linalg.vector_norm(wide, norm_type)
    unit = torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
    scaled = torch.linalg.vector_norm(wide / unit, norm_type) * unit
    sound = (norm > 1e-140) & norm.isfinite()
    columns = [
        torch.where(sound | (largest == 0), norm, scaled),
        largest,
        (magnitude == 0).sum() + missing,
        magnitude.isinf().sum(),
        magnitude.isnan().sum(),
        ((magnitude > 0) & (magnitude < smallest_normal)).sum(),
    ]
    return torch.stack([column.double() for column in columns])
