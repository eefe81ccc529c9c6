"""Random generators. What can be keyed by (seed, item) draws from its own generator; this is for what cannot."""

import hashlib
import random

import numpy as np


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and every key, so that two uses never share a sequence."""
    text = "\0".join([str(seed), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
