"""One random call on a random list, and what has to be true after it."""

import math

import numpy as np
import oracle
import torch
from lists import GradientList, generate
from support import INF, NAN, make_parameters, outcome
from test_statistics import expected as expected_statistics

import fastclip
from fastclip._native import _C

LARGEST = {torch.float16: 65504.0, torch.bfloat16: 3.3895313892515355e38, torch.float32: 3.4028234663852886e38}


def run(seed: int) -> None:
    """Makes the list and the call of this seed. Raises AssertionError, with the list, where something is wrong."""
    random = np.random.Generator(np.random.SFC64(seed))
    given = generate(random)
    if given.threads > 1:
        torch.set_num_threads(given.threads)
    given.remember()
    check = CHECKS[random.choice(len(CHECKS), p=WEIGHTS)]
    try:
        check(given, random)
    except Exception as error:
        raise AssertionError(f"{check.__name__}: {error}\n{given.describe()}") from error
    finally:
        if given.threads > 1:
            torch.set_num_threads(1)


# ---- random arguments ----


def norm_type_of(random: np.random.Generator) -> float | str:
    return [1, 1.0, 2, 2.0, 2.0, "2", INF, INF, "inf"][random.integers(9)]


def threshold_of(random: np.random.Generator, norm: float) -> float:
    """Mostly about as large as the norm; now and then one of the odd ones."""
    draw = random.random()
    if draw < 0.75 and math.isfinite(norm):
        return norm * 10.0 ** random.uniform(-3, 1)
    if draw < 0.85:
        return 10.0 ** random.uniform(-40, 38)
    return [0.0, 1.0, 1e-3, 1e-310, 1e300, INF, NAN, -0.5][random.integers(8)]


def as_argument(random: np.random.Generator, value: float) -> float | torch.Tensor:
    """A float, or a 0-d tensor that holds it."""
    return value if random.random() < 0.85 else torch.tensor(value, dtype=torch.float64)


def container_of(random: np.random.Generator, items: list):
    kind = random.integers(10)
    if kind == 0:
        return tuple(items)
    if kind == 1 and items:
        return iter(items)
    return items[0] if kind == 2 and len(items) == 1 else items


# ---- what has to be true ----


def check_close(got: torch.Tensor, want: torch.Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """As torch.testing.assert_close with NaN equal to itself, which takes 0.2 ms."""
    assert got.dtype == want.dtype and got.shape == want.shape, (got, want)
    got, want = got.double(), want.double()
    good = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= atol + rtol * want.abs())
    assert good.all(), f"expected {want[~good][:5].tolist()}, got {got[~good][:5].tolist()}"


def coefficient(max_norm: float, want: float, norm: torch.Tensor) -> float:
    return oracle.coefficient(max_norm, want if norm.isfinite() else norm.item())


def check_scaled(given: GradientList, coef: float) -> None:
    before, after = given.as_before(), given.present
    if coef == 1:
        return given.check_untouched()
    given.check_surroundings()
    if 0 < abs(coef) < 1.4e-76:  # the documented limit: two factors of float32 cannot express it
        return None
    if given.is_shared:
        return check_scaled_in_turn(given, coef)
    # A threshold that equals the norm: whether the coefficient rounds to 1 is decided by the last digit.
    tolerance = 2e-6 if abs(coef - 1) < 1e-6 else 1e-6
    for dtype in {grad.dtype for grad in after}:
        pair = [torch.cat([g.reshape(-1) for g in grads if g.dtype == dtype]) for grads in (after, before)]
        oracle.check_scaled(*pair, coef, tolerance)


def check_scaled_in_turn(given: GradientList, coef: float) -> None:
    """Gradients that share elements: each is scaled in its turn, and each time rounded."""
    after = [arena.clone() for arena in given.arenas]
    for arena, before in zip(given.arenas, given.before, strict=True):
        arena.copy_(before)
    for grad in given.present:
        grad.copy_(grad.double() * coef)
    for got, want in zip(after, given.arenas, strict=True):
        info = torch.finfo(want.dtype)
        times = len(given.grads)
        check_close(got, want, times * (info.eps + 1e-6), times * info.smallest_normal * info.eps)


