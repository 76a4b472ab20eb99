"""Gradients that are not plain memory: torch's results, and the reason in counters()."""

import pytest
import torch
from support import check_against_torch, make_parameter, make_parameters, outcome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastclip

CALLS = [
    ("clip_grad_norm_", (0.5,)),
    ("clip_grad_value_", (0.5,)),
    ("clip_grads_with_norm_", (0.5, torch.tensor(3.0))),
    ("get_total_norm", ()),
]
calls = pytest.mark.parametrize(("name", "args"), CALLS, ids=[name for name, _ in CALLS])


class Wrapped(torch.Tensor):
    """A subclass that is no memory of its own: every operation goes through __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    def clone(self):
        return Wrapped(self.inner.clone())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda x: x.inner if isinstance(x, Wrapped) else x  # noqa: E731
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        schema = func._schema
        if schema.is_mutable:
            return args[0]
        return tree_map(lambda x: Wrapped(x) if isinstance(x, torch.Tensor) and x.dim() else x, out)


class Plain(torch.Tensor):
    """A subclass that changes nothing about memory."""


def sparse():
    return torch.sparse_coo_tensor([[0, 2]], [3.0, -4.0], (5,)).coalesce()


REASONS = {
    "sparse": sparse,
    "sparse csr": lambda: torch.eye(3).to_sparse_csr() * 3,
    "complex": lambda: torch.randn(5, dtype=torch.complex64),
    "conjugate view": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "negative-bit view": lambda: torch._neg_view(torch.randn(5)),
    "zero tensor": lambda: torch._efficientzerotensor((5,)),
    "device meta": lambda: torch.ones(5, device="meta"),
    "dtype Float8_e4m3fn": lambda: torch.ones(5).to(torch.float8_e4m3fn),
    "dtype Float8_e5m2": lambda: torch.ones(5).to(torch.float8_e5m2),
    "mkldnn": lambda: torch.randn(5, 5).to_mkldnn(),
}


@calls
@pytest.mark.parametrize(("reason", "make"), REASONS.items(), ids=REASONS.keys())
def test_reason_and_result(isa, reason, make, name, args):
    for before, after in ([], []), ([torch.randn(3)], [torch.randn(2)]):
        fastclip.reset_counters()
        check_outcomes(name, args, [*before, make(), *after], reason)


def remake(grad):
    """A clone that is of the same kind, views of the conjugate or the negative included."""
    if grad.is_neg():
        return torch._neg_view(torch._neg_view(grad).clone())
    if grad.is_conj():
        return grad.conj().clone().conj()
    return torch._efficientzerotensor(grad.shape) if grad._is_zerotensor() else grad.clone()


def dense(tensor):
    if isinstance(tensor, Wrapped):
        return tensor.inner
    if tensor.is_mkldnn or tensor.layout != torch.strided:
        return tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().to(torch.complex64 if tensor.is_complex() else torch.float32)


def check_outcomes(name, args, grads, reason):
    outcomes, lists = [], []
    for module in (fastclip, torch.nn.utils):
        copies = [remake(grad) for grad in grads]
        items = copies if name == "get_total_norm" else make_parameters(copies)
        outcomes.append(outcome(getattr(module, name), items, *args))
        lists.append(copies)
    (got, result), (want, expected) = outcomes
    assert got == want, outcomes
    if not isinstance(expected, torch.Tensor):
        assert result == expected
    elif not expected.is_meta:
        torch.testing.assert_close(result, expected)
    for mine, theirs in zip(*lists, strict=True):
        if not mine.is_meta:
            torch.testing.assert_close(dense(mine), dense(theirs))
    counters = fastclip.counters()
    assert counters["native"] == 0 and counters["fallback"] == counters["calls"] == 1
    (counted,) = counters["fallback_reasons"]
    assert counted == reason.removesuffix(" csr")


@calls
def test_subclass_with_dispatch(isa, name, args):
    check_outcomes(name, args, [torch.randn(3), Wrapped(torch.randn(5))], "subclass")


@calls
@pytest.mark.parametrize("as_parameter", [False, True])
def test_subclass_without_dispatch_stays_native(device, name, args, as_parameter):
    grad = torch.full((5,), 3.0, device=device).as_subclass(Plain)
    item = make_parameter(torch.full((5,), 3.0, device=device))
    if as_parameter:
        item = torch.ones(5, device=device).as_subclass(Plain)
        item.requires_grad_()
    if name != "get_total_norm":
        item.grad = grad
    result = getattr(fastclip, name)([grad if name == "get_total_norm" else item], *args)
    assert fastclip.counters()["native"] == 1 and fastclip.counters()["fallback"] == 0
    if name == "get_total_norm":
        assert result.item() == pytest.approx(45**0.5) and type(result) is torch.Tensor
    else:
        assert grad.max() <= 0.51


def test_parameter_subclass_stays_native(device):
    class Mine(torch.nn.Parameter):
        pass

    parameter = Mine(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert fastclip.clip_grad_norm_([parameter], 1.0).item() == 6
    assert fastclip.counters()["native"] == 1


@calls
def test_functorch_wrappers(isa, name, args):
    def total(module):
        def inner(x):
            if name == "get_total_norm":
                return module.get_total_norm([x])
            parameter = type("Item", (), {"grad": x * 1})()
            getattr(module, name)([parameter], *args)
            return parameter.grad

        return inner

    x = torch.randn(3, 4)
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())):
        fastclip.reset_counters()
        got, want = outcome(transform(total(fastclip)), x), outcome(transform(total(torch.nn.utils)), x)
        assert got[0] == want[0], (got, want)
        if got[0] == "returned":
            torch.testing.assert_close(got[1], want[1])
        assert fastclip.counters()["fallback_reasons"] == {"functorch": 1}


@calls
def test_dispatch_mode_sees_the_operations(isa, name, args):
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    items = [torch.randn(3)] if name == "get_total_norm" else make_parameters([torch.randn(3)])
    with Record():
        getattr(fastclip, name)(items, *args)
    assert seen and fastclip.counters()["fallback_reasons"] == {"dispatch mode": 1}


def test_foreach_true_keeps_torchs_error(isa):
    for foreach in (True, False, None):
        check_against_torch("clip_grad_norm_", [torch.ones(3, device="meta")], 0.5, foreach=foreach)


def test_counters(isa):
    parameters = make_parameters([torch.ones(3)])
    zero = {"calls": 0, "native": 0, "fallback": 0, "fallback_reasons": {}}
    assert fastclip.counters() == zero
    fastclip.clip_grad_norm_(parameters, 1.0)
    fastclip.clip_grad_norm_([], 1.0)
    fastclip.clip_grad_value_(parameters, 1.0)
    fastclip.clip_grads_with_norm_(parameters, 1.0, fastclip.get_total_norm(torch.ones(3)))
    assert fastclip.counters() == {**zero, "calls": 5, "native": 5}
    fastclip.clip_grad_norm_(parameters, 1.0, 3)
    fastclip.clip_grad_norm_(parameters, 1.0, 4)
    fastclip.clip_grad_value_(parameters, -1.0)
    fastclip.clip_grads_with_norm_(parameters, 1.0, torch.tensor(2))
    fastclip.get_total_norm([torch.ones(3, device="meta")])
    reasons = {"norm_type": 2, "clip_value": 1, "total_norm": 1, "device meta": 1}
    result = fastclip.counters()
    assert result == {"calls": 10, "native": 5, "fallback": 5, "fallback_reasons": reasons}
    result["fallback_reasons"].clear()  # a copy
    assert fastclip.counters()["fallback_reasons"] == reasons
    fastclip.reset_counters()
    assert fastclip.counters() == zero


def test_nested_tensor(isa):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    got, want = (outcome(module.get_total_norm, [nested]) for module in (fastclip, torch.nn.utils))
    assert got == want
    assert fastclip.counters()["fallback_reasons"] == {"nested": 1}
