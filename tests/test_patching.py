"""patch(), unpatch(), patched(): who is reached, what is restored, and that fallbacks do not come back."""

import os
import threading
import warnings

import pytest
import torch
from torch.nn import utils as torch_utils
from torch.nn.utils import clip_grad as torch_module
from torch.nn.utils import clip_grad_norm_ as imported_before
from torch.nn.utils import clip_grad_value_ as value_imported_before
from torch.nn.utils import clip_grads_with_norm_ as with_norm_imported_before
from torch.nn.utils import get_total_norm as total_imported_before

import fastclip
from fastclip._torch_functions import NAMES, cell_of
from fastclip.patching import _swap


@pytest.fixture(autouse=True)
def unpatched():
    fastclip.unpatch()
    fastclip.reset_counters()
    before = {name: cell_of(name).cell_contents for name in NAMES}
    yield
    assert not fastclip.is_patched()
    assert {name: cell_of(name).cell_contents for name in NAMES} == before


def parameter(value=3.0):
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), value)
    return p


def native_calls():
    return fastclip.counters()["native"]


def test_all_four_are_reached_however_they_were_imported():
    p = parameter()
    with fastclip.patched():
        imported_before([p], 1.0)
        value_imported_before([p], 0.1)
        total_imported_before([p.grad])
        with_norm_imported_before([p], 0.1, torch.tensor(1.0))
        assert native_calls() == 4
        torch_utils.clip_grad_norm_([p], 1.0)
        torch_module.clip_grad_norm_([p], 1.0)
        torch_module._get_total_norm([p.grad])
        torch_module._clip_grads_with_norm_([p], 0.1, torch.tensor(1.0))
        assert native_calls() == 8
    imported_before([p], 1.0)
    assert native_calls() == 8


def test_identity_and_names_stay():
    before = torch_utils.clip_grad_norm_
    with fastclip.patched():
        assert torch_utils.clip_grad_norm_ is before is imported_before
        assert before.__name__ == "clip_grad_norm_"


def test_patch_reports_its_reach():
    assert fastclip.patch() == dict.fromkeys(NAMES, "everybody")
    fastclip.unpatch()


def test_fallbacks_call_torch_once_and_are_counted_once():
    p = parameter()
    with fastclip.patched():
        norm = imported_before([p], 1.0, norm_type=3.0)
    assert norm.item() == pytest.approx(3 * 4 ** (1 / 3))
    assert fastclip.counters() == {"calls": 1, "native": 0, "fallback": 1, "fallback_reasons": {"norm_type": 1}}


@pytest.mark.parametrize(
    "names", [["get_total_norm"], ["clip_grads_with_norm_", "clip_grad_norm_"], ["clip_grad_norm_"]]
)
def test_any_mixture_is_right(names):
    originals = {name: _swap(name, getattr(fastclip, name)) for name in names}
    try:
        for norm_type in (2.0, 3.0):
            p = parameter()
            norm = imported_before([p], 1.0, norm_type)
            assert torch.linalg.vector_norm(p.grad, norm_type).item() == pytest.approx(1.0, rel=1e-5)
            assert norm.item() == pytest.approx(3 * 4 ** (1 / norm_type))
    finally:
        for name, original in originals.items():
            _swap(name, original)


def test_nesting_and_repetition():
    with fastclip.patched():
        with fastclip.patched():
            fastclip.patch()
            fastclip.patch()
        assert fastclip.is_patched()
        fastclip.unpatch()
        assert fastclip.is_patched()  # the outer block is still open
    assert not fastclip.is_patched()
    fastclip.patch()
    with fastclip.patched():
        pass
    assert fastclip.is_patched()
    fastclip.unpatch()
    fastclip.unpatch()
    assert not fastclip.is_patched()


def test_an_exception_restores():
    with pytest.raises(KeyError), fastclip.patched():
        raise KeyError
    with pytest.raises(TypeError, match=r"parameters\[0\]: expected a torch.Tensor, got int"), fastclip.patched():
        imported_before([1], 1.0)
    assert not fastclip.is_patched()


def test_blocks_of_several_threads_overlap():
    inside, leave = threading.Barrier(3), threading.Event()

    def block(stay):
        with fastclip.patched():
            inside.wait()
            if stay:
                leave.wait()

    threads = [threading.Thread(target=block, args=(stay,)) for stay in (True, False)]
    for thread in threads:
        thread.start()
    inside.wait()
    threads[1].join()
    assert fastclip.is_patched()
    leave.set()
    threads[0].join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_inherits_it():
    with fastclip.patched():
        child = os.fork()
        if child == 0:
            imported_before([parameter()], 1.0)
            os._exit(0 if fastclip.is_patched() and native_calls() == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_warning_for_an_empty_generator_names_the_caller():
    with fastclip.patched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        imported_before((p for p in ()), 1.0)
        fastclip.clip_grad_norm_((p for p in ()), 1.0)
    assert [w.filename for w in caught] == [__file__, __file__]


def test_a_compiled_step_keeps_its_whole_graph():
    step = torch.compile(lambda ps: imported_before(ps, 1.0), fullgraph=True, backend="eager")
    with fastclip.patched():
        p = parameter()
        assert step([p]).item() == 6
        assert p.grad.norm().item() == pytest.approx(1)
        assert native_calls() == 1


def test_without_a_cell_the_attributes_are_set(monkeypatch):
    def plain(parameters, clip_value, foreach=None):
        raise AssertionError("not patched")

    monkeypatch.setattr(torch_module, "clip_grad_value_", plain)
    monkeypatch.setattr(torch_utils, "clip_grad_value_", plain)
    assert fastclip.patch()["clip_grad_value_"] == "attribute"
    p = parameter()
    torch_utils.clip_grad_value_([p], 1.0)
    torch_module.clip_grad_value_([p], 1.0)
    assert native_calls() == 2
    fastclip.unpatch()
    assert torch_utils.clip_grad_value_ is plain is torch_module.clip_grad_value_
    monkeypatch.undo()


def test_a_function_that_torch_lacks_is_passed_over(monkeypatch):
    monkeypatch.delattr(torch_module, "_get_total_norm")
    assert fastclip.patch()["get_total_norm"] == "missing"
    fastclip.unpatch()
    monkeypatch.undo()
