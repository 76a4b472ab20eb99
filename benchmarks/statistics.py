"""What statistics cost beside plain clipping: ``python -m benchmarks.statistics [--seconds N]``, on GPT-2 small.

Paired and alternating, on two threads; prints the median and the quartiles of the rounds' ratios.
"""

import argparse

import torch

import fastclip
from benchmarks.gradients import NEVER
from benchmarks.measure import Contestant, paired
from benchmarks.models import gpt2_small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        parameters = make_parameters(dtype)
        saved = [parameter.grad.clone() for parameter in parameters]
        norm = float(fastclip.clip_grad_norm_(parameters, NEVER))
        for name, max_norm in (("unclipped", NEVER), ("clipped", norm / 10)):
            ratios = measure(parameters, saved, max_norm, options.seconds)
            low, high = ratios["quartiles"]
            print(f"{dtype}, {name}: {ratios['median']:.3f} of plain clipping (quartiles {low:.3f} to {high:.3f})")


def make_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in gpt2_small()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def measure(parameters: list[torch.nn.Parameter], saved: list[torch.Tensor], max_norm: float, seconds: float) -> dict:
    statistics = fastclip.GradStatistics()

    def restore() -> None:
        torch._foreach_copy_([parameter.grad for parameter in parameters], saved)

    def clip(**kwargs) -> Contestant:
        return Contestant(lambda: fastclip.clip_grad_norm_(parameters, max_norm, **kwargs), restore)

    contestants = {"plain": clip(), "statistics": clip(statistics=statistics)}
    times = paired(contestants, seconds, max_rounds=1000)
    return times.ratio("statistics", "plain")


if __name__ == "__main__":
    main()
