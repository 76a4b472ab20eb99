"""GradientMonitor: what it records, under which names, how long it keeps it."""

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from support import INF, NAN
from torch import nn

import fastclip
from fastclip.health.naming import Layers
from fastclip.health.recording import Record, Store


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model, scale=1.0, inputs=4):
    model.zero_grad()
    (model(torch.randn(8, inputs)).square().sum() * scale).backward()


def expected_values(parameters, norm_type=2):
    """Norm, abs max and counts of zeros, infs and NaNs in float64; a NaN row where there is no gradient."""
    rows = []
    for parameter in parameters:
        if parameter.grad is None:
            rows.append([NAN] * 5)
            continue
        grad = parameter.grad.double()
        norm, abs_max = torch.linalg.vector_norm(grad, norm_type), grad.abs().max()
        rows.append([x.item() for x in (norm, abs_max, (grad == 0).sum(), grad.isinf().sum(), grad.isnan().sum())])
    return torch.tensor(rows, dtype=torch.float64)


def assert_values(got, want):
    torch.testing.assert_close(got[..., :5], want, rtol=1e-6, atol=0, equal_nan=True)


# ---- what is recorded ----


@pytest.mark.parametrize("norm_type", [1, 2, INF])
def test_gradients_are_recorded_as_before_clipping(norm_type):
    model = make_model()
    twin = copy.deepcopy(model)
    monitor = fastclip.GradientMonitor(model)
    wanted, norms = [], []
    for max_norm in (1e-3, 1e9, 2.0):
        backward(model)
        twin.zero_grad()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        wanted.append(expected_values(model.parameters(), norm_type))
        result = monitor.clip_grad_norm_(max_norm, norm_type)
        norms.append(fastclip.clip_grad_norm_(twin.parameters(), max_norm, norm_type))
        assert torch.equal(result, norms[-1]) and result.dtype == norms[-1].dtype
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad)
    history = monitor.history()
    assert_values(history.values, torch.stack(wanted))
    assert history.steps.tolist() == [0, 1, 2] and history.norm_type == norm_type
    assert history.total_norm.tolist() == [norm.item() for norm in norms]
    assert history.max_norm.tolist() == [1e-3, 1e9, 2.0]
    assert history.values.shape == (3, 4, 6) and history.values.dtype == torch.float64
    assert [(x.name, x.shape, x.dtype, x.module) for x in history.layers] == [
        ("0.weight", (6, 4), "float32", "Linear"),
        ("0.bias", (6,), "float32", "Linear"),
        ("2.weight", (3, 6), "float32", "Linear"),
        ("2.bias", (3,), "float32", "Linear"),
    ]


def test_every_third_step():
    model, wanted = make_model(), []
    monitor = fastclip.GradientMonitor(model, every=3)
    for step in range(8):
        backward(model)
        if step % 3 == 0:
            wanted.append(expected_values(model.parameters()))
        norm = monitor.clip_grad_norm_(0.1)
        clipped = fastclip.get_total_norm([p.grad for p in model.parameters()])
        assert norm > 0.1 and clipped == pytest.approx(0.1, rel=1e-4)
    history = monitor.history()
    assert history.steps.tolist() == [0, 3, 6] and monitor.step == 8
    assert_values(history.values, torch.stack(wanted))


def test_nonfinite_gradients():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    model[0].weight.grad[0, :2] = torch.tensor([INF, NAN])
    with pytest.raises(RuntimeError, match="non-finite"):
        monitor.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert model[2].weight.grad.isfinite().all()
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert history.values[:, :, 3].sum(1).tolist() == [1, 1] and history.values[:, :, 4].sum(1).tolist() == [1, 1]
    assert not history.total_norm.isfinite().any()
    assert monitor.last()["grad/nonfinite"] == 2


def test_accumulation_is_one_record():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    for _ in range(4):
        model(torch.randn(8, 4)).square().sum().backward()
    wanted = expected_values(model.parameters())
    monitor.clip_grad_norm_(1.0)
    assert_values(monitor.history().values, wanted[None])


def test_a_threshold_in_a_tensor_may_change_later():
    model, limit = make_model(), torch.tensor(0.5)
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(limit).zero_()
    limit.fill_(7.0)
    history = monitor.history()
    assert history.max_norm.tolist() == [0.5] and history.total_norm[0] > 0.5


