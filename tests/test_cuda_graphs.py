"""CUDA graphs: capture, replay on new values, and what calls outside of a graph must leave alone."""

import gc
import math

import pytest
import torch
from cuda_support import EMULATED, assert_one_launch, cuda, on_host, parameters_of, slices, watch
from oracle import check_norm, check_scaled, coefficient, total_norm

import fastclip
from fastclip._native import _C

pytestmark = cuda


def capture(call, stream=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


def refill(grads, scale):
    for grad in grads:
        grad.copy_(torch.randn(grad.shape) * scale)


def replay_and_check(graph, norm, grads, max_norm, seed):
    torch.manual_seed(seed)
    whole = (torch.randn(sum(g.numel() for g in grads)) * (seed + 1)).to(grads[0].dtype)
    storage = torch.empty(0, dtype=grads[0].dtype, device="cuda").set_(grads[0].untyped_storage())
    storage.copy_(whole)  # the gradients are slices of one tensor
    before = on_host(grads)
    graph.replay()
    check_norm(norm, before, 2)
    coef = coefficient(max_norm, total_norm(before, 2))
    check_scaled(torch.cat(list(grads)), torch.cat(before), coef)


@pytest.mark.parametrize("count", [10, 300])
def test_three_replays(count):
    grads = slices(count, 40, torch.bfloat16)
    parameters = parameters_of(grads)
    graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters, 1.5))
    for seed in range(3):
        replay_and_check(graph, norm, grads, 1.5, seed)


@pytest.mark.parametrize("known", [False, True], ids=["first call", "called before"])
def test_three_replays_of_a_long_list_with_calls_over_another_between(known):
    """On the stream of the capture, whose cached tables these calls overwrite."""
    stream = torch.cuda.Stream()
    grads = slices(3_000, 8, torch.float32)
    parameters = parameters_of(grads)
    torch.cuda.synchronize()
    if known:
        with torch.cuda.stream(stream):
            fastclip.clip_grad_norm_(parameters, 1e9)
    graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters, 1.5), stream)
    for seed in range(3):
        for count in (3_000, 2_100, 2_500):  # more lists than the cache of a stream holds
            others = slices(count, 8, torch.float32)
            before = on_host(others)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                check_norm(fastclip.clip_grad_norm_(parameters_of(others), 1.0), before, 2)
            torch.cuda.synchronize()
            del others
            gc.collect()
        replay_and_check(graph, norm, grads, 1.5, seed)


def test_more_captures_of_a_long_list_than_there_are_streams_in_torchs_pool():
    stream = torch.cuda.Stream()
    grads = slices(2_100, 1, torch.float32)
    parameters = parameters_of(grads)
    for _ in range(33):
        graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters, 1.5), stream)
    replay_and_check(graph, norm, grads, 1.5, 1)


def test_a_replay_is_one_launch_without_copies():
    parameters = parameters_of(slices(3_000, 8, torch.float32))
    graph, _ = capture(lambda: fastclip.clip_grad_norm_(parameters, 1.5))
    with watch() as seen:
        graph.replay()
    assert seen.synchronisations == [] and seen.copies == 0
    if EMULATED:
        assert seen.launches == 1 and seen.h2d_bytes == 0


def test_a_graph_outlives_its_list_and_its_stream_and_another_graph():
    grads = slices(2_200, 8, torch.float32)
    graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters_of(grads), 1.5))
    other = slices(2_300, 8, torch.float32)
    second, _ = capture(lambda: fastclip.clip_grad_norm_(parameters_of(other), 1.5))
    second.replay()
    del second
    gc.collect()
    fastclip.clip_grad_norm_(parameters_of(other), 1.0)  # frees what belonged to the graph that is gone
    replay_and_check(graph, norm, grads, 1.5, 5)


def test_threshold_on_the_device_is_read_at_replay():
    grads = slices(5, 100, torch.float32)
    max_norm = torch.tensor(1.0, device="cuda")
    parameters = parameters_of(grads)
    graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters, max_norm))
    for value in (0.5, 3.0):
        max_norm.fill_(value)
        replay_and_check(graph, norm, grads, value, 2)


def test_other_functions_in_a_graph():
    grads = slices(5, 100, torch.float32)
    parameters = parameters_of(grads)

    def call():
        norm = fastclip.get_total_norm(grads, math.inf)
        fastclip.clip_grad_value_(parameters, 1.0)
        fastclip.clip_grads_with_norm_(parameters, 0.5, norm)
        return norm

    graph, norm = capture(call)
    for seed in (1, 2):
        torch.manual_seed(seed)
        refill(grads, seed)
        before = on_host(grads)
        graph.replay()
        check_norm(norm, before, math.inf)
        coef = coefficient(0.5, total_norm(before, math.inf))
        for after, was in zip(grads, before, strict=True):
            check_scaled(after, was.clamp(-1, 1), coef)


def test_two_launches_in_a_graph():
    _C.allow_cooperative_launches(False)
    grads = slices(20, 100, torch.float32)
    parameters = parameters_of(grads)
    graph, norm = capture(lambda: fastclip.clip_grad_norm_(parameters, 1.5))
    replay_and_check(graph, norm, grads, 1.5, 3)


def test_reading_the_norm_in_a_capture_is_an_error_that_leaves_the_device_usable():
    parameters = parameters_of(slices(4, 50, torch.float32))
    # A capture that fails leaves its stream the current one, in torch.
    with torch.cuda.stream(torch.cuda.current_stream()), pytest.raises(RuntimeError):
        capture(lambda: fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True))
    fastclip.clip_grad_norm_(parameters, 1.0)
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1.0)
    assert_one_launch(seen)
