"""What torch's own functions do with every kind of argument and layout, and fastclip does too."""

import inspect
import types
import warnings

import numpy as np
import pytest
import torch
from support import (
    EMULATED,
    INF,
    assert_equal,
    check_against_torch,
    clone,
    clone_for_torch,
    make_parameter,
    make_parameters,
    outcome,
    run_python,
)

import fastclip

NAMES = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]
CLIPS = [("clip_grad_norm_", (0.1,)), ("clip_grad_value_", (0.1,)), ("clip_grads_with_norm_", (0.1, torch.tensor(3.0)))]
clips = pytest.mark.parametrize(("name", "args"), CLIPS, ids=[name for name, _ in CLIPS])
# Squares of these sides are 64 elements, on the calling thread, and 1.4 MB, on two.
sides = pytest.mark.parametrize("n", [8, 80 if EMULATED else 600])

LAYOUTS = {
    "transposed": lambda n: [torch.randn(n, n + 1).t(), torch.randn(n, 3)],
    "permuted": lambda n: [torch.randn(2, n, n).permute(1, 2, 0)],
    "channels_last": lambda n: [torch.randn(2, 3, n, n).to(memory_format=torch.channels_last)],
    "every second": lambda n: [torch.randn(n, 2 * n)[:, ::2], torch.randn(5)],
    "padded rows": lambda n: [torch.randn(5), torch.randn(n, n + 3)[:, :n]],
    "sliced from the middle": lambda n: [torch.randn(n, n, 3)[1:-1, 1:-1, 1]],
    "0-d": lambda n: [torch.tensor(3.0), torch.randn(n, n), torch.tensor(-2.0)],
    "0-d from the middle": lambda n: [torch.randn(n, n)[3, 4]],
    "empty": lambda n: [torch.randn(n, n), torch.empty(0, 3), torch.empty(3, 0)],
    "unaligned": lambda n: [torch.randn(n * n + 8)[i:-1] for i in range(1, 8)],
    "expanded one element": lambda n: [torch.randn(1).expand(1, 1, 1), torch.randn(n, n)],
    "views of one memory": lambda n: list(torch.randn(n * n * 4).split(n * n)),
    "without gradients": lambda n: [None, torch.randn(n, n), None],
    "mixed": lambda n: [torch.randn(n, n), torch.randn(n, n).half(), torch.randn(n, n).double().t()],
    "the same gradient twice": lambda n: [torch.randn(n, n)] * 2,
    "the same memory": lambda n: [g := torch.randn(n, n), g.view(-1), g.t()],
    "partial overlap": lambda n: [g := torch.randn(n * n + 5), g[5:], torch.randn(3)],
    "overlap with a gapped one": lambda n: [g := torch.randn(n, n), g[:, ::2]],
    "contained": lambda n: [g := torch.randn(n, n), g[1], g[2], g[1]],
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request, device):
    return lambda n: clone(request.param(n), device=device)


@clips
@sides
def test_layouts(layout, n, name, args):
    check_against_torch(name, layout(n), *args, reference=torch.float64)
    assert fastclip.counters()["fallback"] == 0


@sides
@pytest.mark.parametrize("norm_type", [1, 2, INF])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_layouts_and_norm_types(layout, n, norm_type, max_norm):
    grads = layout(n)
    check_against_torch("clip_grad_norm_", grads, max_norm, norm_type, reference=torch.float64)
    check_against_torch("get_total_norm", [g for g in grads if g is not None], norm_type, reference=torch.float64)


@clips
@pytest.mark.parametrize("offset", [0, 5, 16])
def test_threads_do_not_race_for_shared_memory(device, offset, name, args):
    base = torch.randn(600_000, device=device)
    for grads in ([base[: base.numel() - offset], base[offset:]], [base[offset:], base[: base.numel() - offset]]):
        for _ in range(10):
            check_against_torch(name, grads, *args, reference=torch.float64)


