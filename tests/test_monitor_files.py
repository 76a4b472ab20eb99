"""The monitor's files: what was recorded is read again, also after kill -9."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from support import INF, NAN, ROOT
from torch import nn

import fastclip


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def train(monitor, steps=3, without=None):
    model = monitor.model
    for step in range(steps):
        model.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        if without is not None and step == 1:
            model.get_parameter(without).grad = None
        monitor.clip_grad_norm_(1.0)


def assert_same(got, want):
    assert got.layers == want.layers and got.norm_type == want.norm_type
    for name in ("steps", "total_norm", "max_norm", "values", "weight_norms", "grad_scale"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)
    assert len(got.activations) == len(want.activations)
    for a, b in zip(got.activations, want.activations, strict=True):
        assert (a.name, a.module) == (b.name, b.module)
        torch.testing.assert_close(
            torch.stack([a.saturated, a.zeros]), torch.stack([b.saturated, b.zeros]), equal_nan=True
        )


def odd_values(monitor):
    """A step with everything that has no word in JSON, or is left out."""
    model = monitor.model
    train(monitor, 1)
    model[0].weight.grad[0, :3] = torch.tensor([INF, NAN, 1e-40])
    model[2].bias.grad.zero_()
    model[2].weight.grad = None
    monitor.clip_grad_norm_(INF)


@pytest.mark.parametrize("how", ["save", "path"])
def test_everything_is_read_again(tmp_path, how):
    file = tmp_path / "run.jsonl"
    monitor = fastclip.GradientMonitor(make_model(), activations=True, path=file if how == "path" else None)
    train(monitor, 3, without="0.weight")
    odd_values(monitor)
    train(monitor, 1)
    if how == "save":
        file.write_text("what was there before")
        monitor.save(file)
    history = monitor.history()
    assert not history.total_norm.isfinite().all() and history.values[1, 0].isnan().all()
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    loaded = fastclip.GradientMonitor.load(file)
    assert_same(loaded.history(), history)
    assert loaded.step == monitor.step and "no model" in repr(loaded)
    assert loaded.last() == pytest.approx(monitor.last(), nan_ok=True)
    with pytest.raises(RuntimeError, match="expected a monitor with a model"):
        loaded.clip_grad_norm_(1.0)
    assert list(tmp_path.iterdir()) == [file]


def test_a_loaded_monitor_goes_on_with_another_model_of_the_same_names(tmp_path):
    file = tmp_path / "run.jsonl"
    monitor = fastclip.GradientMonitor(make_model())
    train(monitor)
    monitor.save(file)
    longer = make_model().append(nn.Linear(3, 2))
    loaded = fastclip.GradientMonitor.load(file, longer, every=2)
    train(loaded, 4)
    history = loaded.history()
    assert history.steps.tolist() == [0, 1, 2, 4, 6]
    assert [layer.name for layer in history.layers] == [f"{i}.{n}" for i in (0, 2, 3) for n in ("weight", "bias")]
    assert history.values[:3, 4:].isnan().all() and not history.values[3:].isnan().any()
    assert len(monitor.history().steps) == 3


def test_a_file_that_exists_is_continued(tmp_path):
    file = tmp_path / "run.jsonl"
    with fastclip.GradientMonitor(make_model(), path=file) as monitor:
        train(monitor, 3)
        first = monitor.history()
    model = make_model()
    model[0].requires_grad_(False)  # other layers, other numbers
    with fastclip.GradientMonitor(model, path=file) as monitor:
        assert monitor.step == 3
        train(monitor, 2)
        second = monitor.history()
    assert second.steps.tolist() == [0, 1, 2, 3, 4]
    order = [[layer.name for layer in second.layers].index(layer.name) for layer in first.layers]
    assert torch.equal(second.values[:3, order], first.values)
    assert [layer.name for layer in second.layers][:2] == ["2.weight", "2.bias"]
    assert second.values[3:, 2:].isnan().all()
    loaded = fastclip.GradientMonitor.load(file).history()
    order = [[layer.name for layer in loaded.layers].index(layer.name) for layer in second.layers]
    torch.testing.assert_close(loaded.values[:, order], second.values, rtol=0, atol=0, equal_nan=True)


def test_going_back_to_a_checkpoint(tmp_path):
    file = tmp_path / "run.jsonl"
    with fastclip.GradientMonitor(make_model(), path=file) as monitor:
        train(monitor, 5)
        monitor.step = 2
        train(monitor, 1)
        history = monitor.history()
    assert history.steps.tolist() == [0, 1, 2]
    assert_same(fastclip.GradientMonitor.load(file).history(), history)
    assert sum('"step"' in line for line in file.read_text().splitlines()) == 6  # nothing is taken out of the file


def test_a_file_cut_off_anywhere(tmp_path):
    file, part = tmp_path / "run.jsonl", tmp_path / "part.jsonl"
    with fastclip.GradientMonitor(make_model(), path=file) as monitor:
        train(monitor, 3)
        whole = monitor.history()
    text = file.read_bytes()
    counts = set()
    for end in [*range(0, len(text), 7), len(text)]:
        part.write_bytes(text[:end])
        history = fastclip.GradientMonitor.load(part).history()
        count = len(history.steps)
        counts.add(count)
        assert count == sum(b'"step"' in line for line in text[:end].splitlines(True) if line.endswith(b"\n"))
        if count:
            assert torch.equal(history.values, whole.values[:count])
    assert counts == {0, 1, 2, 3}
    line_cut_off = b'{"step": 2, "total_norm": ' + b"1" * 5000
    part.write_bytes(b"".join(text.splitlines(True)[:-1]) + line_cut_off)  # and continued after it
    with fastclip.GradientMonitor(make_model(), path=part) as monitor:
        assert monitor.step == 2
        train(monitor, 1)
    assert [json.loads(line) for line in part.read_text().splitlines()]
    assert fastclip.GradientMonitor.load(part).history().steps.tolist() == [0, 1, 2]


KILLED = """
import sys, torch, fastclip
model = torch.nn.Linear(30, 20)
monitor = fastclip.GradientMonitor(model, path=sys.argv[1])
while True:
    model.zero_grad()
    model(torch.randn(4, 30)).square().sum().backward()
    monitor.clip_grad_norm_(1.0)
    print(monitor.step, flush=True)