def test_weight_norms():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, weight_norms=2)
    wanted = []
    for _ in range(3):
        backward(model)
        wanted.append(torch.stack([p.detach().double().norm() for p in model.parameters()]))
        monitor.clip_grad_norm_(1.0)
        with torch.no_grad():
            model[0].weight.mul_(2)
    norms = monitor.history().weight_norms
    torch.testing.assert_close(norms[::2], torch.stack(wanted[::2]), rtol=1e-6, atol=0)
    assert norms[1].isnan().all()
    never = fastclip.GradientMonitor(model, weight_norms=0)
    never.clip_grad_norm_(1.0)
    assert never.history().weight_norms.isnan().all()


def test_counters_count_a_call_as_one():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, weight_norms=1)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    assert fastclip.counters()["calls"] == fastclip.counters()["native"] == 1


# ---- which parameters ----


def test_parameters_without_gradient_in_some_steps():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    wanted = []
    for without in ((), ("0.bias", "2.weight"), ("0.weight",)):
        backward(model)
        for name in without:
            model.get_parameter(name).grad = None
        wanted.append(expected_values(model.parameters()))
        monitor.clip_grad_norm_(1.0)
    values = monitor.history().values
    assert_values(values, torch.stack(wanted))
    assert values[1, 1:3].isnan().all() and not values[1, 0].isnan().any()
    assert "grad/norm/0.weight" not in monitor.last() and "grad/norm/0.bias" in monitor.last()


def test_frozen_parameters_and_their_thaw():
    model = make_model()
    model[0].requires_grad_(False)
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    assert [layer.name for layer in monitor.history().layers] == ["2.weight", "2.bias"]
    model[0].requires_grad_(True)
    backward(model)
    wanted = expected_values([*model[2].parameters(), *model[0].parameters()])
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert [layer.name for layer in history.layers] == ["2.weight", "2.bias", "0.weight", "0.bias"]
    assert_values(history.values[1], wanted)
    assert history.values[0, 2:].isnan().all()


def test_parameters_that_are_added_or_replaced_later():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    model[0] = nn.Linear(4, 6)
    model.append(nn.Linear(3, 2, bias=False))
    gc.collect()
    backward(model)
    wanted = expected_values(model.parameters())
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert [layer.name for layer in history.layers] == ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight"]
    assert_values(history.values[1], wanted)
    assert history.values[0, 4].isnan().all() and not history.values[0, :4].isnan().any()


def test_an_id_that_comes_again():
    model, gone, new = make_model(), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    layers = Layers(model)
    layers._by_id[id(new)] = weakref.ref(gone), 3  # as if `new` had got the memory of a parameter that died
    del gone
    assert layers.numbers_of([new, model[0].weight]) == (-1, 0)


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    shapes = {layer.name: layer.shape for layer in monitor.history().layers}
    assert shapes == {"0.weight": (5, 4), "0.bias": (5,), "1.weight": (2, 5), "1.bias": (2,)}


def test_shared_parameters_have_their_first_name():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    wanted = expected_values(model.parameters())
    monitor.clip_grad_norm_(1.0)
    history = monitor.history()
    assert [layer.name for layer in history.layers] == ["0.weight"]
    assert_values(history.values[0], wanted)


class DistributedDataParallel(nn.Module):  # as far as names go
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
        lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["ddp", "dp", "compiled", "compiled ddp", "ddp of compiled"],
)
def test_names_inside_of_wrappers(wrap):
    model = wrap(make_model())
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    assert [layer.name for layer in monitor.history().layers] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not monitor.history().values.isnan().any()


def test_names_of_compiled_and_checkpointed_parts():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    model[0] = torch.compile(model[0], backend="eager")
    model[2] = checkpoint_wrapper(model[2])
    backward(model)
    monitor = fastclip.GradientMonitor(model)
    assert [layer.name for layer in monitor.history().layers] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_module_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    names = [layer.name for layer in fastclip.GradientMonitor(model).history().layers]
    assert names == ["module.weight", "module.bias"]


