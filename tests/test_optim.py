"""ClippedOptimizer: the same steps as clipping and stepping, folded or not, and all that programs do to optimizers."""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from ranks import needs_fully_shard
from support import INF, NAN, bits, make_parameters, outcome, run_python
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, RMSprop, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastclip
from fastclip import AutoClip, ClippedOptimizer, ZClip
from fastclip.statistics import COLUMNS

FUSED = {
    "sgd": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: Adam(p, 0.01, amsgrad=True, fused=True),
    "adamw": lambda p: AdamW(p, 0.01, fused=True),
    "adagrad": lambda p: Adagrad(p, 0.05, fused=True),
}
OTHERS = {
    "foreach": lambda p: AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: RMSprop(p, 0.01),
}
fused = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3)).to(dtype)


def backward(model, step=0):
    inputs = torch.randn(16, 7, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    loss = (model(inputs) - 1).square().sum()
    loss.backward()
    return loss


def adamw(fused=True, **kwargs):
    model = make_model()
    return model, ClippedOptimizer(AdamW(model.parameters(), 0.01, fused=fused), **{"max_norm": 1.0, **kwargs})


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def left_behind(optimizer):
    return {"grad_scale", "found_inf"} & (vars(optimizer).keys() | vars(optimizer.optimizer).keys())


# ---- the same steps ----


@pytest.mark.parametrize("make", [*FUSED.values(), *OTHERS.values()], ids=[*FUSED, *OTHERS])
@pytest.mark.parametrize("fold", ["auto", True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_hundred_steps_equal_clipping_and_stepping(make, fold, dtype):
    plain, model = make_model(dtype), make_model(dtype)
    bare, inner = make(plain.parameters()), make(model.parameters())
    if fold is True and make not in FUSED.values():
        with pytest.raises(ValueError, match="fold: expected with True"):
            ClippedOptimizer(inner, 1.0, fold=fold)
        return
    optimizer = ClippedOptimizer(inner, 1.0, fold=fold)
    for step in range(100):
        optimizer.max_norm = 1e9 if step % 3 == 0 else 1.0
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            # Not from the models, which would take the smallest difference as far apart as it likes.
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            q.grad = p.grad.clone()
        norm = fastclip.clip_grad_norm_(plain.parameters(), optimizer.max_norm)
        assert norm > 1
        bare.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.last_total_norm, norm, rtol=0, atol=0)
        assert not left_behind(optimizer)
    # Folded, each gradient is divided by a 1 / clip_coef rounded to float32: two roundings of 2^-24. In bfloat16
    # clipping in place rounds the gradient to 8 bits, which folding does not.
    folds = fold is not False and make in FUSED.values()
    tolerance = 0 if not folds else {torch.float32: 2e-6, torch.float64: 2e-7, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(weights(model), weights(plain), rtol=tolerance, atol=tolerance)


@fused
@pytest.mark.parametrize("norm_type", [1, 2, INF, 3.5])
def test_one_step_to_the_last_digits(make, norm_type):
    torch.manual_seed(3)
    grads = [torch.randn(1000), torch.randn(33) * 1e-3]
    parameters = make_parameters([g.clone() for g in grads])
    for p in parameters:
        p.data = torch.zeros_like(p.grad)
    optimizer = ClippedOptimizer(make(parameters), 0.01, norm_type, fold=True)
    optimizer.step()
    reference = make_parameters([g.clone() for g in grads])
    norm = torch.nn.utils.clip_grad_norm_(reference, 0.01, norm_type)
    torch.testing.assert_close(optimizer.last_total_norm, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.last_clip_coef, 0.01 / (norm + 1e-6), rtol=1e-6, atol=0)
    for p, r in zip(parameters, reference, strict=True):  # torch's fused optimizers write the divided gradient back
        torch.testing.assert_close(p.grad, r.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fold", ["auto", False])
def test_under_the_threshold_gradients_are_not_written(fold):
    model, optimizer = adamw(max_norm=1e6, fold=fold)
    plain = make_model()
    bare = AdamW(plain.parameters(), 0.01, fused=True)
    for m in (model, plain):
        backward(m)
    before = [(bits(p.grad), p.grad._version) for p in model.parameters()]
    optimizer.step()
    bare.step()
    assert torch.equal(weights(model), weights(plain))
    for p, (was, version) in zip(model.parameters(), before, strict=True):
        assert torch.equal(bits(p.grad), was) and p.grad._version == version
    assert optimizer.last_clip_coef == 1


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("fold", [True, False])
def test_gradients_that_are_not_finite_become_what_clipping_makes_of_them(value, fold):
    grad = torch.tensor([1.0, value, -2.0])
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = grad.clone()
    ClippedOptimizer(SGD([parameter], 1.0, fused=True), 1.0, fold=fold).step()
    expected = grad.clone()
    torch.nn.utils.clip_grad_norm_(make_parameters([expected]), 1.0)
    torch.testing.assert_close(parameter.detach(), -expected, equal_nan=True)


def test_no_gradients():
    _, optimizer = adamw()
    optimizer.step()
    assert optimizer.last_total_norm == 0 and optimizer.last_clip_coef == 1 and not optimizer.state


def test_fold_reads_with_native_code_and_falls_back_counted():
    model, optimizer = adamw(fold=True)
    backward(model)
    optimizer.step()
    assert fastclip.counters()["native"] == 1 and fastclip.counters()["fallback"] == 0
    optimizer.norm_type = 3.0
    optimizer.step()
    assert fastclip.counters()["fallback_reasons"] == {"norm_type": 1}


def test_sparse_gradients():
    plain, embedding = (torch.nn.Embedding(10, 4, _weight=torch.ones(10, 4), sparse=True) for _ in range(2))
    for module in (plain, embedding):
        module(torch.tensor([1, 3, 3])).sum().backward()
    optimizer = ClippedOptimizer(SGD(embedding.parameters(), 0.1), 0.5)
    want = outcome(torch.nn.utils.clip_grad_norm_, plain.parameters(), 0.5)
    if want[0] == "returned":  # by some versions of torch
        SGD(plain.parameters(), 0.1).step()
        optimizer.step()
        assert optimizer.last_total_norm == want[1]
        torch.testing.assert_close(embedding.weight, plain.weight)
    else:
        assert outcome(optimizer.step) == want
    folding = ClippedOptimizer(SGD(embedding.parameters(), 0.1, fused=True), 0.5, fold=True)
    with pytest.raises(ValueError, match="fold: expected with True dense gradients"):
        folding.step()


# ---- thresholds ----


def test_max_norm_changes_and_callables():
    model, optimizer = adamw(max_norm=lambda step: 10.0**-step)
    for step in range(3):
        backward(model)
        optimizer.step()
        want = 10.0**-step / optimizer.last_total_norm.item()
        assert optimizer.steps == step + 1 and optimizer.last_clip_coef.item() == pytest.approx(want, rel=1e-5)
    optimizer.max_norm = torch.tensor(0.5)
    backward(model)
    optimizer.step()
    assert optimizer.last_clip_coef.item() == pytest.approx(0.5 / optimizer.last_total_norm.item(), rel=1e-5)
    optimizer.max_norm = INF
    optimizer.step()
    assert optimizer.last_clip_coef == 1


@pytest.mark.parametrize("fused", [True, False])
def test_groups_with_thresholds_of_their_own(fused):
    model = make_model()
    a, b, c, d = model.parameters()
    groups = [{"params": [a]}, {"params": [b], "max_norm": 0.1}, {"params": [c], "max_norm": None}, {"params": [d]}]
    optimizer = ClippedOptimizer(SGD(groups, 0.0, fused=fused), 1.0)
    backward(model)
    grads = [p.grad.clone() for p in (a, b, c, d)]
    optimizer.step()
    common = torch.nn.utils.get_total_norm([grads[0], grads[3]])
    torch.testing.assert_close(optimizer.last_total_norm, common)
    torch.testing.assert_close(a.grad, grads[0] / common)
    torch.testing.assert_close(d.grad, grads[3] / common)
    torch.testing.assert_close(b.grad, grads[1] * 0.1 / torch.linalg.vector_norm(grads[1]))
    assert torch.equal(c.grad, grads[2])
    optimizer.max_norm = None
    backward(model)
    before = a.grad.clone()
    optimizer.step()
    assert torch.equal(a.grad, before)


def test_clip_value():
    model, optimizer = adamw(max_norm=None, clip_value=0.01)
    backward(model)
    optimizer.step()
    assert max(p.grad.abs().max() for p in model.parameters()) <= 0.01
    assert optimizer.last_total_norm is None and optimizer.last_clip_coef is None


def test_clip_value_beside_a_group_with_a_norm_of_its_own():
    a, b, c = make_parameters([torch.full((5,), 2.0), torch.full((4,), 10.0), torch.full((3,), 7.0)])
    for p in (a, b, c):
        p.data = torch.zeros_like(p.grad)
    groups = [{"params": [a]}, {"params": [b], "max_norm": 1.0}, {"params": [c], "max_norm": None}]
    statistics = fastclip.GradStatistics()
    optimizer = ClippedOptimizer(SGD(groups, 0.0), clip_value=0.5, statistics=statistics)
    optimizer.step()
    assert torch.equal(a.grad, torch.full((5,), 0.5)) and torch.equal(c.grad, torch.full((3,), 7.0))
    torch.testing.assert_close(b.grad, torch.full((4,), 0.5))
    assert statistics.values[:, COLUMNS.index("abs_max")].tolist() == [2, 10, 7]  # before clipping
    b.grad.fill_(10)
    optimizer.param_groups[1]["max_norm"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[1\]"):
        optimizer.step()


def test_a_threshold_that_requires_grad():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    optimizer = ClippedOptimizer(SGD([parameter], 1.0, fused=True), torch.nn.Parameter(torch.tensor(0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.25))
    assert not optimizer.last_clip_coef.requires_grad


def test_errors():
    model = make_model()
    inner = AdamW(model.parameters(), fused=True)
    wrapped = ClippedOptimizer(inner, 1.0)
    for error, message, args, kwargs in [
        (TypeError, "optimizer: expected a torch.optim.Optimizer, got Sequential", (model, 1.0), {}),
        (TypeError, "optimizer: expected one that is not clipped already", (wrapped, 1.0), {}),
        (ValueError, "max_norm: expected a number >= 0, got -1", (inner, -1), {}),
        (ValueError, "max_norm: expected a number >= 0, got nan", (inner, NAN), {}),
        (TypeError, "max_norm: expected a number, got '1'", (inner, "1"), {}),
        (ValueError, "clip_value: expected a number >= 0", (inner,), {"clip_value": -0.5}),
        (ValueError, "clip_value: expected None beside max_norm", (inner, 1.0), {"clip_value": 1.0}),
        (ValueError, "fold: expected with True", (inner,), {"clip_value": 1.0, "fold": True}),
        (ValueError, "fold: expected \"auto\", True or False, got 'always'", (inner, 1.0), {"fold": "always"}),
        (ValueError, "fold: expected with True", (LBFGS(model.parameters()), 1.0), {"fold": True}),
        (ValueError, "norm_type: expected a number, got 'two'", (inner, 1.0, "two"), {}),
        (TypeError, "norm_type: expected a number, got None", (inner, 1.0, None), {}),
    ]:
        with pytest.raises(error, match=message):
            ClippedOptimizer(*args, **kwargs)
    by_value = ClippedOptimizer(inner, clip_value=1.0)
    for optimizer, name, value in [
        (wrapped, "max_norm", -2.0),
        (wrapped, "norm_type", "two"),
        (wrapped, "fold", "always"),
        (wrapped, "clip_value", 0.5),  # there is a max_norm
        (by_value, "clip_value", NAN),
        (by_value, "max_norm", 1.0),
    ]:
        before = getattr(optimizer, name)
        with pytest.raises(ValueError, match=f"(?:{name}|clip_value): expected"):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) is before
    wrapped.max_norm = None
    wrapped.clip_value = 0.5


@pytest.mark.parametrize("fold", [True, False])
def test_an_error_at_the_step_changes_nothing(fold):
    model, optimizer = adamw(max_norm=lambda step: -1.0, fold=fold)
    backward(model)
    before = weights(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="max_norm: expected a number >= 0, got -1"):
        optimizer.step()
    if not fold:
        optimizer.max_norm = 1.0
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "max_norm": NAN})
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['max_norm'\]: expected a number >= 0, got nan"):
            optimizer.step()
    assert torch.equal(weights(model), before[0])
    for p, grad in zip(model.parameters(), before[1], strict=True):
        assert torch.equal(p.grad, grad)


def test_fold_true_notices_what_came_later():
    model, optimizer = adamw(fold=True)
    backward(model)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "max_norm": 1.0})
    with pytest.raises(ValueError, match="one max_norm for all groups"):
        optimizer.step()
    model, optimizer = adamw(fold=True)
    backward(model)
    optimizer.load_state_dict(AdamW(make_model().parameters()).state_dict())  # of one that is not fused
    with pytest.raises(ValueError, match=r"fused=\[None\]"):
        optimizer.step()


def test_optimizer_in_backward_is_refused():
    model = make_model()
    optimizers = {p: ClippedOptimizer(SGD([p], 0.1), 1.0) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = weights(model)
    with pytest.raises(RuntimeError, match="during the backward pass"):
        backward(model)
    assert torch.equal(weights(model), before)


# ---- closures ----


def test_lbfgs_clips_each_evaluation():
    plain, model = make_model(), make_model()
    bare = LBFGS(plain.parameters(), max_iter=5)
    optimizer = ClippedOptimizer(LBFGS(model.parameters(), max_iter=5), 0.5)
    calls = []

    def closure_of(m, o, clip):
        def closure():
            o.zero_grad()
            loss = backward(m)
            if clip:
                fastclip.clip_grad_norm_(m.parameters(), 0.5)
            calls.append(m)
            return loss

        return closure

    for _ in range(3):
        want = bare.step(closure_of(plain, bare, clip=True))
        got = optimizer.step(closure_of(model, optimizer, clip=False))
        assert torch.equal(got, want)
    assert torch.equal(weights(model), weights(plain))
    assert calls.count(model) == calls.count(plain) > 6


@pytest.mark.parametrize("fold", [True, False])
def test_a_closure_returns_its_loss_and_is_clipped(fold):
    plain, model = make_model(), make_model()
    bare = SGD(plain.parameters(), 1.0)
    optimizer = ClippedOptimizer(SGD(model.parameters(), 1.0, fused=True), 0.01, fold=fold)
    loss = backward(plain)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    bare.step()
    assert optimizer.step(lambda: backward(model)) == loss
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-6, atol=1e-9)


class Twice(torch.optim.Optimizer):
    """Folds, evaluates its closure twice, and takes the second gradient."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            closure()
        (parameter,) = self.param_groups[0]["params"]
        parameter -= parameter.grad / getattr(self, "grad_scale", 1)


def test_a_factor_is_that_of_the_last_evaluation():
    parameter = torch.nn.Parameter(torch.zeros(4))
    values = iter([100.0, 0.125])

    def closure():
        parameter.grad = torch.full((4,), next(values))

    optimizer = ClippedOptimizer(Twice([parameter]), 1.0, fold=True)
    optimizer.step(closure)
    assert torch.equal(parameter, torch.full((4,), -0.125)) and not left_behind(optimizer)


# ---- what is left behind, and hooks ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["pre", "inner pre", "inner post", "post", "closure"])
def test_an_interrupted_step_leaves_nothing_behind(error, where):
    model, optimizer = adamw(max_norm=1e-3)
    backward(model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)

    def interrupt(*_):
        raise error

    owner = optimizer.optimizer if "inner" in where else optimizer
    if where != "closure":
        register = owner.register_step_pre_hook if "pre" in where else owner.register_step_post_hook
        register(interrupt)
    with pytest.raises(error):
        optimizer.step(interrupt if where == "closure" else None)
    assert not left_behind(optimizer)


def test_an_attribute_of_another_meaning_is_left_alone():
    class Scaled(SGD):  # by a constant of its own
        def __init__(self, params):
            super().__init__(params, 1.0)
            self.grad_scale = 4.0

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter -= parameter.grad / self.grad_scale

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 8.0)
    optimizer = ClippedOptimizer(Scaled([parameter]), 100.0)
    optimizer.step()
    optimizer.step()
    assert parameter.item() == -4 and optimizer.optimizer.grad_scale == 4


@pytest.mark.parametrize("fold", [True, False])
def test_hooks_run_in_order_and_once(fold):
    model, optimizer = adamw(max_norm=1e-3, fold=fold)
    backward(model)
    seen = []

    def note(name):
        def hook(which, args, kwargs):
            seen.append((name, which, max(p.grad.abs().max() for p in model.parameters()) > 1e-3))

        return hook

    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.optimizer.register_step_pre_hook(note("inner pre"))
    optimizer.optimizer.register_step_post_hook(note("inner post"))
    handles = [
        register_optimizer_step_pre_hook(note("all pre")),
        register_optimizer_step_post_hook(note("all post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    inner = optimizer.optimizer
    assert seen == [
        ("pre", optimizer, True),
        ("all pre", inner, fold),  # folded, the gradients are not clipped yet
        ("inner pre", inner, fold),
        ("inner post", inner, False),
        ("all post", inner, False),
        ("post", optimizer, False),
    ]


def test_a_pre_hook_may_change_gradients_and_arguments():
    model, optimizer = adamw(fold=True)
    backward(model)
    closures = []

    def double(optimizer, args, kwargs):
        for p in model.parameters():
            p.grad.mul_(2)
        return (optimizer, lambda: closures.append(1)), {}

    optimizer.register_step_pre_hook(double)
    want = 2 * fastclip.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    torch.testing.assert_close(optimizer.last_total_norm, want)
    assert closures == [1]


def test_hooks_have_the_arguments_that_they_have_in_torch():
    def calls_of(optimizer):
        seen = []

        def post(optimizer, args, kwargs):
            seen.append(("post", args[1:], kwargs))

        def closure():
            optimizer.register_step_post_hook(post)  # runs from this step on

        optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append(("pre", args[1:], kwargs)))
        optimizer.step()
        optimizer.step(closure)
        (of_step,) = [args for name, args, _ in seen if name == "post"]
        assert of_step == (closure,)
        return [(name, len(args), kwargs) for name, args, kwargs in seen]

    model, optimizer = adamw()
    assert calls_of(optimizer) == calls_of(AdamW(model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: 5)
    with pytest.raises(RuntimeError, match=r"expected None or a tuple of .new_args, new_kwargs., got 5"):
        optimizer.step()


def test_state_dict_hooks():
    _, optimizer = adamw()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "more"})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o)))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert seen == [("pre", optimizer), ("loaded", optimizer)] and state["more"] == 1


# ---- programs ----


def schedulers(optimizer):
    yield lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    yield lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9)
    yield lr_scheduler.StepLR(optimizer, 2)
    yield lr_scheduler.MultiStepLR(optimizer, [2, 4])
    yield lr_scheduler.ConstantLR(optimizer, total_iters=3)
    yield lr_scheduler.LinearLR(optimizer)
    yield lr_scheduler.ExponentialLR(optimizer, 0.9)
    yield lr_scheduler.PolynomialLR(optimizer)
    yield lr_scheduler.CosineAnnealingLR(optimizer, 5)
    yield lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)
    yield lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3)
    yield lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    yield lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    chain = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    yield lr_scheduler.ChainedScheduler(chain, optimizer=optimizer)
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    yield lr_scheduler.SequentialLR(optimizer, parts, [3])
    yield torch.optim.swa_utils.SWALR(optimizer, 0.05)


@pytest.mark.parametrize("number", range(16))
@pytest.mark.parametrize("fold", ["auto", False])
def test_schedulers_without_a_warning(number, fold):
    def train(optimizer):
        scheduler = next(s for i, s in enumerate(schedulers(optimizer)) if i == number)
        seen = []
        for step in range(6):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            seen.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # torch 2.6: its SequentialLR's own
        model = make_model()
        got = train(ClippedOptimizer(SGD(model.parameters(), 0.01, momentum=0.9, fused=True), INF, fold=fold))
        after = weights(model)
        model = make_model()
        assert got == train(SGD(model.parameters(), 0.01, momentum=0.9, fused=True))
        assert torch.equal(weights(model), after)


def test_it_is_an_optimizer_with_the_same_attributes():
    _, optimizer = adamw()
    inner = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    for name in ("state", "param_groups", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
    groups = list(inner.param_groups)
    optimizer.param_groups = groups
    assert inner.param_groups is groups
    inner.something = 3
    assert optimizer.something == 3
    with pytest.raises(AttributeError):
        _ = optimizer.nothing
    assert "max_norm=1.0" in repr(optimizer) and "AdamW" in repr(optimizer)
    inner.grad_scale = 2
    assert not hasattr(optimizer, "grad_scale")
    empty = ClippedOptimizer.__new__(ClippedOptimizer)  # as a debugger sees it while __init__ raises
    assert not hasattr(empty, "optimizer") and not hasattr(empty, "state")


def test_zero_grad_and_add_param_group():
    model, optimizer = adamw()
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    more = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    more.grad = torch.full((2,), 10.0)
    optimizer.step()
    assert optimizer.last_total_norm.item() == pytest.approx(10 * 2**0.5) and optimizer.state[more]["step"] == 1


def test_zero_grad_of_an_optimizer_that_takes_no_argument():
    class Mine(SGD):
        def zero_grad(self):
            self.zeroed = True

    model = make_model()
    optimizer = ClippedOptimizer(Mine(model.parameters(), 0.1), 1.0)
    optimizer.zero_grad()
    assert optimizer.zeroed
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters  # what accelerate asks


def test_checkpoints_of_the_bare_optimizer_and_back():
    model, optimizer = adamw(max_norm=1e9)
    plain = make_model()
    bare = AdamW(plain.parameters(), 0.01, fused=True)
    for m, o in ((model, optimizer), (plain, bare)):
        backward(m)
        o.step()
    buffers = []
    for o in (optimizer, bare):
        buffers.append(io.BytesIO())
        torch.save(o.state_dict(), buffers[-1])
        buffers[-1].seek(0)
    mine, theirs = (torch.load(b, weights_only=True) for b in buffers)
    assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
    optimizer.load_state_dict(theirs)
    bare.load_state_dict(mine)
    for m, o in ((model, optimizer), (plain, bare)):
        backward(m, 1)
        o.step()
    assert torch.equal(weights(model), weights(plain))


def test_a_checkpoint_without_thresholds_keeps_them():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = ClippedOptimizer(SGD([{"params": [a], "max_norm": 0.5}, {"params": [b]}], 0.1), 1.0)
    optimizer.load_state_dict(SGD([{"params": [a]}, {"params": [b]}], 0.3).state_dict())
    assert [group.get("max_norm") for group in optimizer.param_groups] == [0.5, None]
    assert "max_norm" not in optimizer.param_groups[1] and optimizer.param_groups[0]["lr"] == 0.3


def with_policies(*policies):
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in policies]
    groups = [{"params": [p], "max_norm": policy} for p, policy in zip(parameters, policies, strict=True)]
    return parameters, ClippedOptimizer(SGD(groups, 0.1))


def step_with(parameters, optimizer, value):
    for p in parameters:
        p.grad = torch.full((2,), value)
    optimizer.step()


def test_policies_of_groups_go_on_from_a_checkpoint():
    shared = ZClip(warmup=1)
    parameters, optimizer = with_policies(shared, AutoClip(50, window=3), shared, 0.5)
    for value in (1.0, 2.0, 4.0, 3.0, 100.0):
        step_with(parameters, optimizer, value)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert optimizer.param_groups[0]["max_norm"] is shared

    policies = ZClip(warmup=1), AutoClip(50, window=3)
    others, other = with_policies(policies[0], policies[1], policies[0], 7.0)
    for state_dict in (saved, optimizer.optimizer.state_dict()):  # the inner one has the objects
        other.load_state_dict(state_dict)
        assert [group["max_norm"] for group in other.param_groups] == [*policies, policies[0], 0.5]
        for mine, theirs in zip((shared, optimizer.param_groups[1]["max_norm"]), policies, strict=True):
            assert str(mine.state_dict()) == str(theirs.state_dict())
    step_with(parameters, optimizer, 50.0)
    step_with(others, other, 50.0)
    assert policies[0].count == shared.count and policies[0].threshold == shared.threshold < INF
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(parameters, others, strict=True))


@pytest.mark.parametrize("own", [AutoClip(), 1.0, None], ids=str)
def test_a_policy_of_another_kind_in_a_checkpoint_is_an_error(own):
    parameters, optimizer = with_policies(1.0, ZClip())
    step_with(parameters, optimizer, 3.0)
    _, other = with_policies(1.0, own)
    other.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"^state_dict\['param_groups'\]\[1\]\['max_norm'\]: expected .*ZClip"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5 and other.param_groups[1]["max_norm"] is own


def test_a_checkpoint_with_more_groups_leaves_policies_as_they_were():
    parameters, optimizer = with_policies(ZClip(), 1.0)
    step_with(parameters, optimizer, 3.0)
    _, other = with_policies(ZClip())
    with pytest.raises(ValueError, match="parameter groups"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_norm"].count == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied):
    model, optimizer = adamw(fold=True, max_norm=0.5)
    lr_scheduler.StepLR(optimizer, 3)  # puts a step of its own on the instance
    backward(model)
    optimizer.step()
    other = copied(optimizer)
    assert type(other) is ClippedOptimizer and other.steps == 1 and other.max_norm == 0.5
    (mine,), (theirs,) = ([g["params"] for g in o.param_groups] for o in (optimizer, other))
    for p, q in zip(mine, theirs, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q) and p is not q
    other.register_step_pre_hook(lambda *_: None)


class OwnAdamW(AdamW):
    pass


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_a_subclass_fold_as_well(copied):
    """torch's copies lose the attribute by which anybody could tell that they honour grad_scale."""
    model = make_model()
    other = copied(ClippedOptimizer(OwnAdamW(model.parameters(), fused=True), 1.0, fold=True))
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert other.last_clip_coef < 1


def test_setstate_of_the_optimizer():
    _, optimizer = adamw()
    group = {**optimizer.param_groups[0], "lr": 0.125}
    del group["amsgrad"]  # as in a checkpoint of an older torch
    optimizer.__setstate__({"state": optimizer.state, "param_groups": [group]})
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.125 and optimizer.param_groups[0]["amsgrad"] is False


def test_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = adamw()
    backward(model)
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    other_model = make_model()
    bare = AdamW(other_model.parameters(), 0.5, fused=True)
    set_optimizer_state_dict(other_model, bare, saved)
    assert torch.equal(bare.state[other_model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    third_model = make_model()
    third = ClippedOptimizer(AdamW(third_model.parameters(), 0.5, fused=True), 1.0)
    set_optimizer_state_dict(third_model, third, get_optimizer_state_dict(other_model, bare))
    assert torch.equal(third.state[third_model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert third.param_groups[0]["lr"] == 0.01


@fused
@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "inner"])
def test_compiled_steps(make, inside):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = make_model(), make_model()
    bare, optimizer = make(plain.parameters()), ClippedOptimizer(make(model.parameters()), 1.0)
    if inside:
        optimizer.optimizer.step = torch.compile(optimizer.optimizer.step, backend="eager")
        step = optimizer.step
    else:
        step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(4):
        optimizer.max_norm = 1e9 if number % 2 else 1.0
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            q.grad = p.grad.clone()
        norm = fastclip.clip_grad_norm_(plain.parameters(), optimizer.max_norm)
        bare.step()
        step()
        assert optimizer.last_total_norm == norm and not left_behind(optimizer)
    torch.testing.assert_close(weights(model), weights(plain), rtol=2e-6, atol=2e-6)
    if not inside:  # only the lambda and the door out of the graph were compiled, nothing behind it
        assert torch._dynamo.utils.counters["frames"]["total"] == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@needs_fully_shard
def test_a_sharded_model():
    code = """
import torch, fastclip
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_optim import backward, make_model
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for fused, fold in ((True, True), (True, False), (False, "auto")):
    plain, model = make_model(), make_model()
    fully_shard(model, mesh=mesh)
    bare = torch.optim.AdamW(plain.parameters(), 0.01, fused=fused)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 0.01, fused=fused), 0.05, fold=fold)
    for step in range(4):
        for m, o in ((plain, bare), (model, optimizer)):
            o.zero_grad()
            backward(m, step)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        bare.step()
        optimizer.step()
        got = optimizer.last_total_norm
        torch.testing.assert_close(got.full_tensor() if hasattr(got, "full_tensor") else got, norm)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_memory_stays_flat_over_ten_thousand_steps():
    code = """
import resource, gc, torch, fastclip
torch.set_num_threads(1)
p = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
for q in p: q.grad = torch.ones(5)
optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(p, 1e-6, fused=True), 1e-3)
scaler = fastclip.GradScaler("cpu", init_scale=2.0)
scaler.scale(torch.ones(1))
def steps(count):
    for i in range(count):
        if i % 2:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    gc.collect()
    return len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
steps(500)
before, after = steps(500), steps(10_000)
assert after[0] <= before[0] + 10 and after[1] <= before[1] + 2048, (before, after)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_nothing_of_a_step_is_kept_alive():
    model, optimizer = adamw()
    backward(model)
    optimizer.step()
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(grads)
