"""One random call on a random list, and what has to be true after it."""

import math

import numpy as np
import oracle
import torch
from lists import GradientList, generate
from support import INF, NAN, make_parameters, outcome
from test_adaptive import units
from test_policies import PublishedAutoClip, PublishedZClip
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


def clip_with_a_policy(given, random):
    """ZClip or AutoClip, which have learnt from norms about as large as this one or very different."""
    before = given.as_before()
    want = oracle.total_norm(before, 2)
    usual = want * 10.0 ** random.uniform(-3, 1) if math.isfinite(want) and 1e-30 < want < 1e100 else 1.0
    norms = (usual * random.lognormal(0, 0.3, int(random.integers(0, 12)))).tolist()
    if random.random() < 0.5:
        arguments = {"warmup": int(random.integers(1, 8)), "eps": usual * 1e-6}
        arguments["spike_to"] = ["reciprocal", "max", "mean"][random.integers(3)]
        policy, published = fastclip.ZClip(**arguments), PublishedZClip(**arguments)
    else:
        percentile, window = float(random.uniform(0, 100)), int(random.integers(1, 15))
        policy, published = fastclip.AutoClip(percentile, window), PublishedAutoClip(percentile, window)
    for norm in norms:
        policy.follow(torch.tensor(norm, dtype=torch.float64))
        published.threshold(norm)
    count = len(norms)
    result = outcome(fastclip.clip_grad_norm_, container_of(random, make_parameters(given.grads)), policy)
    if raises_instead(given, result):
        assert policy.count == count
        return
    if not before:
        assert policy.count == count
        return given.check_untouched()
    oracle.check_norm(result[1], before, 2)
    learns = bool(result[1].isfinite()) and (want < 1e154 or isinstance(policy, fastclip.AutoClip))
    assert policy.count == count + learns
    threshold = policy.threshold
    if learns:
        check_close(threshold, torch.tensor(published.threshold(want), dtype=torch.float64), 1e-4)
    elif not result[1].isfinite():
        assert threshold == 0
    if abs(threshold - want) <= 1e-6 * want:  # AutoClip's own norm: its last digit decides
        return given.check_surroundings()
    check_scaled(given, coefficient(threshold.item(), want, result[1]))


def clip_with_nonfinite(given, random):
    norm_type, before = norm_type_of(random), given.as_before()
    want = oracle.total_norm(before, norm_type)
    max_norm, nonfinite = threshold_of(random, want), ["propagate", "skip", "zero"][random.integers(3)]
    is_bad = iter([not grad.isfinite().all() for grad in before])
    bad = [grad is not None and next(is_bad) for grad in given.grads]
    parameters = container_of(random, make_parameters(given.grads))
    result = outcome(
        fastclip.clip_grad_norm_, parameters, as_argument(random, max_norm), norm_type, nonfinite=nonfinite
    )
    if raises_instead(given, result, norm_type):
        return
    norm, report = result[1], fastclip.last_report()
    oracle.check_norm(norm, before, norm_type)
    check_close(torch.tensor(report.total_norm, dtype=norm.dtype), norm)
    if norm.isfinite():
        assert not report.is_nonfinite and report.first_bad is None
        assert report.action == ("nothing" if report.clip_coef == 1 else "clipped")
        return check_scaled(given, coefficient(max_norm, want, norm) if before else 1.0)
    assert report.is_nonfinite and report.first_bad == (bad.index(True) if any(bad) else None)
    assert report.action == {"propagate": "propagated", "skip": "skipped", "zero": "zeroed"}[nonfinite]
    if nonfinite == "propagate":
        return check_scaled(given, coefficient(max_norm, want, norm))
    if nonfinite == "skip":
        assert report.clip_coef == 1
        return given.check_untouched()
    assert report.clip_coef == 0
    given.check_surroundings()
    assert not any(grad.any() for grad in given.present)


