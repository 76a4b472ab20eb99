"""Scaled gradients: torch's GradScaler and fastclip's with a ClippedOptimizer, against unscale_, clipping and step."""

import pickle

import pytest
import torch
from support import INF, NAN, bits
from test_optim import FUSED, OTHERS, left_behind, make_model, weights
from torch.optim import SGD, AdamW, lr_scheduler

import fastclip
from fastclip import ClippedOptimizer

MAKERS = {**FUSED, **OTHERS}
scalers = pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, fastclip.GradScaler], ids=["torch", "fastclip"])
folds = pytest.mark.parametrize("fold", [True, False])


def new_scaler(scaler_type, **kwargs):
    scaler = scaler_type("cpu", **{"init_scale": 2.0**10, "growth_interval": 4, **kwargs})
    scaler.scale(torch.ones(1))  # makes its tensors
    return scaler


def set_grads(model, scaler, step, dtype=torch.float32):
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        p.grad = (grad * scaler.get_scale()).to(dtype)


def plant(model, value):
    next(model.parameters()).grad[2, 1] = value


@scalers
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("fold", ["auto", False])
@pytest.mark.parametrize("unscales", [False, True], ids=["", "unscale_"])
def test_steps_as_with_torch(scaler_type, make, fold, unscales):
    plain, model = make_model(), make_model()
    bare, optimizer = make(plain.parameters()), ClippedOptimizer(make(model.parameters()), 1.0, fold=fold)
    torchs, scaler = new_scaler(torch.amp.GradScaler), new_scaler(scaler_type)
    schedulers = [lr_scheduler.StepLR(o, 3) for o in (bare, optimizer)]
    for step in range(1, 13):
        optimizer.max_norm = 1e6 if step % 3 == 1 else 1.0
        for m, s in ((plain, torchs), (model, scaler)):
            set_grads(m, s, step)
            if step == 3:
                plant(m, INF)
        torchs.unscale_(bare)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), optimizer.max_norm)
        torchs.step(bare)
        if unscales:
            scaler.unscale_(optimizer)
        before = weights(model)
        scaler.step(optimizer)
        assert torch.equal(weights(model), before) == (step == 3)
        if step != 3:
            torch.testing.assert_close(optimizer.last_total_norm, norm, rtol=1e-6, atol=0)
        assert not left_behind(optimizer) and optimizer._clipping.prepared is None
        for s, schedule in zip((torchs, scaler), schedulers, strict=True):
            s.update()
            schedule.step()
        assert scaler.state_dict() == torchs.state_dict()
    assert scaler.get_scale() == 2.0**11  # halved once, doubled twice
    torch.testing.assert_close(weights(model), weights(plain), rtol=2e-6, atol=2e-6)
    step_counts = [[state.get("step") for state in o.state.values()] for o in (bare, optimizer)]
    assert step_counts[0] == step_counts[1]


