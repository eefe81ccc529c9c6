"""Scales, tick marks and number formats of the charts."""

import math
from dataclasses import dataclass


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) that lie within [low, high].

    Args:
        low: smallest value shown.
        high: largest value shown; equal bounds give one tick.
        count: number of steps wanted.
    """
    assert math.isfinite(low) and math.isfinite(high) and low <= high
    if low == high:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Return a short form: 0.02, 1.5, 400, 12k, 3M, 1e-05."""
    magnitude = abs(value)
    if magnitude >= 1e15 or 0 < magnitude < 1e-4:
        return f"{value:.0e}"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if magnitude >= limit:
            divisor = 1e3 if suffix == "k" else limit
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def padded_range(values: list[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Return bounds around `values` that leave a little air; a constant gets a band around it."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        return (low, high + spread) if from_zero else (low - spread, high + spread)
    air = (high - low) * 0.06
    return (low if from_zero and low == 0 else low - air, high if from_zero and high == 0 else high + air)
