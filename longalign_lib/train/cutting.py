"""Ways to cut one global batch: who sits in which micro-batch of which rank.

    rank 0   [s3 s0] [s5]      a micro-batch is one packed line, or padded rows, a sequence each
    rank 1   [s1]    [s2 s4]   ranks run micro-batch m side by side; accumulation = micro-batches of a rank

A loss whose weights belong to the global batch has the same gradient under all of them (`invariance`); most others have not
(`wrong_ways`). Micro-batches are dealt like cards: number m * ranks + r is micro-batch m of rank r, so that only the last ones
may be missing. Cost: nothing but lists. Shapes: those of `collate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from longalign_lib.train.collate import collate
from longalign_lib.train.loss import IGNORE
from longalign_lib.train.plan import COLUMNS, Plan


@dataclass(frozen=True)
class Cutting:
    """One way to cut a global batch.

    Attributes:
        name: in words.
        ranks: ``ranks[r][m]`` holds the numbers of the sequences of micro-batch m of rank r, in their order.
        padded: whether a micro-batch is padded rows rather than one packed line.
    """

    name: str
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    padded: bool = False

    @property
    def accumulation(self) -> int:
        """Micro-batches of the rank that has most."""
        return max(len(rank) for rank in self.ranks)

    @property
    def micro_batches(self) -> list[tuple[int, ...]]:
        """All micro-batches in the order in which they are dealt."""
        return [rank[m] for m in range(self.accumulation) for rank in self.ranks if m < len(rank)]

    @property
    def lines(self) -> list[tuple[int, ...]]:
        """All lines of tokens: packs, or padded rows of one sequence."""
        return [line for batch in self.micro_batches for line in (((i,) for i in batch) if self.padded else (batch,))]

    def batches(self, sequences, rank: int = 0, weights=None, pad_id: int = 0) -> list[dict]:
        """The micro-batches of a rank as tensors for a stock model.

        Args:
            sequences: (input_ids, labels) of each sequence, labels unshifted with -100 off the targets.
            rank: whose.
            weights: float[n], weight of a target token of each sequence, for ``loss_weights``; 1 by default.
            pad_id: filler of padded rows.

        Returns:
            What `collate` makes of each micro-batch.
        """
        weights = np.ones(len(sequences)) if weights is None else np.asarray(weights)
        found = []
        for batch in self.ranks[rank]:
            rows = pd.DataFrame({"offset": range(len(batch)), "row": batch, "length": [len(sequences[i][0]) for i in batch]})
            found.append(collate(rows, sequences, weights[list(batch)], padded=self.padded, pad_id=pad_id))
        return found

    def plan(self, sequences) -> Plan:
        """The same cutting as a Plan of one step; a LongAlignTrainer with ``balance=False`` deals it exactly so.

        Raises:
            ValueError: a micro-batch other than the last ones is missing, or one is empty.
        """
        lines, batches = [], [(r, batch) for m in range(self.accumulation) for r, rank in enumerate(self.ranks) for batch in rank[m : m + 1]]
        for pack, (rank, batch) in enumerate(batches):
            if rank != pack % len(self.ranks) or not batch:
                raise ValueError(f"{self.name}: micro-batch {pack} of a plan goes to rank {pack % len(self.ranks)}, none may be "
                                 f"empty, and only the last may be missing; here it is rank {rank}'s {batch}")  # fmt: skip
            lengths = [len(sequences[i][0]) for i in batch]
            steps = [max(lengths)] * len(batch) if self.padded else lengths
            for row, length, offset in zip(batch, lengths, np.cumsum([0, *steps[:-1]]), strict=True):
                lines.append((0, 0, pack, offset, row, 0, length, n_targets(sequences[row])))
        table = pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)
        room = max(max(self._slots(batch, sequences)) for _, batch in batches)
        return Plan(table, "naive" if self.padded else "packed", int(room), self.accumulation * len(self.ranks), len(sequences),
                    max(len(batch) for _, batch in batches) if self.padded else 1, len(self.ranks))  # fmt: skip

    def _slots(self, batch, sequences) -> list[int]:
        lengths = [len(sequences[i][0]) for i in batch]
        return [max(lengths) * len(batch) if self.padded else sum(lengths)]


def n_targets(sequence) -> int:
    """N_i: target tokens of (input_ids, labels); the first token never is one."""
    return int((np.asarray(sequence[1])[1:] != IGNORE).sum())


def cut(name: str, groups, ranks: int = 1, padded: bool = False) -> Cutting:
    """Deal groups of sequences to ranks as micro-batches: group m * ranks + r becomes micro-batch m of rank r."""
    dealt = tuple(tuple(tuple(int(i) for i in g) for g in groups[r::ranks]) for r in range(ranks))
    return Cutting(name, dealt, padded)


def make_cuttings(lengths, ranks: int = 1, *, short: bool = False, seed: int = 0) -> list[Cutting]:
    """Cuttings that differ in packing, order, micro-batch size, accumulation and layout.

    Args:
        lengths: int[n], tokens of each sequence.
        ranks: processes.
        short: also cuttings whose last micro-step leaves ranks without a micro-batch; not every trainer can do that.
        seed: of the random ones.

    Returns:
        Cuttings with different names. Those that need more sequences than there are, are left out.

    Raises:
        ValueError: fewer than two sequences, or fewer than ranks.

    Example:
        >>> make_cuttings([5, 9, 4, 7], ranks=2)[0].ranks
        (((0,), (2,)), ((1,), (3,)))
    """
    lengths = np.asarray(lengths)
    n, rng = lengths.size, np.random.default_rng(seed)
    if n < max(2, ranks) or ranks < 1:
        raise ValueError(f"{n} sequences on {ranks} ranks: give at least two, one a rank")
    whole = n // ranks * ranks
    singles = [[i] for i in range(whole)]
    for i in range(whole, n):
        singles[i - n].append(i)  # so that every rank has as many
    by_length = np.argsort(-lengths, kind="stable")

    def parts(count: int):
        """A random order cut at random places into ``count`` groups."""
        edges = np.sort(rng.choice(np.arange(1, n), count - 1, replace=False))
        return np.split(rng.permutation(n), edges)

    k2, k3 = 2 * ranks, 3 * ranks
    found = [("one by one", singles, False), ("one by one, backwards, padded", [g[::-1] for g in singles[::-1]], True),
             ("one pack a rank", np.array_split(np.arange(n), ranks), False),
             ("one pack a rank, random order", parts(ranks), False),
             ("all rows of a rank padded together", parts(ranks), True)]  # fmt: skip
    if n >= k2:
        alone = [[i] for i in by_length[: k2 - 1]]
        found += [("the longest alone, the rest in one pack", [*alone, by_length[k2 - 1 :]], False),
                  ("neighbours in length, accumulation 2", np.array_split(by_length, k2), False),
                  ("random packs, accumulation 2", parts(k2), False),
                  ("padded rows, accumulation 2", parts(k2), True)]  # fmt: skip
    if n >= k3:
        found += [("random packs, accumulation 3", parts(k3), False), ("padded rows, accumulation 3", parts(k3), True)]
    if short and ranks > 1 and n >= k2:
        found += [("a pack too few for the last micro-step", parts(k2 - 1), False), ("one pack and no other", [np.arange(n)], False),
                  ("padded rows, one micro-batch too few", parts(k2 - 1), True)]  # fmt: skip
    return [cut(name, groups, ranks, padded) for name, groups, padded in found]


def random_sequences(n: int = 12, vocabulary: int = 97, longest: int = 40, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sequences that tell wrong normalisations apart: (input_ids, labels), labels unshifted.

    The first is the longest with two targets, the second short with all tokens as targets, the third has one target; of the
    others every second keeps all its labels, the first token's too, and every second those of its last tokens.
    """
    if n < 3 or longest < 8 or vocabulary < 5:
        raise ValueError(f"{n} sequences up to {longest} tokens of {vocabulary} words: give at least 3, 8 and 5")
    rng = np.random.default_rng(seed)
    lengths = [longest, 5, longest // 2, *rng.integers(4, longest, n - 3)]
    first_target = [longest - 2, 0, longest // 2 - 1, *(0 if i % 2 else rng.integers(1, lengths[i] - 1) for i in range(3, n))]
    rows = []
    for length, first in zip(lengths, first_target, strict=True):
        ids = rng.integers(3, vocabulary, length)
        rows.append((ids, np.where(np.arange(length) >= first, ids, IGNORE)))
    return rows
