"""Generated lists of gradients against the oracle."""

import math

import oracle
import pytest
import torch
from support import DTYPES, EMULATED, INF, NAN, bits, clone, clone_for_torch, make_parameters

import fastclip

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SCALES = [0.0, 1.0, 1.0, 1.0, 1e-3, 1e25, 1e-20, 1e-30, 1e-40, 1e4, -1.0]
SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 1e-45, 1e-40, 3e38, 65504.0, 6e-8, 1e200, 1e-200]


@st.composite
def gradients(draw):
    """One gradient: any dtype, shape, layout, offset; random values of one scale with a few special ones."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.sampled_from([(), (0,), (1,), (7,), (33,), (3, 5), (16, 17), (2, 0, 3), (4, 3, 5), (1025,), (4100,)])
    )
    layout = draw(st.sampled_from(["plain", "plain", "offset", "transposed", "gapped"]))
    scale = draw(st.sampled_from(SCALES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    numel = math.prod(shape)
    offset = draw(st.integers(1, 7)) if layout == "offset" else 0
    step = 2 if layout == "gapped" else 1
    flat = torch.randn(numel * step + offset, generator=generator, dtype=torch.float64).mul(scale).to(dtype)[offset:]
    grad = flat[::step].view(shape) if step == 1 else flat.view(*shape, 2)[..., 0]
    grad = grad.permute(tuple(reversed(range(len(shape))))) if layout == "transposed" else grad
    for _ in range(draw(st.integers(0, 2)) if numel and draw(st.booleans()) else 0):
        place = tuple(draw(st.integers(0, n - 1)) for n in grad.shape)
        grad[place] = torch.tensor(draw(st.sampled_from(SPECIAL)), dtype=torch.float64).to(dtype)
    return grad


lists = st.lists(gradients(), min_size=1, max_size=6)
settings = hypothesis.settings(
    max_examples=20 if EMULATED else 150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@settings
@hypothesis.given(grads=lists, norm_type=st.sampled_from([1, 2, INF]), max_norm=st.sampled_from([1e-3, 0.5, 10, 1e9]))
def test_clip_grad_norm(device, grads, norm_type, max_norm):
    hypothesis.assume(norm_type != INF or all(g.numel() for g in grads))
    grads = clone(grads, device=device)
    copies = clone(grads)
    norm = fastclip.clip_grad_norm_(make_parameters(copies), max_norm, norm_type)
    oracle.check_norm(norm, grads, norm_type)
    assert torch.equal(bits(fastclip.get_total_norm(grads, norm_type)), bits(norm))
    want = oracle.total_norm(grads, norm_type)
    coef = oracle.coefficient(max_norm, want if norm.isfinite() else norm.item())
    for after, before in zip(copies, grads, strict=True):
        if coef == 1:
            assert torch.equal(bits(after), bits(before))
            assert after._version == before._version or device == "cuda"
        else:
            oracle.check_scaled(after, before, coef)


@settings
@hypothesis.given(grads=lists, limit=st.sampled_from([0.0, 1e-3, 0.5, 1 / 3, 100.0, 65504.0, INF, -1.0]))
def test_clip_grad_value(device, grads, limit):
    grads = clone(grads, device=device)
    copies, want = clone(grads), clone_for_torch(grads)
    fastclip.clip_grad_value_(make_parameters(copies), limit)
    torch.nn.utils.clip_grad_value_(make_parameters(want), limit)
    for after, expected in zip(copies, want, strict=True):
        torch.testing.assert_close(after, expected.to(device), rtol=0, atol=0, equal_nan=True)
