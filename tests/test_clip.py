"""clip_grad_norm_: the coefficient, what is written and what is not, and the norm that is returned."""

import math

import numpy as np
import oracle
import pytest
import torch
from support import (
    DTYPES,
    EDGES,
    EMULATED,
    INF,
    LARGE,
    NAN,
    assert_equal,
    bits,
    check_against_torch,
    clone,
    clone_for_torch,
    dtypes,
    make_parameters,
    norm_types,
    outcome,
    run_python,
    small_and_large,
)

import fastclip


def check_clip(grads, max_norm, norm_type=2.0):
    """Clips a clone and holds the norm and every element against the oracle. Returns the clipped gradients."""
    copies = clone(grads)
    norm = fastclip.clip_grad_norm_(make_parameters(copies), max_norm, norm_type)
    oracle.check_norm(norm, grads, norm_type)
    coef = oracle.coefficient(max_norm, oracle.total_norm(grads, norm_type))
    for after, before in zip(copies, grads, strict=True):
        if coef == 1:
            assert torch.equal(bits(after), bits(before))
        else:
            oracle.check_scaled(after, before, coef)
    return copies


@dtypes
@norm_types
def test_every_size(device, dtype, norm_type):
    for size in [*EDGES[1:], LARGE]:
        grads = [torch.randn(size, device=device).to(dtype)]
        check_clip(grads, 0.1, norm_type)
    assert fastclip.counters()["fallback"] == 0


@dtypes
def test_unaligned_views_and_nothing_beyond_them(device, dtype):
    for offset in range(8):
        for size in [1, 15, 33, 1025, 4097]:
            base = torch.randn(size + 16, device=device).to(dtype)
            whole = base.clone()
            grad = base[offset : offset + size]
            norm = fastclip.clip_grad_norm_(make_parameters([grad]), 0.01)
            oracle.check_scaled(grad, whole[offset : offset + size], oracle.coefficient(0.01, norm.item()))
            assert torch.equal(base[:offset], whole[:offset])
            assert torch.equal(base[offset + size :], whole[offset + size :])


@norm_types
@pytest.mark.parametrize("scale", [1, 2 if EMULATED else 40])
def test_mixed_list(device, norm_type, scale):
    sizes = [0 if i % 10 == 3 and norm_type != INF else n * scale for i, n in enumerate(EDGES[1:])]
    grads = [torch.randn(size, device=device).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]
    check_clip(grads, 0.5, norm_type)
    check_clip(grads, 1e9, norm_type)


@dtypes
def test_all_half_patterns_round_as_one_multiplication_in_float32(device, dtype):
    if dtype.itemsize == 2:
        every = torch.arange(-(1 << 15), 1 << 15, device=device).short().view(dtype)
    else:
        every = torch.randn(1 << 16, device=device, dtype=dtype)
    wide = every if dtype == torch.float64 else every.float()
    for coef in [0.5, 0.3, 0.999, 1e-3, 1e-8, -0.7, 2.0**-14, 0.0]:
        grad = every.clone()
        fastclip.clip_grads_with_norm_(make_parameters([grad]), coef, torch.tensor(1 - 1e-6, dtype=torch.float64))
        exact = coef / ((1 - 1e-6) + 1e-6)
        want = (wide * torch.tensor(exact, dtype=wide.dtype, device=device)).to(dtype)
        assert torch.equal(grad.isnan(), want.isnan())
        number = ~want.isnan()
        assert torch.equal(bits(grad)[number], bits(want)[number]), coef


@small_and_large
def test_epsilon(device, size):
    """max_norm / (norm + 1e-6), where the 1e-6 is half of it."""
    grad = torch.zeros(size, device=device)
    grad[-1] = 1e-6
    fastclip.clip_grad_norm_(make_parameters([grad]), 1e-6)
    assert grad[-1].item() == pytest.approx(0.5e-6, rel=1e-6)


@dtypes
@norm_types
@small_and_large
def test_under_the_threshold_nothing_is_written(device, dtype, norm_type, size):
    grad = torch.randn(size, device=device).to(dtype)
    grad[1::7] = -0.0
    before, version = bits(grad), grad._version
    norm = oracle.total_norm([grad], norm_type)
    for max_norm in (norm * 1.001 + 2e-6, 1e30, INF):
        fastclip.clip_grad_norm_(make_parameters([grad]), max_norm, norm_type)
        assert torch.equal(bits(grad), before)
        assert grad._version == version or device == "cuda"