def raises_instead(given: GradientList, result: tuple, norm_type: float | str = 2, writes: bool = True) -> bool:
    """Whether this list cannot be clipped; then that was said, and nothing was touched."""
    is_error = (given.is_expanded and writes) or (
        float(norm_type) == INF and any(grad.numel() == 0 for grad in given.present)
    )
    assert is_error or result[0] == "returned", result
    if is_error:
        assert result[0] is RuntimeError or result[0] is IndexError, result
        given.check_untouched()
    return is_error


# ---- the calls ----


def get_total_norm(given, random):
    norm_type = norm_type_of(random)
    result = outcome(fastclip.get_total_norm, container_of(random, given.present), norm_type)
    if not raises_instead(given, result, norm_type, writes=False):
        oracle.check_norm(result[1], given.present, norm_type)
        given.check_untouched()


def clip_grad_norm_(given, random, statistics=None):
    norm_type, before = norm_type_of(random), given.as_before()
    want = oracle.total_norm(before, norm_type)
    max_norm = threshold_of(random, want)
    error_if_nonfinite = random.random() < 0.1
    parameters = container_of(random, make_parameters(given.grads))
    keywords = {} if statistics is None else {"statistics": statistics}
    result = outcome(
        fastclip.clip_grad_norm_, parameters, as_argument(random, max_norm), norm_type, error_if_nonfinite, **keywords
    )
    rounded = torch.tensor(want, dtype=torch.float64 if any(g.dtype == torch.float64 for g in before) else None)
    if error_if_nonfinite and before and not rounded.isfinite() and result[0] is RuntimeError:
        return given.check_untouched()
    if raises_instead(given, result, norm_type):
        return
    oracle.check_norm(result[1], before, norm_type)
    check_scaled(given, coefficient(max_norm, want, result[1]) if before else 1.0)
    if statistics is not None:
        rows = [expected_statistics(grad, float(norm_type)) for grad in before]
        want_rows = torch.stack(rows) if rows else torch.zeros(0, 6, dtype=torch.float64)
        check_close(statistics.values[:, :1], want_rows[:, :1], 1e-6)
        check_close(statistics.values[:, 1:], want_rows[:, 1:])


def clip_with_statistics(given, random):
    clip_grad_norm_(given, random, fastclip.GradStatistics())


def clip_grads_with_norm_(given, random):
    before = given.as_before()
    norm = torch.tensor(
        oracle.total_norm(before, 2) if random.random() < 0.8 else 10.0 ** random.uniform(-30, 30),
        dtype=[torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16][random.integers(5)],
    )
    max_norm = threshold_of(random, norm.item())
    parameters = container_of(random, make_parameters(given.grads))
    result = outcome(fastclip.clip_grads_with_norm_, parameters, as_argument(random, max_norm), norm)
    if not raises_instead(given, result):
        check_scaled(given, oracle.coefficient(max_norm, norm.item()) if before else 1.0)


def clip_grad_value_(given, random):
    before = given.as_before()
    largest = max([float(g.abs().nan_to_num(0, 1.0).max()) for g in before if g.numel()], default=1.0)
    limit = abs(threshold_of(random, largest))
    if math.isnan(limit):
        limit = 0.25
    result = outcome(fastclip.clip_grad_value_, container_of(random, make_parameters(given.grads)), limit)
    if limit != INF and any(limit > LARGEST.get(grad.dtype, INF) for grad in before):
        assert result[0] is RuntimeError, result
        return given.check_untouched()
    if raises_instead(given, result):
        return
    given.check_surroundings()
    for after, grad in zip(given.present, before, strict=True):
        wide, bound = grad.double(), torch.tensor(limit, dtype=grad.dtype).double()
        want = torch.where(wide.abs() > bound, bound.copysign(wide), wide).to(grad.dtype)
        check_close(after, want)


