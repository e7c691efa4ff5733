"""The quality page's numbers against scipy, krippendorff and hand-computed values."""

import math
from datetime import UTC, datetime
from itertools import combinations

import krippendorff
import numpy as np
import pytest
from scipy.stats import kendalltau, median_abs_deviation

from tunetrail.labeling import quality
from tunetrail.labeling.labels import by_task
from tunetrail.reporting.label_quality import quality_page


def task(name: str, *completions: str, gold: list[int] | None = None) -> dict:
    texts = list(completions or ("a", "bb", "ccc"))
    return {"id": name, "kind": "ranking", "prompt": "p", "completions": texts, "gold": gold and {"ranks": gold}}


def label(name: str, labeler: str, ranks: list[int] | None, **more) -> dict:
    k = len(ranks or [])
    return {
        "task": name, "kind": "ranking", "labeler": labeler, "ranks": ranks, "ratings": None, "flags": [[]] * k,
        "all_bad": False, "comment": "", "text": None, "shown": list(range(k)), "seconds": 30.0, "repeat": False,
        "gold": False, "training": False, "skipped": None, "at": "2026-01-01T00:00:00+00:00", "event": 1,
    } | more  # fmt: skip


TASKS = [task("x"), task("y"), task("z", gold=[1, 2, 3])]
LABELS = [
    label("x", "human-1", [1, 2, 3]),
    label("x", "human-2", [1, 2, 2]),  # two pairs alike, one tied by one of them
    label("y", "human-1", [1, 2, 3]),
    label("y", "human-2", [3, 2, 1]),  # three pairs opposite
    label("y", "human-3", None, skipped="unclear"),
    label("z", "human-1", [1, 2, 3], gold=True),
    label("z", "human-2", [2, 1, 3], gold=True),
    label("z", "human-3", [3, 2, 1], gold=True, training=True),
    label("x", "human-1", [1, 3, 2], repeat=True),
]


def test_agreement_by_hand():
    found = quality.measure(LABELS, TASKS)
    assert found["rankings"] == 4
    assert found["agreement"]["mean"] == pytest.approx((1 + 1 + 0.5 + 0) / 6)
    assert found["agreement"]["n"] == 6
    assert found["agreement_decided"]["mean"] == pytest.approx(2 / 5)
    assert found["gold"]["mean"] == pytest.approx((3 + 2) / 6)
    assert found["self"]["mean"] == pytest.approx(2 / 3)
    own = found["labelers"]
    assert list(own) == ["human-1", "human-2", "human-3"]
    assert [(m["rankings"], m["skips"]) for m in own.values()] == [(2, 0), (2, 0), (0, 1)]
    assert [m["gold"] and m["gold"]["mean"] for m in own.values()] == [1, pytest.approx(2 / 3), None]
    assert own["human-2"]["self"] is None


def test_tau_b_equals_scipys_and_is_undefined_where_a_labeler_ties_everything():
    rows = [label("x", "human-1", [1, 2, 3, 3]), label("x", "human-2", [2, 1, 2, 3])]
    expected = kendalltau(rows[0]["ranks"], rows[1]["ranks"]).statistic
    assert quality.tau_b(quality.between_labelers(rows))["mean"] == pytest.approx(expected)
    tied = [label("y", "human-1", [1, 1, 1, 1]), label("y", "human-2", [1, 2, 3, 4])]
    assert math.isnan(kendalltau([1, 1, 1, 1], [1, 2, 3, 4]).statistic)
    assert quality.tau_b(quality.between_labelers(tied)) is None
    assert quality.tau_b(quality.between_labelers(rows + tied))["n"] == 1


def many(random: np.random.Generator, tasks: int = 40) -> list[dict]:
    """Rankings of different sizes by one to three of four labelers, who agree to some degree."""
    rows = []
    for n in range(tasks):
        k = int(random.integers(2, 6))
        true = random.normal(size=k)
        for who in random.permutation(4)[: random.integers(1, 4)]:
            seen = np.round(true + random.normal(size=k), 0)
            ranks = [1 + int((np.unique(seen) > value).sum()) for value in seen]
            rows.append(label(f"t{n}", f"human-{who}", ranks))
    return rows


def test_alpha_equals_that_of_a_matrix_with_missing_values():
    """The package also takes a matrix: one row per labeler, one column per pair, NaN where a labeler did not see it."""
    rows = many(np.random.default_rng(1))
    names, columns = sorted({row["labeler"] for row in rows}), []
    for group in by_task(rows).values():
        for i, j in combinations(range(len(group[0]["ranks"])), 2):
            seen = {row["labeler"]: np.sign(row["ranks"][j] - row["ranks"][i]) for row in group}
            one_way = [seen.get(name, math.nan) for name in names]
            columns += [one_way, [-outcome for outcome in one_way]]
    expected = krippendorff.alpha(np.array(columns, dtype=float).T, level_of_measurement="nominal")
    found = quality.alpha(rows)
    assert found["mean"] == pytest.approx(expected)
    assert found["low"] < found["mean"] < found["high"]


