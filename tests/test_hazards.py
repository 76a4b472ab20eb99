"""Lists that change while they are read, memory that is gone, and faults behind a gradient that only torch can clip."""

import pytest
import torch
from support import make_parameter, make_parameters

import fastclip


def foreign(effect):
    """An object whose .grad runs code, as a property of a user's class may."""

    class Foreign:
        @property
        def grad(self):
            return effect()

    return Foreign()


def test_a_storage_that_is_swapped_while_the_list_is_read(device):
    first = make_parameter(torch.ones(1000, device=device))

    def swap():
        first.grad.data = torch.ones(1, device=device)

    assert fastclip.clip_grad_norm_([first, foreign(swap)], 1e9).item() == pytest.approx(1000**0.5)


def test_a_list_that_is_cleared_while_it_is_read():
    items = []

    def clear():
        items.clear()
        raise AttributeError

    items.append(foreign(clear))
    with pytest.raises(TypeError, match=r"parameters\[0\]: expected a torch.Tensor, got Foreign"):
        fastclip.clip_grad_norm_(items, 1.0)


def test_an_error_in_a_property_passes_through():
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fastclip.clip_grad_norm_([foreign(fail)], 1.0)


@pytest.mark.parametrize("layout", ["dense", "gapped"])
def test_a_storage_without_memory(device, layout):
    good = torch.ones(4, device=device)
    bad = torch.ones(4, 2, device=device)
    bad = bad if layout == "dense" else bad[:, 0]
    bad.untyped_storage().resize_(0)
    message = r"parameters\[1\]: expected a gradient with memory for its elements, got 0 bytes of storage"
    with pytest.raises(RuntimeError, match=message):
        fastclip.clip_grad_norm_(make_parameters([good, bad]), 1.0)
    assert good.eq(1).all()


def test_a_gapped_gradient_that_requires_grad(device):
    dense, gapped = torch.full((4,), 10.0, device=device), torch.ones(3, 6, device=device)[:, ::2].requires_grad_()
    fastclip.clip_grad_norm_(make_parameters([dense, gapped]), 1.0)
    assert gapped.grad_fn is not None or gapped.is_leaf
    assert torch.cat([dense, gapped.detach().flatten()]).norm().item() == pytest.approx(1, rel=1e-5)
    fastclip.clip_grad_value_(make_parameters([dense, gapped]), 0.01)
    assert gapped.max().item() == pytest.approx(0.01)


def test_nothing_is_modified_when_torch_would_fail_midway(device):
    complex_one = make_parameter(torch.ones(2, dtype=torch.complex64, device=device))
    good = make_parameter(torch.full((3,), 10.0, device=device))
    expanded = make_parameter(torch.ones(1, device=device).expand(3))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        fastclip.clip_grad_norm_([complex_one, good, expanded], 1.0)
    with pytest.raises(TypeError, match=r"parameters\[2\]: expected a torch.Tensor, got int"):
        fastclip.clip_grad_norm_([complex_one, good, 5], 1.0)
    assert good.grad.eq(10).all()


def test_inside_functorch_and_tracing_torch_does_it():
    p = make_parameter(torch.full((4,), 3.0))
    torch.func.grad(lambda x: (fastclip.clip_grad_norm_([p], 1.0) * x).sum())(torch.ones(2))
    torch.jit.trace(lambda x: x * fastclip.clip_grad_norm_([p], 1.0), torch.ones(2), check_trace=False)
    assert fastclip.counters()["fallback_reasons"] == {"functorch": 1, "tracing": 1}


def test_float16_subnormals_survive_flushing(device):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        grad = torch.full((33,), 3e-5, dtype=torch.float16, device=device)
        assert fastclip.get_total_norm(grad).item() == pytest.approx(3e-5 * 33**0.5, rel=1e-2)
    finally:
        torch.set_flush_denormal(False)
