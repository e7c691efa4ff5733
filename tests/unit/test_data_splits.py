"""Splits and leaks: every kind of row in every split, no group in two, every near duplicate found quickly."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunetrail.config.data import SPLITS
from tunetrail.data.splits import assign_groups, assign_splits, duplicates_across, in_turns, overlaps, shuffled
from tunetrail.errors import DataError

KINDS = st.sampled_from(["preferences", "demonstrations", "text"])
EVEN = {"sft": 0.5, "reward": 0.15, "rl": 0.15, "evaluation": 0.1, "heldout": 0.1}
TEXT = {"sft": 0.5 / 0.6, "heldout": 0.1 / 0.6}
SHARES = {"preferences": EVEN, "demonstrations": EVEN, "text": TEXT}


def row(group: str, kind: str, pinned: str | None = None) -> dict:
    return {
        "group": group,
        "kind": kind,
        "pinned": pinned,
        "where": f"{kind}:{group}",
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), KINDS), min_size=1, max_size=150), st.integers(0, 3))
def test_no_group_straddles_splits_whatever_its_rows(drawn, seed):
    rows = [row(group, kind) for group, kind in drawn]
    assigned = assign_splits(rows, SHARES, seed)
    assert set(assigned) == {group for group, _ in drawn}
    assert set(assigned.values()) <= set(SPLITS)
    assert assign_splits(rows[::-1], SHARES, seed) == assigned
    only_text = {g for g, _ in drawn} - {g for g, kind in drawn if kind != "text"}
    assert {assigned[g] for g in only_text} <= {"sft", "heldout"}


def test_splits_of_a_single_kind_stay_the_same():
    """Golden: a seed always gives the same splits."""
    groups = [f"g{i}" for i in range(12) for _ in range(i % 3 + 1)]
    assigned = assign_splits([row(group, "demonstrations") for group in groups], SHARES, 17)
    assert assigned == assign_groups(groups, EVEN, 17)
    assert {split: sorted(g for g in assigned if assigned[g] == split) for split in SPLITS} == {
        "sft": ["g0", "g2", "g5", "g7", "g8"], "reward": ["g3", "g4", "g6"], "rl": ["g11", "g9"],
        "evaluation": ["g1"], "heldout": ["g10"],
    }  # fmt: skip


def test_each_kind_has_its_share_of_every_split():
    """Large groups of one kind do not crowd out another."""
    rows = [row(f"p{i}", "preferences") for i in range(100) for _ in range(6)]
    rows += [row(f"d{i}", "demonstrations") for i in range(400)]
    rows += [row(f"t{i}", "text") for i in range(120)]
    assigned = assign_splits(rows, SHARES, 0)
    counts = Counter((r["group"][0], assigned[r["group"]]) for r in rows)
    for split in SPLITS:
        share = EVEN[split]
        assert counts["p", split] == pytest.approx(600 * share, abs=6)
        assert counts["d", split] == pytest.approx(400 * share, abs=1)
    assert {split: counts["t", split] for split in SPLITS} == {
        "sft": 100,
        "reward": 0,
        "rl": 0,
        "evaluation": 0,
        "heldout": 20,
    }


def test_a_group_of_prompts_and_text_follows_its_prompts():
    rows = [row(f"g{i}", kind) for i in range(50) for kind in ("text", "demonstrations")]
    assert assign_splits(rows, SHARES, 0) == assign_groups([r["group"] for r in rows], EVEN, 0)


def test_pinned_rows_stay_together_and_take_their_group_along():
    rows = [row(f"p{i}", "preferences", "reward") for i in range(9)] + [row("p0", "demonstrations")]
    rows += [row(f"d{i}", "demonstrations") for i in range(20)]
    assigned = assign_splits(rows, SHARES, 0)
    assert {assigned[f"p{i}"] for i in range(9)} == {"reward"}
    free = [f"d{i}" for i in range(20)]
    assert {group: assigned[group] for group in free} == assign_groups(free, EVEN, 0)


@pytest.mark.parametrize(("rows", "message"), [
    ([row("a", "text", "rl")], "text:a: raw text can go to sft and heldout only, but its source has split: rl"),
    ([row("a", "preferences", "reward"), row("a", "demonstrations", "evaluation")],
     "demonstrations:a and preferences:a are in one group ('a'), but their sources are pinned to evaluation and "
     "reward; pin both to one split or remove one row"),
])  # fmt: skip
def test_contradictory_pins_are_refused(rows, message):
    with pytest.raises(DataError) as raised:
        assign_splits(rows, SHARES, 0)
    assert str(raised.value) == message


def test_rows_that_no_split_can_use_are_refused():
    with pytest.raises(DataError) as raised:
        assign_splits([row("a", "demonstrations"), row("b", "text"), row("c", "text")], SHARES | {"text": {}}, 0)
    assert str(raised.value) == (
        "text:b: 2 rows of raw text are of no use: no split that they could go to has a share; remove the source, "
        "configure a stage that reads them, or set data.shares"
    )


def test_a_limit_is_drawn_evenly_over_groups():
    """12 rows of a big group come before 3 and 1 of others: a prefix of 6 takes 3, 2 and 1."""
    rows = [{"id": i, "group": "a"} for i in range(12)]
    rows += [{"id": 12 + i, "group": "b"} for i in range(3)] + [{"id": 15, "group": "c"}]
    found = in_turns(rows)
    assert [row["id"] for row in found[:7]] == [0, 12, 15, 1, 13, 2, 14]
    assert sorted(row["id"] for row in found) == list(range(16))
    for n in range(1, 17):
        counts = Counter(row["group"] for row in found[:n])
        assert all(counts[g] >= min(size, max(counts.values()) - 1) for g, size in (("a", 12), ("b", 3), ("c", 1)))
    assert [row["id"] for row in in_turns(rows, 2)] == [0, 12, 15, 1, 13]


def test_the_order_of_rows_does_not_depend_on_the_order_read():
    rows = [{"id": f"{i:02}"} for i in range(50)]
    first = shuffled(rows, 0, "sft")
    assert shuffled(rows[::-1], 0, "sft") == first
    assert sorted(r["id"] for r in first) == [r["id"] for r in rows]
    assert first not in (rows, shuffled(rows, 1, "sft"), shuffled(rows, 0, "rl"))


# ----------------------------------------------------------------------------- duplicates


def distinct_words(n: int, start: int = 0) -> list[str]:
    return [f"w{start + i}" for i in range(n)]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_pairs_just_over_the_threshold_are_found(threshold):
    """100 pairs of 50 words that differ in their last words: s of 48 shingles shared, s / (96 - s) >= threshold."""
    shared = next(s for s in range(48) if s / (96 - s) >= threshold)
    texts, splits = [], []
    for pair in range(100):
        words = distinct_words(50, 1000 * pair)
        texts += [" ".join(words), " ".join(words[: shared + 2] + distinct_words(48 - shared, 1000 * pair + 500))]
        splits += ["evaluation", "sft"]
    found = duplicates_across(texts, splits, threshold)
    assert set(found) <= {(2 * i, 2 * i + 1) for i in range(100)}
    assert len(found) >= 97


def test_many_near_duplicates_are_all_found():
    """80 similar rows in sft and one in evaluation: all 80 leak."""
    words = distinct_words(30)
    texts = [" ".join([*words, f"end{i}"]) for i in range(81)]
    assert duplicates_across(texts, ["sft"] * 80 + ["evaluation"], 0.9) == [(80, i) for i in range(80)]


def test_training_rows_are_dropped_before_test_rows():
    text = " ".join(distinct_words(30))
    order = ["sft", "rl", "reward", "heldout", "evaluation"]
    assert duplicates_across([text] * 5, order, 0.9) == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert duplicates_across([text, text + " more"] * 2, ["sft", "rl", "rl", "sft"], 0.9) == [(2, 0), (1, 3)]


def test_five_thousand_rows_take_seconds():
    rng = random.Random(0)
    vocabulary = distinct_words(2000)
    texts = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(5000)]
    # A crowd of templated prompts must not make it quadratic.
    texts[:1000] = [" ".join([*distinct_words(40), f"name{i}"]) for i in range(1000)]
    splits = rng.choices(["sft", "evaluation"], k=5000)
    start = time.process_time()
    found = duplicates_across(texts, splits, 0.9)
    assert time.process_time() - start < 15
    assert len(found) == sum(split == "sft" for split in splits[:1000])


def test_overlap_is_the_share_of_n_grams_in_training_texts():
    trained = {"sft": ["one two three four five", "Nine, ten!"], "reward": [], "rl": ["two three four five six seven"]}
    prompts = ["One two THREE, four.", "three four five six eight", "a b c d e", "nine ten", "six seven eight nine"]
    assert overlaps(prompts, trained, 3) == [
        (1.0, "sft"), (2 / 3, "rl"), (0.0, None), (None, None), (0.0, None)
    ]  # fmt: skip


def test_a_short_prompt_must_occur_as_a_whole():
    """In one piece and in order, if it has at least three words."""
    trained = {"sft": ["we know how to count to ten by heart", "ten to count"], "reward": [], "rl": []}
    prompts = ["How to count?", "to ten", "count to", "ten by now", "count ten by heart", "to count to ten by heart"]
    assert overlaps(prompts, trained, 8) == [
        (1.0, "sft"), (None, None), (None, None), (0.0, None), (0.0, None), (1.0, "sft")
    ]  # fmt: skip


def test_overlap_equals_brute_force():
    rng, words = random.Random(0), "abcdef"
    prompts, texts = ([" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(60)] for _ in range(2))
    for prompt, (share, split) in zip(prompts, overlaps(prompts, {"sft": texts, "rl": []}, 4), strict=True):
        size = min(7, max(5, len(prompt)))  # of four one-letter words, or of three if there are no more
        grams = {prompt[i : i + size] for i in range(0, len(prompt) - size + 1, 2)}
        found = [any(gram in text for text in texts) for gram in grams]
        assert share == (sum(found) / len(grams) if grams else None)
        assert split == ("sft" if any(found) else None)
