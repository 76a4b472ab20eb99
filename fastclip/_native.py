"""Finds the compiled extension, and says why it is missing."""

import importlib
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastclip._version import __version__

NOT_BUILT = "extension not built"  # the reason of fallbacks without it

_module: ModuleType | None
missing_because: str | None = None
try:
    _module = importlib.import_module("fastclip._C")
except ImportError as error:
    _module = None
    missing_because = str(error)
    warnings.warn(
        f"fastclip's native extension cannot be used ({error}); torch's own functions do the clipping. To build it for "
        "this torch, with a C++ compiler installed, run in fastclip's source folder: "
        "pip install --no-build-isolation --no-deps --force-reinstall .",
        RuntimeWarning,
        stacklevel=3,
    )
else:
    # Chosen here, once: a FASTCLIP_CPU that names no instruction set of this processor ends the import.
    _module.kernels()

if TYPE_CHECKING:
    from fastclip import _C  # as _C.pyi describes it
else:
    _C = _module


def build_info() -> dict:
    """How this fastclip was built and what it uses on this machine.

    Returns a dict with ``version`` (of fastclip), ``torch`` (version in use), ``native`` (bool: the extension is
    loaded), ``missing_because`` (str if it is not), ``compiler``, ``cuda`` (the CUDA version of the GPU part, 13000 for
    13.0, None where it was not built), ``cpu_kernels`` (the instruction set chosen for this processor, or by
    ``FASTCLIP_CPU=baseline|avx2|avx512``), ``cpu_kernels_available``, and ``threads`` (what torch allows now).
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _C is not None,
        "missing_because": missing_because,
        "compiler": _C.compiler if _C else None,
        "cuda": _C.cuda if _C else None,
        "cpu_kernels": _C.kernels() if _C else None,
        "cpu_kernels_available": _C.available_kernels() if _C else [],
        "threads": torch.get_num_threads(),
    }
