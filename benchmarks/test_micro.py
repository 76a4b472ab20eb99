"""Micro-cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``, with its compare and histogram tools."""

import pytest
import torch

import fastclip
from benchmarks.cases import CASES
from benchmarks.measure import NEVER

SMALL = [case for case in CASES if case.bytes < 1 << 20]


@pytest.mark.parametrize(
    "function", [torch.nn.utils.clip_grad_norm_, fastclip.clip_grad_norm_], ids=["torch", "fastclip"]
)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_unclipped(benchmark, case, function):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=case.dtype)) for shape in case.shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    benchmark.group = case.name
    benchmark(function, parameters, NEVER)
