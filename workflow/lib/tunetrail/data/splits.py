"""Splitting by source group, and refusing duplicates across splits."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from tunetrail.config import SPLITS, Shares
from tunetrail.data.readers import normalise
from tunetrail.seeds import derive_seed

# Where a duplicate across splits is dropped, the row in the earlier split of this list stays: what
# measures is worth more than what trains.
PRIORITY = ("evaluation", "heldout", "reward", "rl", "sft")
NUM_PERM = 64


def assign_groups(groups: Sequence[str], shares: Shares, seed: int) -> dict[str, str]:
    """Group -> split, so that each split's share of the rows is near its target.

    In a seeded order, each group goes to the split that lacks most rows.

    Args:
        groups: the group of every row.
    """
    sizes = Counter(groups)
    order = sorted(sizes)
    random.Random(derive_seed(seed, "groups")).shuffle(order)
    order.sort(key=lambda g: -sizes[g])  # big groups first, while there is room for them
    missing = {split: getattr(shares, split) * len(groups) for split in SPLITS if getattr(shares, split) > 0}
    assigned = {}
    for group in order:
        split = max(missing, key=lambda s: (missing[s], s))
        assigned[group] = split
        missing[split] -= sizes[group]
    return assigned


def _shingles(text: str) -> set[Hashable]:
    """Word 3-grams; a shorter text is one shingle."""
    words = normalise(text).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def jaccard(a: set[Hashable], b: set[Hashable]) -> float:
    return len(a & b) / len(a | b)


def duplicates_across(texts: Sequence[str], splits: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """(row to keep, row that repeats it) for exact and near duplicates in different splits.

    Candidates come from MinHash LSH (Broder 1997), and count where the true Jaccard similarity of the
    word 3-grams is at least `threshold`. Within one split duplicates are nobody's leak.
    """
    from datasketch import MinHash, MinHashLSH

    order = sorted(range(len(texts)), key=lambda i: (PRIORITY.index(splits[i]), i))
    # One signature for each distinct text: exact repeats are then found for nothing.
    members: dict[str, list[int]] = {}
    for i in order:
        members.setdefault(normalise(texts[i]), []).append(i)
    found = [(rows[0], i) for rows in members.values() for i in rows[1:] if splits[i] != splits[rows[0]]]
    if threshold >= 1:
        return found
    shingles = {text: _shingles(text) for text in members}
    index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=NUM_PERM)
    for text, rows in members.items():
        signature = MinHash(num_perm=NUM_PERM, seed=1)
        signature.update_batch([repr(s).encode() for s in shingles[text]])  # type: ignore[attr-defined]
        near = [
            members[other][0]
            for other in index.query(signature)
            if jaccard(shingles[text], shingles[other]) >= threshold
        ]
        kept = min(near, key=order.index, default=None) if len(near) < 50 else near[0]
        for i in rows:
            if kept is not None and splits[i] != splits[kept]:
                found.append((kept, i))
        index.insert(text, signature)
    return sorted(set(found), key=lambda pair: (pair[1], pair[0]))


def shuffled(rows: Sequence[dict], seed: int, split: str) -> list[dict]:
    """The rows in a seeded order, so that a limit takes a random prefix."""
    rows = sorted(rows, key=lambda row: row["id"])
    random.Random(derive_seed(seed, "rows", split)).shuffle(rows)
    return list(rows)


def histogram(values: Sequence[int], bins: int = 20) -> dict | None:
    """{"mean", "min", "max", "histogram": {"edges", "counts"}} of whole numbers; None for no values."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=min(bins, max(1, max(values) - min(values))))
    return {
        "mean": float(np.mean(values)),
        "min": int(min(values)),
        "max": int(max(values)),
        "histogram": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }
