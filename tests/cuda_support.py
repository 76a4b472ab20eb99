"""What the CUDA tests share: their marks, gradients on the device, and what a call asked of it."""

import contextlib
import types

import pytest
import torch
from support import EMULATED, cudaemu

cuda = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_device")]  # the marks of a file of CUDA tests
# Astride the edges of a vector (16 bytes), a row (512 bytes) and a batch of 6 rows, in elements of 2, 4 and 8 bytes.
EDGES = [1, 2, 3, 7, 8, 9, 17, 31, 64, 65, 255, 256, 257, 263, 384, 385, 767, 769, 1535, 1536, 1537, 1543, 3073, 4611]


def parameters_of(grads):
    """A parameter for each gradient; all of them share one element of memory a dtype and device."""
    zeros = {}
    parameters = []
    for grad in grads:
        key = grad.dtype, grad.device
        if key not in zeros:
            zeros[key] = torch.zeros((), dtype=grad.dtype, device=grad.device)
        parameter = torch.nn.Parameter(zeros[key].expand(grad.shape))
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def slices(count, size, dtype, device="cuda", scale=1.0):
    """`count` gradients of `size` elements, cut from one tensor: thousands of allocations would take seconds."""
    return list((torch.randn(count * size, device="cpu") * scale).to(dtype).to(device).split(size))


def unaligned(sizes, dtype, device="cuda"):
    """Gradients in allocations of their own that begin 0 to 7 elements into them and end with them."""
    return [torch.randn(size + i % 8).to(dtype).to(device)[i % 8 :] for i, size in enumerate(sizes)]


def on_host(grads):
    """Copies on the CPU: of thousands of slices at once, since each copy waits."""
    if len(grads) > 100:
        sizes = [grad.numel() for grad in grads]
        return [grad.clone() for grad in torch.cat(grads).cpu().split(sizes)]
    return [grad.detach().cpu().clone() for grad in grads]


@contextlib.contextmanager
def watch():
    """What the block asked of the device: kernels, synchronisations, bytes to and from it, fills, allocations."""
    if EMULATED:
        with cudaemu.record() as recording:
            yield recording
        return
    seen = types.SimpleNamespace(
        launches=0, cooperative_launches=0, synchronisations=[], copies=0, h2d_bytes=0, kernels=[]
    )
    torch.cuda.synchronize()
    with torch.profiler.profile() as p, torch.profiler.record_function("watched"):
        yield seen
    events = p.events()
    (block,) = [event.time_range for event in events if event.name == "watched" and event.device_type.name == "CPU"]
    for event in events:
        if not block.start <= event.time_range.start <= block.end:
            continue  # the profiler's own
        if event.name.startswith(("cudaLaunchKernel", "cudaLaunchCooperativeKernel")):
            seen.launches += 1
            seen.cooperative_launches += "Cooperative" in event.name
        elif "Synchronize" in event.name:
            seen.synchronisations.append(event.name)
        elif event.name.startswith("cudaMemcpy"):
            seen.copies += 1


def assert_one_launch(seen):
    """One cooperative launch, no wait, no copy: the steady state of a call."""
    assert (seen.launches, seen.cooperative_launches) == (1, 1)
    assert seen.synchronisations == [] and seen.copies == 0
    if EMULATED:
        assert seen.h2d_bytes == seen.d2h_bytes == seen.d2d_bytes == seen.fills == seen.torch_operations == 0
        assert seen.tensor_allocations <= 1 and seen.mallocs == 0  # the norm with its workspace
