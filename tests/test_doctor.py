"""python -m fastclip doctor: what it shows, that its self-test finds wrong results, and its exit status."""

import json

import pytest
import torch
from support import run_python

import fastclip
from fastclip import doctor
from fastclip._native import _C

pytestmark = pytest.mark.skipif(_C is None, reason="the extension is not built")
COMMAND = """
import runpy, sys
sys.argv[:] = ["fastclip", "doctor", *sys.argv[1:]]
runpy.run_module("fastclip", run_name="__main__")
"""


@pytest.fixture
def a_card(monkeypatch):
    """One CUDA device that torch names, and an extension without the CUDA part."""
    info = fastclip.build_info()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(fastclip, "build_info", lambda: {**info, "cuda": None})


def test_all_is_well(isa, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = doctor.examine()
    assert result["problems"] == [] and result["self_test"] == {"cpu": []}
    assert result["cpu"]["kernels"] == isa and result["versions"]["torch"] == torch.__version__
    assert result["extension"]["built_for"]["torch"] == torch.__version__
    text = doctor.as_text(result)
    assert "self-test  cpu: 16 of 16 right" in text and text.endswith("\nall is well")


def test_on_a_cuda_device(cuda_device):
    result = doctor.examine()
    assert result["problems"] == [] and result["self_test"] == {device: [] for device in ("cpu", *result["cuda"])}
    text = doctor.as_text(result)
    assert "cuda:0     " in text and "no device" not in text and text.endswith("\nall is well")


@pytest.mark.parametrize(("version", "words"), [(13000, ", the driver runs up to 13.0\n"), (None, "torch has 13.0\n")])
def test_the_driver_is_asked_itself(monkeypatch, a_card, version, words):
    class Driver:
        def __init__(self, name):
            if version is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = version
            return 0

    monkeypatch.setattr("ctypes.CDLL", Driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert words in doctor.as_text(doctor.examine())


WRONG = {
    "norm": lambda parameters, norm: norm * (1 + 1e-5),
    "gradients": lambda parameters, norm: parameters[-1].grad.mul_(1.01) is None or norm,
    "native": lambda parameters, norm: fastclip.reset_counters() or norm,
}


@pytest.mark.parametrize(
    ("what", "message"), [("norm", "norm"), ("gradients", "gradient 3"), ("native", "native call")]
)
def test_wrong_results_are_found(monkeypatch, capsys, what, message):
    real = fastclip.clip_grad_norm_
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(fastclip, "clip_grad_norm_", lambda p, max_norm: WRONG[what](p, real(p, max_norm)))
    assert doctor.main(as_json=False) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM: wrong results on cpu: float32 clipped: expected " in printed and message in printed
    assert "what to do: build anew: " in printed


@pytest.mark.parametrize(
    ("runtime", "words", "remedy"),
    [("13.0", "without its CUDA part", "FASTCLIP_CUDA=1 "), (None, "are not CUDA's", "nothing can be done")],
)
def test_a_device_without_the_cuda_part(monkeypatch, a_card, runtime, words, remedy):
    monkeypatch.setattr(torch.version, "cuda", runtime)
    monkeypatch.setattr(doctor, "_driver", lambda: "13.0")
    result = doctor.examine()
    (problem,) = result["problems"]
    assert words in problem["problem"] and remedy in problem["remedy"]
    assert result["cuda"] == {"cuda:0": "a card"} and list(result["self_test"]) == ["cpu"]


def test_a_device_that_torch_cannot_use(monkeypatch, capsys):
    def no_driver(device):
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", no_driver)
    assert doctor.main(as_json=True) == 1
    result = json.loads(capsys.readouterr().out)
    (problem,) = result["problems"]
    assert problem["problem"] == "torch cannot use cuda:0: The NVIDIA driver on your system is too old."
    assert list(result["self_test"]) == ["cpu"] and "no device" not in doctor.as_text(result)


def test_the_command():
    done = run_python(COMMAND, "--json", env={"FASTCLIP_FORCE": "torch"})
    result = json.loads(done.stdout)
    assert done.returncode == 1 and result["environment"]["FASTCLIP_FORCE"] == "torch"
    assert result["problems"][0]["remedy"] == "unset FASTCLIP_FORCE" and result["self_test"] == {}
