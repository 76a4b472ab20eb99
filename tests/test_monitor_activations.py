"""Forward hooks of a monitor: what counts as saturated, when they look, and that they leave no trace."""

import gc
import math
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastclip
from fastclip.health.activations import _SAMPLE, Activations


def watch(module, x, cycles=1):
    """What is recorded of a module's output."""
    model = nn.Sequential(nn.Identity(), module)
    activations = Activations(model)
    for _ in range(cycles):
        model(x)
    (name, (total, runs)), *others = activations.take().items()
    assert name == "1" and runs == cycles and not others
    return (total / runs).tolist()


def saturated_by_derivative(module, x):
    """The definition: the share of inputs at which |derivative| is below 5% of its largest value anywhere."""
    grid = torch.linspace(-60, 60, 240_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(module(grid).sum(), grid)
    x = x.double().requires_grad_()
    (here,) = torch.autograd.grad(module(x).sum(), x)
    return (here.abs() < 0.05 * slopes.abs().max()).double().mean().item()


MODULES = [
    nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 3), nn.Hardsigmoid(), nn.ELU(), nn.ELU(0.5),
    nn.CELU(2.0), nn.Softplus(), nn.Softplus(beta=2),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_saturated_is_where_the_derivative_is_small(module):
    x = torch.randn(5_000, dtype=torch.float64) * 5
    saturated, zeros = watch(module, x)
    assert saturated == pytest.approx(saturated_by_derivative(module, x), abs=1e-4)
    assert 0.01 < saturated < 0.99
    assert zeros == pytest.approx((module(x) == 0).double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("module", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_left_of_the_dip(module):
    # The derivative passes through 0 at the minimum of the function: that place does not count.
    x = torch.randn(5_000, dtype=torch.float64) * 5
    left = x[x < -2]
    want = saturated_by_derivative(module, left) * len(left) / len(x)
    assert watch(module, x)[0] == pytest.approx(want, abs=2e-3) and want > 0.1


@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.LogSoftmax(1), nn.Softmax(0)], ids=str)
def test_softmax_is_saturated_where_one_probability_is_all(module):
    x = torch.zeros(4, 4)
    x[0, 0] = 9.0
    assert watch(module, x)[0] == 0.25
    assert watch(module, torch.randn(50, 50))[0] == 0  # small probabilities are no saturation


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda m: m.__name__)
def test_recurrent_outputs(module):
    recurrent = module(3, 8, batch_first=True)
    x = torch.randn(4, 7, 3)
    assert watch(recurrent, x)[0] == 0
    with torch.no_grad():
        for parameter in recurrent.parameters():
            parameter.mul_(100)
    outputs, _ = recurrent(x)
    want = (outputs.abs() > math.sqrt(0.95)).float().mean().item()
    assert want > 0.05 and watch(recurrent, x)[0] == pytest.approx(want)
    packed = pack_padded_sequence(x, torch.tensor([7, 5, 3, 1]), batch_first=True)
    outputs, _ = recurrent(packed)
    want = (outputs.data.abs() > math.sqrt(0.95)).float().mean().item()
    assert watch(recurrent, packed)[0] == pytest.approx(want)


def test_other_recurrent_modules():
    relu = nn.RNN(3, 8, nonlinearity="relu")
    x = torch.randn(4, 7, 3)
    zeros = (relu(x)[0] == 0).float().mean().item()
    assert watch(relu, x) == pytest.approx([zeros, zeros]) and zeros > 0.1
    assert watch(nn.LSTMCell(3, 8), torch.randn(4, 3))[0] == 0
    assert watch(nn.RNNCell(3, 8, nonlinearity="relu"), torch.randn(4, 3))[1] > 0.1
    model = nn.Sequential(nn.LSTM(3, 8, proj_size=2))
    assert Activations(model).classes == {}  # linear outputs


class ReLU2(nn.ReLU):
    pass


class GELUActivation(nn.Module):  # as in transformers
    def forward(self, x):
        return nn.functional.gelu(x)


@pytest.mark.parametrize("module", [ReLU2(), GELUActivation(), nn.ReLU(inplace=True)], ids=str)
def test_other_classes(module):
    want = watch(nn.GELU() if isinstance(module, GELUActivation) else nn.ReLU(), x := torch.randn(1_000) * 3)
    assert watch(module, x.clone()) == pytest.approx(want)


def test_a_large_output_is_sampled_evenly():
    x = torch.full((_SAMPLE, 8), -1.0)
    x[:, ::2] = 1.0
    assert watch(nn.ReLU(), x)[1] == pytest.approx(0.5, abs=1e-3)
    assert watch(nn.ReLU(), x.t())[1] == pytest.approx(0.5, abs=1e-3)


def test_odd_outputs():
    assert Activations(nn.Sequential(nn.ReLU())).take() == {}
    empty = Activations(model := nn.Sequential(nn.ReLU()))
    model(torch.empty(0, 3))
    assert empty.take() == {}
    assert watch(nn.Sigmoid(), torch.randn(9).half() * 100)[0] > 0.5


class Recurrent(nn.Module):
    """Runs one cell many times, and its layers in another order than that of their definition."""

    def __init__(self):
        super().__init__()
        self.last, self.act, self.first = nn.Linear(6, 2), nn.Tanh(), nn.Linear(4, 6)
        self.unused = nn.Linear(2, 2)
        self.never = nn.Sigmoid()

    def forward(self, x):
        x = self.act(self.first(x))
        return self.last(self.act(x * 1e6))


def train(monitor, steps=1, micro=1):
    model = monitor.model
    for _ in range(steps):
        model.zero_grad()
        for _ in range(micro):
            model(torch.randn(8, 4)).square().sum().backward()
        monitor.clip_grad_norm_(1.0)


