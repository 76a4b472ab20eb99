"""Streams and devices: two at a time, side streams, CUDA and CPU gradients in one list."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from cuda_support import EMULATED, cuda, cudaemu, on_host, parameters_of, slices, watch
from oracle import check_norm, check_scaled, coefficient, total_norm

import fastclip
from fastclip._native import _C

pytestmark = cuda
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def check(before, grads, norm, max_norm, norm_type=2):
    check_norm(norm, before, norm_type)
    coef = coefficient(max_norm, total_norm(before, norm_type))
    for after, was in zip(on_host(grads), before, strict=True):
        check_scaled(after, was, coef)


@pytest.mark.parametrize("count", [20, 2_200])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_lists_on_two_streams_with_no_wait_between(count, seed):
    if EMULATED:
        cudaemu.set_seed(seed)
    lists = [slices(count, 16, torch.float32, scale=i + 1.0) for i in range(2)]
    befores = [on_host(grads) for grads in lists]
    parameters = [parameters_of(grads) for grads in lists]
    streams = [torch.cuda.Stream() for _ in lists]
    torch.cuda.synchronize()
    norms = []
    with watch() as seen:
        for items, stream in zip(parameters, streams, strict=True):
            with torch.cuda.stream(stream):
                norms.append(fastclip.clip_grad_norm_(items, 0.5))
        assert torch.cuda.current_stream() not in streams
    assert seen.synchronisations == [] and seen.launches == 2
    torch.cuda.synchronize()
    for before, grads, norm in zip(befores, lists, norms, strict=True):
        check(before, grads, norm, 0.5)


def test_a_call_waits_for_what_its_stream_has_queued():
    stream = torch.cuda.Stream()
    grads = slices(2_100, 8, torch.float32)
    parameters = parameters_of(grads)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch._foreach_mul_(grads, 3.0)
        norm = fastclip.clip_grad_norm_(parameters, 1.0)
        doubled = norm * 2
    torch.cuda.current_stream().wait_stream(stream)
    after = torch.linalg.vector_norm(torch.cat(grads).double())
    assert abs(after.item() - 1) < 1e-5 and doubled.item() == 2 * norm.item() > 100


def test_a_long_list_whose_table_is_dropped_while_its_kernel_waits():
    stream = torch.cuda.Stream()
    kept = []
    for i in range(9):  # more than the caches hold
        grads = slices(2_001 + i, 4, torch.float32)
        before = on_host(grads)
        parameters = parameters_of(grads)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if i % 2 else torch.cuda.Stream()):
            kept.append((before, grads, fastclip.clip_grad_norm_(parameters, 0.5)))
    torch.cuda.synchronize()
    for before, grads, norm in kept:
        check(before, grads, norm, 0.5)


@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_cpu_and_cuda_in_one_list(first, norm_type):
    for max_norm in (0.5, 1e9):
        grads = [torch.randn(500, device=d) for d in (first, "cuda", "cpu", "cuda", "cpu")]
        grads += [torch.randn(33).bfloat16(), torch.randn(33, device="cuda").bfloat16()]
        before = on_host(grads)
        norm = fastclip.clip_grad_norm_(parameters_of(grads), max_norm, norm_type)
        assert norm.device.type == first
        check(before, grads, norm, max_norm, norm_type)
        check_norm(fastclip.get_total_norm(grads, norm_type), on_host(grads), norm_type)
    fastclip.clip_grad_value_(parameters_of(grads), 0.25)
    assert all(g.abs().max().item() <= 0.25 for g in grads)
    assert fastclip.counters()["fallback"] == 0


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_cpu_and_cuda_with_a_given_norm(first):
    grads = [torch.ones(50, device=first), torch.ones(50, device="cpu"), torch.ones(50, device="cuda")]
    fastclip.clip_grads_with_norm_(
        parameters_of(grads), torch.tensor(2.0, device="cuda"), torch.tensor(8.0, device=first)
    )
    assert all(torch.allclose(g.cpu(), torch.full((50,), 0.25)) for g in grads)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_error_if_nonfinite_over_cpu_and_cuda(first):
    for bad in (1, 2):
        grads = [torch.ones(5, device=first), torch.ones(5, device="cpu"), torch.ones(5, device="cuda")]
        grads[bad][2] = math.nan
        before = on_host(grads)
        with pytest.raises(RuntimeError, match="non-finite"):
            fastclip.clip_grad_norm_(parameters_of(grads), 1.0, error_if_nonfinite=True)
        assert all(torch.equal(g.cpu().nan_to_num(9), b.nan_to_num(9)) for g, b in zip(grads, before, strict=True))


def test_threads():
    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(2):
                    grads = slices(2_050 if i % 2 else 30, 8, torch.float32)
                    before = on_host(grads)
                    norm = fastclip.clip_grad_norm_(parameters_of(grads), 0.5)
                    check(before, grads, norm, 0.5)
        except BaseException as error:
            failures.append(error)

    failures = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_with_long_lists_on_one_stream():
    """More lists than the cache of a stream holds: each upload overwrites a table that another thread has found."""
    _C.force_cuda_blocks(2)  # so that the emulated device spends little time on each
    lists = [slices(2_100 + i, 1, torch.float32, scale=10.0**i) for i in range(6)]
    before = [on_host(grads) for grads in lists]
    torch.cuda.synchronize()
    norms = [[] for _ in lists]

    def work(i):
        for _ in range(20):
            norms[i].append(fastclip.get_total_norm(lists[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for grads, results in zip(before, norms, strict=True):
        for norm in results:
            check_norm(norm, grads, 2)


@two_devices
@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("first", ["cuda:0", "cuda:1"])
def test_two_devices_in_one_list(first, norm_type):
    for max_norm in (0.5, 1e9):
        grads = [torch.randn(300, device=d) for d in (first, "cuda:0", "cuda:1", "cpu", "cuda:1")]
        before = on_host(grads)
        norm = fastclip.clip_grad_norm_(parameters_of(grads), max_norm, norm_type)
        assert norm.device == torch.device(first)
        check(before, grads, norm, max_norm, norm_type)
        only_cuda = [g for g in grads if g.is_cuda]
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
        if EMULATED:
            with cudaemu.record() as seen:
                fastclip.clip_grad_norm_(parameters_of(only_cuda), max_norm, norm_type)
            assert seen.synchronisations == [] and seen.launches <= 3


@two_devices
def test_a_device_that_is_not_the_current_one():
    grads = slices(2_500, 8, torch.float32, device="cuda:1")
    before = on_host(grads)
    norm = fastclip.clip_grad_norm_(parameters_of(grads), 0.5)
    assert norm.device.index == 1 and torch.cuda.current_device() == 0
    check(before, grads, norm, 0.5)


@two_devices
def test_error_if_nonfinite_over_two_devices():
    for bad in (0, 1):
        grads = [torch.ones(5, device=f"cuda:{i}") for i in range(2)]
        grads[bad][0] = math.inf
        before = on_host(grads)
        with pytest.raises(RuntimeError, match="non-finite"):
            fastclip.clip_grad_norm_(parameters_of(grads), 1.0, error_if_nonfinite=True)
        assert all(torch.equal(g.cpu(), b) for g, b in zip(grads, before, strict=True))


@pytest.mark.skipif(not EMULATED or torch.cuda.device_count() > 1, reason="for an emulator with one device")
def test_two_emulated_devices():
    """Runs this file's tests over two devices in a process that has two."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "two_devices or not_the_current",
        ],
        env={**os.environ, "CUDAEMU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]
