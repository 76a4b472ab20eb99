"""clip_grad_norm_(…, nonfinite=…), the report on it, and what the error for a norm that is not finite says."""

import copy
import threading

import pytest
import torch
from oracle import check_norm, check_scaled, coefficient, total_norm
from ranks import Ranks, all_reduces
from support import DTYPES, INF, LARGE, NAN, bits, clone, dtypes, make_parameters, norm_types, outcome

import fastclip

POLICIES = ["propagate", "skip", "zero"]
ACTIONS = {"propagate": "propagated", "skip": "skipped", "zero": "zeroed"}
policies = pytest.mark.parametrize("nonfinite", POLICIES)
bad_values = pytest.mark.parametrize("bad", [INF, -INF, NAN])


def gradients(dtype=torch.float32, device="cpu", size=100):
    """Dense, missing, gapped, empty and transposed ones; of dtypes mixed where `dtype` is None."""
    shapes = [(3,), None, (size,), (7, 8), (0,), (5, 6), (17,)]
    grads = []
    for i, shape in enumerate(shapes):
        kind = dtype or DTYPES[i % 4]
        grads.append(None if shape is None else torch.randn(shape).to(kind).to(device))
    grads[3] = grads[3][:, ::2]
    grads[5] = grads[5].t()
    return grads


def check_policy(grads, nonfinite, bad_at, norm_type=2, max_norm=0.5):
    """Clips by a policy; compares gradients and report with what was there before."""
    before = [None if grad is None else grad.detach().cpu().clone() for grad in grads]
    norm = fastclip.clip_grad_norm_(make_parameters(grads), max_norm, norm_type, nonfinite=nonfinite)
    report = fastclip.last_report()
    assert report.first_bad == bad_at and report.is_nonfinite and report.action == ACTIONS[nonfinite]
    assert not norm.isfinite() and str(report.total_norm) == str(norm.item())
    for after, was in zip(grads, before, strict=True):
        if was is None:
            continue
        after = after.cpu()
        if nonfinite == "skip":
            assert torch.equal(bits(after), bits(was))
        elif nonfinite == "zero":
            assert torch.equal(bits(after), torch.zeros_like(bits(was)))  # not -0, not NaN
        else:
            check_scaled(after, was, 0.0 if norm.item() == INF else NAN)
    coef = {"skip": 1.0, "zero": 0.0}.get(nonfinite, 0.0 if norm.item() == INF else NAN)
    assert str(report.clip_coef) == str(coef)


@dtypes
@norm_types
@policies
@bad_values
def test_one_bad_element(device, dtype, norm_type, nonfinite, bad):
    for place in (0, 2, 3, 5, 6):
        grads = gradients(dtype, device)
        if norm_type == INF:
            grads[4] = None  # torch has no inf norm of an empty gradient
        grads[place][(-1,) * grads[place].dim()] = bad
        check_policy(grads, nonfinite, place, norm_type)
    assert fastclip.counters()["fallback"] == 0


@policies
def test_the_first_of_several(device, nonfinite):
    grads, first = gradients(None, device), 6
    for place, bad in ((6, INF), (3, NAN), (5, -INF)):
        grads[place][(0,) * grads[place].dim()] = bad
        check_policy(clone(grads), nonfinite, min(place, first))
        first = min(place, first)