@folds
@pytest.mark.parametrize("scale", [0.25, 3.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", [1, 2, INF, 3.0])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_one_step_of_every_dtype_and_scale(fold, scale, dtype, norm_type, max_norm):
    torch.manual_seed(0)
    grads = [torch.randn(300).to(dtype), torch.randn(7, 5).to(dtype)]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    parameters = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g * scale
    optimizer = ClippedOptimizer(AdamW(parameters, fused=True), max_norm, norm_type, fold=fold)
    scaler = new_scaler(fastclip.GradScaler, init_scale=scale)
    scaler.step(optimizer)
    exact = [(p * scale).double() / scale for p in grads]
    norm = torch.nn.utils.get_total_norm(exact, norm_type)
    coef = min(1.0, max_norm / (norm.item() + 1e-6))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(optimizer.last_total_norm.double(), norm, rtol=tolerance, atol=0)
    for p, g in zip(parameters, exact, strict=True):
        torch.testing.assert_close(p.grad.double(), g * coef, rtol=tolerance, atol=0)


@folds
def test_one_pass_and_no_fallback(fold):
    model = make_model()
    optimizer = ClippedOptimizer(AdamW(model.parameters(), fused=fold), 1.0)
    scaler = new_scaler(fastclip.GradScaler)
    set_grads(model, scaler, 0)
    with torch.profiler.profile() as profile:
        scaler.step(optimizer)
    names = [event.name for event in profile.events()]
    assert names.count("fastclip::prepare_step") == 1 and "fastclip::clip_grad_norm_" not in names
    assert "aten::_amp_foreach_non_finite_check_and_unscale_" not in names
    assert fastclip.counters()["native"] == 1 and fastclip.counters()["fallback"] == 0


@folds
@pytest.mark.parametrize("norm_type", [1, 2, INF])
def test_found_inf_is_about_elements_and_not_about_the_norm(fold, norm_type):
    """The norm of these is beyond float32, each of them is not: torch's check lets them pass."""
    parameter = torch.nn.Parameter(torch.zeros(2000))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=True), 1e36, norm_type, fold=fold)
    scaler = new_scaler(fastclip.GradScaler)
    parameter.grad = torch.full((2000,), 1e37)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10 and (parameter != 0).all()
    for value in (INF, -INF, NAN):
        for at in (0, 1000, 1999):
            before = parameter.detach().clone()
            parameter.grad = torch.ones(2000)
            parameter.grad[at] = value
            grad = bits(parameter.grad)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == scale / 2 and torch.equal(parameter, before)
            assert torch.equal(bits(parameter.grad), grad)


@pytest.mark.parametrize("size", [10, 300_000])
@folds
def test_a_planted_inf_on_every_instruction_set(isa, fold, size):
    parameter = torch.nn.Parameter(torch.zeros(size))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=True), 1.0, fold=fold)
    scaler = new_scaler(fastclip.GradScaler)
    parameter.grad = torch.full((size,), 2.0**10)
    parameter.grad[size // 2] = INF
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9 and (parameter == 0).all()
    parameter.grad = torch.full((size,), 2.0**9)
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.full((size,), -(size**-0.5)), rtol=2e-6, atol=0)


@scalers
@pytest.mark.parametrize("make", [FUSED["adamw"], OTHERS["foreach"]], ids=["fused", "foreach"])
def test_float16_gradients_are_refused_where_torch_refuses_them(scaler_type, make):
    def gradients(scaler):
        model = make_model(torch.float16)
        set_grads(model, scaler, 0, torch.float16)
        return model

    outcomes = []
    for wrap in (lambda o: o, lambda o: ClippedOptimizer(o, 1e9)):
        scaler = new_scaler(scaler_type)
        model = gradients(scaler)
        try:
            scaler.step(wrap(make(model.parameters())))
            outcomes.append(weights(model))
        except ValueError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes == ["Attempting to unscale FP16 gradients."] * 2
    else:
        torch.testing.assert_close(*outcomes, equal_nan=True, rtol=0, atol=0)


@scalers
def test_errors_of_torch_stay(scaler_type):
    model = make_model()
    optimizer = ClippedOptimizer(AdamW(model.parameters(), fused=True), 1.0)
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
        scaler_type("cpu").step(optimizer)
    scaler = new_scaler(scaler_type)
    set_grads(model, scaler, 0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)


@scalers
@folds
def test_after_an_interrupted_step_the_next_one_is_right(scaler_type, fold):
    model = make_model()
    optimizer = ClippedOptimizer(SGD(model.parameters(), 1.0, fused=fold), 1.0)
    scaler = new_scaler(scaler_type)
    set_grads(model, scaler, 0)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scaler.step(optimizer)
    handle.remove()
    assert not left_behind(optimizer) and optimizer._clipping.prepared is None
    scaler.update()
    set_grads(model, scaler, 1)
    before = weights(model)
    scaler.step(optimizer)
    assert torch.linalg.vector_norm(weights(model) - before).item() == pytest.approx(1, rel=1e-5)