"""


def test_a_killed_process_loses_no_step(tmp_path):
    file = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    last = 0
    while last < 40:
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max([last, *map(int, process.stdout.read().split("\n")[:-1])])
    history = fastclip.GradientMonitor.load(file).history()
    assert len(history.steps) in (last, last + 1)  # one may have been written and not printed
    assert history.total_norm.isfinite().all()


@pytest.mark.parametrize(
    "text, line",
    [
        (b"hello\n", 1),
        (b'{"epoch": 3}\n', 1),
        (b"\x80\x04\x95\n", 1),
        (b"[1, 2]\n", 1),
        (b'{"fastclip_monitor": 2, "norm_type": 2.0}\n', 1),
        (b'{"fastclip_monitor": 1, "norm_type": 2.0}\n{"step": 0}\n', 2),
        (b'{"fastclip_monitor": 1, "norm_type": 2.0}\n{"step": 0, "total_norm": 1, "max_norm": 1, "layers": [5]}\n', 2),
    ],
)
def test_what_is_no_such_file(tmp_path, text, line):
    file = tmp_path / "x.jsonl"
    file.write_bytes(text)
    message = f"path: expected a monitor's file, got '{file}', whose line {line}"
    with pytest.raises(ValueError, match=message):
        fastclip.GradientMonitor.load(file)
    with pytest.raises(ValueError, match=message):
        fastclip.GradientMonitor(make_model(), path=file)
    assert file.read_bytes() == text


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError):
        fastclip.GradientMonitor.load(tmp_path / "none.jsonl")
    with pytest.raises(IsADirectoryError):
        fastclip.GradientMonitor(make_model(), path=tmp_path)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fastclip.GradientMonitor.load(tmp_path / "none.jsonl", 3)
    monitor = fastclip.GradientMonitor(make_model())
    train(monitor, 1)
    with pytest.raises(FileNotFoundError):
        monitor.save(tmp_path / "no" / "folder.jsonl")


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monitor = fastclip.GradientMonitor(make_model(), path=tmp_path / "run.jsonl")
    train(monitor, 1)
    assert not list(tmp_path.iterdir()) and len(monitor.history().steps) == 1


def test_a_full_disk_does_not_end_the_training(tmp_path):
    monitor = fastclip.GradientMonitor(make_model(), path=tmp_path / "run.jsonl")
    with open("/dev/full", "wb", buffering=0) as full:
        monitor._file = monitor._writer._file = full
        with pytest.warns(UserWarning, match=r"no more records are written to /dev/full: .*No space left"):
            train(monitor, 1)
        train(monitor, 2)
        assert monitor.history().steps.tolist() == [0, 1, 2]
        monitor.close()


def test_writing_keeps_up(tmp_path):
    file = tmp_path / "run.jsonl"
    monitor = fastclip.GradientMonitor(make_model(), path=file, weight_norms=0)
    train(monitor, 2)
    before = file.stat().st_size
    train(monitor, 10)
    per_step = (file.stat().st_size - before) / 10
    assert per_step < 60 + 4 * 2 * 22 + 40  # two numbers a layer; columns of zeros cost nothing


def test_a_file_of_something_else_is_left_alone(tmp_path):
    """Also where it is one line without an end, which a killed process could have left."""
    path, text = tmp_path / "config.json", '{"lr": 0.1, "layers": 12}'
    path.write_text(text)
    with pytest.raises(ValueError, match="path: expected a monitor's file"):
        fastclip.GradientMonitor(nn.Linear(2, 2), path=path)
    with pytest.raises(ValueError, match="path: expected a monitor's file"):
        fastclip.GradientMonitor.load(path)
    assert path.read_text() == text


def test_saving_onto_the_file_that_is_written(tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / "run.jsonl"
    with fastclip.GradientMonitor(model, path=path) as monitor:
        for step in range(4):
            model(torch.ones(1, 2)).sum().backward()
            monitor.clip_grad_norm_(1.0)
            if step == 1:
                with pytest.raises(ValueError, match="path: expected another file"):
                    monitor.save(path)
    assert len(fastclip.GradientMonitor.load(path).history().steps) == 4
    monitor.save(path)  # it is closed
    assert len(fastclip.GradientMonitor.load(path).history().steps) == 4


def test_one_file_for_one_monitor(tmp_path):
    path = tmp_path / "run.jsonl"
    with fastclip.GradientMonitor(make_model(), path=path) as monitor:
        train(monitor, 2)
        with pytest.raises(ValueError, match="path: expected a file of its own"):
            fastclip.GradientMonitor(make_model(), path=path)
        train(monitor, 1)
    with fastclip.GradientMonitor(make_model(), path=path) as monitor:
        assert monitor.step == 3
