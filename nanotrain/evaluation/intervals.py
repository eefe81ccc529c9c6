"""How far an accuracy over few prompts can be trusted."""

import math
from statistics import NormalDist


def wilson_interval(mean: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Unlike the normal approximation it stays inside [0, 1] and is sound for few prompts and for rates near 0 or 1
    (E. B. Wilson, 1927). For scores between 0 and 1 with partial credit it is on the safe side: their variance is at
    most that of a coin with the same mean.

    Args:
        mean: observed share in [0, 1].
        count: number of prompts, at least 1.
        confidence: coverage, between 0 and 1.
    """
    assert count > 0 and 0 <= mean <= 1 and 0 < confidence < 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z * z / count
    centre = (mean + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    # At 0 and 1 the bound is exact; rounding must not move it past the observed value.
    return (max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))