@policies
@pytest.mark.parametrize("position", [0, LARGE // 2 + 1, LARGE - 1])
def test_shared_by_threads_or_blocks(device, nonfinite, position):
    grads = [torch.randn(LARGE).to(device) for _ in range(3)]
    grads[1][position] = NAN
    grads[2][0] = INF
    check_policy(grads, nonfinite, 1)


def test_every_element_is_looked_at(device):
    whole = torch.zeros(50, device=device)
    for position in range(42):
        whole[3:45] = 1
        whole[3 + position] = INF
        check_policy([torch.ones(2, device=device), whole[3:45]], "zero", 1)
    assert whole[:3].tolist() == [0] * 3 and whole[45:].tolist() == [0] * 5


@policies
def test_overlapping_gradients(device, nonfinite):
    memory = torch.ones(200, device=device)
    grads = [torch.ones(3, device=device), memory[:120], memory[80:]]
    memory[100] = INF
    parameters = make_parameters(grads)
    fastclip.clip_grad_norm_(parameters, 0.5, nonfinite=nonfinite)
    assert fastclip.last_report().first_bad == 1
    left = {"skip": [1.0, INF], "zero": [0.0, 0.0], "propagate": [0.0, NAN]}[nonfinite]
    assert [str(x) for x in memory[[0, 100]].tolist()] == [str(x) for x in left]


@dtypes
@norm_types
@pytest.mark.parametrize("nonfinite", [None, *POLICIES])
def test_finite_gradients_are_clipped_as_without_it(device, dtype, norm_type, nonfinite):
    for max_norm in (0.5, 1e9):
        grads = [g for g in gradients(dtype, device) if g is not None and g.numel()]
        before, plain = clone(grads, device="cpu"), clone(grads)
        norm = fastclip.clip_grad_norm_(make_parameters(grads), max_norm, norm_type, nonfinite=nonfinite)
        assert torch.equal(norm, fastclip.clip_grad_norm_(make_parameters(plain), max_norm, norm_type))
        check_norm(norm.cpu(), before, norm_type)
        coef = coefficient(max_norm, total_norm(before, norm_type))
        for after, other, was in zip(grads, plain, before, strict=True):
            assert torch.equal(after, other)
            check_scaled(after.cpu(), was, coef)
        if nonfinite is not None:
            report = fastclip.last_report()
            assert report.action == ("nothing" if coef == 1 else "clipped")
            assert report.clip_coef == pytest.approx(coef, rel=1e-6) and report.total_norm == norm.item()
            assert report.first_bad is None and not report.is_nonfinite


@policies
@pytest.mark.parametrize("dtype, value", [(torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_a_norm_beyond_its_dtype_has_no_bad_gradient(device, dtype, value, nonfinite):
    grads = [torch.full((9,), value, dtype=dtype, device=device)]
    check_policy(grads, nonfinite, None)
    grads = [torch.full((9,), value, dtype=dtype, device=device)]
    kind, message = outcome(fastclip.clip_grad_norm_, make_parameters(grads), 1.0, error_if_nonfinite=True)
    beyond = str(dtype).removeprefix("torch.")
    assert kind is RuntimeError and message.endswith(f"No gradient has an inf or NaN: the norm is beyond {beyond}")


def test_errors_name_the_first_bad_gradient(device):
    grads = [torch.ones(3, device=device), None, torch.ones(4, device=device), torch.ones(3, device=device)]
    grads[2][1], grads[3][0] = NAN, INF
    text = "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped."
    parameters = make_parameters(grads)
    kind, message = outcome(fastclip.clip_grad_norm_, parameters, 1.0, error_if_nonfinite=True)
    assert kind is RuntimeError and message.startswith(text)
    assert message.endswith("parameters[2].grad has the first inf or NaN")
    assert grads[0].tolist() == [1, 1, 1] and grads[3][1].item() == 1
    kind, message = outcome(fastclip.get_total_norm, [g for g in grads if g is not None], error_if_nonfinite=True)
    assert kind is RuntimeError and message.endswith("tensors[1] has the first inf or NaN")
    kind, message = outcome(fastclip.clip_grad_norm_, parameters, 1.0, error_if_nonfinite=True, nonfinite="propagate")
    assert kind is RuntimeError and "parameters[2].grad" in message
    report = fastclip.last_report()
    assert (report.action, report.first_bad, report.clip_coef) == ("nothing", 2, 1.0)


@policies
@pytest.mark.parametrize("reason", ["norm_type", "complex"])
def test_what_torch_does_has_the_same_policies(nonfinite, reason):
    kind = torch.complex64 if reason == "complex" else torch.float32
    grads = [torch.ones(3, dtype=kind), None, torch.ones(2, 4, dtype=kind)]
    grads[2][0, 1] = NAN
    norm_type = 3 if reason == "norm_type" else 2
    parameters = make_parameters(grads)
    fastclip.clip_grad_norm_(parameters, 0.5, norm_type, nonfinite=nonfinite)
    assert fastclip.counters()["fallback_reasons"] == {reason: 1}
    report = fastclip.last_report()
    assert (report.action, report.first_bad) == (ACTIONS[nonfinite], 2)
    want = {"skip": 1.0, "zero": 0.0, "propagate": NAN}[nonfinite]
    torch.testing.assert_close(grads[0].abs(), torch.full((3,), want), equal_nan=True)
    assert bool(grads[2][0, 1].isnan()) == (nonfinite != "zero")
    if nonfinite == "skip":
        found, message = outcome(fastclip.clip_grad_norm_, parameters, 0.5, norm_type, error_if_nonfinite=True)
        assert found is RuntimeError and message.endswith("parameters[2].grad has the first inf or NaN")


@pytest.mark.parametrize("with_policy", [True, False])
def test_a_norm_beyond_float32_is_finite(with_policy):
    """Where torch's functions clip, too."""
    for value, raises in ((1e100, False), (INF, True)):
        grads = [torch.tensor([value, 0.0], dtype=torch.float64)]
        max_norm = fastclip.ZClip(max_norm=1.0) if with_policy else 1.0
        call = fastclip.clip_grad_norm_, make_parameters(grads), max_norm, 3
        kind, _ = outcome(*call, error_if_nonfinite=True, nonfinite="propagate")
        assert (kind is RuntimeError) == raises
        assert fastclip.last_report().action == ("nothing" if raises else "clipped")
        assert grads[0][0].item() == pytest.approx(INF if raises else 1.0)


def test_a_report_has_the_coefficient_that_was_used():
    """In float32 no gradient of this norm is changed, where torch's functions clip."""
    grad = torch.tensor([1.0])
    max_norm = 1 + 1e-6 - 1e-9
    assert grad.item() / (1 + 1e-6) != 1 and max_norm / (1 + 1e-6) < 1
    fastclip.clip_grad_norm_(make_parameters([grad]), max_norm, 3, nonfinite="propagate")
    assert grad.item() == 1 and fastclip.last_report().action == "nothing"


@pytest.mark.parametrize("value", ["raise", "", 1, True])
def test_another_value_is_an_error(value):
    parameters = make_parameters([torch.full((3,), INF)])
    kind, message = outcome(fastclip.clip_grad_norm_, parameters, 1.0, nonfinite=value)
    assert kind is ValueError
    assert message == f'nonfinite: expected "propagate", "skip" or "zero", got {value!r}'
    assert parameters[0].grad.tolist() == [INF] * 3


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_an_error_and_a_policy_exclude_each_other(nonfinite):
    parameters = make_parameters([torch.ones(3)])
    kind, message = outcome(fastclip.clip_grad_norm_, parameters, 1.0, error_if_nonfinite=True, nonfinite=nonfinite)
    assert kind is ValueError and message.startswith("error_if_nonfinite: expected False")
    assert parameters[0].grad.tolist() == [1.0] * 3


def test_version_counters_on_the_cpu(isa):
    for nonfinite, rises in (("skip", 0), ("zero", 1)):
        grad = torch.tensor([INF, 1.0])
        fastclip.clip_grad_norm_(make_parameters([grad]), 1.0, nonfinite=nonfinite)
        assert grad._version == rises


def test_reports_are_those_of_the_thread():
    fastclip.clip_grad_norm_(make_parameters([torch.full((3,), INF)]), 1.0, nonfinite="skip")
    fastclip.clip_grad_norm_(make_parameters([torch.full((3,), NAN)]), 1.0)  # asks for none
    seen = []
    thread = threading.Thread(target=lambda: seen.append(fastclip.last_report()))
    thread.start()
    thread.join()
    assert seen == [None]
    assert fastclip.last_report().action == "skipped" and fastclip.last_report().total_norm == INF
    with pytest.raises(AttributeError):
        fastclip.last_report().action = "other"


def test_no_gradients():
    assert fastclip.clip_grad_norm_(make_parameters([None]), 1.0, nonfinite="zero").item() == 0
    assert fastclip.last_report() == fastclip.ClipReport(0.0, 1.0, False, "nothing", None)


@policies
def test_with_statistics(device, nonfinite):
    grads = [torch.ones(3, device=device), torch.tensor([1.0, NAN], device=device)]
    statistics = fastclip.GradStatistics()
    fastclip.clip_grad_norm_(make_parameters(grads), 1.0, statistics=statistics, nonfinite=nonfinite)
    assert fastclip.last_report().first_bad == 1 and statistics.values[:, 4].tolist() == [0, 1]


def test_names_through_the_monitor():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    monitor = fastclip.GradientMonitor(model)
    model(torch.ones(1, 2)).sum().backward()
    model[1].weight.grad[0, 1] = INF
    monitor.clip_grad_norm_(1.0, nonfinite="zero")
    report = fastclip.last_report()
    assert report.action == "zeroed" and model[0].weight.grad.count_nonzero() == 0
    assert monitor.name_of(list(model.parameters())[report.first_bad]) == "1.weight"
    assert monitor.name_of(torch.nn.Parameter(torch.zeros(1))) is None
    assert monitor.last()["grad/nonfinite"] == 1


def test_compiled_calls_leave_the_graph():
    grads = [torch.ones(3), torch.tensor([NAN, 1.0])]
    parameters = make_parameters(grads)
    step = torch.compile(lambda: fastclip.clip_grad_norm_(parameters, 1.0, nonfinite="zero"), backend="eager")
    assert step().isnan()
    assert [g.tolist() for g in grads] == [[0.0] * 3, [0.0] * 2]
    assert fastclip.last_report().first_bad == 1


# ---- several ranks ----


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def check_ranks(nonfinite, sharded):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    rank = torch.distributed.get_rank()
    local = torch.tensor([1.0, NAN if rank == 1 else 2.0])
    grads, arguments = [torch.ones(2), None, local], {"process_group": torch.distributed.group.WORLD}
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        grads, arguments = [DTensor.from_local(g, mesh, [Shard(0)]) for g in (grads[0], local)], {}
    parameters = make_parameters(grads)
    with all_reduces() as seen:
        norm = fastclip.clip_grad_norm_(parameters, 0.5, nonfinite=nonfinite, **arguments)
    assert len(seen) == 1  # as without it
    assert fastclip.counters()["fallback"] == 0
    report = fastclip.last_report()
    bad_at = 1 if sharded else 2
    assert (report.action, report.first_bad) == (ACTIONS[nonfinite], bad_at if rank == 1 else None)
    assert norm.isnan() if not sharded else norm.full_tensor().isnan()
    want = {"skip": [1.0, 1.0], "zero": [0.0, 0.0], "propagate": [NAN, NAN]}[nonfinite]
    first = grads[0]._local_tensor if sharded else grads[0]
    assert [str(x) for x in first.tolist()] == [str(x) for x in want]
    if nonfinite == "zero":
        assert local.tolist() == [0.0, 0.0]
    if nonfinite == "skip":
        kind, message = outcome(fastclip.clip_grad_norm_, parameters, 0.5, error_if_nonfinite=True, **arguments)
        end = f"parameters[{bad_at}].grad has the first inf or NaN on this rank"
        assert kind is RuntimeError and message.endswith(
            end if rank == 1 else "No gradient has an inf or NaN on this rank"
        )


@policies
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_decide_alike(ranks, nonfinite, sharded):
    ranks.run(check_ranks, nonfinite, sharded)


# ---- inside the optimizer ----


def stepped(optimizer_type, nonfinite, bad, device="cpu", **options):
    parameters = [torch.nn.Parameter(torch.ones(4, device=device)) for _ in range(3)]
    arguments = {name: options.pop(name) for name in list(options) if name in ("fused", "momentum")}
    optimizer = fastclip.ClippedOptimizer(
        optimizer_type(parameters, lr=0.1, **arguments), 1.0, nonfinite=nonfinite, **options
    )
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full((4,), bad if i == 1 else 2.0, device=device)
    optimizer.step()
    return optimizer, parameters


KINDS = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"fused": True, "fold": False}),
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("kind, options", KINDS)
def test_a_bad_step_is_left_out(kind, options, bad):
    optimizer, parameters = stepped(kind, "skip", bad, **options)
    assert all(p.tolist() == [1.0] * 4 for p in parameters)
    assert fastclip.last_report().first_bad == 1 and fastclip.last_report().action == "skipped"
    assert optimizer.last_clip_coef.item() == 1 and "found_inf" not in optimizer.optimizer.__dict__
    for state in optimizer.state.values():
        assert all(not value.count_nonzero() for value in state.values() if isinstance(value, torch.Tensor))
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    optimizer.step()
    assert all(p.isfinite().all() and (p < 1).all() for p in parameters)
    assert fastclip.last_report().action == "clipped"


@pytest.mark.parametrize("kind, options", KINDS)
def test_a_bad_steps_gradients_become_zero(kind, options):
    optimizer, parameters = stepped(kind, "zero", NAN, **{**options, "fold": "auto"})
    assert all(p.grad.tolist() == [0.0] * 4 and p.isfinite().all() for p in parameters)
    assert fastclip.last_report().action == "zeroed" and optimizer.last_clip_coef.item() == 0


@pytest.mark.parametrize(
    "kind, options", [(torch.optim.SGD, {}), (torch.optim.SGD, {"fused": True}), (torch.optim.LBFGS, {})]
)
def test_a_bad_step_with_a_closure(kind, options):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = fastclip.ClippedOptimizer(kind([parameter], lr=0.1, **options), 1.0, nonfinite="skip")

    def closure():
        parameter.grad = torch.full((3,), NAN)
        return torch.tensor(7.0)

    assert optimizer.step(closure).item() == 7
    assert parameter.tolist() == [1.0] * 3


def test_groups_with_thresholds_of_their_own():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    inner = torch.optim.SGD([{"params": [first], "max_norm": 1.0}, {"params": [second]}], lr=0.1)
    optimizer = fastclip.ClippedOptimizer(inner, 1.0, nonfinite="skip")
    first.grad, second.grad = torch.tensor([1.0, INF]), torch.ones(2)
    optimizer.step()
    assert first.tolist() == second.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, fastclip.GradScaler])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_scalers_leave_out_their_steps_as_ever(scaler_type, fused, nonfinite):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD([parameter], 0.1, fused=fused), 1.0, nonfinite=nonfinite)
    scaler = scaler_type("cpu", init_scale=4.0)
    for value in (INF, 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert (parameter.tolist() == [1.0] * 3) is (value == INF)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nonfinite", POLICIES)
def test_a_report_on_a_step_of_fastclips_scaler(fused, nonfinite):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = fastclip.ClippedOptimizer(torch.optim.Adam([parameter], fused=fused), 1.0, nonfinite=nonfinite)
    scaler = fastclip.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for value, norm, action in ((4.0, 4.0, "clipped"), (NAN, NAN, "skipped")):
        parameter.grad = torch.full((4,), value)
        scaler.step(optimizer)
        scaler.update()
        report = fastclip.last_report()
        assert report.action == action and report.total_norm == pytest.approx(norm, nan_ok=True)
        assert report.first_bad == (None if action == "clipped" else 0)


@pytest.mark.parametrize("scaler_type", [None, torch.amp.GradScaler, fastclip.GradScaler])
@pytest.mark.parametrize("max_norm", [{}, {"max_norm": 1.0}], ids=["folded", "in place"])
@pytest.mark.parametrize("dampening", [0, 0.5])
def test_momentum_begins_with_the_first_good_step(scaler_type, max_norm, dampening):
    results = []
    for values in ((NAN, NAN, 1.0, 2.0), (1.0, 2.0)):
        parameter = torch.nn.Parameter(torch.ones(4))
        inner = torch.optim.SGD([{"params": [parameter], **max_norm}], 0.1, 0.9, dampening, fused=True)
        optimizer = fastclip.ClippedOptimizer(inner, 1.0, nonfinite="skip")
        scaler = scaler_type and scaler_type("cpu", init_scale=4.0)
        if scaler:
            scaler.scale(torch.ones(()))
        torch.use_deterministic_algorithms(True)  # what torch leaves without values becomes NaN
        try:
            for value in values:
                parameter.grad = torch.full((4,), value * (scaler.get_scale() if scaler else 1))
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append(parameter.detach())
    assert torch.equal(*results) and results[0].isfinite().all()


def test_the_optimizers_argument():
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1, fused=True)
    assert outcome(fastclip.ClippedOptimizer, inner, 1.0, nonfinite="other") == (
        ValueError,
        'nonfinite: expected "propagate", "skip" or "zero", got \'other\'',
    )
    assert outcome(fastclip.ClippedOptimizer, inner, clip_value=1.0, nonfinite="skip")[0] is ValueError
    assert outcome(fastclip.ClippedOptimizer, inner, 1.0, fold=True, nonfinite="zero")[0] is ValueError
    optimizer = fastclip.ClippedOptimizer(inner, 1.0, nonfinite="skip")
    assert copy.deepcopy(optimizer).nonfinite == "skip"
    optimizer.nonfinite = None
    assert outcome(setattr, optimizer, "nonfinite", "other")[0] is ValueError and optimizer.nonfinite is None


def test_without_the_extension(monkeypatch):
    from fastclip import clip

    monkeypatch.setattr(clip, "_C", None)
    grads = [torch.ones(2), torch.tensor([INF, 1.0])]
    fastclip.clip_grad_norm_(make_parameters(grads), 1.0, nonfinite="zero")
    assert fastclip.last_report().first_bad == 1 and grads[1].tolist() == [0.0, 0.0]