def test_a_model_without_parameters():
    monitor = fastclip.GradientMonitor(nn.Identity())
    assert monitor.clip_grad_norm_(1.0) == 0
    history = monitor.history()
    assert history.layers == [] and history.values.shape == (1, 0, 6)
    monitor.table(console=quiet())


def test_no_gradient_at_all():
    monitor = fastclip.GradientMonitor(make_model())
    assert monitor.clip_grad_norm_(1.0) == 0
    history = monitor.history()
    assert history.values.shape == (1, 4, 6) and history.values.isnan().all() and history.total_norm.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    model = make_model().to(dtype)
    monitor = fastclip.GradientMonitor(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    wanted = expected_values(model.parameters())
    monitor.clip_grad_norm_(1.0)
    assert_values(monitor.history().values[0], wanted)
    assert {layer.dtype for layer in monitor.history().layers} == {str(dtype)[6:]}


def test_two_monitors_on_one_model():
    model = make_model()
    first, second = fastclip.GradientMonitor(model), fastclip.GradientMonitor(model, every=2, activations=True)
    for _ in range(3):
        backward(model)
        with fastclip.patched(monitor=first), fastclip.patched(monitor=second):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert first.history().steps.tolist() == [0, 1, 2] and second.history().steps.tolist() == [0, 2]
    assert torch.equal(first.history().values[::2], second.history().values)


def test_threads():
    models = [make_model(seed) for seed in range(4)]
    shared = fastclip.GradientMonitor(models[0])
    monitors = [shared, shared, *map(fastclip.GradientMonitor, models[2:])]
    for model in models:
        backward(model)
    errors = []

    def work(monitor):
        try:
            for _ in range(100):
                monitor.clip_grad_norm_(1e9)
                monitor.last()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(monitor,)) for monitor in monitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(shared.history().steps) == 200 == shared.step and len(monitors[2].history().steps) == 100


# ---- how long it is kept ----


def record(step, total_norm=1.0):
    return Record(step, (), torch.empty(0, 6, dtype=torch.float64), total_norm, 1.0)


def test_the_newest_half_and_a_fair_sample_of_the_older():
    store = Store(80)
    for step in range(20_000):
        store.add(record(step))
        assert len(store) <= 80
    steps = [r.step for r in store.records()]
    assert steps == sorted(set(steps)) and len(steps) > 60
    assert steps[-40:] == list(range(19_960, 20_000))
    grid = [step for step in steps[:-40] if step % 1024 == 0]
    assert grid == list(range(0, 19_960, 1024))


def test_extremes_are_kept_when_records_are_thinned():
    store = Store(80)
    special = {777: INF, 7_777: NAN, 5_001: 1e6, 11_111: 1e5}
    for step in range(20_000):
        store.add(record(step, special.get(step, 1 + step % 7 / 10)))
    steps = [r.step for r in store.records()]
    assert set(special) <= set(steps)


def test_endless_nonfinite_records_leave_their_beginning():
    store = Store(80)
    for step in range(5_000):
        store.add(record(step, NAN if step >= 1_001 else 1.0))
        assert len(store) <= 80
    assert 1_001 in [r.step for r in store.records()]


def test_memory_is_flat_over_10_000_steps():
    import tracemalloc

    model = nn.Linear(3, 2)
    monitor = fastclip.GradientMonitor(model, capacity=200, weight_norms=50)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def tensors():
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    sizes = []
    tracemalloc.start()
    for step in range(10_001):
        monitor.clip_grad_norm_(1e9)
        if step in (2_000, 10_000):
            gc.collect()
            sizes.append((tracemalloc.get_traced_memory()[0], tensors()))
    tracemalloc.stop()
    (bytes_before, tensors_before), (bytes_after, tensors_after) = sizes
    assert bytes_after < bytes_before + 20_000 and tensors_after <= tensors_before + 20
    assert len(monitor.history().steps) <= 200 and monitor.step == 10_001


def test_going_back_to_an_earlier_step():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    for step in (0, 1, 2, 3, 1, 2):
        backward(model)
        if step != monitor.step:
            monitor.step = step
        monitor.clip_grad_norm_(1.0)
    assert monitor.history().steps.tolist() == [0, 1, 2]
    monitor.step = 10
    monitor.clip_grad_norm_(1.0)
    assert monitor.history().steps.tolist() == [0, 1, 2, 10] and monitor.step == 11
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        monitor.step = -1


