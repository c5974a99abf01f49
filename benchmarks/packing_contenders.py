"""Who takes part in `packing.py`: packing functions, ours and published ones, and what their answers are judged by.

A contender is ``prepare(lengths, capacity) -> (call, read)``: ``call()`` is timed, and ``read`` of what it returned gives, for
every row that was placed, its pack and its length. ``prepare`` brings the lengths into the form that the contender wants, and
imports it, so that a missing one is its own line only.

TRL's packing moves tokens: it is given rows of tokens that take no bytes (an Arrow column of nulls), the cheapest there
are, and its loop is timed alone, too. axolotl's and seqpacker's options are those that their own trainer and manual use.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from longalign_lib.train.packing import ALGORITHMS, lower_bound

CAPACITY, SEED, BATCH = 65_536, 0, 8
PLAN = dict(capacity=CAPACITY, packs_per_step=64, max_ranks=8)


def mix(rows: int, seed: int = SEED, capacity: int = CAPACITY) -> np.ndarray:
    """The lengths that everyone packs, int64[rows], see `paper_scale.mix`."""
    from longalign_lib.train.paper_scale import mix as lengths

    return lengths(rows, seed, capacity)


def published_rule(lengths, capacity: int, seed: int = SEED) -> np.ndarray:
    """Next-fit as the paper's authors published it, int64[n]: the pack of every row, -1 for a row that is lost.

    Rows come in random order and one pack is open. A row joins while the pack stays **below** the capacity, so a pack of
    several rows is never exactly full; otherwise the pack is written and the row opens the next. The pack that is open
    at the end is never written. (Their rows of full length fail earlier, in tokenization; here they open a pack.)
    """
    lengths = np.asarray(lengths)
    packs = np.empty(lengths.size, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(lengths.size)
    pack, load = 0, 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if load and load + length >= capacity:
            pack, load = pack + 1, 0
        packs[row] = pack
        load += length
    packs[packs == pack] = -1
    return packs


def trl_binning(lengths, capacity: int) -> list[dict]:
    """The loop of TRL's best-fit decreasing over TRL's own tree, without its token tables: rows and load of every pack."""
    from trl.data_utils import _SegmentTree

    tree, by_room, bins = _SegmentTree(capacity), defaultdict(deque), []
    tree.add(capacity)
    order = np.argsort(-lengths, kind="stable")
    for length, row in zip(lengths[order].tolist(), order.tolist(), strict=True):
        room = tree.search(length)
        if room < capacity:
            pack = by_room[room].popleft()
        else:
            pack = {"ids": [], "length": 0}
            bins.append(pack)
        pack["ids"].append(row)
        pack["length"] += length
        if room < capacity and not by_room[room]:
            tree.remove(room)
        if room > length:
            by_room[room - length].append(pack)
            tree.add(room - length)
    return bins


def _ours(algorithm):
    return lambda lengths, capacity: (lambda: algorithm(lengths, capacity), lambda packs: (packs, lengths))


def _published(lengths, capacity):
    return lambda: published_rule(lengths, capacity), lambda packs: (packs[packs >= 0], lengths[packs >= 0])


def _of_lists(lists, lengths):
    """Packs given as lists of row numbers."""
    rows = np.fromiter((row for rows in lists for row in rows), dtype=np.int64)
    return np.repeat(np.arange(len(lists)), [len(rows) for rows in lists]), lengths[rows]


def _trl_alone(lengths, capacity):
    import trl.data_utils  # noqa: F401  missing: say so before the clock starts

    return lambda: trl_binning(lengths, capacity), lambda bins: _of_lists([b["ids"] for b in bins], lengths)


def _trl(batch_size):
    def prepare(lengths, capacity):
        import datasets
        import pyarrow as pa
        from trl import pack_dataset

        datasets.disable_progress_bars()
        datasets.disable_caching()
        starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        rows = pa.LargeListArray.from_arrays(starts, pa.nulls(int(lengths.sum())))  # tokens of no bytes
        data = datasets.Dataset(pa.table({"input_ids": rows}))

        def call():
            return pack_dataset(data, capacity, strategy="bfd", map_kwargs={"batch_size": batch_size})

        def read(packed):
            lists = packed.data.column("seq_lengths").combine_chunks()
            counts = lists.value_lengths().to_numpy()
            return np.repeat(np.arange(counts.size), counts), lists.flatten().to_numpy()

        return call, read

    return prepare


def _binpacking(lengths, capacity):
    import binpacking

    rows = dict(enumerate(lengths.tolist()))
    return lambda: binpacking.to_constant_volume(rows, capacity), lambda bins: _of_lists([list(b) for b in bins], lengths)


def _axolotl(lengths, capacity):
    from axolotl.utils.samplers.multipack import pack_parallel

    lengths = lengths.astype(np.int32)  # as its sampler holds them; 200 and 100,000 are its trainer's defaults
    call = lambda: pack_parallel(lengths, capacity, group_size=100_000, bin_size=200, num_processes=1)  # noqa: E731
    return call, lambda bins: _of_lists(bins, lengths)


def _seqpacker(lengths, capacity):
    import seqpacker

    def read(flat):
        rows, ends = flat  # np.split(rows, ends) gives the packs
        return np.searchsorted(ends, np.arange(rows.size), side="right"), lengths[rows]

    return lambda: seqpacker.Packer(capacity, "obfd").pack_flat(lengths), read


def _length_groups(lengths, capacity):
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    values = lengths.tolist()
    call = lambda: get_length_grouped_indices(values, BATCH, generator=torch.Generator().manual_seed(SEED))  # noqa: E731
    return call, lambda order: (np.arange(len(order)) // BATCH, lengths[order])


def _plan(method):
    def prepare(lengths, capacity):
        from longalign_lib.train.plan import build_plan

        call = lambda: build_plan(lengths, method=method, seed=SEED, **PLAN | {"capacity": capacity})  # noqa: E731
        return call, lambda plan: (plan.table.pack.to_numpy(), plan.table.length.to_numpy().astype(np.int64))

    return prepare


PACKERS = {f"ours: {name}": _ours(algorithm) for name, algorithm in ALGORITHMS.items()}
PEERS = {"published next-fit": _published, "TRL bfd, its loop alone": _trl_alone, "TRL bfd, one table": _trl(None),
         "TRL bfd, batches of 1,000": _trl(1000), "binpacking": _binpacking, "axolotl multipack": _axolotl,
         "seqpacker obfd": _seqpacker, "transformers length groups": _length_groups}  # fmt: skip
PLANS = {f"plan: {method}": _plan(method) for method in ("packed", "balanced")}
PADDED = ("transformers length groups",)  # batches padded to their longest row, no packs


def outcome(pack, length, lengths, capacity: int, padded: bool = False) -> dict:
    """What was made of the rows: packs (or batches), rows lost, fill, waste and gap to the lower bound in percent.

    Args:
        pack, length: int[k], of every row that was placed.
        lengths: int[n], all rows that were given.
        padded: ``pack`` numbers batches padded to their longest row; they have no gap.

    Raises:
        ValueError: a pack is over the capacity, or a row was placed that was never given.
    """
    pack, length = np.unique(np.asarray(pack), return_inverse=True)[1], np.asarray(length).astype(np.int64)
    size = int(max(lengths.max(initial=0), length.max(initial=0))) + 1
    extra = np.flatnonzero(np.bincount(length, minlength=size) > np.bincount(lengths, minlength=size))
    if extra.size:
        raise ValueError(f"placed more rows of {extra[0]} tokens than there are")
    packs = int(pack.max(initial=-1)) + 1
    load = np.bincount(pack, weights=length, minlength=packs)
    if padded:
        longest = np.zeros(packs, dtype=np.int64)
        np.maximum.at(longest, pack, length)
        slots = int((np.bincount(pack, minlength=packs) * longest).sum())
    else:
        slots = packs * capacity
        if load.max(initial=0) > capacity:
            raise ValueError(f"a pack holds {int(load.max())} tokens, over the capacity of {capacity}")
    fill = float(length.sum() / slots) if slots else 0.0
    gap = None if padded or not packs else 100 * (packs / lower_bound(length, capacity) - 1)
    return {"packs": packs, "lost": int(lengths.size - length.size), "fill": fill, "waste": 100 * (1 - fill), "gap": gap}
