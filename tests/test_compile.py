"""torch.compile, torch.export, vmap: fastclip's operators in the graph, one compilation, the eager results."""

import copy
import warnings

import oracle
import pytest
import torch
import torch._dynamo.config
import torch._dynamo.testing
from support import INF, clone, make_parameters, outcome
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastclip
from fastclip._native import _C

pytestmark = pytest.mark.skipif(_C is None, reason="extension not built")
OPS = torch.ops.fastclip
ANY_BACKEND = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's own, about profiler ranges and lazy tensor lists
        warnings.simplefilter("ignore")
        yield
    assert torch.is_grad_enabled()


def some_grads():
    return [
        torch.randn(4, 5),
        torch.randn(7, 3).t(),
        torch.empty(0, 2),
        torch.randn(4, 6)[:, ::2],
        torch.tensor(2.0),
        torch.randn(9, dtype=torch.float16),
        torch.randn(9, dtype=torch.bfloat16),
    ]


def compiled(function, backend="aot_eager", **kwargs):
    """The compiled function, and a counter with `frame_count` and the `graphs` that were made."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **kwargs), counter


def targets(counter):
    return [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]


def operators(counter):
    return [target for target in targets(counter) if "fastclip" in target]


# name -> what a program calls, with parameters and one threshold.
CALLS = {
    "clip_grad_norm_": lambda module, ps, limit: module.clip_grad_norm_(ps, limit),
    "clip_grads_with_norm_": lambda module, ps, limit: module.clip_grads_with_norm_(ps, limit, torch.tensor(3.0)),
    "clip_grad_value_": lambda module, ps, limit: module.clip_grad_value_(ps, limit),
    "get_total_norm": lambda module, ps, limit: module.get_total_norm([p.grad for p in ps if p.grad is not None]),
}
calls = pytest.mark.parametrize("name", CALLS)


def check_against_eager(call, grads, backend="aot_eager"):
    """Calls `call(parameters)` eagerly and compiled, on clones: the same result and gradients. Returns the counter."""
    wanted, got = make_parameters(clone(grads)), make_parameters(clone(grads))
    want = call(wanted)
    fastclip.reset_counters()
    function, counter = compiled(call, backend)
    result = function(got)
    torch.testing.assert_close(result, want, rtol=0, atol=0, equal_nan=True)
    for mine, eager in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.grad, eager.grad, rtol=0, atol=0, equal_nan=True)
    return counter


NORM = torch.tensor(2.0)
SAMPLES = {
    "get_total_norm": lambda grads, norm_type: (OPS.get_total_norm.default, grads, norm_type, False),
    "clip_grad_norm_": lambda grads, norm_type: (OPS.clip_grad_norm_.default, grads, 0.5, norm_type, False),
    "clip_grad_norm_.Tensor": lambda grads, norm_type: (
        OPS.clip_grad_norm_.Tensor,
        grads,
        torch.tensor(0.5),
        norm_type,
        True,
    ),
    "clip_grads_with_norm_": lambda grads, _: (OPS.clip_grads_with_norm_.default, grads, 0.5, NORM),
    "clip_grads_with_norm_.Tensor": lambda grads, _: (
        OPS.clip_grads_with_norm_.Tensor,
        grads,
        torch.tensor(0.5),
        NORM,
    ),
    "clip_grad_value_": lambda grads, _: (OPS.clip_grad_value_.default, grads, 0.5),
    "clip_grad_value_.Tensor": lambda grads, _: (OPS.clip_grad_value_.Tensor, grads, torch.tensor(0.5)),
}
OPERATOR_INPUTS = {
    "float32": lambda: [torch.randn(4, 5), torch.randn(7)],
    "with autograd": lambda: [torch.randn(4, 5).requires_grad_() * 2, torch.randn(7).requires_grad_() * 1],
    "float64": lambda: [torch.randn(4, 5), torch.randn(7, dtype=torch.float64)],
    "mixed": some_grads,
    "none": list,
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
@pytest.mark.parametrize("grads", OPERATOR_INPUTS.values(), ids=OPERATOR_INPUTS.keys())
def test_opcheck(grads, sample):
    operator, *args = sample(grads(), 2.0)
    opcheck(operator, tuple(args))
    assert fastclip.counters()["fallback"] == 0


def test_all_overloads_are_in_the_samples():
    names = {str(sample([], 2.0)[0]).removeprefix("fastclip.").removesuffix(".default") for sample in SAMPLES.values()}
    assert names == {
        name.removeprefix("fastclip::") for name in torch._C._dispatch_get_all_op_names() if "fastclip::" in name
    }


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
@pytest.mark.parametrize("grads", OPERATOR_INPUTS.values(), ids=OPERATOR_INPUTS.keys())
def test_fake_kernels_promise_what_the_operators_return(grads, sample):
    operator, *args = sample(grads(), 2.0)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake[0] = [mode.from_tensor(grad) for grad in args[0]]
        promised = operator(*fake)
    real = operator(*args)
    if real is not None:
        assert (promised.shape, promised.dtype, promised.device) == (real.shape, real.dtype, real.device)
    assert fastclip.counters()["calls"] == (1 if args[0] else 0)  # the fake one is none


@calls
@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_one_compilation_one_operator_over_many_steps(name, backend):
    function, counter = compiled(lambda ps: CALLS[name](fastclip, ps, 0.5), backend)
    parameters = make_parameters(some_grads())
    for step in range(1, 6):
        grads = some_grads()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        before, (want, wanted) = clone(grads), (None, make_parameters(clone(grads)))
        want = CALLS[name](fastclip, wanted, 0.5)
        fastclip.reset_counters()
        got = function(parameters)
        assert fastclip.counters() == {"calls": 1, "native": 1, "fallback": 0, "fallback_reasons": {}}, step
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        for mine, eager, old in zip(parameters, wanted, before, strict=True):
            torch.testing.assert_close(mine.grad, eager.grad, rtol=0, atol=0)
            assert name == "get_total_norm" or old.numel() < 4 or not torch.equal(mine.grad, old)
    assert counter.frame_count == 1
    assert [target.split(".")[1] for target in operators(counter)] == [name]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "get_total_norm"])
@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_a_threshold_that_changes_every_step(name, backend):
    function, counter = compiled(lambda ps, limit: CALLS[name](fastclip, ps, limit), backend)
    for step in range(12):  # more than torch's limit for recompilations, 8
        limit = 0.9 - 0.05 * step
        grads = [torch.full((4, 5), 3.0), torch.full((7,), -2.0)]
        wanted = make_parameters(clone(grads))
        CALLS[name](fastclip, wanted, limit)
        function(make_parameters(grads), limit)
        for mine, eager in zip(grads, wanted, strict=True):
            torch.testing.assert_close(mine, eager.grad, rtol=0, atol=0)
    assert counter.frame_count <= 2 and fastclip.counters()["fallback"] == 0


@pytest.mark.parametrize("limit", [1, "0.5", torch.tensor(0.5), torch.tensor(1), torch.tensor([0.5])], ids=repr)
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_"])
def test_thresholds_of_other_types(name, limit):
    counter = check_against_eager(lambda ps: CALLS[name](fastclip, ps, limit), some_grads())
    assert len(operators(counter)) == 1 and fastclip.counters()["native"] == 1


@calls
def test_patched_functions_have_the_operator(name):
    function, counter = compiled(lambda ps: CALLS[name](torch.nn.utils, ps, 0.5))
    with fastclip.patched():
        for _ in range(3):
            grads = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
            function(make_parameters(grads))
            assert name == "get_total_norm" or max(g.abs().max() for g in grads) < 1
    assert counter.frame_count == 1 and len(operators(counter)) == 1
    assert fastclip.counters() == {"calls": 3, "native": 3, "fallback": 0, "fallback_reasons": {}}


def test_patching_after_the_compilation_compiles_anew():
    function, counter = compiled(lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5))
    for patched, native in ((False, 0), (True, 1), (False, 1)):
        if patched:
            fastclip.patch()
        norm = function(make_parameters([torch.full((4,), 2.0)]))
        fastclip.unpatch()
        assert norm.item() == 4 and fastclip.counters()["native"] == native
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_the_gradients_of_a_model(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    reference = copy.deepcopy(model)

    def update(model):
        norm = fastclip.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.5)
        return norm

    function, counter = compiled(lambda: update(model), backend)
    for step in range(5):
        norms = []
        x = torch.randn(3, 4)
        for m, call in ((model, function), (reference, lambda: update(reference))):
            m.zero_grad()
            m(x).square().sum().backward()
            norms.append(call())
        assert norms[0].item() > 0.1 and norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5), step
        for mine, eager in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, eager)
    assert counter.frame_count == 1 and len(operators(counter)) == 1


def test_a_real_optimizer_breaks_the_graph_only_where_torch_does():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def update():
        norm = fastclip.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return norm

    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        update()
        assert fastclip.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.1, rel=1e-5)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4 and len(operators(counter)) == 1


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no backward pass"
)
@pytest.mark.parametrize("how", ["backward", "grad"])
def test_forward_backward_and_clipping_in_one_graph(how):
    model, x = torch.nn.Linear(4, 2), torch.randn(3, 4)

    def step(x):
        loss = model(x).square().sum()
        if how == "backward":
            loss.backward()
        else:
            for parameter, grad in zip(
                model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
            ):
                parameter.grad = grad
        return fastclip.clip_grad_norm_(model.parameters(), 0.1)

    want = step(x)
    function, counter = compiled(step)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for _ in range(3):
            model.zero_grad()
            assert function(x).item() == pytest.approx(want.item(), rel=1e-6)
            assert fastclip.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.1, rel=1e-5)
    assert counter.frame_count == 1 and len(operators(counter)) == 1


@pytest.mark.parametrize("norm_type", [1, 2, INF, "inf", 2.0])
def test_norm_types(norm_type):
    grads = [torch.randn(4, 5), torch.randn(7).half()]
    counter = check_against_eager(lambda ps: fastclip.clip_grad_norm_(ps, 0.5, norm_type), grads)
    counter = check_against_eager(lambda ps: fastclip.get_total_norm([p.grad for p in ps], norm_type), grads)
    assert len(operators(counter)) == 1
    oracle.check_norm(fastclip.get_total_norm(grads, norm_type), grads, norm_type)


EDGES = {
    "no gradients": lambda: [None, None],
    "some without gradients": lambda: [None, torch.randn(3), None],
    "an empty one": lambda: [torch.empty(0), torch.randn(3)],
    "only empty ones": lambda: [torch.empty(0), torch.empty(3, 0)],
    "half": lambda: [torch.randn(3).half(), torch.randn(4).half()],
    "infinite": lambda: [torch.tensor([INF, 1.0]), torch.randn(3)],
    "NaN": lambda: [torch.tensor([float("nan"), 1.0]), torch.randn(3)],
    "zeros": lambda: [torch.zeros(3)],
    "beyond float32's squares": lambda: [torch.full((3,), 1e30)],
    "views of one memory": lambda: list(torch.randn(40).split(10)),
    "one gradient twice": lambda: [g := torch.randn(5), torch.randn(3), g],
    "overlap": lambda: [g := torch.randn(40), g[5:], torch.randn(3)],
    "gaps": lambda: [torch.randn(6, 6)[:, ::2], torch.randn(4, 5).t()],
    "negative view": lambda: [torch._neg_view(torch.randn(5))],
}


@calls
@pytest.mark.parametrize("grads", EDGES.values(), ids=EDGES.keys())
def test_edges(grads, name):
    if name == "get_total_norm":
        check_against_eager(lambda ps: CALLS[name](fastclip, ps, 0.5), [g for g in grads() if g is not None])
    else:
        check_against_eager(lambda ps: CALLS[name](fastclip, ps, 0.5), grads())


def test_a_parameter_listed_twice_and_a_generator():
    for call in (
        lambda ps: fastclip.clip_grad_norm_([ps[0], ps[1], ps[0]], 0.5),
        lambda ps: fastclip.clip_grad_norm_((p for p in ps), 0.5),
        lambda ps: fastclip.clip_grad_norm_((p for p in ps if p.grad is None), 0.5),
        lambda ps: fastclip.clip_grad_norm_(ps[0], 0.5),
        lambda ps: fastclip.get_total_norm(ps[0].grad),
        lambda ps: fastclip.get_total_norm([]),
        lambda ps: fastclip.get_total_norm(ps),  # parameters themselves, which require gradients
    ):
        torch._dynamo.reset()
        check_against_eager(call, [torch.randn(4), torch.randn(3)])


@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_error_if_nonfinite_is_raised_by_the_operator_and_modifies_nothing(backend):
    function, counter = compiled(lambda ps: fastclip.clip_grad_norm_(ps, 0.5, error_if_nonfinite=True), backend)
    parameters = make_parameters([torch.ones(4)])
    assert function(parameters).item() == 2
    parameters[0].grad = torch.tensor([1.0, INF, 3.0, 4.0])
    with pytest.raises(RuntimeError, match=r"norm of order 2.0 for gradients from `parameters` is non-finite"):
        function(parameters)
    assert parameters[0].grad.tolist() == [1, INF, 3, 4] and torch.is_grad_enabled()
    parameters[0].grad = torch.ones(4)
    assert function(parameters).item() == 2 and counter.frame_count == 1


@calls
@pytest.mark.parametrize(
    "grads",
    [lambda: [torch.ones(3, dtype=torch.complex64)], lambda: [torch.ones(3), torch.ones(3).to(torch.float8_e5m2)]],
    ids=["complex", "float8"],
)
def test_what_is_not_fused_is_torchs_own_function(grads, name):
    function, counter = compiled(lambda ps: CALLS[name](fastclip, ps, 0.5))
    mine, theirs = make_parameters(grads()), make_parameters(grads())
    want = outcome(CALLS[name], torch.nn.utils, theirs, 0.5)
    got = outcome(function, mine)
    assert (got[0] == "returned") == (want[0] == "returned")
    if got[0] == "returned":
        torch.testing.assert_close(got[1], want[1])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert operators(counter) == []


@pytest.mark.parametrize("norm_type", [3, 0.5, 0, -INF])
def test_norm_types_that_torch_computes(norm_type):
    counter = check_against_eager(
        lambda ps: fastclip.clip_grad_norm_(ps, 0.5, norm_type), [torch.randn(3), torch.randn(4)]
    )
    assert operators(counter) == [] and len(targets(counter)) > 0


def test_dynamic_shapes():
    function, counter = compiled(lambda a, b: fastclip.get_total_norm([a, b, a[:, ::2]]))
    for rows in (3, 5, 7, 11, 13):
        a, b = torch.randn(rows, 4), torch.randn(2)
        assert function(a, b).item() == pytest.approx(oracle.total_norm([a, b, a[:, ::2]], 2), rel=1e-6)
    assert counter.frame_count <= 2 and fastclip.counters()["native"] == 5


def test_inf_norm_of_a_gradient_that_is_empty_at_run_time():
    function, _ = compiled(lambda ps: fastclip.clip_grad_norm_(ps, 0.5, INF))
    with pytest.raises(RuntimeError, match="cannot compute the inf"):
        function(make_parameters([torch.ones(3), torch.empty(0)]))
    assert fastclip.counters()["fallback_reasons"] == {"inf norm of an empty gradient": 1}


class Norm(torch.nn.Module):
    def forward(self, a, b):
        return fastclip.get_total_norm([a, b])


def test_export():
    program = torch.export.export(
        Norm(), (torch.randn(3), torch.randn(4)), dynamic_shapes=({0: torch.export.Dim("n")}, None), strict=True
    )
    nodes = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert "fastclip.get_total_norm.default" in nodes
    assert program.module()(torch.ones(5), torch.ones(4)).item() == 3


def test_export_without_dynamo_needs_no_fastclip():
    program = torch.export.export(Norm(), (torch.randn(3), torch.randn(4)), strict=False)
    assert not any("fastclip" in str(node.target) for node in program.run_decompositions().graph.nodes)
    assert program.module()(torch.ones(3), torch.ones(1).expand(4).clone()).item() == pytest.approx(7**0.5)


def test_functional_call_and_func_grad():
    model, x = torch.nn.Linear(4, 2), torch.randn(3, 4)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def norm(parameters):
        return fastclip.get_total_norm(torch.func.grad(loss)(parameters).values())

    function, counter = compiled(norm)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert function(parameters).item() == pytest.approx(norm(parameters).item(), rel=1e-6)
    assert len(operators(counter)) == 1

    parameters = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loss(parameters).backward()
    function, counter = compiled(lambda parameters: fastclip.clip_grad_norm_(parameters.values(), 0.1))
    function(parameters)
    assert fastclip.get_total_norm([p.grad for p in parameters.values()]).item() == pytest.approx(0.1, rel=1e-5)
    assert len(operators(counter)) == 1


def test_vmap():
    function, _ = compiled(torch.func.vmap(lambda a: fastclip.get_total_norm([a, a[:2]])))
    x = torch.randn(3, 4)
    want = torch.stack([fastclip.get_total_norm([row, row[:2]]) for row in x])
    torch.testing.assert_close(function(x), want)
    torch.testing.assert_close(torch.func.vmap(lambda a: OPS.get_total_norm([a, a[:2]], 2.0, False))(x), want)


@pytest.mark.parametrize(
    ("reason", "grads", "norm_type"),
    [
        ("norm_type", lambda: [torch.randn(3), torch.randn(4).double()], 3.0),
        ("norm_type", lambda: [torch.randn(3), torch.randn(4)], 0.5),
        ("complex", lambda: [torch.randn(3, dtype=torch.complex64), torch.randn(4)], 2.0),
        ("complex", lambda: [torch.randn(3, dtype=torch.complex128)], 1.0),
        ("device meta", lambda: [torch.randn(3, device="meta")], 2.0),
    ],
)
def test_operators_do_what_no_kernel_does(reason, grads, norm_type):
    """Called directly: torch's results and, but for a norm that is at least float32, its dtypes."""
    mine = grads()
    theirs = make_parameters(clone(mine))
    results = [OPS.get_total_norm(mine, norm_type, False), OPS.clip_grad_norm_(mine, 0.5, norm_type, False)]
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    OPS.clip_grads_with_norm_(mine, 0.25, results[0] * 0 + 0.5)
    torch.nn.utils.clip_grads_with_norm_(theirs, 0.25, want * 0 + 0.5)
    for got in results:
        assert got.dtype == want.dtype and got.device == want.device
        assert want.is_meta or got.item() == pytest.approx(want.item(), rel=1e-6)
    for grad, parameter in zip(mine, theirs, strict=True):
        assert want.is_meta or torch.allclose(grad, parameter.grad, rtol=1e-6)
    counters = fastclip.counters()
    if reason == "device meta":  # fake kernels do these: nothing is computed
        assert counters["calls"] == 0
    else:
        assert counters["fallback_reasons"] in ({reason: 2, "complex": 1}, {reason: 2}, {reason: 3})
        assert counters["fallback"] + counters["native"] == 3


def test_operators_clip_by_a_negative_value_as_torch():
    grads = [torch.randn(5)]
    theirs = make_parameters(clone(grads))
    OPS.clip_grad_value_(grads, -0.5)
    torch.nn.utils.clip_grad_value_(theirs, -0.5)
    assert torch.equal(grads[0], theirs[0].grad)
    assert fastclip.counters()["fallback_reasons"] == {"clip_value": 1}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_operators_name_what_they_refuse(sample):
    argument = "tensors" if "get_total_norm" in str(sample([], 2.0)[0]) else "grads"
    grads = [torch.ones(3), torch.ones(3, dtype=torch.int64)]
    operator, *args = sample(grads, 2.0)
    with pytest.raises(TypeError, match=rf"{argument}\[1\]: expected a floating-point gradient, got torch.int64"):
        operator(*args)
    grads[1] = torch.ones(100)
    grads[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{argument}\[1\]: expected a gradient with memory"):
        operator(*args)
    assert torch.equal(grads[0], torch.ones(3)) and fastclip.counters()["calls"] == 0