def test_threads_do_not_race_for_one_small_gradient(isa):
    """Two threads would meet in the same few cache lines all the time; each factor that is lost is an error of 1e-3."""
    for _ in range(3):
        grads = [torch.randn(8192)]
        args = 0.999, torch.tensor(1.0)
        check_against_torch("clip_grads_with_norm_", grads, *args, twice=[0] * 2000, reference=torch.float64, rtol=3e-4)


@clips
@sides
def test_parameter_listed_twice(device, n, name, args):
    for _ in range(10):
        grads = [torch.randn(n, n), torch.randn(3), torch.randn(4, 6)[:, ::2]]
        check_against_torch(name, grads, *args, twice=[0, 2], reference=torch.float64)


@clips
@sides
def test_gradient_that_overlaps_itself_raises_and_modifies_nothing(device, n, name, args):
    for expanded in (torch.randn(1, device=device).expand(n * n), torch.randn(n, 1, device=device).expand(n, n)):
        grads = [torch.randn(n, n, device=device), expanded]
        before = clone(grads)
        kind, message = outcome(getattr(fastclip, name), make_parameters(grads), *args)
        assert (kind, message) == outcome(getattr(torch.nn.utils, name), make_parameters(clone_for_torch(grads)), *args)
        assert kind is RuntimeError and "single memory location" in message
        assert torch.equal(grads[0], before[0]) and grads[0]._version == 0
    expanded = torch.randn(n, 1, device=device).expand(n, n)
    check_against_torch("get_total_norm", [expanded], reference=torch.float64)


@clips
def test_gradient_that_overlaps_itself_too_hard_to_tell(device, name, args):
    grads = [torch.randn(100, device=device).as_strided((8, 8), (7, 1)), torch.randn(5, device=device)]
    check_against_torch(name, grads, *args)


@sides
@pytest.mark.parametrize("norm_type", [0, 0.5, 3, -INF, -1, 2.5, "3", np.float64(0.5)])
def test_norm_types_that_torch_computes(device, n, norm_type):
    grads = [torch.randn(n, n, device=device), torch.randn(7, device=device)]
    check_against_torch("clip_grad_norm_", grads, 0.5, norm_type, rtol=1e-5)
    check_against_torch("get_total_norm", grads, norm_type, rtol=1e-5)
    assert fastclip.counters() == {"calls": 2, "native": 0, "fallback": 2, "fallback_reasons": {"norm_type": 2}}


@pytest.mark.parametrize("norm_type", [1, 2, 1.0, 2.0, "inf", "2", INF, np.inf, np.float32(2), np.int64(1), True])
def test_norm_types_that_are_fused(device, norm_type):
    check_against_torch("clip_grad_norm_", [torch.randn(9, device=device)], 0.5, norm_type)
    check_against_torch("get_total_norm", [torch.randn(9, device=device)], norm_type)
    assert fastclip.counters()["native"] == 2 and fastclip.counters()["fallback"] == 0


def test_norm_type_tensor(device):
    check_against_torch("clip_grad_norm_", [torch.randn(9, device=device)], 0.5, torch.tensor(1))


@pytest.mark.parametrize("foreach", [None, True, False])
@clips
def test_foreach(device, foreach, name, args):
    check_against_torch(name, [torch.randn(9, device=device), torch.randn(4, device=device)], *args, foreach=foreach)
    check_against_torch("get_total_norm", [torch.randn(9, device=device)], foreach=foreach)


@pytest.mark.parametrize("grads", [[torch.empty(0)], [torch.ones(3), torch.empty(0, 2)]])
def test_inf_norm_of_an_empty_gradient_raises(device, grads):
    grads = [g.to(device) for g in grads]
    for name, args in (("clip_grad_norm_", (1.0, INF)), ("get_total_norm", (INF,))):
        assert check_against_torch(name, grads, *args)[0] is RuntimeError


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "generator": lambda ps: (p for p in ps),
    "iterator": iter,
    "map": lambda ps: map(lambda p: p, ps),
    "dict values": lambda ps: {i: p for i, p in enumerate(ps)}.values(),
    "dict keys": lambda ps: {p: 0 for p in ps}.keys(),
    "ParameterList": torch.nn.ParameterList,
    "list subclass": type("Reversed", (list,), {"__iter__": lambda self: iter(list(reversed(self)))}),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
