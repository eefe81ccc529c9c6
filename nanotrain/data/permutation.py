"""A pseudo-random order of n items that is computed, not stored: any position costs the same, nothing is built.

A four-round Feistel network permutes the numbers below a power of four that covers n; positions that land outside are
sent through again ("cycle walking"), which keeps it a permutation of range(n).
"""

import hashlib

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def derive_key(*parts: str | int) -> int:
    """Return a 64-bit key that depends on every part and on their order."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permuted_index(position: int, size: int, key: int) -> int:
    """Return the item at `position` of the order that `key` gives to range(size).

    Expected cost is below four network passes: the covering power of four is less than 4 x size.
    """
    assert 0 <= position < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    round_keys = [_mix(key + number) for number in range(_ROUNDS)]
    value = position
    while True:
        left, right = value >> half_bits, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value = (left << half_bits) | right
        if value < size:
            return value
