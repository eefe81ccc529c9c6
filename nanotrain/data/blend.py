"""Which source the k-th training sample comes from, for any k, without walking there.

Each phase of a curriculum is a repeating table of sources. The table interleaves the sources as evenly as integers
allow: after any number of samples, each source has been drawn its weight x that number, give or take less than one.
"""

import bisect
import heapq
import itertools
import math
import threading
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

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


def _windows(shares: list[int]) -> tuple[list[int], list[int]]:
    """Return how many windows open at each entry of a table, and all windows' codes in the order of their opening.

    A code is deadline x number of sources + source, so codes sort as the pairs do.
    """
    period, sources = sum(shares), len(shares)
    releases, codes = [], []
    for source, share in enumerate(shares):
        draws = np.arange(share, dtype=np.int64)
        releases.append(draws * period // max(1, share))
        codes.append(-(-(draws + 1) * period // max(1, share)) * sources + source)
    release = np.concatenate(releases)
    order = np.argsort(release, kind="stable")
    return np.bincount(release, minlength=period).tolist(), np.concatenate(codes)[order].tolist()


def interleave(shares: list[int]) -> Iterator[int]:
    """Yield sum(shares) source numbers, of which every prefix keeps the shares to less than one draw.

    The j-th draw of a source with n of P entries must fall in the window [floor(jP/n), ceil((j+1)P/n)). Taking, at each
    entry, the open window that closes first always meets all windows (earliest deadline first on one machine).
    """
    opening, codes = _windows(shares)
    waiting = iter(codes)
    sources, windows = len(shares), []
    push, pop, push_and_pop = heapq.heappush, heapq.heappop, heapq.heappushpop
    for count in opening:
        if count == 1:  # nearly always
            yield push_and_pop(windows, next(waiting)) % sources
            continue
        for code in itertools.islice(waiting, count):
            push(windows, code)
        yield pop(windows) % sources


class Blend:
    """An endless sequence of sources in fixed proportions.

    The table is worked out as far as it is asked for.

    Args:
        weights: source name -> weight; any positive scale.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self.sources = [name for name, weight in weights.items() if weight > 0]
        self._shares = _integer_shares([weights[name] for name in self.sources])
        self._period = sum(self._shares)
        self._rest = interleave(self._shares)
        self._table: list[int] = []
        self._before: list[int] = []  # draws of the entry's source before it
        self._drawn = [0] * len(self.sources)
        self._extending = threading.Lock()

    def _extend(self, entries: int) -> None:
        """Work out the table's first `entries` entries."""
        if entries <= len(self._table):
            return
        with self._extending:  # a prefetching thread may ask at the same time
            for source in itertools.islice(self._rest, max(0, entries - len(self._table))):
                self._before.append(self._drawn[source])
                self._drawn[source] += 1
                self._table.append(source)

    def draw(self, k: int) -> tuple[str, int]:
        """Return the source of the k-th sample and how many samples of that source came before it."""
        cycle, entry = divmod(k, self._period)
        self._extend(entry + 1)
        source = self._table[entry]
        return self.sources[source], cycle * self._shares[source] + self._before[entry]

    def counts(self, k: int) -> dict[str, int]:
        """Return how many of the first k samples come from each source."""
        cycle, entry = divmod(k, self._period)
        self._extend(entry)
        drawn = np.bincount(np.asarray(self._table[:entry], np.int64), minlength=len(self.sources)).tolist()
        shares = zip(self.sources, self._shares, drawn, strict=True)
        return {name: cycle * share + count for name, share, count in shares}


class Curriculum:
    """Blends with switch points, over a fixed number of samples.

    Args:
        phases: as configured; the last ends at 1.0.
        num_samples: of the whole stage; a phase ends after round(until x num_samples) samples.
    """

    def __init__(self, phases: list[PhaseConfig], num_samples: int) -> None:
        self.num_samples = num_samples
        ends = [round(config.until * num_samples) for config in phases]
        self._starts = [0, *ends[:-1]]
        self._lengths = [end - start for start, end in zip(self._starts, ends, strict=True)]
        self._blends = [Blend(config.weights) for config in phases]
        self._before: list[dict[str, int]] = [{}]  # samples of each source before a phase, as far as asked for

    def _drawn_before(self, phase: int) -> dict[str, int]:
        """Return the samples of each source in all phases before this one."""
        while len(self._before) <= phase:
            last = len(self._before) - 1
            drawn = dict(self._before[last])
            for name, count in self._blends[last].counts(self._lengths[last]).items():
                drawn[name] = drawn[name] + count if name in drawn else count
            self._before.append(drawn)
        return self._before[phase]

    @property
    def totals(self) -> dict[str, int]:
        """Samples of each source over the whole stage."""
        return dict(self._drawn_before(len(self._blends)))

    def draw(self, k: int) -> tuple[str, int]:
        """Return the source of global sample k and its number within that source, counted over all phases."""
        phase = bisect.bisect_right(self._starts, k) - 1
        name, number = self._blends[phase].draw(k - self._starts[phase])
        drawn = self._drawn_before(phase)
        return name, number + (drawn[name] if name in drawn else 0)