def test_alpha_by_hand_and_where_it_is_undefined():
    # Coincidences of two pairs in both orders, ++ --, +- -+: observed disagreement 4 of 8, expected 2*4*4/(8*7).
    rows = [label("x", "a", [1, 2]), label("x", "b", [1, 2]), label("y", "a", [1, 2]), label("y", "b", [2, 1])]
    assert quality.alpha(rows)["mean"] == pytest.approx(1 - (4 / 8) / (32 / 56))
    assert quality.alpha(rows)["n"] == 2
    assert quality.alpha(rows[:2])["mean"] == 1
    assert quality.alpha([label("x", who, [1, 1]) for who in "ab"]) is None  # one kind of outcome
    assert quality.alpha(rows[::2]) is None  # one labeler
    assert quality.alpha([]) is None


def test_alpha_does_not_depend_on_the_order_of_completions():
    """If the better text always came first in the file, agreement by chance would look high."""
    rows = many(np.random.default_rng(2))
    for row in rows:
        row["ranks"] = sorted(row["ranks"]) if row["labeler"] != "human-0" else row["ranks"]
    turned = [row | {"ranks": row["ranks"][::-1]} if int(row["task"][1:]) % 2 else row for row in rows]
    assert quality.alpha(turned) == pytest.approx(quality.alpha(rows))


def test_intervals_resample_tasks():
    """Ten rankings of one task are one observation, however many pairs they contain."""
    one = [label("x", f"human-{n}", [1, 2, 3] if n % 2 else [3, 2, 1]) for n in range(10)]
    found = quality.same_outcomes(quality.between_labelers(one))
    assert found["low"] == found["high"] == found["mean"]


def test_bias_by_hand():
    rows = [
        label("x", "human-1", [1, 2, 2], shown=[0, 1, 2]),  # decided: 0>1, 0>2, and 0 came first
        label("y", "human-1", [2, 1], shown=[0, 1]),  # the one shown second wins
    ]
    tasks = {"x": task("x", "long", "s", "long"), "y": task("y", "a", "bb")}
    assert quality.first_shown_wins(rows)["mean"] == pytest.approx(2 / 3)
    assert quality.longer_wins(rows, tasks)["mean"] == pytest.approx(1)  # 0 and 2 of x have equal lengths
    assert quality.longer_wins(rows, tasks)["n"] == 2


def test_a_labeler_who_always_prefers_the_first_output_is_detected():
    random = np.random.default_rng(0)
    rows = []
    for n in range(40):
        shown = random.permutation(4).tolist()
        rows.append(label(f"t{n}", "human-1", [shown.index(i) + 1 for i in range(4)], shown=shown))
        rows.append(label(f"t{n}", "human-2", (random.permutation(4) + 1).tolist(), shown=shown))
    own = quality.measure(rows, [])["labelers"]
    assert own["human-1"]["first_shown_wins"]["low"] == 1
    assert own["human-2"]["first_shown_wins"]["low"] < 0.5 < own["human-2"]["first_shown_wins"]["high"]


def test_robust_z_equals_scipys_and_finds_answers_given_without_reading():
    values = [20.0, 25, 30, 35, 40, 1]
    expected = (np.array(values) - np.median(values)) / median_abs_deviation(values, scale="normal")
    assert quality.robust_z(values) == pytest.approx(expected.tolist())
    assert quality.robust_z([]) is None
    assert quality.robust_z([5.0, 5.0, 5.0, 9.0]) is None
    rows = [label(f"t{n}", "human-1", [1, 2], seconds=seconds, event=n) for n, seconds in enumerate(values)]
    assert [row["event"] for row in quality.speed_outliers(rows)] == [5]


def test_the_remaining_time_follows_from_the_pace_so_far():
    rows = [label("x", "human-1", [1, 2], seconds=s) for s in (10.0, 20.0, 60.0)]
    now = datetime(2026, 1, 1, 6, tzinfo=UTC)  # six hours after the first
    assert quality.remaining(rows, 9, 3, now) == {"answers": 6, "work_seconds": 120, "seconds": 2 * 6 * 3600}
    assert quality.remaining([], 9, 0, now) == {"answers": 9, "work_seconds": None, "seconds": None}


def test_the_quality_page_has_its_figures_and_says_what_was_not_measured():
    progress = {"wanted": 4, "have": 2}
    page = quality_page(LABELS, TASKS, progress, datetime(2026, 1, 2, tzinfo=UTC))
    assert page["remaining"]["answers"] == 2
    assert page["figures"].keys() == {"agreement", "bias", "speed", "progress"}
    assert "InstructGPT" in page["figures"]["agreement"]
    assert "not measured" in page["figures"]["progress"]  # all at the same time
    for svg in page["figures"].values():
        assert svg.startswith("<svg")
        assert " style=" not in svg  # a strict content security policy would drop it
    empty = quality_page([], [])
    assert empty["agreement"] is empty["alpha"] is empty["remaining"] is None
    assert all("not measured" in svg for svg in empty["figures"].values())
