"""The specs of the evaluation's figures: every number drawn is in the metrics, and missing figures are None."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import vl_convert

from tunetrail.evaluation import matches, stats
from tunetrail.reporting import evaluation_charts as charts
from tunetrail.reporting.curves import over_optimisation
from tunetrail.reporting.numbers import NOT_MEASURED, percent

NAMES = ["base", "sft", "dpo", "ppo"]
SERIES = {"base": "base", "sft": "sft", "dpo": "p0", "ppo": "p1"}


def interval(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 24}


def rows_of(spec):
    """All data rows of a spec, in order."""
    found = []

    def walk(node):
        if isinstance(node, dict):
            if isinstance(node.get("values"), str):
                found.extend(row for row in json.loads(node["values"]) if row not in found)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(spec)
    return found


@pytest.fixture(scope="module")
def match():
    random = np.random.default_rng(0)
    scores = {name: random.normal(0.4 * i, 1, size=60) for i, name in enumerate(NAMES)}
    outcome_of = {(a, b): stats.outcomes(scores[a], scores[b]) for a, b in matches.pairs_of(NAMES)}
    lengths = {name: random.integers(4, 20, size=60) for name in NAMES}
    return matches.match(NAMES, "sft", outcome_of, lengths, list(range(60)), 100, 0)


FRONTIER = {
    "sft": {"best_of_n": {"points": [{"n": n, "kl_bound": stats.best_of_n_kl(n), "reward": interval(n / 8),
        "gold": interval(20 + n)} for n in (1, 2, 4)]}},
    "dpo": {"frontier": {"points": [{"step": s, "chosen": s == 9, "kl": interval(s / 10), "reward": interval(s / 9),
        "gold": interval(20 + s)} for s in (3, 9)]}},
    "ppo": {"frontier": None},
}  # fmt: skip
FORGETTING = [
    {"first": "sft", "second": "base", "adapters": ["full", None], "nll": interval(0.1), "choices": interval(-0.1)},
    {"first": "dpo", "second": "base", "adapters": ["lora", None], "nll": interval(0.2), "choices": None},
    {"first": "dpo", "second": "sft", "adapters": ["lora", "full"], "nll": interval(0.3), "choices": None},
]
PREFERENCES = [
    {"before": "sft", "after": "dpo", "chosen": interval(-1.0), "rejected": interval(-3.0), "margin": interval(2.0)}
]
TOKENS = [
    {"id": i, "token": t, "before": a, "after": b}
    for i, (t, a, b) in enumerate([(" a", 0.1, 0.5), (" 'b'\n", 0.5, 0.2), ("c", None, 0.3)])
]
PROBES = {"positions": [{"position": 1, "token": " a", "before": 0.1, "after": 0.5, "tokens": TOKENS}]}
REWARD = {
    "accuracy": interval(0.6), "accuracy_longer_wins": interval(0.5), "accuracy_shorter_wins": interval(0.52),
    "accuracy_probe": interval(0.55), "accuracy_longer_preferred": interval(0.7), "accuracy_shorter_preferred":
    interval(0.45), "gain_over":
    {"longer_wins": interval(0.1), "shorter_wins": interval(0.08), "probe": interval(0.05)},
    "ece": 0.04, "ceiling": {"labelers": 2,
        "agreement": interval(0.8), "majority": interval(0.85), "at_most": interval(0.89)},
    "accuracy_by_source": {"web": interval(0.61)}, "accuracy_by_labeler": {"ann": interval(0.62)},
    "accuracy_by_confidence": [{"low": 0.5, "high": 0.55, "confidence": 0.52, "accuracy": 0.51, "accuracy_low": 0.4,
        "accuracy_high": 0.6, "n": 9}],
}  # fmt: skip
CARD = {"contamination": {"words": 8, "limit": 0.5, "histogram": {"edges": [0, 0.5, 1], "counts": [7, 2]}}}
DRAWN = {
    "win_matrix": lambda match, narrow: charts.win_matrix(match, narrow),
    "strengths": lambda match, narrow: charts.strengths(match, SERIES, narrow),
    "length_controlled": lambda match, narrow: charts.length_controlled(match, "sft", SERIES, narrow),
    "frontier": lambda match, narrow: charts.frontier(FRONTIER, "sft", SERIES, narrow),
    "forgetting": lambda match, narrow: charts.forgetting(FORGETTING, "base", SERIES, narrow),
    "preference_shift": lambda match, narrow: charts.preference_shift(PREFERENCES, SERIES, narrow),
    "probe_shift": lambda match, narrow: charts.probe_shift(PROBES, narrow),
    "reward_accuracy": lambda match, narrow: charts.reward_accuracy(REWARD, narrow),
    "calibration": lambda match, narrow: charts.calibration(REWARD, narrow),
    "contamination": lambda match, narrow: charts.contamination(CARD, narrow),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_spec_can_be_drawn(match, name):
    for narrow in (False, True):
        assert "<svg" in vl_convert.vegalite_to_svg(DRAWN[name](match, narrow))


def test_missing_measurements_have_no_spec():
    assert charts.win_matrix(None, False) is None
    assert charts.strengths(None, SERIES, False) is None
    assert charts.length_controlled(None, "sft", SERIES, False) is None
    assert charts.frontier({"sft": {}}, "sft", SERIES, False) is None
    assert charts.forgetting([], "base", SERIES, False) is None
    assert charts.preference_shift([], SERIES, False) is None
    assert charts.probe_shift(None, False) is None
    assert charts.reward_accuracy(None, False) is None
    assert charts.calibration({"accuracy_by_confidence": []}, False) is None
    assert charts.contamination({"contamination": None}, False) is None


def test_the_matrix_has_each_pair_twice(match):
    rows = rows_of(charts.win_matrix(match, False))
    assert len(rows) == 12
    for pair in match["pairs"]:
        (row,) = [r for r in rows if (r["first"], r["second"]) == (pair["first"], pair["second"])]
        (back,) = [r for r in rows if (r["first"], r["second"]) == (pair["second"], pair["first"])]
        assert row["rate"] == pair["win_rate"]["mean"] == pytest.approx(1 - back["rate"])
        assert row["text"] == percent(pair["win_rate"]["mean"]) + "*" * pair["significant"]


def test_dots_are_the_metrics_intervals(match):
    def drawn(spec):
        return [row["mean"] for row in rows_of(spec) if "mean" in row]

    assert drawn(charts.strengths(match, SERIES, False)) == [row["score"]["mean"] for row in match["scores"]]
    against = [pair for pair in match["pairs"] if pair["second"] == "sft"]
    assert drawn(charts.length_controlled(match, "sft", SERIES, False)) == [
        pair[key]["mean"] for pair in against for key in ("win_rate", "length_controlled")
    ]
    assert drawn(charts.forgetting(FORGETTING, "base", SERIES, False)) == [0.1, 0.2, -0.1]
    assert drawn(charts.preference_shift(PREFERENCES, SERIES, False)) == [-1.0, -3.0]
    accuracies, gains = [0.6, 0.5, 0.52, 0.55, 0.8, 0.85, 0.89, 0.7, 0.45, 0.61, 0.62], [0.1, 0.08, 0.05]
    assert sorted(drawn(charts.reward_accuracy(REWARD, False))) == sorted(accuracies + gains)
    assert len(rows_of(charts.reward_accuracy(REWARD | {"gain_over": None}, False))) == len(accuracies) + 1


def test_the_diagram_starts_at_the_lowest_bound():
    """Including 0, which is a bound like any other; a bin without a bound starts at its accuracy."""

    def begin(low, accuracy):
        row = {"confidence": 0.6, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": 0.9, "n": 2}
        (at, _) = [
            r["at"]
            for r in rows_of(charts.calibration({"ece": 0.1, "accuracy_by_confidence": [row]}, False))
            if "at" in r
        ]
        return at

    assert begin(0.0, 0.5) == 0
    assert begin(None, 0.32) == 0.3
    assert begin(0.55, 0.7) == 0.5


def test_a_missing_length_controlled_win_rate_is_shown_as_such(match):
    pairs = [pair | {"length_controlled": None} for pair in match["pairs"]]
    rows = rows_of(charts.length_controlled(match | {"pairs": pairs}, "sft", SERIES, False))
    assert [row["text"] for row in rows if "equal length" in str(row.get("label"))] == [NOT_MEASURED] * 2


def test_the_frontier_marks_the_chosen_point_and_the_yardstick():
    rows = rows_of(charts.frontier(FRONTIER, "sft", SERIES, False))
    rewards = [
        (r["line"], r["order"], r["kl"], r["mean"], r["chosen"]) for r in rows if r.get("mean", 99) < 10 and "line" in r
    ]
    assert rewards == [
        ("dpo", 3, 0.3, 3 / 9, False), ("dpo", 9, 0.9, 1.0, True),
        *(("best of n", n, stats.best_of_n_kl(n), n / 8, False) for n in (1, 2, 4)),
    ]  # fmt: skip


def test_probes_are_side_by_side_with_the_largest_gains_on_top():
    rows = rows_of(charts.probe_shift(PROBES, False))
    assert [(r["token"], r["when"], r["prob"]) for r in rows if "when" in r] == [
        ("→ ␣a", "before", 0.1), ("→ ␣a", "after", 0.5), ("c", "after", 0.3),
        ("␣'b'⏎", "before", 0.5), ("␣'b'⏎", "after", 0.2),
    ]  # fmt: skip


def test_over_optimisation_shows_the_reward_models_score_alone():
    """Not the sum that PPO learns from: it would rise with a bonus for length too."""
    history = [
        {"step": step, "kl": 0.1 * step, "score": 10.0 + step, "score_reward_model": 0.5, "score_length": 9.5 + step}
        for step in range(5)
    ]
    policy = SimpleNamespace(name="p", series="p0", metrics={"method": "ppo"}, trained=SimpleNamespace(history=history))
    run = SimpleNamespace(policies=[policy], reference="sft")
    drawn = rows_of(over_optimisation([run], False))
    assert [row["score"] for row in drawn if "step" in row] == 5 * [0.5]