# ---- the model stays as it was ----


def test_the_monitor_keeps_no_copy_of_the_model_alive():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, activations=True)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    reference = weakref.ref(model)
    del monitor, model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("activations", [False, True])
def test_copies_of_the_model(activations):
    model = make_model()
    keys = list(model.state_dict())
    monitor = fastclip.GradientMonitor(model, activations=activations)
    assert list(model.state_dict()) == keys
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies += [torch.load(file, weights_only=False), copy.deepcopy(copies[0])]
    x = torch.randn(5, 4)
    for twin in copies:
        assert torch.equal(twin(x), model(x))
        twin(x).sum().backward()
        twin.load_state_dict(model.state_dict())
    assert b"fastclip" not in pickle.dumps(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    assert len(monitor.history().steps) == 1


def test_a_model_that_holds_its_monitor():
    model = make_model()
    model.monitor = fastclip.GradientMonitor(model, every=2, activations=True)
    for _ in range(3):
        backward(model)
        model.monitor.clip_grad_norm_(1.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        monitor = twin.monitor
        assert monitor is not model.monitor and monitor.model is twin
        assert torch.equal(monitor.history().values, model.monitor.history().values)
        backward(twin)
        monitor.clip_grad_norm_(1.0)
        backward(twin)
        wanted = expected_values(twin.parameters())
        monitor.clip_grad_norm_(1.0)
        assert monitor.history().steps.tolist() == [0, 2, 4]
        assert_values(monitor.history().values[2], wanted)


# ---- readers ----


def quiet():
    console = pytest.importorskip("rich.console")
    return console.Console(file=io.StringIO(), width=120, color_system="standard", force_terminal=True)


def test_last():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    assert monitor.last() == {}
    backward(model)
    model[0].bias.grad[:3] = 0
    norm = model[0].weight.grad.norm().item()
    monitor.clip_grad_norm_(0.5)
    last = monitor.last()
    assert last["grad/step"] == 0 and last["grad/max_norm"] == 0.5 and last["grad/nonfinite"] == 0
    assert last["grad/clip_coef"] == pytest.approx(0.5 / last["grad/total_norm"], rel=1e-5)
    assert last["grad/norm/0.weight"] == pytest.approx(norm, rel=1e-5)
    assert last["grad/zeros/0.bias"] == 0.5 and last["grad/zeros/2.bias"] == 0
    assert all(type(value) in (int, float) for value in last.values()) and len(last) == 5 + 3 * 4
    monitor.clip_grad_norm_(1e9)
    assert monitor.last()["grad/clip_coef"] == 1


def test_table():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    console = quiet()
    monitor.table(console)
    assert "no step recorded" in console.file.getvalue()
    for step in range(3):
        backward(model)
        if step == 2:
            model[0].weight.grad[0, 0] = NAN
            model[2].bias.grad.zero_()
            model[2].weight.grad = None
        monitor.clip_grad_norm_(1.0)
    console = quiet()
    table = monitor.table(console)
    text = console.file.getvalue()
    assert table.row_count == 4 and "no grad" in text and "step 2" in text and "6x4" in text
    styles = {
        name: row.style for name, row in zip(["0.weight", "0.bias", "2.weight", "2.bias"], table.rows, strict=True)
    }
    assert styles == {"0.weight": "bold red", "0.bias": "yellow", "2.weight": "", "2.bias": "bold red"}
    assert "100.0%" in text and "\x1b[1;31m" in text
    assert monitor.table(quiet(), rows=2).row_count == 2


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    with SummaryWriter(tmp_path) as writer:
        for _ in range(3):
            backward(model)
            monitor.clip_grad_norm_(1.0)
            monitor.to_tensorboard(writer)
        monitor.to_tensorboard(writer)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("grad/norm/2.weight")
    assert [event.step for event in scalars] == [0, 1, 2]
    assert [event.value for event in scalars] == pytest.approx(monitor.history().values[:, 2, 0].tolist())
    with pytest.raises(TypeError, match="writer: expected a SummaryWriter"):
        monitor.to_tensorboard("runs")


def test_diagnose():
    layers = [m for _ in range(10) for m in (nn.Linear(6, 6), nn.Sigmoid())]
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), *layers, nn.Linear(6, 3))
    monitor = fastclip.GradientMonitor(model)
    assert monitor.diagnose() == []
    for _ in range(12):
        backward(model)
        monitor.clip_grad_norm_(1.0)
    (finding,) = [finding for finding in monitor.diagnose() if finding.kind == "vanishing"]
    assert finding.layer == "0.weight" and "0.weight" in str(finding)


