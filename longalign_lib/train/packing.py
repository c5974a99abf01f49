"""Bin packing of sequences: which pack does every row go into?

Each function maps ``(lengths, capacity)`` to the pack number of every row, numbered 0, 1, … without gaps. No pack holds more
than ``capacity`` tokens, a pack may be exactly full, every row is in exactly one pack; any whole capacity works. This file
needs NumPy and nothing else: copy it whole.

    next_fit             one open pack; O(n). The published way, for comparison: it fills about 0.8.
    first_fit_decreasing longest first, into the first pack with room; O(n log m) by a tree over the packs' room
    best_fit_decreasing  longest first, into the fullest pack with room; a loop over the different lengths and the rooms that
                         they meet, not over rows: 1,000,000 rows in 0.2 s
    cost_balanced        as few packs as best fit, and the packs' costs (attention work) as level as rows allow; O(n log m)

The multiset of pack loads depends on the multiset of lengths alone (next_fit: on their order too). Rows over the capacity are
an error here: cut, split or drop them first. From numbers to packs, and why in random order: packs are numbered as they are
opened, those with the longest rows first.

    packs = best_fit_decreasing([len(ids) for ids in rows], 8192)          # int64[n]
    members = rows_by_pack(packs)                                          # a list of arrays of row numbers
    for k in np.random.default_rng(seed).permutation(len(members)):
        train_on(np.concatenate([rows[i] for i in members[k]]))            # with attention kept inside each row
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np


def whole_lengths(lengths) -> np.ndarray:
    """Return ``lengths`` as int64[n]; ValueError names the first entry that is no count of tokens."""
    try:
        values = np.asarray(lengths)
    except ValueError:  # rows of tokens of different length
        values = np.empty((0, 0))
    if values.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional, a number of tokens for each row (a list or an array), got "
                         f"shape {values.shape} of a {type(lengths).__name__}")  # fmt: skip
    if values.size and not np.issubdtype(values.dtype, np.integer):
        odd = next((f"row {i} is {x!r}" for i, x in enumerate(values.tolist()) if type(x) is not int), "a number is too large")
        raise ValueError(f"lengths must be whole numbers of tokens, got dtype {values.dtype} ({odd})")
    whole = values.astype(np.int64)
    if (whole < 0).any():
        row = int(np.flatnonzero(whole < 0)[0])
        raise ValueError(f"row {row} has {int(values[row])} tokens: lengths are counts, from 0 to 2^63 - 1")
    return whole


def whole_number(name: str, value, most: int = 2**63 - 1) -> int:
    """Return ``value`` as an int; ValueError unless it is a whole number, at least 1 and at most ``most``."""
    try:
        good = not isinstance(value, bool | np.bool_ | str) and int(value) == value and 1 <= value <= most
    except (TypeError, ValueError, OverflowError):  # None, NaN, infinity, a list
        good = False
    if not good:
        raise ValueError(f"{name} must be a whole number {'>= 1' if most == 2**63 - 1 else f'in 1..{most}'}, got {value!r}")
    return int(value)


def check_lengths(lengths, capacity: int, names=None) -> np.ndarray:
    """Return ``lengths`` as int64[n]; raise ValueError naming the first row that is empty, longer than capacity, or no number.

    ``names`` are the row numbers to name, 0..n-1 by default.
    """
    lengths, capacity = whole_lengths(lengths), whole_number("capacity", capacity)
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if bad.size:
        row = int(bad[0] if names is None else names[bad[0]])
        raise ValueError(
            f"row {row} has {int(lengths[bad[0]])} tokens, outside 1..{capacity} ({bad.size} such rows): "
            "cut, split or leave them out first, or raise the capacity"
        )
    return lengths


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
    order, present, counts = _longest_first(lengths)
    leaves = 1 << max(0, (lengths.size - 1).bit_length())
    room = [int(capacity)] * (2 * leaves)
    into, takes = [], []  # pack ``into[k]`` takes the next ``takes[k]`` rows of ``order``
    for need, count in zip(present.tolist(), counts.tolist(), strict=True):
        while count:
            node = 1
            while node < leaves:
                node *= 2
                if room[node] < need:
                    node += 1
            take = min(room[node] // need, count)
            into.append(node - leaves)
            takes.append(take)
            count -= take
            room[node] -= take * need
            while node > 1:
                node //= 2
                room[node] = max(room[2 * node], room[2 * node + 1])
    return _spread(order, into, takes)


def best_fit_decreasing(lengths, capacity: int, rooms=None) -> np.ndarray:
    """Longest first, each into the pack with the least room that still holds it (the textbook rule).

        lengths 5 4 3 6 2, capacity 10:   6 | 5 | 4 -> beside 6 (room 4 < room 5) | 3 -> beside 5 | 2 -> beside 5 3
                                          |6 4|  |5 3 2|   ->  1 0 1 0 1

    Rows of one length ``l`` are placed together: every pack with the least room ``r >= l`` takes ``r // l`` of them before
    any other pack is the best fit, because its room only shrinks. So packs are kept in groups of one room, and a group
    moves at once. "The least room >= l" is found in a bit set of two levels: a bit for every room, and a bit for every word.

    Args:
        lengths: int[n], tokens a row, in any order.
        capacity: tokens a pack.
        rooms: int[k], tokens still free in packs 0..k-1 that are already open; none by default.

    Returns:
        int64[n], pack number of every row. The multiset of pack loads is that of the textbook loop.
    """
    lengths = check_lengths(lengths, capacity)
    capacity = int(capacity)
    order, present, counts = _longest_first(lengths)
    shift = (capacity.bit_length() + 1) // 2
    low = (1 << shift) - 1
    words, summary = [0] * ((capacity >> shift) + 1), 0  # bit r & low of words[r >> shift]: some pack has room r
    groups: dict[int, list[int]] = {}  # room -> the packs that have exactly this much left
    into, takes = [], []
    packs = 0

    def add(room: int, members: list[int]) -> None:
        nonlocal summary
        if not room or not members:
            return
        if room in groups:
            groups[room] += members
        else:
            groups[room] = members
            words[room >> shift] |= 1 << (room & low)
            summary |= 1 << (room >> shift)

    def remove(room: int) -> None:
        nonlocal summary
        del groups[room]
        words[room >> shift] ^= 1 << (room & low)
        if not words[room >> shift]:
            summary ^= 1 << (room >> shift)

    for pack, room in enumerate([] if rooms is None else np.asarray(rooms).tolist()):
        if type(room) is not int or not 0 <= room <= capacity:
            raise ValueError(f"rooms[{pack}] is {room}, no whole number in 0..{capacity}")
        add(room, [pack])
        packs += 1
    for length, count in zip(present.tolist(), counts.tolist(), strict=True):
        while count:
            word = length >> shift
            found = words[word] >> (length & low)
            if found:
                room = length + (found & -found).bit_length() - 1
            else:  # nothing in this word: the next word that has a bit
                later = summary >> (word + 1)
                if not later:
                    break
                word += (later & -later).bit_length()
                room = (word << shift) + (words[word] & -words[word]).bit_length() - 1
            group, each = groups[room], room // length
            whole, rest = divmod(count, each)
            if whole >= len(group):
                moved, rest = group, 0
                remove(room)
            else:
                moved = group[len(group) - whole :]
                del group[len(group) - whole :]
                if rest:
                    last = group.pop()
                    add(room - rest * length, [last])
                if not group:
                    remove(room)
            into += moved
            takes += [each] * len(moved)
            count -= each * len(moved) + rest
            add(room - each * length, moved)
            if rest:
                into.append(last)
                takes.append(rest)
        if count:  # no open pack fits: open new ones, all filled alike
            each = capacity // length
            whole, rest = divmod(count, each)
            for new, take in ((whole, each), (1, rest)):
                if take and new:
                    fresh = list(range(packs, packs + new))
                    into += fresh
                    takes += [take] * new
                    packs += new
                    add(capacity - take * length, fresh)
    return _spread(order, into, takes)


def cost_balanced(lengths, capacity: int, cost=None, tail: float = 0.005, slack: float = 0.005) -> np.ndarray:
    """As few packs as best-fit decreasing, with their costs as level as the rows allow.

        lengths 6 3 3 3 2 2 1, capacity 10, cost l^2:
            best fit    |6 3 1| |3 3 2 2|    costs 46 and 26
            levelled    |6 2 2| |3 3 3 1|    costs 44 and 28: the 3s go beside each other, where it is cheap
                                             ->  0 1 1 1 0 0 1

    Longest rows first (most costly first, when cost grows with length), each into the **cheapest** pack that still has room:
    Graham's rule, over as many packs as best-fit decreasing needs. Packs without room step aside until rows are short enough.
    The shortest rows, ``tail`` of all tokens, wait, and fill the cracks by best fit.

    Besides the costs it levels the number of rows in a pack: best fit puts the short rows together into the last packs, 800
    of them in one, where here every pack gets some. A loss that divides by each step's own number of sequences is therefore
    far less biased towards long rows.

    Args:
        lengths: int[n], tokens a row, in any order.
        capacity: tokens a pack.
        cost: lengths -> cost of every row, growing with the length; a pack costs the sum of its rows. By default attention
            plus linear work of a 7B model, ``l^2 / 2 + 24,576 l`` token pairs.
        tail: share of all tokens kept back for filling.
        slack: share of packs more than best-fit decreasing at which its packing is returned instead.

    Returns:
        int64[n], pack number of every row; at most ``1 + slack`` times as many packs as best-fit decreasing makes.
    """
    lengths = check_lengths(lengths, capacity)
    fewest = best_fit_decreasing(lengths, capacity)
    if not lengths.size:
        return fewest
    order, _, _ = _longest_first(lengths)
    costs = np.asarray(lengths * (lengths / 2 + 24_576) if cost is None else cost(lengths), dtype=float)
    if costs.shape != lengths.shape or not np.isfinite(costs).all():
        raise ValueError(f"cost must give one finite number a row, got shape {costs.shape} for {lengths.shape}")
    if not (0 <= tail <= 1 and slack >= 0):
        raise ValueError(f"tail is a share of tokens in 0..1 and slack a share of packs >= 0, got {tail!r} and {slack!r}")
    before = np.cumsum(lengths[order])
    early = int(np.searchsorted(before, (1 - tail) * before[-1]))
    count = int(fewest.max()) + 1
    heap = [(0.0, pack) for pack in range(count)]  # (cost so far, pack): the cheapest on top
    room = [int(capacity)] * count
    aside: dict[int, list] = {}  # room -> packs that were too full for the row at hand
    full: list[int] = []  # the keys of ``aside``, ascending
    packs = np.full(lengths.size, -1, dtype=np.int64)
    left_over = []
    for row, length, price in zip(order[:early].tolist(), lengths[order[:early]].tolist(), costs[order[:early]].tolist()):
        while full and full[-1] >= length:
            for entry in aside.pop(full.pop()):
                heapq.heappush(heap, entry)
        while heap and room[heap[0][1]] < length:
            entry = heapq.heappop(heap)
            if room[entry[1]] not in aside:
                aside[room[entry[1]]] = []
                bisect.insort(full, room[entry[1]])
            aside[room[entry[1]]].append(entry)
        if not heap:
            left_over.append(row)
            continue
        so_far, pack = heap[0]
        packs[row] = pack
        room[pack] -= length
        heapq.heapreplace(heap, (so_far + price, pack))
    rest = np.concatenate([np.array(left_over, dtype=np.int64), order[early:]])
    packs[rest] = best_fit_decreasing(lengths[rest], capacity, room)
    _, packs = np.unique(packs, return_inverse=True)  # a pack that got no row leaves no gap
    return packs if packs.max() + 1 <= count * (1 + slack) else fewest


def radix_argsort(keys) -> np.ndarray:
    """Stable ``argsort`` of whole numbers >= 0, 16 bits a pass (NumPy sorts 16 bits by counting): 5 times faster."""
    keys = np.asarray(keys, dtype=np.int64)
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    while keys.size and int(keys.max()) > 0xFFFF:
        keys = keys >> 16
        order = order[np.argsort((keys[order] & 0xFFFF).astype(np.uint16), kind="stable")]
    return order


def _longest_first(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from the longest to the shortest (stable), the lengths present in that order, and how many rows have each."""
    if not lengths.size:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    order = radix_argsort(int(lengths.max()) - lengths)
    descending = lengths[order]
    starts = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
    return order, descending[starts], np.diff(np.append(starts, lengths.size))


