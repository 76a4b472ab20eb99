"""torch's own four clipping functions, as they were when fastclip was imported, out of reach of any patch.

``torch.nn.utils.clip_grad_norm_`` and its siblings are wrappers: torch's ``_no_grad`` keeps the real function in a
closure cell, which ``patching`` sets. The functions here come from a second copy of torch's module, so that a fallback,
and what it calls in its turn, never comes back to fastclip.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from torch.nn.utils import clip_grad as torch_module

# Public name -> name inside torch.nn.utils.clip_grad.
NAMES = {
    "get_total_norm": "_get_total_norm",
    "clip_grad_norm_": "clip_grad_norm_",
    "clip_grads_with_norm_": "_clip_grads_with_norm_",
    "clip_grad_value_": "clip_grad_value_",
}


def cell_of(name: str) -> types.CellType | None:
    """The closure cell with the real function behind a public name, or None where torch has no such wrapper."""
    wrapper: Any = getattr(torch_module, NAMES[name], None)
    code = getattr(wrapper, "__code__", None)
    if code is None or "func" not in code.co_freevars:
        return None
    cell = wrapper.__closure__[code.co_freevars.index("func")]
    return cell if isinstance(cell.cell_contents, types.FunctionType) else None


def _second_copy() -> types.ModuleType:
    # Registered under a name of its own: torch.compile looks up the globals of what it traces by module name.
    spec: Any = importlib.util.spec_from_file_location("fastclip._torch_clip_grad", torch_module.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _function(name: str) -> Callable:
    # Without a cell the function is not torch's usual one (some vendors replace it): then it is that one.
    return getattr(torch_module if cell_of(name) is None else _copy, NAMES[name])


_copy = _second_copy()
get_total_norm = _function("get_total_norm")
clip_grad_norm_ = _function("clip_grad_norm_")
clip_grads_with_norm_ = _function("clip_grads_with_norm_")
clip_grad_value_ = _function("clip_grad_value_")
