"""Processes that form a gloo group and run functions of the test modules, started once and used again."""

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fastclip

# What torch 2.6 has for GPUs only.
needs_fully_shard = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's fully_shard needs a GPU"
)


def gloo_averages() -> bool:
    """Whether this torch can make DTensors whole that are means over ranks; to be called on all ranks."""
    try:
        dist.all_reduce(torch.ones(1), op=dist.ReduceOp.AVG)
    except RuntimeError:
        return False
    return True


SECONDS = 60  # for one function on all ranks; who takes longer waits for ever


class Ranks:
    """A pool of processes, one a rank. Use as a context manager."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.processes = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._kill()

    def run(self, function, *args):
        """Runs function(*args) on every rank; raises what ranks raised, or where one does not come back in time."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        failures, deadline = [], time.monotonic() + SECONDS
        while waiting and (ready := wait(waiting, max(deadline - time.monotonic(), 0))):
            for pipe in ready:
                if error := _received(pipe):
                    failures.append(f"rank {waiting[pipe]}:\n{error}")
                    deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it
                del waiting[pipe]
        failures += [f"rank {rank} did not come back" for rank in waiting.values()]
        if failures:
            self._kill()  # nobody knows what state they are in
        assert not failures, "\n".join(failures)

    def _start(self):
        # The server imports once what takes seconds; every rank is forked off it, before any thread exists.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes = []
        for rank in range(self.world_size):
            here, there = context.Pipe()
            arguments = (rank, self.world_size, str(Path(self.folder.name) / "store"), there)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.pipes.append(here)
        for process in self.processes:
            process.start()

    def _kill(self):
        if not self.processes:
            return
        for process in self.processes:
            process.kill()
            process.join()
        self.processes.clear()
        self.folder.cleanup()


def _received(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return "the process has died"


def _serve(rank, world_size, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        fastclip.reset_counters()
        try:
            function(*args)
        except Exception:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)


@contextlib.contextmanager
def all_reduces():
    """The process groups of all calls of dist.all_reduce inside the block, in order."""
    groups, original = [], dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        groups.append(group)
        return original(tensor, op, group, async_op)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield groups
