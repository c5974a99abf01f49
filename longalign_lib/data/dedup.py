"""Near-duplicates: found by MinHash and locality-sensitive hashing (`datasketch`), removed only on an exact count.

A text is cut into units (a Latin word or number, lower case, or a single Chinese character); its shingles are all runs of
five units, as a set of 64-bit hashes. Two texts are near-duplicates when the Jaccard similarity of their sets, shared
over all shingles, is at least the threshold. MinHash signatures of 128 values, cut into b bands of r, propose pairs: one
of similarity s is proposed with probability 1 - (1 - s^r)^b (`recall_at`; b and r are set so that this is 0.99 at the
threshold). Every proposal is then counted exactly.

Rule: documents are taken from the longest to the shortest (by shingles, then by id); each stays unless it is a
near-duplicate of one that stays. Invariants: what is removed names a kept document with a similarity >= threshold, so
nothing is removed falsely; the outcome depends neither on the order of the documents nor on Python's hash seed.
Cost: 128 multiply-adds and 0.5 microseconds a shingle, about 10 kB a kept document; texts are read again for a proposal.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from longalign_lib.data.documents import Document

SHINGLE = 5
PERMUTATIONS = 128
_UNITS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 16_384  # shingles hashed at a time: 8 MB of permuted values


def shingles(text: str, size: int = SHINGLE) -> np.ndarray:
    """The set of shingles of a text as sorted uint64 hashes; a text shorter than `size` units is one shingle.

    A text without any unit (only signs) is cut into its characters instead.
    """
    units = _UNITS.findall(text.lower()) or list("".join(text.split()))
    if not units:
        return np.zeros(0, dtype=np.uint64)
    known: dict[str, int] = {}
    for unit in units:
        if unit not in known:
            raw = unit.encode("utf-8", "replace")
            known[unit] = zlib.crc32(raw) << 32 | zlib.adler32(raw)
    codes = np.fromiter((known[unit] for unit in units), dtype=np.uint64, count=len(units))
    size = min(size, len(codes))
    count = len(codes) - size + 1
    hashes = np.full(count, len(codes) if count == 1 else size, dtype=np.uint64)
    for offset in range(size):  # wraps around 2**64, which is meant
        hashes = (hashes ^ codes[offset : offset + count]) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared over all shingles of two sets (sorted unique arrays); two empty sets have 0."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def recall_at(similarity: float, threshold: float = 0.8) -> float:
    """Chance that a pair of this similarity is proposed: 1 - (1 - s^r)^b."""
    bands, rows = _bands(threshold)
    return 1 - (1 - similarity**rows) ** bands


def find_near_duplicates(
    ids: Sequence[str],
    text_of: Callable[[int], str],
    *,
    threshold: float = 0.8,
    seed: int = 1,
    progress: bool = False,
) -> list[dict]:
    """Which documents are near-duplicates of a longer (or, at equal length, by id earlier) one that stays.

    Args:
        ids: of the documents, unique.
        text_of: the text at a position of `ids`; read once, and again when it is proposed.
        threshold: Jaccard similarity from which a document is removed, above 0.
        seed: of the permutations.
        progress: show a bar.

    Returns:
        list of {"id", "reason", "duplicate_of", "jaccard", "position"} in the order of `ids`.

    Raises:
        ValueError: a threshold outside (0, 1], ids that are not unique.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; give a Jaccard similarity above 0 and at most 1")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} ids are repeated; give each document its own")
    sets = functools.lru_cache(maxsize=64)(lambda position: shingles(text_of(position)))
    signatures, sizes = [], []
    for position in tqdm(range(len(ids)), desc="signatures", disable=not progress, leave=False):
        found = sets(position)
        sizes.append(len(found))
        signatures.append(_signature(found, seed))
    index = _index(threshold)
    removed = []
    for position in sorted(range(len(ids)), key=lambda i: (-sizes[i], ids[i])):
        if sizes[position] == 0:
            continue
        own = _minhash(seed, signatures[position])
        best = (0.0, -1)
        for other in sorted(index.query(own)):
            # |A & B| / |A | B| is at most the smaller size over the larger: most proposals end here.
            if sizes[position] < threshold * sizes[other]:
                continue
            similarity = jaccard(sets(position), sets(other))
            if similarity >= threshold and (similarity, -other) > (best[0], -best[1]):
                best = (similarity, other)
        similarity, other = best
        if other < 0:
            index.insert(position, own)
            continue
        reason = f"near-duplicate of {ids[other]} (Jaccard {similarity:.3f})"
        note = {"id": ids[position], "reason": reason, "duplicate_of": ids[other], "jaccard": similarity}
        removed.append(note | {"position": position})
    return sorted(removed, key=lambda note: note["position"])


def remove_near_duplicates(
    documents: Sequence[Document], *, threshold: float = 0.8, seed: int = 1
) -> tuple[list[Document], list[dict]]:
    """The documents without near-duplicates, in their order, and the removals; see `find_near_duplicates`."""
    notes = find_near_duplicates([d.id for d in documents], lambda i: documents[i].text, threshold=threshold, seed=seed)
    gone = {note.pop("position") for note in notes}
    return [d for position, d in enumerate(documents) if position not in gone], notes


@functools.cache
def _blank(seed: int):
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=seed, hashfunc=_same, scheme="affine32")


def _same(value: int) -> int:
    return value


def _minhash(seed: int, hashvalues: np.ndarray):
    from datasketch import MinHash

    permutations = _blank(seed).permutations
    return MinHash(hashvalues=hashvalues, permutations=permutations, seed=seed, hashfunc=_same, scheme="affine32")


def _signature(found: np.ndarray, seed: int) -> np.ndarray:
    own = _blank(seed).copy()
    small = (found >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(small), _BLOCK):
        own.update_batch(small[start : start + _BLOCK].tolist())
    return own.hashvalues


@functools.cache
def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band): the longest rows with which a pair at the threshold is still proposed 99 times of 100."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


def _index(threshold: float):
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, params=_bands(threshold))