def clip_grad_norms_(given, random):
    """Gradients dealt out to groups; each comes out as by a call of its own."""
    if given.is_shared:
        return
    norm_type, count = float(norm_type_of(random)), int(random.integers(1, 5))
    groups, present, before = [[[] for _ in range(count)] for _ in range(3)]
    old = iter(given.as_before())
    for parameter, grad in zip(make_parameters(given.grads), given.grads, strict=True):
        group = random.integers(count)
        groups[group].append(parameter)
        if grad is not None:
            present[group].append(grad)
            before[group].append(next(old))
    wants = [oracle.total_norm(group, norm_type) for group in before]
    max_norms = [threshold_of(random, want) if random.random() < 0.9 else None for want in wants]
    result = outcome(fastclip.clip_grad_norms_, groups, max_norms, norm_type)
    if raises_instead(given, result, norm_type):
        return
    given.check_surroundings()
    for norm, now, was, want, max_norm in zip(result[1], present, before, wants, max_norms, strict=True):
        if not was:
            assert norm == 0
            continue
        own_dtype = torch.float64 if any(g.dtype == torch.float64 for g in was) else torch.float32
        oracle.check_norm(norm.to(own_dtype), was, norm_type)
        coef = 1.0 if max_norm in (None, INF) else coefficient(max_norm, want, norm)
        for grad, old_grad in zip(now, was, strict=True):
            if not 0 < abs(coef) < 1.4e-76:
                oracle.check_scaled(grad, old_grad, coef, 2e-6)


def clip_grad_adaptive_(given, random):
    """Weights of all orders of magnitude beside the gradients."""
    if given.is_shared:
        return
    norm_type, clipping, eps = float(norm_type_of(random)), 10.0 ** random.uniform(-4, 1), 10.0 ** random.uniform(-6, 0)
    parameters, before = [], given.as_before()
    old = iter(before)
    for grad in given.grads:
        like = torch.zeros(()) if grad is None else next(old)
        weight = torch.from_numpy(np.asarray(random.standard_normal(like.shape))).to(like.dtype)
        size = like.abs().double().nan_to_num(1, 1).mean().clamp(1e-30, 1e30).item() if like.numel() else 1.0
        weight = weight * (size * 10.0 ** random.uniform(-2, 6))
        if weight.numel() and random.random() < 0.05:
            weight.view(-1)[random.integers(weight.numel())] = [INF, NAN, 0.0][random.integers(3)]
        if weight.ndim > 1 and random.random() < 0.3:
            weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
        parameters.append(torch.nn.Parameter(weight))
        parameters[-1].grad = grad
    native = fastclip.counters()["native"]
    result = outcome(fastclip.clip_grad_adaptive_, container_of(random, parameters), clipping, eps, norm_type=norm_type)
    if raises_instead(given, result):
        return
    given.check_surroundings()
    if fastclip.counters()["native"] == native and any((g.abs() > 1e150).any() for g in before):
        return  # torch's norms of transposed float64 gradients overflow
    present = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter, was in zip(present, before, strict=True):
        if was.numel() == 0:
            continue
        for weight, now, old_grad in zip(units(parameter), units(parameter.grad), units(was), strict=True):
            coef = oracle.unit_coefficient(weight, old_grad, clipping, eps, norm_type)
            if not 0 < abs(coef) < 1.4e-76:
                oracle.check_scaled(now, old_grad, coef, 3e-6)


CHECKS = [
    clip_grad_norm_,
    clip_with_statistics,
    get_total_norm,
    clip_grads_with_norm_,
    clip_grad_value_,
    prepare_step,
    clipped_optimizer,
    other_norm_types,
    clip_with_a_policy,
    clip_with_nonfinite,
    clip_grad_norms_,
    clip_grad_adaptive_,
]
WEIGHTS = [0.2, 0.1, 0.08, 0.1, 0.13, 0.09, 0.04, 0.01, 0.05, 0.08, 0.08, 0.04]
