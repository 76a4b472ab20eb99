"""Wrong arguments: the exact exception and message, and gradients that stay as they were."""

import decimal

import error_table
import numpy as np
import pytest
import torch
from conftest import CUDA
from support import make_parameter, outcome

import fastclip

CALLS = {
    "clip_grad_norm_": lambda items: fastclip.clip_grad_norm_(items, 0.1),
    "clip_grad_value_": lambda items: fastclip.clip_grad_value_(items, 0.1),
    "clip_grads_with_norm_": lambda items: fastclip.clip_grads_with_norm_(items, 0.1, torch.tensor(2.0)),
    "get_total_norm": lambda items: fastclip.get_total_norm(items),
}


class HasGrad:
    grad = "text"


@pytest.fixture(params=CALLS.items(), ids=CALLS.keys())
def call(request, device):
    """A function of fastclip on [a good item, *items]: checks that the good one stays, returns error and argument."""
    name, function = request.param
    argument = "tensors" if name == "get_total_norm" else "parameters"

    def run(*items):
        good = torch.full((5,), 3.0, device=device)
        first = good if argument == "tensors" else make_parameter(good)
        result = outcome(function, [first, *items])
        assert torch.equal(good, torch.full((5,), 3.0, device=device)) and good._version == 0
        return result

    run.argument, run.function = argument, function
    return run


def test_grad_that_is_no_tensor(call):
    where, found = ("[1].grad", "str") if call.argument == "parameters" else ("[1]", "HasGrad")
    assert call(HasGrad()) == (TypeError, f"{call.argument}{where}: expected a torch.Tensor, got {found}")


def freed():
    grad = torch.ones(4)
    grad.untyped_storage().resize_(0)
    return grad


def inference():
    with torch.inference_mode():
        return torch.ones(3)


def names(good, function):
    """What the calls of the table are made of."""
    model = torch.nn.Linear(2, 2)
    return {
        "fastclip": fastclip,
        "np": np,
        "torch": torch,
        "clip": function,
        "freed": freed,
        "good": good,
        "has_grad": HasGrad(),
        "inference": inference,
        "model": model,
        "optimizer": torch.optim.SGD([good], lr=0.1),
        "with_grad": make_parameter,
        "with_group_threshold": lambda value: torch.optim.SGD([{"params": [good], "max_norm": value}], lr=0.1),
    }


ROWS = [row for rows in error_table.SECTIONS.values() for row in rows]
TABLE = [(row, name) for row in ROWS for name in (CALLS if "clip(" in row.call.replace("fastclip", "") else ["-"])]


# Errors of torch itself that its older versions word otherwise.
OLDER = {
    "_foreach_norm cannot compute the infinity norm on an empty tensor…": "linalg.vector_norm cannot compute the inf…",
    "value cannot be converted to type c10::Half without overflow": "value cannot be converted to type at::Half…",
}


@pytest.mark.parametrize(("row", "name"), TABLE, ids=[f"{row.call}-{name}" for row, name in TABLE])
@pytest.mark.parametrize("place", ["cpu", *CUDA])
def test_table(request, place, row, name):
    if place == "cuda":
        request.getfixturevalue("cuda_device")
    grad = torch.full((5,), 3.0, device=place)
    function, message = CALLS.get(name), row.message
    good = make_parameter(grad)
    values = names(good, function)
    if name == "get_total_norm":
        message = message.replace("parameters", "tensors")
        values.update(good=grad, with_grad=lambda grad: grad)
    got, text = outcome(eval, row.call, values)
    assert got is row.error, text
    messages = [message, OLDER.get(message, message)]
    assert any(text.startswith(m[:-1]) if m.endswith("…") else text == m for m in messages), text
    assert torch.equal(grad, torch.full((5,), 3.0, device=place)) and grad._version == 0


def test_page():
    assert error_table.PAGE.read_text() == error_table.page(), "python tests/error_table.py writes the page"


NUMBERS = [
    (None, TypeError, "None"),
    ([1.0], TypeError, "[1.0]"),
    ("one", ValueError, "'one'"),
    ("", ValueError, "''"),
    (1j, TypeError, "1j"),
]


@pytest.mark.parametrize(("value", "kind", "found"), NUMBERS, ids=[found for _, _, found in NUMBERS])
def test_number_that_is_none(device, value, kind, found):
    grad = torch.full((5,), 3.0, device=device)
    p, norm = make_parameter(grad), torch.tensor(2.0)
    for argument, function in {
        "max_norm": lambda ps: fastclip.clip_grad_norm_(ps, value),
        "norm_type": lambda ps: fastclip.clip_grad_norm_(ps, 1.0, value),
        "clip_value": lambda ps: fastclip.clip_grad_value_(ps, value),
        "max_norm ": lambda ps: fastclip.clip_grads_with_norm_(ps, value, norm),
        "norm_type ": lambda ps: fastclip.get_total_norm([grad], value),
    }.items():
        for parameters in ([p], p, (p,), []):
            expected = f"{argument.strip()}: expected a number, got {found}"
            assert outcome(function, parameters) == (kind, expected)
    assert grad.min() == 3 and grad._version == 0


def test_number_tensor_of_two_elements(device):
    """float() says what is wrong with a tensor; the argument is named as everywhere."""
    grad = torch.full((5,), 3.0, device=device)
    kind, message = outcome(fastclip.clip_grad_norm_, [make_parameter(grad)], torch.ones(2))
    assert kind in (TypeError, ValueError, RuntimeError) and grad._version == 0
    if kind is not RuntimeError:
        assert message.startswith("max_norm: expected a number, got ")


def test_numbers_with_float_method(device):
    grad = torch.full((4,), 3.0, device=device)
    assert fastclip.clip_grad_norm_([make_parameter(grad)], decimal.Decimal("1.5")).item() == 6
    assert grad.norm().item() == pytest.approx(1.5, rel=1e-5)


def test_error_in_a_number_or_a_truth_value_passes_through(device):
    class Broken:
        def __float__(self):
            raise KeyError("mine")

        def __bool__(self):
            raise LookupError("mine")

    parameters = [make_parameter(torch.ones(3, device=device))]
    assert outcome(fastclip.clip_grad_norm_, parameters, Broken()) == (KeyError, "'mine'")
    assert outcome(fastclip.clip_grad_value_, parameters, Broken()) == (KeyError, "'mine'")
    assert outcome(fastclip.clip_grad_norm_, parameters, 1.0, 2, Broken()) == (LookupError, "mine")


def test_error_in_a_grad_property_passes_through(device):
    class Broken:
        @property
        def grad(self):
            raise KeyError("mine")

    good = make_parameter(torch.ones(3, device=device))
    assert outcome(fastclip.clip_grad_norm_, [good, Broken()], 0.1) == (KeyError, "'mine'")
    assert good.grad._version == 0


def test_missing_and_unknown_arguments(device):
    for function, args, kwargs in [
        (fastclip.clip_grad_norm_, ([],), {}),
        (fastclip.clip_grad_norm_, ([], 1.0), {"maximum": 2}),
        (fastclip.clip_grad_value_, ([],), {}),
        (fastclip.clip_grads_with_norm_, ([], 1.0), {}),
        (fastclip.get_total_norm, (), {}),
    ]:
        assert outcome(function, *args, **kwargs)[0] is TypeError


def test_errors_are_not_counted_as_calls(device):
    outcome(fastclip.clip_grad_norm_, [None], 1.0)
    outcome(fastclip.clip_grad_norm_, [], "one")
    assert fastclip.counters()["calls"] == 0
