"""Monitors of what clips elsewhere: ClippedOptimizer, GradScaler, patched functions, python -m fastclip run."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from support import INF, NAN, ROOT
from torch import nn

import fastclip
from fastclip import __main__ as command_line
from fastclip import watching
from fastclip.health.discovery import Discovery, find_model


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(model):
    return model(torch.randn(8, 4)).square().sum()


def backward(model):
    model.zero_grad()
    loss_of(model).backward()


def norms(model):
    return torch.stack([p.grad.double().norm() for p in model.parameters()])


OPTIMIZERS = {
    "folded": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    "in place": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9, foreach=True),
    "folded sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3, fused=True),
}
optimizers = pytest.mark.parametrize("kind", OPTIMIZERS)


# ---- ClippedOptimizer ----


@optimizers
def test_every_step_of_an_optimizer(kind):
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    optimizer = fastclip.ClippedOptimizer(OPTIMIZERS[kind](model.parameters()), max_norm=lambda step: 0.5 + step)
    assert monitor.attach(optimizer) is optimizer and monitor.attach(optimizer).monitors == [monitor]
    twin = copy.deepcopy(model)
    other = fastclip.ClippedOptimizer(OPTIMIZERS[kind](twin.parameters()), max_norm=lambda step: 0.5 + step)
    wanted, totals = [], []
    for _ in range(3):
        backward(model)
        for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
            same.grad = parameter.grad.clone()
        wanted.append(norms(model))
        optimizer.step()
        other.step()
        totals.append(optimizer.last_total_norm.item())
    history = monitor.history()
    torch.testing.assert_close(history.values[..., 0], torch.stack(wanted), rtol=1e-6, atol=0)
    assert history.total_norm.tolist() == totals and history.max_norm.tolist() == [0.5, 1.5, 2.5]
    assert history.steps.tolist() == [0, 1, 2] and history.grad_scale.isnan().all()
    for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, same)  # recording changes nothing
    monitor.detach(optimizer)
    optimizer.step()
    assert monitor.step == 3


def test_the_keyword_and_every_second_step():
    model = make_model()
    monitor = fastclip.GradientMonitor(model, every=2)
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = fastclip.ClippedOptimizer(inner, max_norm=1.0, monitor=monitor)
    for _ in range(5):
        backward(model)
        optimizer.step()
    assert monitor.history().steps.tolist() == [0, 2, 4] and monitor.step == 5


@pytest.mark.parametrize("where", ["one group", "all groups"])
def test_thresholds_of_groups(where):
    model = make_model()
    groups = [{"params": model[0].parameters(), "max_norm": 0.1}, {"params": model[2].parameters()}]
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(groups, 1e-3), 1.0 if where == "one group" else None)
    monitor = fastclip.GradientMonitor(model)
    monitor.attach(optimizer)
    backward(model)
    wanted = norms(model)
    optimizer.step()
    history = monitor.history()
    torch.testing.assert_close(history.values[0, :, 0], wanted, rtol=1e-6, atol=0)
    assert history.max_norm.isnan().all() and history.total_norm[0] == pytest.approx(wanted.norm().item(), rel=1e-6)
    assert norms(model)[:2].norm() == pytest.approx(0.1, rel=1e-4)


def test_clip_value():
    model = make_model()
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 1e-3), clip_value=1e-3)
    monitor = fastclip.GradientMonitor(model)
    monitor.attach(optimizer)
    backward(model)
    wanted = norms(model)
    optimizer.step()
    history = monitor.history()
    torch.testing.assert_close(history.values[0, :, 0], wanted, rtol=1e-6, atol=0)
    assert history.max_norm.isnan().all() and model[0].weight.grad.abs().max() <= 1e-3


def test_of_several_evaluations_the_first_is_recorded():
    model = make_model()
    optimizer = fastclip.ClippedOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=4), max_norm=1.0)
    monitor = fastclip.GradientMonitor(model)
    monitor.attach(optimizer)
    x, first = torch.randn(8, 4), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        first.append(norms(model))
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert len(first) > 3
    history = monitor.history()
    assert history.steps.tolist() == [0, 1]
    torch.testing.assert_close(history.values[0, :, 0], first[0], rtol=1e-6, atol=0)


def test_copies_of_an_optimizer_are_not_watched():
    model = make_model()
    optimizer = fastclip.ClippedOptimizer(
        torch.optim.SGD(model.parameters(), 1e-3), 1.0, monitor=fastclip.GradientMonitor(model)
    )
    assert copy.deepcopy(optimizer).monitors == [] == pickle.loads(pickle.dumps(optimizer)).monitors


def test_wrong_monitors_and_optimizers():
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(TypeError, match=r"monitor: expected a fastclip\.GradientMonitor, got int"):
        fastclip.ClippedOptimizer(inner, 1.0, monitor=3)
    with pytest.raises(TypeError, match=r"optimizer: expected a fastclip\.ClippedOptimizer, got SGD"):
        fastclip.GradientMonitor(model).attach(inner)
    for function in (fastclip.patch, lambda monitor: fastclip.patched(monitor=monitor).__enter__()):
        with pytest.raises(TypeError, match=r"monitor: expected a fastclip\.GradientMonitor, got Sequential"):
            function(monitor=model)
    assert not fastclip.is_patched() and watching.watchers == []


# ---- GradScaler ----


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, fastclip.GradScaler])
@optimizers
def test_true_values_under_a_scaler(kind, scaler_class, unscale):
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    optimizer = fastclip.ClippedOptimizer(OPTIMIZERS[kind](model.parameters()), max_norm=0.5, monitor=monitor)
    scaler = scaler_class("cpu", init_scale=1024.0, growth_interval=1)
    wanted, bad = [], 3
    for step in range(5):
        model.zero_grad()
        scaler.scale(loss_of(model)).backward()
        wanted.append(norms(model) / scaler.get_scale())
        if step == bad:
            model[2].weight.grad[0, 0] = INF
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() != 1024
    history = monitor.history()
    steps = history.steps.tolist()
    good = [i for i, total in enumerate(history.total_norm.tolist()) if torch.isfinite(torch.tensor(total))]
    others = [step for step in range(5) if step != bad]
    torch.testing.assert_close(
        history.values[good][..., 0], torch.stack([wanted[i] for i in others]), rtol=2e-6, atol=0
    )
    torch.testing.assert_close(
        history.total_norm[good], torch.stack([wanted[i].norm() for i in others]), rtol=2e-6, atol=0
    )
    # Where the scaler itself leaves the step out nobody clips: it is no step.
    assert len(steps) == 5 or (steps == [0, 1, 2, 3] and len(good) == 4)
    known = not history.grad_scale.isnan().any()
    assert known or history.grad_scale.isnan().all()
    assert known == (not unscale and (kind != "in place" or scaler_class is fastclip.GradScaler))


@optimizers
def test_a_scaler_where_nothing_is_fused(kind):
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    optimizer = fastclip.ClippedOptimizer(OPTIMIZERS[kind](model.parameters()), 0.5, norm_type=3, monitor=monitor)
    scaler = fastclip.GradScaler("cpu", init_scale=1024.0)
    wanted = []
    for _ in range(2):
        model.zero_grad()
        scaler.scale(loss_of(model)).backward()
        wanted.append(torch.stack([(p.grad.double() / 1024).abs().pow(3).sum().pow(1 / 3) for p in model.parameters()]))
        scaler.step(optimizer)
        scaler.update()
    history = monitor.history()
    assert history.steps.tolist() == [0, 1] and monitor.step == 2 and history.norm_type == 3
    torch.testing.assert_close(history.values[..., 0], torch.stack(wanted), rtol=1e-5, atol=0)
    torch.testing.assert_close(history.total_norm, torch.stack(wanted).pow(3).sum(1).pow(1 / 3), rtol=1e-5, atol=0)
    assert history.max_norm.tolist() == [0.5, 0.5] and history.grad_scale.tolist() == [1024, 1024]


# ---- patched functions ----


def test_torch_functions_under_a_patch():
    model, other = make_model(), make_model(1)
    monitor = fastclip.GradientMonitor(model)
    wanted, limits = [], []
    with fastclip.patched(monitor=monitor):
        for clip, limit in (
            (lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5), 0.5),
            (lambda: torch.nn.utils.clip_grad_norm_(list(model.parameters()), max_norm=1e9), 1e9),
            (lambda: fastclip.clip_grad_norm_(model.parameters(), 2.0), 2.0),
            (lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3), NAN),
            (
                lambda: torch.nn.utils.clip_grads_with_norm_(
                    model.parameters(), 0.25, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                ),
                0.25,
            ),
        ):
            backward(model)
            backward(other)
            wanted.append(norms(model))
            limits.append(limit)
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            clip()
            assert norms(model).norm() <= 1.0001 * (1e-3 * 51**0.5 if limit != limit else limit)
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    history = monitor.history()
    torch.testing.assert_close(history.values[..., 0], torch.stack(wanted), rtol=1e-6, atol=0)
    torch.testing.assert_close(history.total_norm, torch.stack(wanted).norm(dim=1), rtol=1e-6, atol=0)
    assert history.max_norm.tolist() == pytest.approx(limits, nan_ok=True)


def test_a_program_that_wants_statistics_itself():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    statistics, of_step = fastclip.GradStatistics(), fastclip.GradStatistics()
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = fastclip.ClippedOptimizer(inner, 1e9, statistics=of_step)
    backward(model)
    with fastclip.patched(monitor=monitor):
        fastclip.clip_grad_norm_(model.parameters(), 1e9, statistics=statistics)
        optimizer.step()
    assert torch.equal(torch.stack([statistics.values, of_step.values]), monitor.history().values)
    assert optimizer.statistics is of_step


def test_patch_and_unpatch():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    fastclip.patch(monitor=monitor)
    fastclip.patch(monitor=monitor)
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    monitor.clip_grad_norm_(1.0)
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 1e-3), 1.0, monitor=monitor)
    optimizer.step()
    fastclip.unpatch()
    assert monitor.step == 3 and watching.watchers == []  # each call once
    fastclip.patch(monitor=monitor)
    monitor.close()
    assert watching.watchers == []
    fastclip.unpatch()


def test_one_monitor_in_nested_contexts():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    with fastclip.patched(monitor=monitor):
        with fastclip.patched(monitor=monitor):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert monitor.step == 2 and watching.watchers == []


@optimizers
def test_an_optimizer_under_a_patch(kind):
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    optimizer = fastclip.ClippedOptimizer(OPTIMIZERS[kind](model.parameters()), 0.5)
    scaler = fastclip.GradScaler("cpu")
    with fastclip.patched(monitor=monitor):
        backward(model)
        wanted = norms(model)
        optimizer.step()
        model.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    history = monitor.history()
    torch.testing.assert_close(history.values[0, :, 0], wanted, rtol=1e-6, atol=0)
    assert history.steps.tolist() == [0, 1]


@pytest.mark.parametrize("how", ["clip_value", "groups"])
def test_an_optimizer_that_clips_in_parts_under_a_patch(how):
    model = make_model()
    groups = [{"params": model[0].parameters(), "max_norm": 0.1}, {"params": model[2].parameters(), "max_norm": 0.2}]
    inner = torch.optim.SGD(groups if how == "groups" else model.parameters(), 1e-3)
    optimizer = fastclip.ClippedOptimizer(inner, clip_value=1e-3 if how == "clip_value" else None)
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    with fastclip.patched(monitor=monitor):
        optimizer.step()
    assert monitor.step == 1 and not monitor.history().values.isnan().any()


def test_parameters_that_are_not_the_models():
    model, head = make_model(), nn.Linear(3, 2)
    monitor = fastclip.GradientMonitor(model)
    head(model(torch.randn(8, 4))).square().sum().backward()
    wanted = norms(model)
    everything = [head.weight, *model.parameters(), head.bias]
    total = torch.stack([p.grad.norm() for p in everything]).norm().item()
    with fastclip.patched(monitor=monitor):
        torch.nn.utils.clip_grad_norm_(everything, 1e9)
        torch.nn.utils.clip_grad_norm_(everything[::-1], 1e9)
        torch.nn.utils.clip_grad_norm_(head.bias, 1e9)
    history = monitor.history()
    assert len(history.layers) == 4
    torch.testing.assert_close(history.values[..., 0], torch.stack([wanted, wanted]), rtol=1e-6, atol=0)
    assert history.total_norm.tolist() == pytest.approx([total, total], rel=1e-6)


def test_errors_of_patched_calls_are_as_without_a_monitor():
    model = make_model()
    backward(model)
    with fastclip.patched(monitor=fastclip.GradientMonitor(model)):
        with pytest.raises(TypeError, match=r"parameters\[1\]: expected a torch.Tensor, got int"):
            torch.nn.utils.clip_grad_norm_([model[0].weight, 3], 1.0)
        with pytest.warns(UserWarning, match="empty generator"):
            torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0)
        assert torch.nn.utils.clip_grad_norm_(model[0].weight, 1.0) > 0


def test_another_norm_type_of_a_program():
    model = make_model()
    monitor = fastclip.GradientMonitor(model)
    backward(model)
    with fastclip.patched(monitor=monitor):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.warns(UserWarning, match="norm_type=inf is not recorded: the others have 2"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=INF)
    assert max(p.grad.abs().max() for p in model.parameters()) < 0.1001
    assert len(monitor.history().steps) == 1


# ---- models that nobody named ----


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make_model()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = make_model(), make_model()


def test_the_model_is_found_by_its_parameters():
    model = Trained()
    assert find_model(list(model.parameters())) is model
    assert find_model(list(model.parameters())[:3]) is not None
    assert find_model([torch.zeros(3, requires_grad=True)]) is None
    model.body.requires_grad_(False)
    assert find_model([p for p in model.parameters() if p.requires_grad]) is model
    gan = Gan()
    assert find_model(list(gan.generator.parameters())) is gan.generator
    alone = nn.Sequential(nn.Linear(2, 2))
    assert find_model(list(alone.parameters())) is alone
    wrapped = nn.DataParallel(alone)
    assert find_model(list(wrapped.parameters())) is alone
    twin = copy.deepcopy(model)
    assert find_model(list(twin.parameters())) in (twin, twin.body) and twin.body is not model.body


def test_discovery():
    gan = Gan()
    discovery = Discovery()
    with fastclip.patched(monitor=discovery):
        for part in (gan.generator, gan.discriminator, gan.generator):
            backward(part)
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        loose = torch.zeros(3, requires_grad=True)
        loose.sum().backward()
        torch.nn.utils.clip_grad_norm_([loose], 1.0)
        torch.nn.utils.clip_grad_norm_([loose], 1.0)
    assert discovery.names == ["Sequential", "Sequential"] and [m.step for m in discovery.monitors] == [2, 1]
    assert not discovery.monitors[0].history().values.isnan().any()
    del gan, part
    gc.collect()
    assert find_model([loose]) is None and all(model() is None for model in discovery._models)
    assert len(discovery.monitors[0].history().steps) == 2  # records outlive the model


PROGRAM = """
import sys
import torch
from torch.nn.utils import clip_grad_norm_

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.act, self.head = torch.nn.Linear(4, 6), torch.nn.Sigmoid(), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.body(x)))

torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), 1e-2)
for _ in range(12):
    optimizer.zero_grad()
    net(torch.randn(8, 4)).square().sum().backward()
    clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
"""


VANISHING = PROGRAM.replace(
    "net = Net()",
    "net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Sigmoid(), *[m for _ in range(10) for m in "
    "(torch.nn.Linear(6, 6), torch.nn.Sigmoid())], torch.nn.Linear(6, 3))",
)


@pytest.fixture
def program(tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "vanishing.py").write_text(VANISHING)
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "failing.py").write_text(PROGRAM + "raise KeyError('lost')\n")
    (tmp_path / "interrupted.py").write_text(PROGRAM + "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "idle.py").write_text("print('nothing to do')\n")
    return tmp_path


def run(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "fastclip", "run", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_page_needs_jinja2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastclip", "run", "--monitor", "out.html", "train.py"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command_line.main()
    assert 'a page needs jinja2: pip install "fastclip[health]"' in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--monitor"], ["--no-activations", "--every", "2", "--monitor"]])
def test_an_unchanged_program_is_monitored(program, options):
    done = run(*options, "out.html", "train.py", "--lr", "1", cwd=program)
    assert done.returncode == 0, done.stderr
    assert "fastclip: Net, 12 steps: " in done.stderr and f"page written: {program}/out.html" in done.stderr
    page = (program / "out.html").read_text()
    assert "body.weight" in page and "head.bias" in page
    assert "fastclip: 12 calls, 12 native" in done.stderr


@pytest.mark.parametrize("name, error", [("failing", "KeyError: 'lost'"), ("interrupted", "KeyboardInterrupt")])
def test_the_page_is_written_whatever_ends_the_program(program, name, error):
    done = run("--monitor", "out.html", f"{name}.py", cwd=program)
    assert done.returncode != 0 and error in done.stderr
    assert "Net, 12 steps" in done.stderr and (program / "out.html").stat().st_size > 1000


def test_the_findings_are_printed(program):
    done = run("--monitor", "out.html", "vanishing.py", cwd=program)
    assert done.returncode == 0
    assert "fastclip: Sequential, 12 steps: " in done.stderr
    assert "\n  vanishing gradient in 0.weight: " in done.stderr
    assert "Replace Sigmoid" in done.stderr


def test_a_program_that_clips_nothing(program):
    done = run("--monitor", "out.html", "idle.py", cwd=program)
    assert done.returncode == 0 and "nothing to show" in done.stderr and not (program / "out.html").exists()


def test_other_ranks_write_nothing(program):
    done = run("--monitor", "out.html", "train.py", cwd=program, RANK="1")
    assert done.returncode == 0 and "steps" not in done.stderr and not (program / "out.html").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--monitor", "no/folder.html"], "--monitor: expected a file in a folder that exists, got no/folder.html"),
        (["--monitor", "."], "--monitor: expected a file in a folder that exists, got ."),
        (["--every", "0", "--monitor", "x.html"], "--every: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_told_before_the_program_runs(options, message, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    monkeypatch.setattr(sys, "argv", ["fastclip", "run", *options, "train.py"])
    with pytest.raises(SystemExit) as exit_of:
        command_line.main()
    assert exit_of.value.code == 2 and message in capsys.readouterr().err


def test_a_closed_monitor_is_off_its_optimizers():
    model = nn.Linear(2, 2)
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 0.1), 1.0)
    with fastclip.GradientMonitor(model) as monitor:
        monitor.attach(optimizer)
        assert optimizer.monitors == [monitor]
    assert optimizer.monitors == []


def test_wrong_arguments_have_the_usual_errors():
    model = nn.Linear(2, 2)
    with fastclip.GradientMonitor(model) as monitor, fastclip.patched(monitor=monitor):
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(TypeError, match=r"parameters\[2\]"):
            fastclip.clip_grad_value_([*model.parameters(), 3], 1.0)
        with pytest.raises(TypeError, match="statistics"):
            fastclip.clip_grad_norm_(model.parameters(), 1.0, statistics=[])


def test_a_closed_monitor_is_not_kept_by_the_patch():
    model = nn.Linear(2, 2)
    monitor = fastclip.GradientMonitor(model)
    fastclip.patch(monitor=monitor)
    try:
        monitor.close()
        dead = weakref.ref(monitor), weakref.ref(model)
        del monitor, model
        gc.collect()
        assert [ref() for ref in dead] == [None, None]
    finally:
        fastclip.unpatch()