def test_a_module_that_runs_twice_has_the_mean():
    monitor = fastclip.GradientMonitor(Recurrent(), activations=True)
    train(monitor, 2, micro=3)
    act, never = monitor.history().activations
    assert (act.name, act.module) == ("act", "Tanh") and (never.name, never.module) == ("never", "Sigmoid")
    assert act.saturated.tolist() == pytest.approx([0.5, 0.5], abs=0.06)
    assert never.saturated.isnan().all() and never.zeros.shape == (2,)
    last = monitor.last()
    assert last["activation/saturated/act"] == act.saturated[-1] and "activation/zeros/never" not in last


def test_depth_is_the_order_of_the_forward_pass():
    depths = lambda monitor: {layer.name: layer.depth for layer in monitor.history().layers}  # noqa: E731
    monitor = fastclip.GradientMonitor(Recurrent(), activations=True)
    train(monitor)
    depth = depths(monitor)
    assert depth["first.weight"] < depth["last.weight"] < depth["unused.weight"]
    monitor = fastclip.GradientMonitor(Recurrent(), activations=True)
    monitor.clip_grad_norm_(1.0)  # before any forward pass
    train(monitor)
    assert depths(monitor) == depth
    monitor = fastclip.GradientMonitor(Recurrent())
    train(monitor)
    depth = depths(monitor)
    assert depth["last.weight"] < depth["first.weight"] < depth["unused.weight"]


def test_only_forward_passes_of_recorded_training_steps_are_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].weight.data, model[0].bias.data = torch.eye(4), torch.zeros(4)
    monitor = fastclip.GradientMonitor(model, every=3, activations=True)
    for step in range(7):
        with torch.no_grad():
            model(-torch.ones(8, 4))
        model.eval()
        model(-torch.ones(8, 4))
        model.train()
        model(torch.ones(8, 4) if step % 3 == 0 else -torch.ones(8, 4)).sum().backward()
        monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert history.steps.tolist() == [0, 3, 6] and history.activations[0].zeros.tolist() == [0, 0, 0]
    assert monitor._activations.take() == {}


def test_hooks_do_not_change_what_the_model_computes():
    model = Recurrent()
    x = torch.randn(8, 4)
    before = model(x)
    with fastclip.GradientMonitor(model, activations=True):
        assert torch.equal(model(x), before)
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_with_the_monitor():
    model = Recurrent()
    monitor = fastclip.GradientMonitor(model, activations=True)
    train(monitor)
    del monitor
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("first", ["monitor", "compile"])
def test_a_compiled_model(first):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if first == "compile":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.randn(8, 4))
        monitor = fastclip.GradientMonitor(compiled, activations=True)
    else:
        monitor = fastclip.GradientMonitor(model, activations=True)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled.zero_grad()
        compiled(torch.randn(8, 4)).square().sum().backward()
        monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert [layer.name for layer in history.layers] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not history.values.isnan().any()
    assert history.activations[0].zeros.isnan().all()  # compiled modules are not looked at


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    monitor = fastclip.GradientMonitor(model, activations=True)
    for reentrant in (False, True):
        x = torch.randn(8, 4, requires_grad=True)
        zeros = (model[1](model[0](x)) == 0).float().mean().item()
        monitor._activations.take()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        total, runs = monitor._activations.take()["1"]
        assert (total / runs)[1].item() == pytest.approx(zeros)


class Odd(nn.Module):
    """Hands a ReLU what has no values to look at."""

    def __init__(self, make):
        super().__init__()
        self.make, self.weight, self.relu = make, nn.Parameter(torch.ones(3, 4)), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.make(self.weight * x))
        return y.to_dense() if y.layout is torch.sparse_coo else y.values() if y.is_nested else y


def nested(w):
    return torch.nested.nested_tensor_from_jagged(w, torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, nested], ids=["sparse", "nested"])
def test_outputs_without_plain_values(make):
    model = Odd(make)
    with fastclip.GradientMonitor(model, activations=True) as monitor:
        model(2.0).sum().backward()
        monitor.clip_grad_norm_(1.0)
        assert "activation/saturated/relu" not in monitor.last() and monitor.last()["grad/total_norm"] > 0


def test_under_vmap():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with fastclip.GradientMonitor(model, activations=True) as monitor:
        torch.func.vmap(model)(torch.randn(5, 4)).sum().backward()
        monitor.clip_grad_norm_(1.0)
        assert "activation/saturated/1" not in monitor.last()


def test_scripted_modules_take_no_hooks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch advises against it
        scripted = torch.jit.script(nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Tanh())
    with fastclip.GradientMonitor(model, activations=True) as monitor:
        model(torch.randn(5, 4)).sum().backward()
        monitor.clip_grad_norm_(1.0)
        assert "activation/saturated/2" in monitor.last()


class Tokens(nn.Module):
    """Parameters of the model itself, an attention whose projection is never called, checkpointed blocks."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.late = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.position = nn.Parameter(torch.zeros(5, 8))

    def forward(self, x):
        x = x + self.position
        x = self.attention(x, x, x)[0]
        return self.head(torch.utils.checkpoint.checkpoint(self.late, x, use_reentrant=True))


def test_depth_of_what_runs_in_no_hook():
    with fastclip.GradientMonitor(Tokens(), activations=True) as monitor:
        monitor.model(torch.randn(3, 5, 8, requires_grad=True)).sum().backward()
        monitor.clip_grad_norm_(1.0)
        depth = {layer.name: layer.depth for layer in monitor.history().layers}
    assert depth["position"] < depth["attention.out_proj.weight"] < depth["late.weight"] < depth["head.weight"]
    assert depth["attention.in_proj_weight"] == depth["attention.out_proj.bias"]