@clips
def test_containers(device, container, name, args):
    grads = [torch.randn(4, device=device), torch.randn(2, 3, device=device)]
    want = clone(grads)
    got = getattr(fastclip, name)(container(make_parameters(grads)), *args)
    expected = getattr(torch.nn.utils, name)(container(make_parameters(want)), *args)
    assert got is expected is None or torch.allclose(got, expected)
    for mine, theirs in zip(grads, want, strict=True):
        assert_equal(mine, theirs)


@clips
@pytest.mark.parametrize("shape", [(4, 5), (0,), ()])
def test_single_tensor(device, name, args, shape):
    grads = [torch.randn(shape, device=device)]
    want = clone(grads)
    getattr(fastclip, name)(make_parameter(grads[0]), *args)
    getattr(torch.nn.utils, name)(make_parameter(want[0]), *args)
    assert_equal(grads[0], want[0])
    assert_equal(fastclip.get_total_norm(grads[0]), torch.nn.utils.get_total_norm(grads[0]))


@clips
def test_generator_is_read_once(device, name, args):
    parameters, seen = make_parameters([torch.ones(3, device=device) for _ in range(4)]), []
    getattr(fastclip, name)((seen.append(p) or p for p in parameters), *args)
    assert len(seen) == 4 and parameters[3].grad.max() < 1


def test_error_inside_a_generator_passes_through(device):
    def broken():
        yield make_parameter(torch.ones(3))
        raise TypeError("mine")

    for function, args in ((fastclip.clip_grad_norm_, (1.0,)), (fastclip.get_total_norm, ())):
        assert outcome(function, broken(), *args) == (TypeError, "mine")


def test_empty_generator_warns_at_the_caller(device):
    with pytest.warns(UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur") as seen:
        line = inspect.currentframe().f_lineno + 1
        norm = fastclip.clip_grad_norm_((p for p in []), 1.0)
        torch.nn.utils.clip_grad_norm_((p for p in []), 1.0)
    torch_warns = "is an empty generator" in inspect.getsource(torch.nn.utils.clip_grad)  # torch 2.6 does not yet
    assert [str(w.message) for w in seen] == [str(seen[0].message)] * (1 + torch_warns)
    assert (seen[0].filename, seen[0].lineno) == (__file__, line)
    assert norm.item() == 0


@pytest.mark.parametrize(
    "empty", [[], (), {}, iter(()), [torch.zeros(3)], torch.zeros(3)], ids=lambda x: type(x).__name__
)
def test_no_gradients(device, empty):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = fastclip.clip_grad_norm_(empty, 1.0)
        assert fastclip.clip_grads_with_norm_(empty, 1.0, torch.tensor(2.0)) is None
    assert norm.shape == () and norm.dtype == torch.float32 and norm.item() == 0 and not norm.requires_grad
    norm += 1
    assert fastclip.clip_grad_norm_([], 1.0, "inf", True).item() == 0
    assert fastclip.get_total_norm([]).item() == 0


def test_non_leaf_parameter_warns_as_torch(device):
    x = torch.ones(3, device=device, requires_grad=True)
    texts = []
    for module in (fastclip, torch.nn.utils):
        with pytest.warns(UserWarning, match="not a leaf Tensor is being accessed") as seen:
            assert module.clip_grad_norm_([x * 2], 1.0).item() == 0
        texts.append(str(seen[0].message).split("(Triggered")[0])
        grad = torch.full((3,), 10.0, device=device)
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="not a leaf"):
            warnings.simplefilter("error")
            module.clip_grad_norm_([make_parameter(grad), x * 2], 1.0)
        assert grad.eq(10).all()
    assert texts[0] == texts[1]


