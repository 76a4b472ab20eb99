"""The rules of csrc/policy.h in Python, for where the extension is missing. Reads the state: waits for devices."""

import math
from bisect import bisect_left, insort

from torch import Tensor

_HEAD = 3  # rule, threshold, count


def follow(state: Tensor, norm: float) -> None:
    """Changes the state of a policy as ``_C.follow_norm`` does."""
    numbers = state.tolist()
    if math.isfinite(norm):
        numbers[1] = (_zclip if numbers[0] == 1 else _autoclip)(numbers, norm)
    else:
        numbers[1] = 0.0
    state.copy_(state.new_tensor(numbers))


def _zclip(state: list[float], norm: float) -> float:
    count, (mean, variance, alpha, z_threshold, warmup, eps, spike_to, max_norm) = state[2], state[_HEAD:]
    threshold, learns = math.inf, math.isfinite(norm * norm)
    if count < warmup and learns:
        delta = norm - mean
        mean += delta / (count + 1)
        variance += (delta * (norm - mean) - variance) / (count + 1)
    elif count >= warmup:
        deviation = math.sqrt(variance)
        distance = deviation + eps
        z = (norm - mean) / distance if distance else math.copysign(math.inf, norm - mean) if norm != mean else math.nan
        if z > z_threshold:
            threshold = mean + (z_threshold / (z / z_threshold), z_threshold, 0.0)[int(spike_to)] * deviation
            norm = threshold
        if learns:
            mean = alpha * mean + (1 - alpha) * norm
            variance = alpha * variance + (1 - alpha) * (norm - mean) * (norm - mean)
    state[2] += learns
    state[_HEAD : _HEAD + 2] = mean, variance
    return min(threshold, max_norm)


def _autoclip(state: list[float], norm: float) -> float:
    count, fraction, window = int(state[2]), state[_HEAD], int(state[_HEAD + 1])
    arrivals = _HEAD + 2
    remembered = min(count, window)
    ascending = state[arrivals + window : arrivals + window + remembered]
    if count >= window:
        del ascending[bisect_left(ascending, state[arrivals + count % window])]
    insort(ascending, norm)
    state[2] += 1
    state[arrivals + count % window] = norm
    state[arrivals + window : arrivals + window + len(ascending)] = ascending

    position = (len(ascending) - 1) * fraction
    below = int(position)
    if below + 1 >= len(ascending):
        return ascending[-1]
    part, a, b = position - below, ascending[below], ascending[below + 1]
    return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)