@scalers
@folds
@pytest.mark.parametrize("how", ["interrupted", "closure=None"])
def test_a_second_attempt_before_the_update(scaler_type, fold, how):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=fold), 100.0)
    scaler = new_scaler(scaler_type)
    parameter.grad = torch.full((4,), 3 * 2.0**10)

    def interrupt(*_):
        raise KeyboardInterrupt

    if how == "interrupted":
        handle = optimizer.optimizer.register_step_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            scaler.step(optimizer)
        handle.remove()
    else:
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=None)
        assert torch.equal(parameter.grad, torch.full((4,), 3 * 2.0**10))
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.full((4,), -3.0))
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)


@scalers
@folds
def test_pre_hooks_change_gradients_before_the_norm_is_taken(scaler_type, fold):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=fold), 1.0)
    scaler = new_scaler(scaler_type)
    parameter.grad = torch.full((4,), 2.0**10)

    def change(*_):
        parameter.grad *= 100

    optimizer.register_step_pre_hook(change)
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.5))


@scalers
def test_a_grad_scale_of_the_users_own_multiplies_the_scalers(scaler_type):
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=True), 100.0)
    scaler = new_scaler(scaler_type)
    parameter.grad = torch.full((4,), 12 * 2.0**10)
    optimizer.grad_scale = torch.tensor(4.0)
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.full((4,), -3.0)) and optimizer.last_total_norm == 6


@scalers
def test_a_norm_of_high_order_is_taken_without_the_scale(scaler_type):
    """(3 * 2^16)^10 is beyond float32."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=True), 1.0, norm_type=10.0)
    scaler = new_scaler(scaler_type, init_scale=2.0**16)
    parameter.grad = torch.full((4,), 3 * 2.0**16)
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -(4**-0.1)))


@scalers
def test_disabled_several_optimizers_and_others(scaler_type):
    model, other = make_model(), make_model()
    optimizer, bare = ClippedOptimizer(SGD(model.parameters(), 1.0), 1.0), AdamW(other.parameters(), fused=True)
    scaler = scaler_type("cpu", enabled=False)
    set_grads(model, scaler, 0)
    scaler.step(optimizer)
    assert optimizer.last_clip_coef < 1
    scaler = new_scaler(scaler_type)
    for m in (model, other):
        set_grads(m, scaler, 1)
    plant(other, INF)
    before = weights(model), weights(other)
    scaler.step(optimizer)
    scaler.step(bare)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(weights(model), before[0]) and torch.equal(weights(other), before[1])
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == scaler.state_dict()


@scalers
@pytest.mark.parametrize("kind", ["clip_value", "groups", "norm_type"])
def test_what_torchs_scaler_has_to_unscale(scaler_type, kind):
    model = make_model()
    inner = SGD(model.parameters(), 1.0, fused=True)
    kwargs = {"clip_value": {"clip_value": 0.01}, "groups": {"max_norm": 9.0}, "norm_type": {"max_norm": 1.0}}[kind]
    optimizer = ClippedOptimizer(inner, norm_type=3.0 if kind == "norm_type" else 2.0, **kwargs)
    if kind == "groups":
        optimizer.param_groups[0]["max_norm"] = 1.0
    scaler = new_scaler(scaler_type)
    set_grads(model, scaler, 0)
    exact = torch.cat([p.grad.double().flatten() / scaler.get_scale() for p in model.parameters()])
    before = weights(model)
    scaler.step(optimizer)
    if kind == "clip_value":
        want = exact.clamp(-0.01, 0.01)
    else:
        want = exact / torch.linalg.vector_norm(exact, 3.0 if kind == "norm_type" else 2.0)
    torch.testing.assert_close(before - weights(model), want, rtol=1e-4, atol=1e-6)
