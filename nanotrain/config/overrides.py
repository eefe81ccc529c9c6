"""Overrides as the command line gives them: `[+|++|~]head.rest=value`. Hydra parses the values (config/load.py)."""

import hashlib
import re
from dataclasses import dataclass

_PARTS = re.compile(r"(\+\+|\+|~)?([^=]*)(=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One override; `head` is the first part of its key, which in a pipeline names the entry."""

    text: str

    def _split(self) -> tuple[str, str, str]:
        match = _PARTS.fullmatch(self.text)
        assert match is not None
        return match[1] or "", match[2], match[3] or ""

    @property
    def head(self) -> str:
        return self._split()[1].split(".", 1)[0]

    @property
    def has_tail(self) -> bool:
        """True when a key follows the head."""
        return "." in self._split()[1]

    def without_head(self) -> "Override":
        """Return the override as the entry's own recipe sees it."""
        assert self.has_tail
        sign, key, value = self._split()
        return Override(f"{sign}{key.split('.', 1)[1]}{value}")


@dataclass(frozen=True)
class SweepJob:
    """One point of a sweep."""

    overrides: list[str]
    suffix: str
    """What the job's output_dir and name get at the end."""


def sweep_suffix(swept: list[str]) -> str:
    """Return `-seed-2-learning_rate-0.001` for `seed=2` and `stage.training.learning_rate=0.001`.

    The last part of each key, or all of it where two keys end alike. A suffix that is too long for a folder name
    is cut and gets a digest. Equal points get equal suffixes whatever the rest of the sweep is.
    """
    pairs = [override._split()[1:] for override in map(Override, swept)]
    ends = [key.rsplit(".", 1)[-1] for key, _ in pairs]
    parts = []
    for (key, value), end in zip(pairs, ends, strict=True):
        short = end if ends.count(end) == 1 else key
        parts.append(re.sub(r"[^A-Za-z0-9._]+", "-", f"{short}-{value[1:]}").strip("-"))
    suffix = "-" + "-".join(parts)
    if len(suffix) > 120:
        suffix = suffix[:100] + "-" + hashlib.sha256(suffix.encode()).hexdigest()[:12]
    return suffix
