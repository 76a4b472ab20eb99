"""What is right, computed in float64 (and wider sums) without overflow, underflow or any code of fastclip."""

import math

import numpy as np
import torch

CHUNK = 1 << 20


def _chunks(grads):
    """All elements as float64 arrays of at most CHUNK elements; float64 gradients, held to 1e-12, as long double."""
    for grad in grads:
        flat = grad.detach().cpu().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            chunk = flat[start : start + CHUNK].double().abs().numpy()
            yield chunk.astype(np.longdouble) if grad.dtype == torch.float64 else chunk


def total_norm(grads, norm_type):
    """The norm of order 1, 2 or inf over all elements of all gradients, as a Python float."""
    norm_type = float(norm_type)
    largest = 0.0
    for chunk in _chunks(grads):
        top = float(chunk.max())  # NaN if there is one
        largest = top if top > largest or math.isnan(top) else largest
        if math.isnan(largest):
            return math.nan
    if norm_type == math.inf or largest == 0 or math.isinf(largest):
        return largest
    scale = np.ldexp(1.0, -math.frexp(largest)[1] // 2)  # twice, since 2^-exponent itself may not be representable
    scaled = (chunk * scale * scale for chunk in _chunks(grads))
    total = sum(((c if norm_type == 1 else c * c).sum() for c in scaled), np.longdouble(0))
    return float((total if norm_type == 1 else np.sqrt(total)) / scale / scale)


def coefficient(max_norm, norm):
    """min(1, max_norm / (norm + 1e-6)) in float64."""
    coef = float(np.float64(max_norm) / (np.float64(norm) + 1e-6))
    return 1.0 if coef > 1 else coef


def unit_coefficient(weight, grad, clipping, eps, norm_type):
    """What adaptive clipping multiplies a unit's gradient by, of any magnitude."""
    max_norm = clipping * max(total_norm([weight], norm_type), eps)  # of NaN first: max(NaN, x) is NaN
    norm = total_norm([grad], norm_type)
    return 1.0 if norm < max_norm else max_norm / max(norm, 1e-6)


def check_norm(got, grads, norm_type):
    """The dtype is the promotion of the gradients', at least float32; exact for inf, else to 1e-6 or 1e-12."""
    doubles = [g.dtype == torch.float64 for g in grads]
    assert got.shape == () and not got.requires_grad
    assert got.dtype == (torch.float64 if any(doubles) else torch.float32)
    want, tolerance = total_norm(grads, norm_type), 1e-12 if all(doubles) else 1e-6
    rounded = torch.tensor(want, dtype=got.dtype).item()
    if float(norm_type) == math.inf or not math.isfinite(rounded) or rounded == 0:
        assert got.item() == rounded or (math.isnan(got.item()) and math.isnan(rounded)), (got.item(), want)
    else:
        subnormal = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        assert abs(got.item() - want) <= tolerance * want + subnormal / 2, (got.item(), want, got.item() / want - 1)


# Half a unit in the last place, relative and absolute: what rounding the exact product may cost.
ROUNDING = {
    torch.float64: (2.0**-53, 2.0**-1075),
    torch.float32: (2.0**-24, 2.0**-150),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}


def check_scaled(after, before, coef, tolerance=1e-6):
    """after == before * coef, but for `tolerance` and one rounding to the gradient's dtype."""
    assert after.dtype == before.dtype and after.shape == before.shape
    got, want = after.detach().cpu().double(), before.detach().cpu().double() * coef
    # Values beyond the dtype become inf as in a conversion; inf and NaN have to be where they are expected.
    rounded = want.to(after.dtype).double()
    finite = rounded.isfinite() & got.isfinite()
    special = ~finite
    assert torch.equal(got[special].nan_to_num(1e300, 2e300, -2e300), rounded[special].nan_to_num(1e300, 2e300, -2e300))
    relative, absolute = ROUNDING[after.dtype]
    bound = want.abs() * (relative + tolerance) + absolute
    excess = ((got - want).abs() - bound)[finite]
    assert excess.numel() == 0 or excess.max() <= 0, f"off by {excess.max()} at {excess.argmax()}, coefficient {coef}"