# ---- what is wrong ----


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, "model: expected a torch.nn.Module, got list"),
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 2.5}, TypeError, "every: expected an integer, got 2.5"),
        ({"every": True}, TypeError, "every: expected an integer, got True"),
        ({"capacity": 7}, ValueError, "capacity: expected at least 8, got 7"),
        ({"capacity": None}, TypeError, "capacity: expected an integer, got None"),
        ({"weight_norms": -1}, ValueError, "weight_norms: expected at least 0, got -1"),
        ({"path": "/nowhere/at/all.jsonl"}, FileNotFoundError, "/nowhere/at/all.jsonl"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        fastclip.GradientMonitor(**{"model": model, **arguments})


def test_another_norm_type():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    monitor.clip_grad_norm_(1.0)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"norm_type: expected 2\.0 as in the records before, got inf"):
        monitor.clip_grad_norm_(0.1, INF)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    assert monitor.step == 1


def test_errors_of_clipping_are_its_own():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    with pytest.raises(ValueError, match="max_norm"):
        monitor.clip_grad_norm_("much")
    with pytest.raises(TypeError):
        monitor.clip_grad_norm_()
    assert len(monitor.history().steps) == 0


def test_after_close_it_clips_and_records_no_more():
    model = make_model()
    with fastclip.GradientMonitor(model, activations=True) as monitor:
        backward(model)
        monitor.clip_grad_norm_(1.0)
    assert not any(module._forward_hooks for module in model.modules())
    monitor.close()
    backward(model)
    assert monitor.clip_grad_norm_(0.1) > 0.1
    assert fastclip.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(0.1, rel=1e-4)
    assert len(monitor.history().steps) == 1


def test_inside_of_torch_compile():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)

    @torch.compile(backend="eager")
    def clip():
        return monitor.clip_grad_norm_(1.0) * 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            backward(model)
            clip()
    assert len(monitor.history().steps) == 3


def test_importing_fastclip_does_not_import_monitors():
    from support import run_python

    code = "import sys, fastclip; print(sorted(m for m in sys.modules if m.startswith(('fastclip.health', 'rich'))))"
    assert run_python(code).stdout == "[]\n"
    assert "GradientMonitor" in dir(fastclip)


def test_a_larger_parameter_in_the_place_of_another():
    model = nn.Sequential(nn.Linear(4, 3))
    with fastclip.GradientMonitor(model) as monitor:
        for wide in (4, 40):
            model[0] = nn.Linear(wide, 3)
            model(torch.zeros(2, wide)).sum().backward()
            monitor.clip_grad_norm_(1.0)
        assert monitor.history().layers[0].shape == (3, 40) and monitor.last()["grad/zeros/0.weight"] == 1


def test_going_back_beyond_the_newest_half():
    model = nn.Linear(2, 2)
    with fastclip.GradientMonitor(model, capacity=8) as monitor:
        for _ in range(40):
            model(torch.ones(1, 2)).sum().backward()
            monitor.clip_grad_norm_(1.0)
        monitor.step = 10
        kept = monitor.history().steps.tolist()
        assert kept and monitor.last()["grad/step"] == kept[-1] < 10
        monitor.step = 2
        assert all(step < 2 for step in monitor.history().steps.tolist())


def test_the_records_are_the_monitors_own():
    model = nn.Linear(2, 2)
    statistics = fastclip.GradStatistics()
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 0.1), 1.0, statistics=statistics)
    with fastclip.GradientMonitor(model) as monitor:
        monitor.attach(optimizer)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        statistics.values.zero_()
        assert monitor.last()["grad/norm/weight"] > 0
