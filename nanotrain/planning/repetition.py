"""How often a run walks through each source: planned from published sizes, and held to the caps before training."""

from dataclasses import dataclass

from nanotrain.config.blend import Curriculum
from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import UserError


@dataclass(frozen=True)
class PlannedSource:
    """One source of a planned run.

    Attributes:
        name: of the source.
        shares: of the tokens of each phase.
        tokens: drawn over the whole run.
        pool: what it draws from; empty when no size is known.
        pool_tokens: how much text that is.
        epochs: of the pool, over all its sources; 0 when no size is known.
        max_epochs: the cap; 0 = none.
    """

    name: str
    shares: tuple[float, ...]
    tokens: float
    pool: str
    pool_tokens: int
    epochs: float
    max_epochs: float


def plan_repetition(curriculum: Curriculum, total_tokens: int = 0) -> list[PlannedSource]:
    """Return what a run draws from each source, in the order of the blends.

    Args:
        curriculum: phases and pools.
        total_tokens: of the run; 0 = the curriculum's own.
    """
    total = total_tokens or curriculum.total_tokens
    names = list(dict.fromkeys(name for _, blend in curriculum.phases for name in blend.weights))
    starts = [0.0, *(until for until, _ in curriculum.phases[:-1])]
    lengths = [(until - start) * total for start, (until, _) in zip(starts, curriculum.phases, strict=True)]
    shares = {
        name: tuple(blend.weights[name] if name in blend.weights else 0.0 for _, blend in curriculum.phases)
        for name in names
    }
    tokens = {name: sum(share * length for share, length in zip(shares[name], lengths, strict=True)) for name in names}
    pool_of = {source: pool for pool, one in curriculum.pools.items() for source in one.sources}
    drawn = {pool: sum(tokens[source] for source in one.sources) for pool, one in curriculum.pools.items()}
    planned = []
    for name in names:
        pool = pool_of[name] if name in pool_of else ""
        size = curriculum.pools[pool].tokens if pool else 0
        caps = [blend.max_epochs[name] for _, blend in curriculum.phases if name in blend.max_epochs]
        epochs = drawn[pool] / size if pool else 0.0
        planned.append(PlannedSource(name, shares[name], tokens[name], pool, size, epochs, min(caps, default=0.0)))
    return planned


def check_epochs(epochs: dict[str, float], caps: dict[str, float], where: str, way_out: str) -> None:
    """Refuse a run that would walk through a source more often than its cap allows.

    Args:
        epochs: source -> times that its text is walked through.
        caps: source -> most times; sources without one have no cap.
        where: the key or file that states the caps.
        way_out: what to change.

    Raises:
        UserError: one or more sources exceed their caps; all are named.
    """
    over = [
        f"`{name}` {epochs[name]:.2f} times, its cap is {caps[name]:g}"
        for name in caps
        if name in epochs and epochs[name] > caps[name] * (1 + 1e-9)
    ]
    if over:
        raise UserError(f"{where} would repeat {'; '.join(over)}; {way_out}.")


def curriculum_caps(phases: list[PhaseConfig]) -> dict[str, float]:
    """Return source -> the lowest cap that any phase states: a cap holds for the whole stage."""
    caps: dict[str, float] = {}
    for phase in phases:
        for name, cap in phase.max_epochs.items():
            caps[name] = min(cap, caps[name]) if name in caps else cap
    return caps
