"""Splits rows by source group, and finds duplicates and overlaps across splits."""

import random
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tunetrail.config.data import KINDS
from tunetrail.data.readers import normalise
from tunetrail.errors import DataError
from tunetrail.seeds import derive_seed

# When a duplicate across splits is dropped, the row in the earlier split of this list stays: data to measure on is
# worth more than data to train on.
PRIORITY = ("evaluation", "heldout", "reward", "rl", "sft")
NUM_PERM = 64
NAMES = {kind: kind for kind in KINDS} | {"text": "raw text"}


def assign_groups(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Group -> split, so that each split's share of the rows is near its target.

    Large groups come first, in a seeded order among equals; each goes to the split that lacks most rows.

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
    """Group -> split, for rows whose source is pinned to a split.

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
                f"{row['where']} and {other['where']} are in one group ({row['group'][:40]!r}), but their sources are "
                f"pinned to {row['pinned']} and {other['pinned']}; pin both to one split or remove one row"
            )
    return {group: row["pinned"] for group, row in first.items()}


def assign_splits(rows: Sequence[dict], shares: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, str]:
    """Group -> split for rows of all kinds. A group with a row from a pinned source goes as a whole to that split.

    The other groups are split kind by kind, each with its own shares, so that no kind runs short in a split because
    another has larger groups. A group with several kinds counts as the first of them in `KINDS`.

    Args:
        rows: with "group", "where", "pinned" (a split, or None) and "kind".
        shares: kind -> split -> share of the rows.

    Raises:
        DataError: a kind has rows but no share in any split, or see `pinned_groups`.
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
                "has a share; remove the source, configure a stage that reads them, or set data.shares"
            )
        assigned |= assign_groups([row["group"] for row in own], shares.get(kind, {}), seed)
    return assigned


def _shingles(text: str) -> set[Hashable]:
    """The text's word 3-grams; a shorter text is a single shingle."""
    words = normalise(text).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def jaccard(a: set[Hashable], b: set[Hashable]) -> float:
    return len(a & b) / len(a | b)


def duplicates_across(
    texts: Sequence[str], splits: Sequence[str], threshold: float, given: Sequence[bool] = ()
) -> list[tuple[int, int]]:
    """(row to keep, row that repeats it) for each row that repeats a row of another split, exactly or nearly.

    Candidates come from MinHash LSH (Broder 1997) and count if the true Jaccard similarity of their word 3-grams is at
    least `threshold`. Duplicates within one split are no leak.

    Args:
        given: whether each row belongs to a given test set, whose rows are kept before all others; empty: none does.
    """
    from datasketch import MinHash, MinHashLSH

    given = given or [False] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: (not given[i], PRIORITY.index(splits[i]), i))
    # One signature per distinct text: exact repeats then cost nothing.
    members: dict[str, list[int]] = {}
    for i in order:
        members.setdefault(normalise(texts[i]), []).append(i)
    kept_for = {i: rows[0] for rows in members.values() for i in rows[1:] if splits[i] != splits[rows[0]]}
    if threshold >= 1:
        return [(kept, i) for i, kept in sorted(kept_for.items())]
    shingles = {text: _shingles(text) for text in members}
    position = {text: i for i, text in enumerate(members)}
    # A superfluous candidate costs one comparison, a missing one is a leak: with these weights LSH finds about 99% of
    # the pairs at the threshold, and more above it (85% with equal weights).
    index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=NUM_PERM, weights=(0.1, 0.9))
    for text, rows in members.items():
        signature = MinHash(num_perm=NUM_PERM, seed=1)
        signature.update_batch([repr(s).encode() for s in shingles[text]])  # type: ignore[attr-defined]
        candidates = sorted(index.query(signature), key=position.__getitem__)
        near = next((t for t in candidates if jaccard(shingles[text], shingles[t]) >= threshold), None)
        if near is not None:
            kept = members[near][0]
            kept_for |= {i: kept for i in rows if splits[i] != splits[kept] and i not in kept_for}
        index.insert(text, signature)
    return [(kept, i) for i, kept in sorted(kept_for.items())]