def test_non_leaf_parameter_that_retains_its_gradient(device):
    x = torch.ones(3, device=device, requires_grad=True)
    y = x * 2
    y.retain_grad()
    (y**2).sum().backward()
    fastclip.clip_grad_norm_([x, y], 1.0)
    assert torch.cat([x.grad, y.grad]).norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "total_norm",
    [
        torch.tensor(0.0),
        torch.tensor(INF),
        torch.tensor(float("nan")),
        torch.tensor(-2.0),
        torch.tensor(2.0, dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.float16),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2),
        torch.tensor(True),
        torch.tensor([2.0]),
        torch.tensor([[2.0]]),
        torch.tensor([2.0, 3.0]),
        torch.tensor(2.0, requires_grad=True),
        torch.tensor(2.0 + 0j),
        torch.tensor(2.0, device="meta"),
        2.0,
        2,
        "2",
        None,
    ],
    ids=repr,
)
@pytest.mark.parametrize("max_norm", [0.5, 5, torch.tensor(0.5)], ids=repr)
def test_total_norms_as_torch_treats_them(device, total_norm, max_norm):
    half = isinstance(total_norm, torch.Tensor) and total_norm.dtype in (torch.float16, torch.bfloat16)
    grads = [torch.randn(9, device=device), torch.randn(4, dtype=torch.float64, device=device)]
    check_against_torch("clip_grads_with_norm_", grads, max_norm, total_norm, rtol=8e-3 if half else 2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    """torch's parameters first, same names, order and defaults; what fastclip adds is keyword-only."""
    mine = list(inspect.signature(getattr(fastclip, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torch.nn.utils, name)).parameters.values())
    first, added = mine[: len(theirs)], mine[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in first] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)
    assert isinstance(getattr(fastclip, name), types.FunctionType) and name in fastclip.__all__


def test_keywords(device):
    grad = torch.full((4,), 3.0, device=device)
    ps = make_parameters([grad])
    norm = fastclip.clip_grad_norm_(parameters=ps, max_norm=3.0, norm_type=1, error_if_nonfinite=False, foreach=None)
    assert norm.item() == 12
    assert fastclip.get_total_norm(tensors=[grad], norm_type=2, error_if_nonfinite=True, foreach=None) < 3
    fastclip.clip_grads_with_norm_(parameters=ps, max_norm=1.0, total_norm=norm, foreach=False)
    fastclip.clip_grad_value_(parameters=ps, clip_value=0.01, foreach=None)
    assert_equal(grad, torch.full((4,), 0.01, device=device))


@clips
def test_profiler_range(device, name, args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        getattr(fastclip, name)(make_parameters([torch.ones(3, device=device)]), *args)
    assert f"fastclip::{name}" in [event.key for event in profile.key_averages()]


@clips
@pytest.mark.parametrize("size", [10, 600_001])
def test_lazy_clones_keep_their_values(device, size, name, args):
    base = torch.full((size,), 3.0, device=device)
    grad = torch._lazy_clone(base)
    getattr(fastclip, name)(make_parameters([grad]), *args)
    assert base.min() == base.max() == 3 and grad.max() < 3
    grad = torch._lazy_clone(base)
    getattr(fastclip, name)(make_parameters([base]), *args)
    assert grad.min() == grad.max() == 3 and base.max() < 3


def test_reading_a_lazy_clone_does_not_copy_it(device):
    grad = torch._lazy_clone(torch.ones(10, device=device))
    fastclip.get_total_norm([grad])
    assert torch._C._is_cow_tensor(grad)


DROP_GRADIENTS = """
import torch, fastclip
from support import make_parameters

class Thief:
    def __init__(self, victim):
        self.victim = victim

    @property
    def grad(self):  # runs while the list is read
        self.victim.grad = None
        return torch.full((100,), 3.0)

for isa in fastclip._native._C.available_kernels():
    fastclip._native._C.select_kernels(isa)
    for _ in range(50):
        first, second = make_parameters([torch.full((100,), 1.0), torch.full((100,), 2.0)])
        norm = fastclip.clip_grad_norm_([first, Thief(first), second, Thief(second)], 1e9)
        assert abs(norm.item() - (100 + 900 + 400 + 900) ** 0.5) < 1e-5, norm
print("finished")
"""


def test_gradients_dropped_by_foreign_code_during_the_call():
    done = run_python(DROP_GRADIENTS)
    assert done.stdout == "finished\n", (done.returncode, done.stderr)