def _spread(order: np.ndarray, into: list[int], takes: list[int]) -> np.ndarray:
    """Give the next ``takes[k]`` rows of ``order`` the pack ``into[k]``."""
    packs = np.empty(order.size, dtype=np.int64)
    packs[order] = np.repeat(np.array(into, dtype=np.int64), np.array(takes, dtype=np.int64))
    return packs


def pack_loads(lengths, packs) -> np.ndarray:
    """Tokens in every pack, int64[number of packs]; exact up to 2**53 tokens a pack."""
    packs = np.asarray(packs, dtype=np.int64)
    return np.bincount(packs, weights=np.asarray(lengths), minlength=int(packs.max(initial=-1)) + 1).astype(np.int64)


def rows_by_pack(packs) -> list[np.ndarray]:
    """Row numbers of every pack, ascending in each: ``rows_by_pack([1, 0, 1])`` is ``[array([1]), array([0, 2])]``."""
    packs = np.asarray(packs, dtype=np.int64)
    ends = np.cumsum(np.bincount(packs))
    return np.split(radix_argsort(packs), ends[:-1]) if packs.size else []


def lower_bound(lengths, capacity: int) -> int:
    """No packing can use fewer packs: max of total tokens over capacity and the rows longer than half of it."""
    lengths = check_lengths(lengths, capacity)
    total = int((lengths >> 32).sum()) * 2**32 + int((lengths & (2**32 - 1)).sum())  # beyond 2**63 too
    return max(-(-total // int(capacity)), int((lengths > int(capacity) // 2).sum()))


ALGORITHMS = {f.__name__: f for f in (next_fit, first_fit_decreasing, best_fit_decreasing, cost_balanced)}
