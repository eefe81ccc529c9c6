"""Which source the k-th training sample comes from, for any k, without walking there.

Each phase of a curriculum is a repeating table of sources. The table interleaves the sources as evenly as integers
allow: after any number of samples, each source has been drawn its weight x that number, give or take less than one.
"""

import bisect
import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

from nanotrain.config.data import PhaseConfig

_MAX_PERIOD = 1 << 16
"""Weights that need a longer table are rounded to multiples of 1/65536."""


def _integer_shares(weights: list[float]) -> list[int]:
    """Return integers in the proportion of the weights, whose sum is the table's length."""
    fractions = [Fraction(repr(weight)) for weight in weights]  # repr: 0.35 means 35/100, not its binary neighbour
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    counts = [int(fraction * common) for fraction in fractions]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= _MAX_PERIOD:
        return counts
    exact = [Fraction(count * _MAX_PERIOD, total) for count in counts]
    rounded = [max(1, math.floor(share)) if share else 0 for share in exact]  # no positive weight is lost
    order = sorted(range(len(exact)), key=lambda i: (rounded[i] - exact[i], i))
    for i in order:
        if sum(rounded) >= _MAX_PERIOD:
            break
        rounded[i] += 1 if exact[i] else 0
    return rounded


def interleave(shares: list[int]) -> list[int]:
    """Return a table of sum(shares) source numbers in which every prefix keeps the shares to less than one draw.

    The j-th draw of a source with n of P entries must fall in the window [floor(jP/n), ceil((j+1)P/n)). Taking, at each
    entry, the open window that closes first always meets all windows (earliest deadline first on one machine).
    """
    period = sum(shares)
    releases = [(0, source) for source, share in enumerate(shares) if share]
    heapq.heapify(releases)
    open_windows: list[tuple[int, int]] = []
    drawn = [0] * len(shares)
    table = []
    for entry in range(period):
        while releases and releases[0][0] <= entry:
            source = heapq.heappop(releases)[1]
            deadline = -(-(drawn[source] + 1) * period // shares[source])
            heapq.heappush(open_windows, (deadline, source))
        deadline, source = heapq.heappop(open_windows)
        assert deadline > entry
        table.append(source)
        drawn[source] += 1
        if drawn[source] < shares[source]:
            heapq.heappush(releases, (drawn[source] * period // shares[source], source))
    return table


class Blend:
    """An endless sequence of sources in fixed proportions.

    Args:
        weights: source name -> weight; any positive scale.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.sources = [name for name, weight in weights.items() if weight > 0]
        shares = _integer_shares([weights[name] for name in self.sources])
        self._table = interleave(shares)
        self._positions: list[list[int]] = [[] for _ in self.sources]
        for entry, source in enumerate(self._table):
            self._positions[source].append(entry)

    def draw(self, k: int) -> tuple[str, int]:
        """Return the source of the k-th sample and how many samples of that source came before it."""
        cycle, entry = divmod(k, len(self._table))
        source = self._table[entry]
        positions = self._positions[source]
        return self.sources[source], cycle * len(positions) + bisect.bisect_left(positions, entry)

    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the first k samples come from each source."""
        cycle, entry = divmod(k, len(self._table))
        return {
            name: cycle * len(positions) + bisect.bisect_left(positions, entry)
            for name, positions in zip(self.sources, self._positions, strict=True)
        }


@dataclass(frozen=True)
class _Phase:
    start: int
    blend: Blend
    drawn_before: dict[str, int]


class Curriculum:
    """Blends with switch points, over a fixed number of samples.

    Args:
        phases: as configured; the last ends at 1.0.
        num_samples: of the whole stage; a phase ends after round(until x num_samples) samples.
    """

    def __init__(self, phases: list[PhaseConfig], num_samples: int) -> None:
        self.num_samples = num_samples
        self._phases: list[_Phase] = []
        start, drawn = 0, {}
        for config in phases:
            end = round(config.until * num_samples)
            blend = Blend(config.weights)
            self._phases.append(_Phase(start, blend, dict(drawn)))
            for name, count in blend.counts(end - start).items():
                drawn[name] = drawn[name] + count if name in drawn else count
            start = end
        self.totals: dict[str, int] = drawn
        """Samples of each source over the whole stage."""
        self._starts = [phase.start for phase in self._phases]

    def draw(self, k: int) -> tuple[str, int]:
        """Return the source of global sample k and its number within that source, counted over all phases."""
        phase = self._phases[bisect.bisect_right(self._starts, k) - 1]
        name, number = phase.blend.draw(k - phase.start)
        return name, number + (phase.drawn_before[name] if name in phase.drawn_before else 0)