CLIP_READ_ONLY_MEMORY = """
import itertools, mmap, os, signal, sys, warnings
import torch, fastclip
from support import make_parameters
warnings.simplefilter("ignore")
torch.set_num_threads(2)
with open(sys.argv[1], "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
functions = fastclip.clip_grad_norm_, fastclip.clip_grad_value_
for isa, function, size in itertools.product(fastclip._native._C.available_kernels(), functions, (1001, 600_001)):
    fastclip._native._C.select_kernels(isa)
    parameters = make_parameters([torch.frombuffer(memory, dtype=torch.float32)[:size]])
    function(parameters, 1e6)
    # With a threshold that makes it write it has to crash, or the line above proves nothing.
    child = os.fork()
    if child == 0:
        function(parameters, 1e-3)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
print("finished")
"""


def test_under_the_threshold_read_only_memory_is_enough(tmp_path):
    torch.rand(LARGE).numpy().tofile(tmp_path / "gradient")
    done = run_python(CLIP_READ_ONLY_MEMORY, tmp_path / "gradient")
    assert done.stdout == "finished\n", (done.returncode, done.stderr)


@small_and_large
def test_version_counters(device, size):
    grads = [torch.randn(size, device=device), torch.randn(size, 2, device=device)[:, 0], torch.ones(3, device=device)]
    parameters = make_parameters(grads)
    fastclip.clip_grad_norm_(parameters, 1e6)
    if device == "cpu":  # on a CUDA device the host does not know whether the kernel wrote
        assert [g._version for g in grads] == [0, 0, 0]
    fastclip.clip_grad_norm_(parameters, 0.1)
    written = [g._version for g in grads]
    assert all(version > 0 for version in written)
    fastclip.clip_grads_with_norm_(parameters, 0.1, torch.tensor(5.0, device=device))
    assert all(now > then for now, then in zip((g._version for g in grads), written, strict=True))


