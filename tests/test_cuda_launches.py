"""What a call asks of the device: launches, waits, copies, allocations, bytes."""

import math

import pytest
import torch
from cuda_support import EMULATED, assert_one_launch, cuda, parameters_of, slices, watch

import fastclip

pytestmark = cuda
emulated_only = pytest.mark.skipif(not EMULATED, reason="needs the emulator's counters")


@pytest.mark.parametrize("count", [10, 2_000, 20_000])
def test_steady_state_is_one_launch(count):
    parameters = parameters_of(slices(count, 16, torch.bfloat16))
    fastclip.clip_grad_norm_(parameters, 1.0)  # a long list's table goes to the device once
    for max_norm in (1e-3, 1e9):
        for norm_type in (2, math.inf):
            with watch() as seen:
                fastclip.clip_grad_norm_(parameters, max_norm, norm_type)
            assert_one_launch(seen)


def test_max_norm_on_the_device_is_not_waited_for():
    parameters = parameters_of(slices(10, 16, torch.float32))
    max_norm = torch.tensor(0.5, device="cuda")
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, max_norm)
    assert_one_launch(seen)


@pytest.mark.parametrize("count", [10, 3_000])
def test_other_functions_are_one_launch_too(count):
    grads = slices(count, 16, torch.float32)
    parameters = parameters_of(grads)
    norm = fastclip.get_total_norm(grads)
    for call in (
        lambda: fastclip.get_total_norm(grads),
        lambda: fastclip.clip_grads_with_norm_(parameters, 1.0, norm),
        lambda: fastclip.clip_grad_value_(parameters, 0.5),
    ):
        with watch() as seen:
            call()
        assert seen.launches == 1 and seen.synchronisations == [] and seen.copies == 0


def test_a_long_table_is_sent_again_only_when_it_changed():
    parameters = parameters_of(slices(2_500, 8, torch.float32))
    fastclip.clip_grad_norm_(parameters, 1e9)
    parameters[17].grad = torch.ones(8, device="cuda")
    with watch() as seen:
        norm = fastclip.clip_grad_norm_(parameters, 1e9)
    assert seen.launches == 1 and seen.synchronisations == [] and seen.copies == 1
    want = torch.linalg.vector_norm(torch.stack([p.grad.double().cpu() for p in parameters]))
    assert abs(norm.item() / want.item() - 1) < 1e-6
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1e9)
    assert_one_launch(seen)


def test_two_long_lists_that_take_turns():
    lists = [parameters_of(slices(2_500, 8, torch.float32)) for _ in range(2)]
    for parameters in lists:
        fastclip.clip_grad_norm_(parameters, 1e9)
    for parameters in lists * 2:
        with watch() as seen:
            fastclip.clip_grad_norm_(parameters, 1e9)
        assert_one_launch(seen)


def test_error_if_nonfinite_waits_once():
    parameters = parameters_of(slices(10, 16, torch.float32))
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert seen.launches == 1 and len(seen.synchronisations) == 1


@emulated_only
@pytest.mark.parametrize("sizes", [(64, 65_536), (1, 4_300_003)], ids=["64 tensors", "one tensor"])
def test_bytes_read_and_written(sizes):
    count, size = sizes
    parameters = parameters_of(slices(count, size, torch.bfloat16))
    total = 2 * count * size
    for max_norm, reads, writes in ((1e9, 1, 0), (1.0, 2, 1)):
        with watch() as seen:
            fastclip.clip_grad_norm_(parameters, max_norm)
        (kernel,) = seen.kernels
        blocks = kernel.grid[0]
        assert 8 * blocks * blocks <= total / 100  # every block reads every partial norm
        # Sectors of 32 bytes: lanes that read the same address (the table) are served by one.
        assert 32 * kernel.stats.global_read_sectors <= 1.01 * reads * total + 64 * blocks * blocks
        results = 16 * blocks + 64
        assert writes * total <= kernel.stats.global_written_bytes <= writes * total + results
        assert kernel.stats.local_bytes == 0 and kernel.stats.atomics <= 4 * blocks  # of the barrier alone


@emulated_only
def test_value_clipping_writes_only_what_changes():
    grads = slices(8, 4096, torch.float32)
    with watch() as seen:
        fastclip.clip_grad_value_(parameters_of(grads), 100.0)
    (kernel,) = seen.kernels
    assert kernel.stats.global_written_bytes == 0
    grads[5][77] = 1000
    with watch() as seen:
        fastclip.clip_grad_value_(parameters_of(grads), 100.0)
    (kernel,) = seen.kernels
    assert kernel.stats.global_written_bytes == 16
    assert kernel.stats.global_read_sectors * 32 <= 1.01 * 8 * 4096 * 4 + 1024


@emulated_only
def test_the_parameters_of_a_launch_fit():
    for count in (240, 241, 2_000):
        grads = slices(count, 8, torch.float32)
        with watch() as seen:
            fastclip.get_total_norm(grads)
        assert seen.kernels[0].parameter_bytes <= 32_764 and seen.copies == 0
