"""Best-fit packing: rows of unequal length into bins of equal capacity, nothing cut."""

import bisect


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Place each row in the fullest bin that still has room, longest rows first.

    Args:
        lengths: of the rows, each in [1, capacity].
        capacity: of a bin.

    Returns:
        Row numbers of each bin. Deterministic: equal lengths keep their order.
    """
    assert all(1 <= length <= capacity for length in lengths)
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (free room, bin), sorted
    for row in order:
        place = bisect.bisect_left(by_room, (lengths[row], -1))
        if place < len(by_room):
            room, number = by_room.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(row)
        room -= lengths[row]
        if room:
            bisect.insort(by_room, (room, number))
    return bins