def test_backward_notices_a_clipped_gradient(device):
    x = torch.ones(3, device=device, requires_grad=True)
    grad = torch.full((3,), 5.0, device=device)
    y = x * grad  # saves grad for backward
    fastclip.clip_grad_norm_(make_parameters([grad]), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@small_and_large
def test_coefficient_too_small_for_float32(device, size):
    large = torch.full((size,), 1e38 / math.sqrt(size), device=device)
    check_clip([large], 1e-3)
    check_clip([large, torch.ones(5, device=device).bfloat16(), torch.ones(5, device=device).half()], 1e-3)
    check_clip([large, torch.full((9,), 1e38, device=device).bfloat16()], 1e-5)
    check_clip([large, torch.ones(5, 2, device=device)[:, 0] * 1e37], 1e-3)
    check_clip([torch.full((9,), 1e200, dtype=torch.float64, device=device)], 1e-3)
    for max_norm in (1e-20, 1e-30, 1e-37):  # a power of two and a rest, both float32
        check_clip([large, torch.full((9,), 1e38, device=device).bfloat16()], max_norm)


@pytest.mark.parametrize("scale", [1e25, 1e30, 1e-4, 1e-10, 1e-30])
@norm_types
def test_scales(device, scale, norm_type):
    check_clip([torch.randn(1000, device=device) * scale, torch.randn(33, device=device) * scale], 1e-12, norm_type)


def test_float16_list_beyond_its_own_range(device):
    grads = [torch.full((LARGE,), 100.0, device=device).half(), torch.full((9,), 6e4, device=device).half()]
    (clipped, _) = check_clip(grads, 1e4)
    assert clipped.min() > 0  # torch: its norm is inf, and every gradient becomes 0


THRESHOLDS = [0, 0.0, -1, -0.5, INF, -INF, NAN, 2, True, np.float32(0.5), np.float64(0.5), np.int64(1), "0.5"]
THRESHOLDS += [torch.tensor(0.5), torch.tensor(1), torch.tensor([0.5]), 1e-45, 1e300, 1e-300, 10**30]


@pytest.mark.parametrize("max_norm", THRESHOLDS, ids=repr)
@small_and_large
def test_thresholds_as_torch_treats_them(device, max_norm, size):
    grads = [torch.randn(size, device=device), torch.randn(3, dtype=torch.float64, device=device)]
    check_against_torch("clip_grad_norm_", grads, max_norm, rtol=1e-5)
    check_against_torch("clip_grad_norm_", [torch.zeros(size, device=device)], max_norm)


@dtypes
@norm_types
@pytest.mark.parametrize("max_norm", [1.0, 0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("values", [[INF], [-INF, 1], [NAN, 2], [1, NAN, INF], [0, INF, -0.0, -2]], ids=str)
def test_non_finite_norms_as_torch_treats_them(device, dtype, norm_type, max_norm, values):
    for repeat in (1, 300):
        grads = [torch.tensor(values * repeat, dtype=dtype, device=device), torch.ones(9, dtype=dtype, device=device)]
        check_against_torch("clip_grad_norm_", grads, max_norm, norm_type)


@dtypes
@norm_types
def test_norm_that_overflows_float32_gives_zeros_as_in_torch(device, dtype, norm_type):
    value = torch.finfo(torch.float32).max if dtype == torch.float32 else torch.finfo(dtype).max
    grads = [torch.full((50,), value, dtype=dtype, device=device)]
    if dtype in (torch.float32, torch.bfloat16):
        check_against_torch("clip_grad_norm_", grads, 1.0, norm_type)
        if norm_type != INF:
            copies = clone(grads)
            assert fastclip.clip_grad_norm_(make_parameters(copies), 1.0, norm_type).item() == INF
            assert not copies[0].any()
    elif dtype == torch.float16:
        check_clip(grads, 1.0, norm_type)


@norm_types
@small_and_large
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_error_if_nonfinite(device, norm_type, size, value):
    grads = [torch.ones(size, device=device), torch.ones(5, device=device)]
    grads[0][size // 2] = value
    for name in ("clip_grad_norm_", "get_total_norm"):
        args = (1.0, norm_type, True) if name == "clip_grad_norm_" else (norm_type, True)
        kind, message = check_against_torch(name, grads, *args)
        assert kind is RuntimeError and f"norm of order {float(norm_type)}" in message
    before, parameters = [bits(g) for g in grads], make_parameters(grads)
    assert outcome(fastclip.clip_grad_norm_, parameters, 1.0, norm_type, error_if_nonfinite=True)[0] is RuntimeError
    assert all(torch.equal(bits(g), b) for g, b in zip(grads, before, strict=True))
    assert [g._version for g in grads] == [1, 0]


def test_error_if_nonfinite_passes_what_is_finite(device):
    # The squares overflow, and so does float16's own norm; neither is a reason to raise.
    check_clip([torch.full((9,), 1e30, device=device)], 1.0)
    grads = [torch.full((999,), 6e4, device=device).half(), torch.full((9,), 1e30, device=device)]
    assert fastclip.clip_grad_norm_(make_parameters(grads), 1.0, 2, True).item() < INF


@small_and_large
def test_returned_norm_is_fresh_and_writable(device, size):
    parameters = make_parameters([torch.full((size,), 0.01, device=device)])
    norms = [fastclip.clip_grad_norm_(parameters, 1e6) for _ in range(3)]
    norms += [fastclip.get_total_norm([p.grad for p in parameters]) for _ in range(3)]
    assert len({norm.data_ptr() for norm in norms}) == len(norms)
    expected = norms[0].item()
    norms[0].fill_(-1)
    norms[1] += 5
    assert norms[2].item() == expected and fastclip.clip_grad_norm_(parameters, 1e6).item() == expected
    assert all(norm.shape == () and norm.is_leaf and norm.device.type == device for norm in norms)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@small_and_large
def test_grad_modes(device, mode, size):
    grad = torch.ones(size, device=device)
    want = clone_for_torch([grad])
    with mode():
        norm = fastclip.clip_grad_norm_(make_parameters([grad]), 1.0)
        expected = torch.nn.utils.clip_grad_norm_(make_parameters(want), 1.0)
        total = fastclip.get_total_norm([grad])
    assert not norm.requires_grad and norm.is_inference() == expected.is_inference() == total.is_inference()
    assert_equal(grad, want[0].to(device))


def test_gradient_that_requires_grad(device):
    """As create_graph=True leaves it: written in place under no_grad, and the norm has no history."""
    x = torch.tensor([3.0, 4.0], device=device, requires_grad=True)
    (x**2).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    norm = fastclip.clip_grad_norm_([x], 1.0)
    assert norm.item() == 10 and not norm.requires_grad
    torch.testing.assert_close(x.grad.detach(), torch.tensor([0.6, 0.8], device=device))
    leaf = torch.ones(3, device=device, requires_grad=True)
    assert not fastclip.get_total_norm([leaf]).requires_grad


@small_and_large
def test_inference_tensors(device, size):
    with torch.inference_mode():
        grads = [torch.ones(size, device=device), torch.ones(9, device=device)]
        copies = clone(grads)
        fastclip.clip_grad_norm_(make_parameters(copies), 1.0)
        oracle.check_scaled(copies[0], grads[0], oracle.coefficient(1.0, oracle.total_norm(grads, 2)))
    oracle.check_norm(fastclip.get_total_norm(grads), grads, 2)
    outcomes = []
    with torch.inference_mode():
        for_torch = clone_for_torch(grads)
    for module, copies in ((fastclip, grads), (torch.nn.utils, for_torch)):
        plain = torch.ones(9, device=copies[0].device)
        outcomes.append(outcome(module.clip_grad_norm_, make_parameters([plain, *copies]), 1.0))
        outcomes.append(outcome(module.clip_grad_value_, make_parameters([plain, *copies]), 0.5))
        if module is fastclip:
            assert plain.min() == 1 and all(g.min() == 1 for g in grads)  # torch has written before it raises
    assert outcomes[:2] == outcomes[2:] and outcomes[0][0] is RuntimeError
