"""Bradley-Terry, win rates at equal lengths and matches, compared with scipy's optimiser, by hand and by simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from tunetrail.evaluation import matches, stats


def simulated(strengths, n, seed=0):
    """Outcomes on n prompts, all against all."""
    random, names = np.random.default_rng(seed), list(strengths)
    return {
        (a, b): (random.random(n) < expit(strengths[a] - strengths[b])).astype(float)
        for a, b in matches.pairs_of(names)
    }


def test_pairs_put_the_later_one_first():
    assert matches.pairs_of(["base", "sft", "dpo"]) == [("sft", "base"), ("dpo", "base"), ("dpo", "sft")]


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_bradley_terry_is_the_maximum_of_the_likelihood(prior):
    random = np.random.default_rng(0)
    wins = random.integers(1, 30, size=(5, 5)) / 2 * (1 - np.eye(5))

    def loss(free):
        s = np.concatenate([free[:2], [0], free[2:]])
        return -((wins + prior * (1 - np.eye(5))) * np.log(expit(s[:, None] - s[None]))).sum()

    expected = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    found = matches.bradley_terry(wins[None], reference=2, prior=prior)[0]
    assert found[2] == 0
    assert np.delete(found, 2) == pytest.approx(expected, abs=1e-5)


def test_bradley_terry_of_two_is_the_log_odds_and_finite_if_one_never_lost():
    assert matches.bradley_terry(np.array([[[0, 30], [10, 0]]]), 1, prior=0.0)[0, 0] == pytest.approx(np.log(3))
    assert matches.bradley_terry(np.array([[[0, 40], [0, 0]]]), 1)[0, 0] == pytest.approx(np.log(40.5 / 0.5))


def test_bradley_terry_scores_cover_the_true_strengths():
    truth, covered = {"base": -0.6, "sft": 0.0, "dpo": 0.3, "ppo": 0.9}, []
    for seed in range(250):
        outcome_of = simulated(truth, 120, seed)
        found = stats.bootstrap_of(
            lambda c, o=outcome_of: matches.strengths(list(truth), "sft", o, c), range(120), 300, seed
        )
        assert (found[1]["mean"], found[1]["low"], found[1]["high"]) == (0, 0, 0)
        covered += [
            score["low"] <= truth[name] <= score["high"]
            for name, score in zip(truth, found, strict=True)
            if name != "sft"
        ]
    assert 0.93 <= np.mean(covered) <= 0.97


def long_winded(n, quality, bias, seed=0):
    """Outcomes and length gaps of a judge that likes length; the first is longer on most prompts."""
    random = np.random.default_rng(seed)
    gap = random.normal(8, 10, size=n)
    chance = expit(quality + bias * np.tanh(gap / gap.std()))
    return (random.random(n) < chance).astype(float), gap


def test_length_control_removes_the_effect_of_length():
    """Equally good, but longer and preferred for it: it wins 67% of the time, and 50% at equal lengths."""
    outcome, gap = long_winded(50_000, quality=0.0, bias=1.5)
    assert outcome.mean() > 0.65
    ones = np.ones((1, len(outcome)))
    assert matches.length_controlled(outcome, gap, ones)[0, 0] == pytest.approx(0.5, abs=0.01)
    better, gap = long_winded(50_000, quality=0.7, bias=-1.0)
    assert matches.length_controlled(better, gap, ones)[0, 0] == pytest.approx(expit(0.7), abs=0.01)


def test_length_control_equals_the_likelihoods_maximum_and_weights_are_copies():
    outcome, gap = long_winded(80, quality=0.3, bias=1.0)
    outcome[:10] = 0.5
    counts = np.random.default_rng(0).integers(0, 4, size=80)
    x = np.stack([np.ones(80), np.tanh(gap / gap.std())])

    def loss(c):
        p = expit(c @ x)
        return -(counts * (outcome * np.log(p) + (1 - outcome) * np.log(1 - p))).sum() + 0.005 * (c**2).sum()

    expected = expit(minimize(loss, np.zeros(2), options={"gtol": 1e-9}).x[0])
    assert matches.length_controlled(outcome, gap, counts[None])[0, 0] == pytest.approx(expected, abs=1e-6)


def test_length_control_changes_nothing_if_lengths_are_equal():
    outcome = np.array([1.0] * 30 + [0.5] * 6 + [0.0] * 12)
    found = matches.length_controlled(outcome, np.zeros(48), np.ones((1, 48)))[0, 0]
    assert logit(found) == pytest.approx(logit(outcome.mean()), abs=1e-3)
    assert 0.99 < matches.length_controlled(np.ones(48), np.arange(48.0), np.ones((1, 48)))[0, 0] < 1


def test_there_is_no_win_rate_at_equal_lengths_if_one_side_is_always_longer():
    """One side is longer by 20 tokens on nearly all prompts; that says nothing about a gap of 0."""
    random = np.random.default_rng(0)
    gaps = {
        "longer": random.normal(20, 3, size=2000),
        "both": random.normal(20, 14, size=2000),
        "equal": np.zeros(2000),
    }
    outcome = (random.random(2000) < 0.9).astype(float)
    for name, gap in gaps.items():
        lengths = {"sft": np.full(2000, 40.0), "dpo": 40 + gap}
        (pair,) = matches.match(["sft", "dpo"], "sft", {("dpo", "sft"): outcome}, lengths, range(2000), 20, 0)["pairs"]
        assert (pair["length_controlled"] is None) == (name == "longer"), name
    assert pair["length_controlled"]["mean"] == pytest.approx(outcome.mean(), abs=1e-3)


def test_length_controlled_interval_covers():
    covered = []
    for seed in range(500):
        outcome, gap = long_winded(150, quality=0.4, bias=1.0, seed=seed)
        interval = stats.bootstrap_of(
            lambda c, o=outcome, g=gap: matches.length_controlled(o, g, c), range(150), 300, seed
        )[0]
        covered.append(interval["low"] <= expit(0.4) <= interval["high"])
    assert 0.93 <= np.mean(covered) <= 0.97


def test_a_match_by_hand():
    names = ["base", "sft", "dpo", "ppo"]
    outcome_of = simulated({"base": -3.0, "sft": 0.0, "dpo": 0.0, "ppo": 2.0}, 60)
    lengths = {name: np.random.default_rng(i).integers(5, 20, size=60) for i, name in enumerate(names)}
    found = matches.match(names, "sft", outcome_of, lengths, [i // 2 for i in range(60)], 200, 0)
    pairs = {(row["first"], row["second"]): row for row in found["pairs"]}
    assert (found["prompts"], found["groups"]) == (60, 30)
    assert [row["family"] for row in found["pairs"]] == ["base", "base", "base", "sft", "sft", "policies"]
    for pair, row in pairs.items():
        outcome = outcome_of[pair]
        (alone,) = stats.bootstrap_of(stats.mean_of(outcome), [i // 2 for i in range(60)], 200, 0)
        assert row["win_rate"]["mean"] == pytest.approx(outcome.mean())
        assert row["win_rate"]["low"] == pytest.approx(alone["low"])
        assert row["win_rate"]["wins"] + row["win_rate"]["ties"] + row["win_rate"]["losses"] == 60
    assert pairs["ppo", "sft"]["significant"]
    assert not pairs["dpo", "sft"]["significant"]
    assert pairs["dpo", "sft"]["p_holm"] == pytest.approx(max(pairs["dpo", "sft"]["p"], 2 * pairs["ppo", "sft"]["p"]))
    assert pairs["ppo", "dpo"]["p_holm"] == pairs["ppo", "dpo"]["p"]  # the only one in its family
    assert [row["name"] for row in found["scores"]] == names
    assert found["scores"][3]["score"]["low"] > 0
    assert found["scores"][0]["score"]["high"] < 0


def test_a_match_without_the_reference_has_no_scores():
    outcome_of = simulated({"base": 0.0, "dpo": 0.0}, 20)
    lengths = dict.fromkeys(("base", "dpo"), [1.0] * 20)
    assert matches.match(["base", "dpo"], "sft", outcome_of, lengths, range(20), 100, 0)["scores"] == []


def test_unknown_outcomes_affect_only_their_pair():
    """As if that pair had not been compared on those prompts; everything else stays the same."""
    names, groups = ["base", "sft", "dpo"], [i // 2 for i in range(40)]
    outcome_of = simulated({"base": -0.5, "sft": 0.0, "dpo": 0.5}, 40)
    lengths = {name: np.random.default_rng(i).integers(5, 20, size=40) for i, name in enumerate(names)}
    whole = matches.match(names, "sft", outcome_of, lengths, groups, 200, 0)
    holed = outcome_of | {("dpo", "sft"): np.where(np.arange(40) < 10, np.nan, outcome_of["dpo", "sft"])}
    found = matches.match(names, "sft", holed, lengths, groups, 200, 0)
    assert found["pairs"][:2] == whole["pairs"][:2]
    rest = outcome_of["dpo", "sft"][10:]
    pair = found["pairs"][2]
    assert pair["win_rate"]["mean"] == pytest.approx(rest.mean())
    assert (pair["win_rate"]["n"], pair["win_rate"]["groups"]) == (30, 15)
    assert pair["win_rate"]["wins"] + pair["win_rate"]["losses"] == 30
    assert pair["p"] == stats.sign_flip_p(rest, groups[10:], 0)
    assert pair["minimum_detectable"] == stats.minimum_detectable(rest, groups[10:], 1)
    wins = np.zeros((1, 3, 3))
    for (a, b), outcome in outcome_of.items():
        played = outcome[10:] if (a, b) == ("dpo", "sft") else outcome
        wins[0, names.index(a), names.index(b)] = played.sum()
        wins[0, names.index(b), names.index(a)] = (1 - played).sum()
    scores = [row["score"]["mean"] for row in found["scores"]]
    assert scores == pytest.approx(matches.bradley_terry(wins, 1)[0].tolist())
