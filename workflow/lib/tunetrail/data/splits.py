"""Splitting by source group, and refusing duplicates across splits."""

import random
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tunetrail.config.data import KINDS
from tunetrail.data.readers import normalise
from tunetrail.errors import DataError
from tunetrail.seeds import derive_seed

# Where a duplicate across splits is dropped, the row in the earlier split of this list stays: what
# measures is worth more than what trains.
PRIORITY = ("evaluation", "heldout", "reward", "rl", "sft")
NUM_PERM = 64
NAMES = {kind: kind for kind in KINDS} | {"text": "raw text"}


def assign_groups(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Group -> split, so that each split's share of the rows is near its target.

    In a seeded order, each group goes to the split that lacks most rows.

    Args:
        groups: the group of every row.
        shares: split -> share of the rows, above 0.
    """
    sizes = Counter(groups)
    order = sorted(sizes)
    random.Random(derive_seed(seed, "groups")).shuffle(order)
    order.sort(key=lambda g: -sizes[g])  # big groups first, while there is room for them
    missing = {split: share * len(groups) for split, share in shares.items()}
    assigned = {}
    for group in order:
        split = max(missing, key=lambda s: (missing[s], s))
        assigned[group] = split
        missing[split] -= sizes[group]
    return assigned


def pinned_groups(rows: Sequence[dict]) -> dict[str, str]:
    """Group -> split of the rows whose source is pinned to one.

    Args:
        rows: with "group", "where", "pinned" (a split, or None) and "kind".

    Raises:
        DataError: one group is pinned to two splits, or raw text to a split that has no use for it.
    """
    first: dict[str, dict] = {}
    for row in rows:
        if row["pinned"] is None:
            continue
        if row["kind"] == "text" and row["pinned"] not in ("sft", "heldout"):
            raise DataError(
                f"{row['where']}: raw text can go to sft and heldout only, but its source has split: {row['pinned']}"
            )
        other = first.setdefault(row["group"], row)
        if other["pinned"] != row["pinned"]:
            raise DataError(
                f"{row['where']} and {other['where']} are of one group ({row['group'][:40]!r}), but their sources are "
                f"pinned to {row['pinned']} and {other['pinned']}; pin both to one split or remove one row"
            )
    return {group: row["pinned"] for group, row in first.items()}


def assign_splits(rows: Sequence[dict], shares: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, str]:
    """Group -> split for rows of every kind. A group with a row of a pinned source goes to that split as a whole.

    Of the other groups each kind is spread by shares of its own, so that none runs short in a split because another has
    bigger groups. A group of several kinds counts as the first of them in `KINDS`.

    Args:
        rows: with "group", "where", "pinned" (a split, or None) and "kind".
        shares: kind -> split -> share of the rows.

    Raises:
        DataError: rows of a kind that has no share in any split; or see `pinned_groups`.
    """
    kind_of: dict[str, str] = {}
    assigned = pinned_groups(rows)
    rows = [row for row in rows if row["group"] not in assigned]
    for row in rows:
        kind_of[row["group"]] = min(kind_of.get(row["group"], row["kind"]), row["kind"], key=KINDS.index)
    for kind in KINDS:
        own = [row for row in rows if kind_of[row["group"]] == kind]
        if own and not shares.get(kind):
            raise DataError(
                f"{own[0]['where']}: {len(own)} rows of {NAMES[kind]} are of no use: no split that they could go to "
                "has a share; remove the source, give the stage that reads them, or give data.shares"
            )
        assigned |= assign_groups([row["group"] for row in own], shares.get(kind, {}), seed)
    return assigned


def _shingles(text: str) -> set[Hashable]:
    """Word 3-grams; a shorter text is one shingle."""
    words = normalise(text).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def jaccard(a: set[Hashable], b: set[Hashable]) -> float:
    return len(a & b) / len(a | b)


def duplicates_across(
    texts: Sequence[str], splits: Sequence[str], threshold: float, given: Sequence[bool] = ()
) -> list[tuple[int, int]]:
    """(row to keep, row that repeats it), once for each row that repeats one of another split, exactly or nearly.

    Candidates come from MinHash LSH (Broder 1997), and count where the true Jaccard similarity of the
    word 3-grams is at least `threshold`. Within one split duplicates are nobody's leak.

    Args:
        given: whether a row is of a test set that was given as such; empty: none is. Those are kept before any other.
    """
    from datasketch import MinHash, MinHashLSH

    given = given or [False] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: (not given[i], PRIORITY.index(splits[i]), i))
    # One signature for each distinct text: exact repeats are then found for nothing.
    members: dict[str, list[int]] = {}
    for i in order:
        members.setdefault(normalise(texts[i]), []).append(i)
    found = {i: rows[0] for rows in members.values() for i in rows[1:] if splits[i] != splits[rows[0]]}
    if threshold >= 1:
        return [(kept, i) for i, kept in sorted(found.items())]
    shingles = {text: _shingles(text) for text in members}
    position = {text: i for i, text in enumerate(members)}
    # A candidate too many costs a comparison, one too few is a leak: the weights make LSH find about 99% of the pairs
    # at the threshold, and more above it (85% with equal weights).
    index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=NUM_PERM, weights=(0.1, 0.9))
    for text, rows in members.items():
        signature = MinHash(num_perm=NUM_PERM, seed=1)
        signature.update_batch([repr(s).encode() for s in shingles[text]])  # type: ignore[attr-defined]
        candidates = sorted(index.query(signature), key=position.__getitem__)
        near = next((t for t in candidates if jaccard(shingles[text], shingles[t]) >= threshold), None)
        if near is not None:
            kept = members[near][0]
            found |= {i: kept for i in rows if splits[i] != splits[kept] and i not in found}
        index.insert(text, signature)
    return [(kept, i) for i, kept in sorted(found.items())]


TRAINED = ("sft", "reward", "rl")
"""Splits that something is trained on."""


FEWEST_WORDS = 3
"""A prompt of fewer is in any larger text by chance."""


def words_of(text: str) -> list[str]:
    """Case and punctuation aside."""
    return re.findall(r"\w+", text.lower())


def ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """All sequences of n words; fewer words have none."""
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def overlaps(
    prompts: Sequence[str], trained: Mapping[str, Sequence[str]], n: int
) -> list[tuple[float | None, str | None]]:
    """Of each prompt the share of its n-grams that a text of any training split has (as Brown et al. 2020, appendix C,
    look for them), and the split that most of them are in. A prompt of fewer than n words is one such sequence.

    Returns:
        (share, split); (None, None) for a prompt of fewer than FEWEST_WORDS words, (0, None) where no text has any.
    """
    least = min(n, FEWEST_WORDS)
    rows = [ngrams(words, max(least, min(n, len(words)))) for words in map(words_of, prompts)]
    wanted = set().union(*rows)  # training texts may be many: only what is asked for is kept of them
    sizes = {len(gram) for gram in wanted}

    def asked_for(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return set().union(*(ngrams(words, size) & wanted for size in sizes))

    seen = {split: set().union(*map(asked_for, texts)) for split, texts in trained.items()}
    anywhere = set().union(*seen.values())
    found: list[tuple[float | None, str | None]] = []
    for grams in rows:
        share = len(grams & anywhere) / len(grams) if grams else None
        found.append((share, max(seen, key=lambda split: len(grams & seen[split])) if share else None))
    return found


def holders(prompts: Sequence[str], texts: Sequence[Sequence[str]], n: int, limit: float) -> set[int]:
    """Which rows hold, each by itself, more than `limit` of the n-grams of one of the prompts, as `overlaps` counts.

    Args:
        texts: of each row, what it says.
    """
    least = min(n, FEWEST_WORDS)
    grams = [ngrams(words, max(least, min(n, len(words)))) for words in map(words_of, prompts)]
    prompts_with: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            prompts_with.setdefault(gram, []).append(i)
    sizes = {len(gram) for gram in prompts_with}
    found = set()
    for row, said in enumerate(texts):
        held = {gram for words in map(words_of, said) for size in sizes for gram in ngrams(words, size)}
        counts = Counter(i for gram in held & prompts_with.keys() for i in prompts_with[gram])
        if any(count > limit * len(grams[i]) for i, count in counts.items()):
            found.add(row)
    return found


def shuffled(rows: Sequence[dict], seed: int, split: str) -> list[dict]:
    """The rows in a seeded order, whatever order they were read in."""
    rows = sorted(rows, key=lambda row: row["id"])
    random.Random(derive_seed(seed, "rows", split)).shuffle(rows)
    return rows


def in_turns(rows: Sequence[dict], max_per_group: int | None = None) -> list[dict]:
    """The first row of each group, then the second of each, and so on: every prefix is as even as the groups allow.

    Rows of one group depend on one another, so that a limit keeps most information where it keeps most groups.

    Args:
        rows: with "group".
        max_per_group: later rows of a group are left out; None: none are.
    """
    turns: Counter[str] = Counter()
    turn_of = []
    for row in rows:
        turn_of.append(turns[row["group"]])
        turns[row["group"]] += 1
    order = sorted(range(len(rows)), key=turn_of.__getitem__)
    return [rows[i] for i in order if max_per_group is None or turn_of[i] < max_per_group]


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