def prepare_step(given, random):
    """What ClippedOptimizer and GradScaler make of gradients that are multiplied by grad_scale."""
    before, norm_type = given.as_before(), norm_type_of(random)
    grad_scale = [1.0, 65536.0, 1024.0, 0.5][random.integers(4)]
    scaled = oracle.total_norm(before, norm_type)
    want = scaled / grad_scale
    max_norm, in_place = abs(threshold_of(random, want)), bool(random.random() < 0.5)
    argument = None if grad_scale == 1 else torch.tensor(grad_scale)
    parameters = make_parameters(given.grads)
    result = outcome(_C.prepare_step, parameters, max_norm, norm_type, argument, in_place)
    if in_place and given.is_expanded:
        assert result[0] is RuntimeError, result
        return given.check_untouched()
    assert result[0] == "returned", result
    if not before:
        assert result[1] is None or isinstance(result[1], str)
        return
    if isinstance(result[1], str):
        assert result[1] in ("unscaling float16", "inf norm of an empty gradient"), result
        return given.check_untouched()
    norm, divisor, found_inf = result[1]
    expected = torch.tensor(want, dtype=norm.dtype)
    check_close(norm, expected, 2e-6, 1e-44)
    is_finite = math.isfinite(scaled)
    assert found_inf.item() == (0 if is_finite else 1)
    factor = coefficient(max_norm, want, norm) / grad_scale
    if factor == 1:
        assert divisor is None
    elif divisor is not None:
        inverse = torch.tensor(INF if factor == 0 else 1 / factor, dtype=torch.float64).float()
        check_close(divisor, inverse, 2e-6, 1e-44)
    else:
        assert abs(factor - 1) < 1e-6
    check_scaled(given, factor if in_place and is_finite else 1.0)


def clipped_optimizer(given, random):
    """A step of SGD from zero with learning rate 1: the parameters become the clipped gradients, with the other sign.

    The gradients are of middling size, since torch's own step divides by a float32.
    """
    grads = [g.detach().contiguous().nan_to_num(0, 1, -1).clamp(-1e3, 1e3) for g in given.present]
    grads = [g for g in grads if g.dtype in (torch.float32, torch.float64)]
    grads = [g.where(g.abs() > 1e-3, torch.zeros(())) for g in grads if g.numel()]
    if not grads:
        return
    before = [g.clone() for g in grads]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    folds = bool(random.random() < 0.5)
    want = oracle.total_norm(before, 2)
    max_norm = float(max(want, 1e-3) * 10.0 ** random.uniform(-3, 1))
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(parameters, lr=1.0, fused=folds), max_norm, fold=folds)
    optimizer.step()
    oracle.check_norm(optimizer.last_total_norm, before, 2)
    coef = oracle.coefficient(max_norm, want)
    for parameter, grad in zip(parameters, before, strict=True):
        oracle.check_scaled(-parameter.detach(), grad, coef, 2e-6)


def other_norm_types(given, random):
    """torch does these: its own result, its own gradients."""
    norm_type = [0.5, 3, 4.5, 0][random.integers(4)]
    if given.is_expanded or given.is_shared:
        return
    copies = [None if g is None else g.clone() for g in given.grads]
    got = outcome(fastclip.clip_grad_norm_, make_parameters(given.grads), 1.0, norm_type)
    want = outcome(torch.nn.utils.clip_grad_norm_, make_parameters(copies), 1.0, norm_type)
    assert got[0] == want[0], (got, want)
    if got[0] == "returned":
        check_close(got[1], want[1])
        for mine, theirs in zip(given.grads, copies, strict=True):
            if mine is not None:
                check_close(mine, theirs, 1e-6)


CHECKS = [
    clip_grad_norm_,
    clip_with_statistics,
    get_total_norm,
    clip_grads_with_norm_,
    clip_grad_value_,
    prepare_step,
    clipped_optimizer,
    other_norm_types,
]
WEIGHTS = [0.33, 0.12, 0.11, 0.13, 0.17, 0.09, 0.04, 0.01]
