"""nonfinite= on a CUDA device: one launch, no wait, graphs, launches that are not cooperative, the CPU beside it."""

import pytest
import torch
from cuda_support import EMULATED, assert_one_launch, cuda, parameters_of, watch
from support import INF, NAN

import fastclip
from fastclip._native import _C

pytestmark = cuda
policies = pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
KEPT = {"skip": 2.0, "zero": 0.0, "propagate": NAN}


def gradients(bad=NAN):
    grads = [torch.full((40,), 2.0) for _ in range(4)]
    grads[2][7] = bad
    return [grad.cuda() for grad in grads]


def check(grads, nonfinite, first_bad=2):
    assert [str(grad.cpu()[0].item()) for grad in grads] == [str(KEPT[nonfinite])] * len(grads)
    report = fastclip.last_report()
    assert report.first_bad == first_bad and report.is_nonfinite


@policies
def test_one_launch_and_no_wait(nonfinite):
    parameters = parameters_of(gradients())
    with watch() as seen:
        fastclip.clip_grad_norm_(parameters, 1.0, nonfinite=nonfinite)
    assert_one_launch(seen)
    if EMULATED and nonfinite == "skip":
        assert seen.kernels[0].stats.global_written_bytes < 300  # results, and no gradient
    check([p.grad for p in parameters], nonfinite)


@policies
@pytest.mark.parametrize("blocks", [1, 3])
def test_launches_that_are_not_cooperative(nonfinite, blocks):
    _C.allow_cooperative_launches(False)
    _C.force_cuda_blocks(blocks)
    grads = gradients()
    fastclip.clip_grad_norm_(parameters_of(grads), 1.0, nonfinite=nonfinite)
    check(grads, nonfinite)


@policies
@pytest.mark.parametrize("cpu_first", [False, True])
@pytest.mark.parametrize("bad_on_cpu", [False, True])
def test_cpu_and_cuda_in_one_list(nonfinite, cpu_first, bad_on_cpu):
    here, there = [torch.full((5,), 2.0), torch.full((5,), 2.0)], [torch.full((5,), 2.0), torch.full((5,), 2.0)]
    (here if bad_on_cpu else there)[1][3] = NAN
    there = [grad.cuda() for grad in there]
    grads = [here[0], there[0], here[1], there[1]] if cpu_first else [there[0], here[0], there[1], here[1]]
    fastclip.clip_grad_norm_(parameters_of(grads), 1.0, nonfinite=nonfinite)
    check(grads, nonfinite, (2 if cpu_first else 3) if bad_on_cpu else (3 if cpu_first else 2))


def test_each_replay_of_a_graph_decides_anew():
    grads = gradients()
    parameters = parameters_of(grads)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fastclip.clip_grad_norm_(parameters, 1.0, nonfinite="zero")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fastclip.clip_grad_norm_(parameters, 1.0, nonfinite="zero")
    for place, bad in ((2, NAN), (None, 0.0), (0, INF)):
        for i, grad in enumerate(grads):
            host = torch.full((40,), 2.0)
            if i == place:
                host[9] = bad
            grad.copy_(host)
        graph.replay()
        torch.cuda.synchronize()
        report = fastclip.last_report()
        assert report.first_bad == place
        assert report.action == ("clipped" if place is None else "zeroed")
        assert (grads[1].cpu()[0].item() == 0) == (place is not None)
