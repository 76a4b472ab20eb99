"""Statistics without clipping, by torch's operations, compared with a count element by element."""

import math

import pytest
import torch
from support import INF, NAN, make_parameters

from fastclip.health.measure import measure
from fastclip.statistics import GradStatistics


def counted(grad):
    elements = [abs(x) for x in grad.to_dense().flatten().tolist()]
    tiny = torch.finfo(grad.dtype).tiny
    is_nan = any(map(math.isnan, elements))
    return [
        torch.linalg.vector_norm(torch.tensor(elements, dtype=torch.float64)).item() if elements else 0,
        NAN if is_nan else max(elements, default=0),
        elements.count(0),
        elements.count(INF),
        sum(map(math.isnan, elements)),
        sum(0 < x < tiny for x in elements),
    ]


def sample(dtype, *special):
    grad = torch.randn(7, 9).to(dtype)
    grad[0, : len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_against_a_count(dtype):
    tiny = torch.finfo(dtype).tiny
    grads = [
        sample(dtype, 0.0, 0.0, -0.0),
        sample(dtype, INF, -INF, 0.0),
        sample(dtype, NAN, INF),
        sample(dtype, tiny / 4, -tiny / 2, tiny, 0.0),
        sample(dtype).t()[::2],
        torch.empty(0, 3, dtype=dtype),
        torch.zeros(5, dtype=dtype),
        torch.tensor(-3.0, dtype=dtype),
        torch.randn(300_000).to(dtype).where(torch.arange(300_000) % 3 > 0, 0),
    ]
    parameters = make_parameters([None, *grads, None])
    statistics = GradStatistics()
    measure(parameters, statistics)
    want = torch.tensor([counted(grad) for grad in grads], dtype=torch.float64)
    assert statistics.values.dtype == torch.float64
    torch.testing.assert_close(statistics.values, want, rtol=1e-6, atol=0, equal_nan=True)


def test_sparse_and_complex():
    sparse = torch.sparse_coo_tensor([[0, 2, 2]], [1.0, 2.0, 2.0], (5,), check_invariants=True)
    complex_ = torch.tensor([3 + 4j, 0, complex(INF, 0)])
    statistics = GradStatistics()
    measure(make_parameters([sparse, complex_]), statistics)
    norm = 17**0.5
    assert statistics.values[0].tolist() == pytest.approx([norm, 4, 3, 0, 0, 0])
    assert statistics.values[1].tolist()[1:] == [INF, 1, 1, 0, 0]


def test_no_gradients():
    statistics = GradStatistics()
    measure(make_parameters([None]), statistics)
    assert statistics.values.shape == (0, 6)
