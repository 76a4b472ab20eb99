"""Who else clips: torch in its several ways, apex, TransformerEngine. The absent ones are named, with a reason."""

import functools
import importlib
import math
from collections.abc import Callable

import torch

import fastclip
from benchmarks.clocks import is_a_card
from benchmarks.gradients import Gradients

COMPILED_TENSORS = 16  # compiling takes 10 seconds for 6 tensors, minutes for 148
TORCH, LOOP, COMPILED = "torch", "torch for-loop", "torch compiled"
FASTCLIP, LIST = "fastclip", "list"
OTHERS = (LOOP, COMPILED, "apex", "TransformerEngine")


def contestants(gradients: Gradients, all_of_them: bool, quick: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """Calls that clip a case's gradients, and why the other rivals do not take part.

    torch's default is its foreach path, on the CPU and on CUDA.
    """
    parameters, max_norm, order = gradients.parameters, gradients.max_norm, gradients.case.norm_type
    found = {
        TORCH: lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm, order),
        FASTCLIP: lambda: fastclip.clip_grad_norm_(parameters, max_norm, order),
    }
    if not all_of_them:
        return found, {}
    found[LOOP] = lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm, order, foreach=False)
    absent = {}
    for name, make in ((COMPILED, _compiled), ("apex", _apex), ("TransformerEngine", _transformer_engine)):
        made = make(gradients, quick)
        if isinstance(made, str):
            absent[name] = made
        else:
            found[name] = made
    return found, absent


def _compiled(gradients: Gradients, quick: bool) -> Callable | str:
    """torch's formula, compiled: torch.compile of clip_grad_norm_ itself would leave its graph for .grad."""
    count = len(gradients.grads)
    if quick:
        return "left out by --quick: compiling takes a quarter of a minute"
    if not gradients.case.aims:
        return "takes part for the models with aims only: compiling takes a quarter of a minute"
    if gradients.grads[0].device.type == "cuda" and not is_a_card():
        return "its kernels are machine code, which an emulated device does not run"
    if count > COMPILED_TENSORS and gradients.grads[0].device.type == "cpu":
        return f"compiling a graph of {count} tensors takes minutes"
    if count > 200:
        return f"compiling a graph of {count:,} tensors takes minutes"
    grads, order = gradients.grads, gradients.case.norm_type
    max_norm = torch.tensor(gradients.max_norm, device=grads[0].device)
    if not hasattr(gradients, "compiled"):  # once for a case: the threshold, a tensor, does not belong to the graph
        torch._dynamo.reset()
        gradients.compiled = torch.compile(_flat_clip)
    return lambda: gradients.compiled(grads, max_norm, order)


def _flat_clip(tensors: list[torch.Tensor], max_norm: torch.Tensor, order: float) -> torch.Tensor:
    norms = torch.stack([torch.linalg.vector_norm(g, order, dtype=torch.float32) for g in tensors])
    norm = torch.linalg.vector_norm(norms, order)
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in tensors:
        g.mul_(coef)
    return norm


@functools.cache
def optional_module(name: str):
    """A module, or text that says why it cannot be used."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another torch fails in its own ways
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _apex(gradients: Gradients, quick: bool) -> Callable | str:
    module = optional_module("apex.contrib.clip_grad")
    if isinstance(module, str):
        return module
    if gradients.grads[0].device.type != "cuda":
        return "works on CUDA devices only"
    return lambda: module.clip_grad_norm_(gradients.parameters, gradients.max_norm, gradients.case.norm_type)


def _transformer_engine(gradients: Gradients, quick: bool) -> Callable | str:
    module = optional_module("transformer_engine.pytorch.optimizers")
    if isinstance(module, str):
        return module
    if gradients.grads[0].device.type != "cuda":
        return "works on CUDA devices only"
    if gradients.case.norm_type != 2 or not math.isfinite(gradients.norm):
        return "has the L2 norm only"
    grads, max_norm = gradients.grads, gradients.max_norm
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")

    def clip() -> torch.Tensor:
        norm, _ = module.multi_tensor_applier(module.multi_tensor_l2norm, overflow, [grads], False)
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    return clip