TRAINED = ("sft", "reward", "rl")
"""Splits that models are trained on."""


FEWEST_WORDS = 3
"""Prompts with fewer words occur in large texts by chance."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """All sequences of n consecutive words; empty if there are fewer words."""
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def overlaps(
    prompts: Sequence[str], trained: Mapping[str, Sequence[str]], n: int
) -> list[tuple[float | None, str | None]]:
    """For each prompt, the share of its n-grams that texts of the training splits contain (as in Brown et al. 2020,
    appendix C), and the split that contains most of them. A prompt of fewer than n words is a single n-gram.

    Returns:
        (share, split) per prompt; (None, None) for fewer than FEWEST_WORDS words, (0, None) if no text contains any.
    """
    least = min(n, FEWEST_WORDS)
    rows = [ngrams(words, max(least, min(n, len(words)))) for words in map(words_of, prompts)]
    wanted = set().union(*rows)  # there may be many training texts: only the n-grams of prompts are kept
    sizes = {len(gram) for gram in wanted}

    def wanted_in(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return set().union(*(ngrams(words, size) & wanted for size in sizes))

    seen = {split: set().union(*map(wanted_in, texts)) for split, texts in trained.items()}
    anywhere = set().union(*seen.values())
    shares: list[tuple[float | None, str | None]] = []
    for grams in rows:
        share = len(grams & anywhere) / len(grams) if grams else None
        shares.append((share, max(seen, key=lambda split: len(grams & seen[split])) if share else None))
    return shares


def holders(prompts: Sequence[str], texts: Sequence[Sequence[str]], n: int, limit: float) -> set[int]:
    """Indices of the rows that alone contain more than `limit` of a prompt's n-grams, counted as in `overlaps`.

    Args:
        texts: the texts of each row.
    """
    least = min(n, FEWEST_WORDS)
    grams = [ngrams(words, max(least, min(n, len(words)))) for words in map(words_of, prompts)]
    prompts_with: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            prompts_with.setdefault(gram, []).append(i)
    sizes = {len(gram) for gram in prompts_with}
    over = set()
    for row, row_texts in enumerate(texts):
        held = {gram for words in map(words_of, row_texts) for size in sizes for gram in ngrams(words, size)}
        counts = Counter(i for gram in held & prompts_with.keys() for i in prompts_with[gram])
        if any(count > limit * len(grams[i]) for i, count in counts.items()):
            over.add(row)
    return over


def shuffled(rows: Sequence[dict], seed: int, split: str) -> list[dict]:
    """The rows in a seeded order that does not depend on the order in which they were read."""
    rows = sorted(rows, key=lambda row: row["id"])
    random.Random(derive_seed(seed, "rows", split)).shuffle(rows)
    return rows


def in_turns(rows: Sequence[dict], max_per_group: int | None = None) -> list[dict]:
    """The first row of each group, then the second of each, and so on: every prefix is as even as the groups allow.

    Rows of one group depend on one another, so a limit keeps most information by keeping as many groups as possible.

    Args:
        rows: with "group".
        max_per_group: further rows of a group are left out; None: none are.
    """
    turns: Counter[str] = Counter()
    turn_of = []
    for row in rows:
        turn_of.append(turns[row["group"]])
        turns[row["group"]] += 1
    order = sorted(range(len(rows)), key=turn_of.__getitem__)
    return [rows[i] for i in order if max_per_group is None or turn_of[i] < max_per_group]


def histogram(values: Sequence[int], bins: int = 20) -> dict | None:
    """{"mean", "min", "max", "histogram": {"edges", "counts"}} of integers; None if there are none."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=min(bins, max(1, max(values) - min(values))))
    return {
        "mean": float(np.mean(values)),
        "min": int(min(values)),
        "max": int(max(values)),
        "histogram": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }
