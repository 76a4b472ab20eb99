"""What breaks into a call: signals, memory that runs out, workers; and that nothing grows over many calls."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, run_python

import fastclip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and /proc as Linux has them")

INTERRUPTS = """
import os, random, signal, sys, threading, time
import torch, fastclip

torch.set_num_threads(2)
armed, sent = [False], [0]

def interrupt(*_):
    if armed[0]:
        armed[0] = False
        raise KeyboardInterrupt

def send():
    choose = random.Random(int(sys.argv[2]))
    while True:
        time.sleep(choose.uniform(0, 0.002))
        if armed[0]:
            sent[0] += 1
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, interrupt)
grads = [torch.empty(2_000_000), torch.empty(30), torch.empty(1_500_000).double(), torch.empty(500_000, 2)[:, 0]]
parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
for parameter, grad in zip(parameters, grads):
    parameter.grad = grad
optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(parameters, lr=0.0), 1e-3)
call = {
    "norm": lambda: fastclip.clip_grad_norm_(parameters, 1e-3),
    "value": lambda: fastclip.clip_grad_value_(parameters, 0.5),
    "step": lambda: optimizer.step(),
}[sys.argv[1]]
threading.Thread(target=send, daemon=True).start()
interrupted, states = 0, set()
for _ in range(40):
    for grad in grads:
        grad.fill_(2.0)
    try:
        armed[0] = True
        call()
        armed[0] = False
    except KeyboardInterrupt:
        interrupted += 1
        values = {x.item() for grad in grads for x in (grad.min(), grad.max())}
        assert max(values) - min(values) <= 1e-6 * max(values), values
        states.add("untouched" if max(values) == 2 else "clipped")
        assert not {"grad_scale", "found_inf"} & set(optimizer.optimizer.__dict__)
assert interrupted >= 5 and "clipped" in states, (interrupted, states)
call()
print("finished", interrupted, sent[0], sorted(states))
"""


@pytest.mark.parametrize("call", ["norm", "value", "step"])
def test_keyboard_interrupts_leave_gradients_untouched_or_clipped(call):
    """SIGINT again and again, at times of its own, during calls that release the interpreter lock."""
    done = run_python(INTERRUPTS, call, 1)
    assert done.stdout.startswith("finished"), done.stdout + done.stderr


OUT_OF_MEMORY = """
import resource, sys
import torch, fastclip
from support import make_parameters

torch.set_num_threads(2)
what = sys.argv[1]
grads = [torch.full((600_000,), 2.0), torch.full((7,), 2.0)]
if what == "a copy of a gradient with gaps":
    grads.append(torch.full((1_000_000, 2), 2.0)[:, 0])
if what in ("the table", "statistics"):
    grads += list(torch.full((50_000, 1), 2.0))
parameters = make_parameters(grads)
fastclip.clip_grad_norm_(parameters[:2], 1e9)  # starts the threads
statistics = fastclip.GradStatistics() if what == "statistics" else None
fastclip.clip_grad_norm_(parameters[:2], 1e9, statistics=statistics)
hoard = [None] * 500_000
with open("/proc/self/status") as file:
    size = int(file.read().split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
error = None
if what == "the result":  # small pieces are left in the heap, until they are taken too
    try:
        for i in range(len(hoard)):
            hoard[i] = torch.empty(1)
    except (RuntimeError, MemoryError):
        pass
try:
    fastclip.clip_grad_norm_(parameters, 1e-3, statistics=statistics)
except (RuntimeError, MemoryError) as raised:
    error = type(raised)
hoard = None
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert error is not None, "there was memory"
assert all(grad.eq(2).all() and grad._version <= 1 for grad in grads[:100]), [grad.max() for grad in grads[:3]]
assert fastclip.clip_grad_norm_(parameters, 1e-3, statistics=statistics) > 1  # works again
print("finished", error.__name__)
"""


@pytest.mark.parametrize("what", ["the result", "the table", "statistics", "a copy of a gradient with gaps"])
def test_out_of_memory_raises_and_leaves_gradients_whole(what):
    done = run_python(OUT_OF_MEMORY, what)
    assert done.stdout.startswith("finished"), done.stdout + done.stderr


class ClippingDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        parameter = torch.nn.Parameter(torch.zeros(300_000))
        parameter.grad = torch.full((300_000,), 2.0)
        norm = fastclip.clip_grad_norm_(parameter, 1.0)
        return torch.stack([norm, parameter.grad.max()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_a_data_loader():
    """Forked after fastclip's threads exist; the lists are large enough for threads."""
    dataset = ClippingDataset()
    expected = torch.stack([dataset[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_nothing_grows():
    """The short version of `make soak`."""
    command = [sys.executable, ROOT / "tests" / "soak.py", "--calls", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
