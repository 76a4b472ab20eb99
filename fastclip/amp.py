"""A GradScaler that unscales, checks for inf and NaN, takes the norm and clips in one pass over the gradients."""

from typing import Any, TypeGuard

import torch
from torch.amp.grad_scaler import OptState

from fastclip.optim import ClippedOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``, except in ``step(optimizer)`` of a ``ClippedOptimizer`` that was not unscaled before.

    torch's reads and writes all gradients to unscale and check them, before they are clipped. Here one reading of the
    norm finds infs and NaNs too, and one factor unscales and clips: inside the step where it folds, else in place. When
    a gradient is not finite, the gradients stay as they were.

    Whatever else, and what has to go through torch's own functions (sparse gradients, norms other than 1, 2 and inf,
    ``clip_value``, thresholds of single groups, step pre hooks of the wrapper, which may change gradients), is done as
    in torch.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if kwargs or any(x is not None for x in args) or not self._enabled or not _can_be_prepared(optimizer):
            return super().step(optimizer, *args, **kwargs)
        clipping, state = optimizer._clipping, self._per_optimizer_states[id(optimizer)]
        try:
            if state["stage"] is OptState.READY:
                self._prepare(optimizer)
            return super().step(optimizer, *args)
        except BaseException:
            # Where the step folds the gradients still have their scale: the next attempt has to begin anew.
            if clipping.prepared is not None and clipping.folds and state["stage"] is OptState.UNSCALED:
                state["stage"] = OptState.READY
            raise
        finally:
            clipping.prepared, clipping.is_recorded = None, False

    def _prepare(self, optimizer: ClippedOptimizer) -> None:
        scale, _ = self._check_scale_growth_tracker("step")
        found_inf = optimizer._clipping.prepare_scaled(scale)
        if found_inf is not None:
            state = self._per_optimizer_states[id(optimizer)]
            state["stage"] = OptState.UNSCALED  # for torch's step: leave the gradients alone
            state["found_inf_per_device"] = {found_inf.device: found_inf}


def _can_be_prepared(optimizer: torch.optim.Optimizer) -> TypeGuard[ClippedOptimizer]:
    # Pre hooks may change gradients, after which the norm would be another. A grad_scale that the user has set
    # multiplies the scaler's own in torch.
    return isinstance(optimizer, ClippedOptimizer) and not (
        optimizer._optimizer_step_pre_hooks or "grad_scale" in vars(optimizer)
    )
