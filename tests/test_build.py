"""How fastclip was built: build_info(), the forced instruction set, and the package without its extension."""

import re

import pytest
import torch
from conftest import ISAS
from support import run_python

import fastclip


def test_build_info(isa):
    info = fastclip.build_info()
    assert info["version"] == fastclip.__version__ and re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["torch"] == torch.__version__
    assert info["native"] is True and info["missing_because"] is None
    assert re.search(r"\d+\.\d+", info["compiler"])
    assert info["cpu_kernels"] == isa and info["cpu_kernels_available"] == ISAS
    assert info["threads"] == torch.get_num_threads() == 2


def test_instruction_sets(isa):
    assert ISAS[0] == "baseline" and set(ISAS) <= {"baseline", "avx2", "avx512"}
    with pytest.raises(ValueError, match=r"expected one that this processor runs .baseline.*, got 'sse9'"):
        fastclip._native._C.select_kernels("sse9")
    assert fastclip.build_info()["cpu_kernels"] == isa


def test_public_names():
    functions = {"clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"}
    assert set(fastclip.__all__) >= functions | {"counters", "reset_counters", "build_info", "__version__"}
    assert all(hasattr(fastclip, name) and getattr(fastclip, name).__doc__ for name in fastclip.__all__)


SHOW_KERNELS = """
import torch, fastclip
print(fastclip.get_total_norm(torch.full((9,), 2.0)).item(), fastclip.build_info()["cpu_kernels"])
"""


@pytest.mark.parametrize(("forced", "expected"), [*zip(ISAS, ISAS, strict=True), *[("", name) for name in ISAS[-1:]]])
def test_forced_instruction_set(forced, expected):
    done = run_python(SHOW_KERNELS, env={"FASTCLIP_CPU": forced})
    assert done.stdout == f"6.0 {expected}\n", done.stderr


@pytest.mark.skipif(not ISAS, reason="the extension is not built")
@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 "])
def test_unknown_instruction_set(name):
    done = run_python("import fastclip", env={"FASTCLIP_CPU": name})
    message = f"FASTCLIP_CPU: expected one that this processor runs ({', '.join(ISAS)}), got '{name}'"
    assert done.stderr.splitlines()[-1] == f"ValueError: {message}"


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["fastclip._C"] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fastclip
    import fastclip.clip
import torch
from support import INF, check_against_torch, make_parameters

(warning,) = seen
assert warning.category is RuntimeWarning, warning
text = str(warning.message)
for part in ("native extension cannot be used", "torch's own functions", "C++ compiler", "-m fastclip build"):
    assert part in text, text
info = fastclip.build_info()
assert info["native"] is False and info["missing_because"] and info["compiler"] is None
assert info["cpu_kernels"] is None and info["cpu_kernels_available"] == []

grads = [torch.randn(5), None, torch.randn(3, 4).t()]
for norm_type in (1, 2, 3, "inf"):
    check_against_torch("clip_grad_norm_", grads, 0.5, norm_type, rtol=0)
check_against_torch("clip_grad_value_", grads, 0.5, rtol=0)
check_against_torch("clip_grads_with_norm_", grads, 0.5, torch.tensor(2.0), rtol=0)
check_against_torch("get_total_norm", grads[:1], rtol=0)
check_against_torch("clip_grad_norm_", [torch.tensor([INF])], 0.5, error_if_nonfinite=True)
assert fastclip.clip_grad_norm_((p for p in make_parameters(grads)), 1.0) > 0
assert fastclip.clip_grad_norm_([], 1.0).item() == 0
counters = fastclip.counters()
assert counters["native"] == 0 and counters["fallback_reasons"] == {"extension not built": 10}, counters
fastclip.reset_counters()
assert fastclip.counters()["calls"] == 0
for empty in ([], (), [torch.zeros(2)], (p for p in []), torch.zeros(2)):
    fastclip.clip_grad_value_(empty, 1.0)
print("finished")
"""


def test_without_extension():
    done = run_python(WITHOUT_EXTENSION)
    assert done.stdout == "finished\n", done.stderr
