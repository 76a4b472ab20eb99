"""The benchmark on a GPU, as tools/gpu.sh runs it: ``python -m benchmarks.gpu [arguments of run]``.

It is ``python -m benchmarks run --device cuda`` that begins nothing after 120 seconds, written to build/gpu.json, .md.
``--try-out`` shows that every contestant runs and is right, on small cases and without any times: an emulated device
can do that too.
"""

import sys

from benchmarks import __main__ as command
from benchmarks import models, rivals
from benchmarks.cases import BOTH, Case
from benchmarks.gradients import Gradients
from benchmarks.measure import first_calls

SMALL = [
    Case("models", "RL policy, fp32", models.rl_policy(), "fp32", rivals=True),
    Case("models", "60 tensors of 64, mixed", [(64,), (8, 8)] * 30, "mixed", rivals=True),
]


def try_out() -> None:
    for case in SMALL:
        gradients = Gradients(case, "cuda")
        for mode in BOTH:
            gradients.set_mode(mode)
            calls, absent = rivals.contestants(gradients, True, quick=True)
            first, failed = first_calls(calls, gradients)
            for name in first:
                print(f"{case.name}, {mode}: {name}: right")
            for name, why in {**absent, **failed}.items():
                print(f"{case.name}, {mode}: {name}: absent: {why}")


if __name__ == "__main__":
    if "--try-out" in sys.argv[1:]:
        try_out()
    else:
        arguments = ["run", "--device", "cuda", "--output", "build/gpu", "--budget", "120", "--effort", "0.4"]
        sys.exit(command.main([*arguments, *sys.argv[1:]]))
