"""Bin packing of sequences: which pack does every row go into?

Each function maps ``(lengths, capacity)`` to the pack number of every row, numbered 0, 1, … without gaps. No pack holds more
than ``capacity`` tokens, a pack may be exactly full, every row is in exactly one pack. NumPy only, so that any of them can
be copied.

    next_fit             one open pack; O(n). The published way, for comparison: it fills about 0.8.
    first_fit_decreasing longest first, into the first pack with room; O(n log m) by a tree over the packs' room
    best_fit_decreasing  longest first, into the fullest pack with room; by histograms of lengths and of room, so its cost
                         grows with the number of different lengths, not of rows

Over-long rows are the plan's business: here they are an error.
"""

from __future__ import annotations

import numpy as np


def check_lengths(lengths, capacity: int) -> np.ndarray:
    """Return ``lengths`` as int64[n]; raise ValueError naming the first row that is empty, longer than capacity, or no number."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional, got shape {lengths.shape}")
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be whole numbers of tokens, got dtype {lengths.dtype}")
    if isinstance(capacity, bool) or int(capacity) != capacity or capacity < 1:
        raise ValueError(f"capacity must be a whole number of tokens >= 1, got {capacity!r}")
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens, outside 1..{capacity} ({bad.size} such rows): "
            "truncate or drop them first (plan.fit_lengths), or raise the capacity"
        )
    return lengths.astype(np.int64)


def next_fit(lengths, capacity: int) -> np.ndarray:
    """Keep one pack open; a row that does not fit closes it for good.

        lengths 5 4 3 6 2, capacity 10:   |5 4 .|  |3 6 .|  |2 ........|   ->  0 0 1 1 2

    Args:
        lengths: int[n], tokens a row, in the order to be packed.
        capacity: tokens a pack.

    Returns:
        int64[n], pack number of every row.
    """
    lengths = check_lengths(lengths, capacity)
    packs = np.empty(lengths.size, dtype=np.int64)
    pack, load = 0, 0
    for row, length in enumerate(lengths.tolist()):
        if load + length > capacity:
            pack, load = pack + 1, 0
        packs[row] = pack
        load += length
    return packs


def first_fit_decreasing(lengths, capacity: int) -> np.ndarray:
    """Longest first, each into the lowest-numbered pack that has room.

        lengths 5 4 3 6 2, capacity 10:   6 | 5 | 4 -> beside 6 | 3 -> beside 5 | 2 -> beside 5 3
                                          |6 4|  |5 3 2|   ->  1 0 1 0 1
    Args and returns as `next_fit`. A binary tree holds the largest room below each node; a row walks down it.
    """
    lengths = check_lengths(lengths, capacity)
    n = lengths.size
    leaves = 1 << max(0, (n - 1).bit_length())
    room = [int(capacity)] * (2 * leaves)
    packs = np.empty(n, dtype=np.int64)
    values = lengths.tolist()
    for row in np.argsort(-lengths, kind="stable").tolist():
        need, node = values[row], 1
        while node < leaves:
            node *= 2
            if room[node] < need:
                node += 1
        packs[row] = node - leaves
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def best_fit_decreasing(lengths, capacity: int) -> np.ndarray:
    """Longest first, each into the pack with the least room that still holds it (the textbook rule, ties by age).

        lengths 5 4 3 6 2, capacity 10:   6 | 5 | 4 -> beside 6 (room 4 < room 5) | 3 -> beside 5 | 2 -> beside 5 3
                                          |6 4|  |5 3 2|   ->  1 0 1 0 1

    Rows of one length ``l`` are placed together: a pack with the least room ``r >= l`` takes ``r // l`` of them before
    any other pack is the best fit, because its room only shrinks. So the loop runs over different lengths and the packs
    touched, and finds "the least room >= l" by looking into a bit set of rooms that are present.

    Args and returns as `next_fit`. The multiset of pack loads is that of the textbook loop.
    """
    lengths = check_lengths(lengths, capacity)
    order = np.argsort(-lengths, kind="stable")
    present, counts = np.unique(-lengths, return_counts=True)
    packs_sorted = np.empty(lengths.size, dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # room -> packs that have exactly this much room left
    bits, packs, at = 0, 0, 0  # bit r of ``bits`` says that with_room[r] is not empty
    for length, count in zip((-present).tolist(), counts.tolist(), strict=True):
        while count:
            fitting = bits >> length
            if not fitting:  # no open pack fits: open new ones, all filled alike
                each = capacity // length
                new = -(-count // each)
                packs_sorted[at : at + count] = packs + np.arange(count) // each
                newest = packs + new - 1  # it may hold fewer than the others
                rest = count - (new - 1) * each
                groups = ((each, list(range(packs, newest))), (rest, [newest]))
                for inside, group in groups:
                    room = capacity - inside * length
                    if room and group:
                        with_room.setdefault(room, []).extend(group)
                        bits |= 1 << room
                at, packs, count = at + count, packs + new, 0
                continue
            room = length + (fitting & -fitting).bit_length() - 1
            group = with_room[room]
            pack = group.pop()
            if not group:
                bits &= ~(1 << room)
            take = min(room // length, count)
            packs_sorted[at : at + take] = pack
            at, count, left = at + take, count - take, room - take * length
            if left:
                with_room.setdefault(left, []).append(pack)
                bits |= 1 << left
    packs_of = np.empty(lengths.size, dtype=np.int64)
    packs_of[order] = packs_sorted
    return packs_of


def pack_loads(lengths, packs) -> np.ndarray:
    """Tokens in every pack, int64[number of packs]."""
    packs = np.asarray(packs)
    return np.bincount(packs, weights=np.asarray(lengths), minlength=int(packs.max(initial=-1)) + 1).astype(np.int64)


def lower_bound(lengths, capacity: int) -> int:
    """No packing can use fewer packs: max of total tokens over capacity and the rows longer than half of it."""
    lengths = check_lengths(lengths, capacity)
    return max(-(-int(lengths.sum()) // int(capacity)), int((2 * lengths > capacity).sum()))


ALGORITHMS = {f.__name__: f for f in (next_fit, first_fit_decreasing, best_fit_decreasing)}
