"""Threads, processes and memory: same results whoever calls, same bits each time, nothing that grows."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import oracle
import pytest
import torch
from support import LARGE, bits, clone, make_parameters, run_python

import fastclip

THREADS = [1, 2, 3, 4]


def model(seed, scale=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size * scale, generator=generator) for size in (3, 4097, 100_000, 0, 33, 250_001)]


def clip_and_value(grads):
    """The bits of the norm and of all gradients after both kinds of clipping."""
    parameters = make_parameters(grads)
    norm = fastclip.clip_grad_norm_(parameters, 1.0)
    fastclip.clip_grad_value_(parameters, 1e-3)
    return [bits(x) for x in (norm, *grads)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [1, 2])
def test_eight_threads_clip_different_models(isa, scale):
    expected = [clip_and_value(model(seed, scale)) for seed in range(8)]
    models = [[model(seed, scale) for _ in range(5)] for seed in range(8)]
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        return [clip_and_value(grads) for grads in models[seed]]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for seed, results in enumerate(pool.map(work, range(8))):
            assert all(same(result, expected[seed]) for result in results)
    assert fastclip.counters()["native"] == 2 * 8 * 6


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("norm_type", [1, 2, float("inf")])
def test_thread_counts(isa, threads, norm_type):
    torch.set_num_threads(threads)
    grads = [torch.randn(LARGE), torch.randn(7).half(), torch.randn(300_000).bfloat16(), torch.randn(9)]
    first = fastclip.get_total_norm(grads, norm_type)
    oracle.check_norm(first, grads, norm_type)
    assert all(torch.equal(fastclip.get_total_norm(grads, norm_type), first) for _ in range(10))
    copies = clone(grads)
    fastclip.clip_grad_norm_(make_parameters(copies), 1.0, norm_type)
    coef = oracle.coefficient(1.0, oracle.total_norm(grads, norm_type))
    for after, before in zip(copies, grads, strict=True):
        oracle.check_scaled(after, before, coef)
    fastclip.clip_grad_value_(make_parameters(copies), 1e-7)
    assert max(g.abs().max() for g in copies) <= 1.2e-7


def test_same_bits_while_others_use_the_processor(isa):
    expected = clip_and_value(model(1, 3))
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert all(same(clip_and_value(model(1, 3)), expected) for _ in range(10))
    finally:
        spin.kill()
        spin.wait()


@pytest.mark.parametrize("call", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"])
def test_large_calls_release_the_interpreter_lock(isa, call):
    """Without a switch interval another thread moves only where the lock is given away."""
    grads = [torch.randn(3_000_000)]
    items = grads if call == "get_total_norm" else make_parameters(grads)
    args = () if call == "get_total_norm" else (1e-3,)
    steps, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def count():
        while not stop.is_set():
            steps[0] += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    other.start()
    try:
        sys.setswitchinterval(60)
        progressed = 0
        for _ in range(50):
            before = steps[0]
            getattr(fastclip, call)(items, *args)
            progressed += steps[0] > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    assert progressed > 0


@pytest.mark.parametrize("call", [fastclip.clip_grad_norm_, fastclip.clip_grad_value_])
def test_gradients_dropped_during_large_calls(isa, call):
    """One thread clips and, as soon as the lock is free, another one drops the last references to the gradients."""
    elements, during = 3_000_000, 0
    for _ in range(10):
        parameters = make_parameters([torch.ones(elements) for _ in range(4)])
        start = threading.Event()

        def drop(parameters=parameters, start=start):
            start.wait()
            for p in parameters:
                p.grad = None

        other = threading.Thread(target=drop)
        other.start()
        start.set()
        norm = call(parameters, 0.5)
        during += all(p.grad is None for p in parameters)
        other.join()
        # Gradients that were dropped before the call are not counted, those dropped during it are.
        assert norm is None or norm.item() in [pytest.approx((count * elements) ** 0.5) for count in range(5)]
    assert during > 0


def test_list_changed_during_large_calls(isa):
    parameters = make_parameters([torch.ones(100_000) for _ in range(20)])
    stop = threading.Event()

    def change():
        while not stop.is_set():
            parameters.append(parameters.pop(0))
            parameters[:] = list(parameters)
            time.sleep(0)

    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(50):
            assert fastclip.clip_grad_norm_(parameters, 1.0).isfinite()
    finally:
        stop.set()
        other.join()


def wait_for(child, seconds=60):
    """The exit code of a forked child; it is killed when it does not end."""
    for _ in range(seconds * 100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_use(isa):
    """The child touches tensors through fastclip and numpy alone: torch's own threads do not survive a fork."""
    large, again, small, small_again = [model(seed, scale) for seed, scale in ((1, 2), (1, 2), (1, 0), (1, 0))]
    small[-1], small_again[-1] = torch.ones(9), torch.ones(9)
    expected = [clip_and_value(grads) for grads in (large, small)]  # starts the threads
    parameters = [make_parameters(grads) for grads in (again, small_again)]
    child = os.fork()
    if child == 0:
        good = True
        for ps, want in zip(parameters, expected, strict=True):
            norm = fastclip.clip_grad_norm_(ps, 1.0)
            fastclip.clip_grad_value_(ps, 1e-3)
            results = [norm, *(p.grad for p in ps)]
            good &= all(x.numpy().tobytes() == w.numpy().tobytes() for x, w in zip(results, want, strict=True))
        os._exit(0 if good else 3)
    assert wait_for(child) == 0
    assert same(clip_and_value(model(1, 2)), expected[0])


def clip_in_child(seed):
    torch.set_num_threads(2)
    return [x.tolist()[:3] if x.dim() else x.item() for x in clip_and_value(model(seed))]


def test_spawned_process():
    torch.set_num_threads(2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(clip_in_child, (5,)).get(120) == clip_in_child(5)


MEMORY = """
import resource, sys
import torch, fastclip
from support import make_parameters

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(2)
calls, elements = int(sys.argv[1]), int(sys.argv[2])
small = make_parameters([torch.ones(300_000), torch.ones(5)])
def run(parameters):
    for norm_type in (1, 2, "inf"):
        fastclip.clip_grad_norm_(parameters, 1e-3, norm_type)
    fastclip.clip_grad_value_(parameters, 1e-9)
    fastclip.clip_grads_with_norm_(parameters, 1.0, fastclip.get_total_norm([p.grad for p in parameters]))
run(small)
large = make_parameters([torch.ones(elements // 4) for _ in range(4)])
before = peak()
run(large)
for _ in range(calls):
    run(small)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize(("calls", "elements"), [(2000, 1000), (0, 50_000_000)], ids=["2,000 calls", "200 MB"])
def test_memory(calls, elements):
    done = run_python(MEMORY, calls, elements)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024  # KB
