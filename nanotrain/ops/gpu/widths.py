"""Triton's tiles have power-of-two sides; 1280 = 1024 + 256 need not be padded to the next one."""

import triton


def split_width(width: int) -> tuple[int, int]:
    """Cut `width` into a power of two and a rest, which is a power of two of at least 16, possibly masked."""
    large = 1 << (width.bit_length() - 1)
    if large == width:
        large //= 2
    return large, max(16, triton.next_power_of_2(width - large))
