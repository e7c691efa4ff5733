"""Golden numbers, brute force and coverage for tunetrail.evaluation.stats."""

import itertools
import math

import numpy as np
import pytest

from tunetrail.evaluation import stats


def test_bootstrap_of_nothing_and_of_one_value():
    assert stats.bootstrap([], 100, seed=0) is None
    assert stats.bootstrap([2.5], 100, seed=0) == {"mean": 2.5, "low": 2.5, "high": 2.5, "n": 1}


def test_bootstrap_equals_brute_force_over_all_resamples():
    values = [1.0, 2.0, 6.0, 11.0]
    means = [np.mean(sample) for sample in itertools.product(values, repeat=4)]
    interval = stats.bootstrap(values, 200_000, seed=1)
    assert interval["mean"] == 5.0
    assert interval["n"] == 4
    assert [interval["low"], interval["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_bootstrap_of_groups_equals_brute_force_over_all_resamples_of_groups():
    groups = {"a": [0.0, 0.0, 0.0], "b": [1.0], "c": [5.0, 7.0], "d": [2.5], "e": [3.0, 9.0]}
    values = [v for vs in groups.values() for v in vs]
    names = [g for g, vs in groups.items() for _ in vs]
    means = [np.mean([v for g in drawn for v in groups[g]]) for drawn in itertools.product(groups, repeat=5)]
    interval = stats.bootstrap(values, 100_000, seed=1, groups=names)
    assert interval["mean"] == pytest.approx(np.mean(values))
    assert interval["n"] == 9
    assert [interval["low"], interval["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_bootstrap_depends_only_on_its_seed():
    values = np.random.default_rng(0).normal(size=30)
    assert stats.bootstrap(values, 500, seed=3) == stats.bootstrap(values, 500, seed=3)
    assert stats.bootstrap(values, 500, seed=3) != stats.bootstrap(values, 500, seed=4)


def test_bootstrap_in_blocks_covers_every_resample(monkeypatch):
    values = np.random.default_rng(0).normal(5, 1, size=30)
    monkeypatch.setattr(stats, "_BLOCK", 100)
    interval = stats.bootstrap(values, 1001, seed=0)
    assert 4 < interval["low"] < interval["mean"] < interval["high"] < 6


def _coverage(draw, truth, **options):
    """The share of 2,000 intervals that contain the truth."""
    random = np.random.default_rng(7)
    intervals = (stats.bootstrap(draw(random), 400, seed=i, **options) for i in range(2000))
    return np.mean([interval["low"] <= truth <= interval["high"] for interval in intervals])


def test_interval_covers_the_true_mean_95_times_in_100():
    assert 0.93 <= _coverage(lambda r: r.normal(3, 2, size=60), 3) <= 0.97


def test_the_group_interval_covers_clustered_data_and_the_row_interval_does_not():
    groups = np.repeat(np.arange(80), 5)

    def clustered(random):
        return random.normal(size=80)[groups] + 0.3 * random.normal(size=400)

    assert 0.93 <= _coverage(clustered, 0, groups=groups) <= 0.97
    assert _coverage(clustered, 0) < 0.75


def test_an_undefined_resample_does_not_count():
    """The mean of the first of three rows, over the resamples that contain it."""

    def first(counts):
        with np.errstate(invalid="ignore"):
            return 7 * counts[:, :1] / counts[:, :1]

    (found,) = stats.bootstrap_of(first, range(3), 100, seed=0)
    assert (found["low"], found["high"]) == (7, 7)


def win_rate(ours, theirs):
    outcome = stats.outcomes(ours, theirs)
    return stats.bootstrap_of(stats.mean_of(outcome), range(len(ours)), 2000, 0)[0] | stats.tally(outcome)


def test_win_rate_counts_ties_half():
    result = win_rate([3, 2, 1, 5], [1, 2, 2, 1])
    assert (result["wins"], result["ties"], result["losses"], result["n"]) == (2, 1, 1, 4)
    assert result["mean"] == 0.625
    assert result["low"] < 0.625 < result["high"]


def test_several_samples_count_all_pairs_of_a_prompt():
    found = stats.outcomes([[3, 1], [5, 5]], [[2, 1, 0], [5, 6, 7]])
    # 3 beats all three; 1 loses to 2, ties with 1, beats 0. 5 ties once and loses twice, both times.
    assert found == pytest.approx([(3 + 0 + 0.5 + 1) / 6, 1 / 6])
    assert stats.tally(np.array([0.75, 0.5, 1 / 6, 1.0])) == {"wins": 2, "ties": 1, "losses": 1}


def test_win_rate_tie_is_inclusive():
    assert stats.outcomes([3, 3.1, 1], [1, 1, 3.1], tie=2).tolist() == [0.5, 1, 0]


def test_win_rate_of_the_other_side_is_the_complement():
    random = np.random.default_rng(0)
    ours, theirs = random.integers(0, 5, size=50), random.integers(0, 4, size=50)
    there, back = win_rate(ours, theirs), win_rate(theirs, ours)
    assert there["mean"] == pytest.approx(1 - back["mean"])
    assert (there["wins"], there["losses"]) == (back["losses"], back["wins"])
    assert there["low"] == pytest.approx(1 - back["high"])


def test_the_area_under_the_curve_is_the_share_of_pairs_told_apart():
    values, positive = [3.0, 1.0, 2.0, 2.0, 1.0, 5.0], [True, False, True, False, True, False]
    counts = np.array([[1, 1, 1, 1, 1, 1], [2, 1, 0, 3, 1, 0], [1, 0, 1, 0, 1, 0]])
    expected = []
    for drawn in counts[:2]:
        rows = [(v, p) for v, p, n in zip(values, positive, drawn, strict=True) for _ in range(n)]
        pairs = [(a > b) + (a == b) / 2 for a, is_one in rows if is_one for b, other in rows if not other]
        expected.append(np.mean(pairs))
    found = stats.auc_of(values, positive)(counts)
    assert found[:2, 0] == pytest.approx(expected)
    assert np.isnan(found[2, 0])  # none of the other label was drawn


def test_dpo_against_ppo_on_256_prompts_is_not_significant():
    """61.7% against 57.0% (Rafailov et al. 2023): the intervals overlap, each about 6 points to a side."""
    dpo, ppo = (win_rate([1] * wins + [0] * (256 - wins), [0.5] * 256) for wins in (158, 146))
    assert dpo["mean"] == pytest.approx(0.617, abs=1e-3)
    assert dpo["low"] < ppo["high"]
    assert dpo["high"] - dpo["mean"] == pytest.approx(1.96 * math.sqrt(0.617 * 0.383 / 256), abs=0.012)


def test_bootstrap_of_the_mean_is_the_bootstrap():
    random = np.random.default_rng(0)
    values, groups = random.normal(size=200), random.integers(0, 30, size=200)
    (found,) = stats.bootstrap_of(stats.mean_of(values), groups, 20_000, seed=0)
    clusters = stats.bootstrap(values, 20_000, 1, groups=groups)
    assert found["mean"] == pytest.approx(clusters["mean"])
    assert [found["low"], found["high"]] == pytest.approx([clusters["low"], clusters["high"]], abs=0.015)
    assert (found["n"], found["groups"]) == (200, 30)


def test_bootstrap_of_rows_of_one_group_resamples_rows():
    found, alone = (stats.bootstrap_of(stats.mean_of([1.0, 2.0, 3.0]), g, 100, 0)[0] for g in (["a"] * 3, range(3)))
    assert found == alone | {"groups": 1}


def test_win_rate_intervals_cover_95_times_in_100():
    """With ties, and with prompts in groups, both over prompts and over groups."""
    random, trials, n = np.random.default_rng(3), 4000, 200
    chances, groups = [0.5, 0.2, 0.3], np.repeat(np.arange(50), 4)
    alone = random.choice([1, 0.5, 0], size=(trials, n), p=chances)
    together = random.choice([1, 0.5, 0], size=(trials, 50), p=chances)[:, groups]

    def coverage(outcomes, units):
        found = stats.bootstrap_of(
            lambda counts: counts @ outcomes.T / n, units, 2000, seed=1
        )  # for all trials at once
        return np.mean([interval["low"] <= 0.6 <= interval["high"] for interval in found])

    assert 0.93 <= coverage(alone, range(n)) <= 0.97
    assert 0.93 <= coverage(together, groups) <= 0.97
    assert coverage(together, range(n)) < 0.75


def modules(random, trials, gain, samples=3, sizes=(2, 3, 4, 5, 6) * 8):
    """Gold scores [trials, n, samples] of two models, the first better by `gain`, on prompts of 40 modules of unequal
    size half of whose effects they share; and each prompt's module."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    of_module, of_prompt = random.normal(size=(trials, len(sizes))), random.normal(size=(trials, len(groups)))
    effect = gain + 3.5 * of_module[:, groups] + 3 * of_prompt
    ours, theirs = 6.5 * random.normal(size=(2, trials, len(groups), samples))
    return ours + effect[..., None], theirs, groups


def test_intervals_of_several_samples_cover_over_groups_and_not_over_prompts():
    """Win rate and paired difference, the means over 3 samples (all 9 pairs) of a prompt as one value."""
    from scipy.stats import norm

    random = np.random.default_rng(11)
    ours, theirs, groups = modules(random, 1500, 2.0)
    wins = np.stack([stats.outcomes(a, b) for a, b in zip(ours, theirs, strict=True)])
    gained = ours.mean(2) - theirs.mean(2)
    truths = norm.cdf(2.0 / np.sqrt(2 * 6.5**2 + 3.5**2 + 3**2)), 2.0
    for values, truth in zip((wins, gained), truths, strict=True):
        covered = {}
        for name, units in (("groups", groups), ("prompts", range(len(groups)))):
            found = stats.bootstrap_of(stats.mean_of(values.T), units, 1000, seed=2)
            covered[name] = np.mean([interval["low"] <= truth <= interval["high"] for interval in found])
        assert 0.92 <= covered["groups"] <= 0.97
        assert covered["prompts"] < covered["groups"] - 0.02


def test_p_has_its_size_and_its_power_grows_with_samples():
    random = np.random.default_rng(12)

    def found(gain, samples):
        ours, theirs, groups = modules(random, 80, gain, samples)
        pairs = zip(ours, theirs, strict=True)
        return np.mean([stats.sign_flip_p(stats.outcomes(a, b), groups, 1) < 0.05 for a, b in pairs])

    assert found(0.0, 3) <= 0.11  # 5%, within 2.5 standard errors
    assert found(2.0, 3) > found(2.0, 1) + 0.1


@pytest.mark.parametrize(("wins", "losses", "ties"), [(9, 3, 0), (40, 20, 11), (5, 5, 2), (0, 7, 0)])
def test_sign_flip_is_the_sign_test(wins, losses, ties):
    from scipy.stats import binomtest

    outcome = np.array([1] * wins + [0] * losses + [0.5] * ties)
    p = stats.sign_flip_p(outcome, range(len(outcome)))
    assert p == pytest.approx(binomtest(wins, wins + losses).pvalue, abs=0.01 if wins + losses > 12 else 1e-9)


def test_sign_flip_of_groups_is_one_flip_per_group():
    """Five groups of ten that all agree: 2 of 32 flips are as far from balance."""
    outcome, groups = np.ones(50), np.repeat(np.arange(5), 10)
    assert stats.sign_flip_p(outcome, groups) == pytest.approx(2 / 32)
    assert stats.sign_flip_p(outcome, range(50)) < 0.001
    assert stats.sign_flip_p(np.full(8, 0.5), range(8)) == 1
    assert stats.sign_flip_p(outcome, ["a"] * 50) == 1  # one group shows nothing


def test_sign_flip_is_uniform_if_nobody_is_better():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 2)
    outcomes = random.choice([1, 0], size=(150, 40))[:, groups]
    p = np.array([stats.sign_flip_p(outcome, groups, seed=1) for outcome in outcomes])
    assert 0.01 <= np.mean(p < 0.05) <= 0.09


def test_holm_by_hand_and_between_bonferroni_and_nothing():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.5]) == [1.0, 1.0]
    assert stats.holm([]) == []
    p = np.random.default_rng(0).random(20) ** 3
    corrected = np.array(stats.holm(p))
    assert (p <= corrected).all()
    assert (corrected <= np.minimum(1, 20 * p) + 1e-12).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


def test_holm_raises_a_false_alarm_in_one_family_of_twenty():
    p = np.random.default_rng(1).random((4000, 6))
    assert 0.04 <= np.mean([min(stats.holm(row)) < 0.05 for row in p]) <= 0.06


@pytest.mark.parametrize(("n", "wins", "tests"), [(64, 48, 1), (200, 150, 1), (200, 100, 4), (1000, 300, 1)])
def test_minimum_detectable_difference_is_found_four_times_in_five(n, wins, tests):
    """Whatever was observed: with a true win rate that far above one half the exact sign test finds it in 80% of the
    draws, less what a count that moves in whole steps costs."""
    from scipy.stats import binom, binomtest, norm

    detectable = stats.minimum_detectable(np.repeat([1.0, 0.0], [wins, n - wins]), range(n), tests)
    assert detectable == pytest.approx((norm.ppf(1 - 0.025 / tests) + norm.ppf(0.8)) * 0.5 / np.sqrt(n - 1))
    found = [k for k in range(n + 1) if binomtest(k, n).pvalue < 0.05 / tests]
    assert 0.77 <= binom.pmf(found, n, 0.5 + detectable).sum() <= 0.82


def test_minimum_detectable_difference_does_not_grow_with_the_effect():
    """Prompts of 33 modules, correlated within each, with a win rate of 50% or 90%: they show the same difference."""
    random, groups = np.random.default_rng(4), np.repeat(np.arange(33), 3)

    def smallest(p):
        chances = random.beta(6 * p, 6 * (1 - p), size=(300, 33))[:, groups]
        outcomes = (random.random(chances.shape) < chances).astype(float)
        return np.mean([stats.minimum_detectable(outcome, groups) for outcome in outcomes])

    assert smallest(0.9) == pytest.approx(smallest(0.5), rel=0.1)


def test_minimum_detectable_difference_grows_with_the_groups():
    outcome = np.repeat(np.random.default_rng(0).choice([0.0, 1.0], size=50), 4)
    alone, grouped = (stats.minimum_detectable(outcome, g) for g in (range(200), np.repeat(np.arange(50), 4)))
    assert grouped == pytest.approx(2 * alone, rel=0.02)


def test_too_few_groups_cannot_show_anything():
    """Five groups that all agree have p = 2/32; six have 2/64, which is not enough for two tests."""
    five, six = (np.repeat(np.arange(k), 4) for k in (5, 6))
    assert stats.sign_flip_p(np.ones(20), five) > 0.05
    assert stats.minimum_detectable(np.array([1.0, 0] * 10), five) is None
    assert stats.minimum_detectable(np.ones(24), six) == 0.5  # only winning everything
    assert stats.minimum_detectable(np.ones(24), six, tests=2) is None
    assert stats.minimum_detectable(np.array([0.0, 1.0]), ["a", "a"]) is None
    assert stats.minimum_detectable(np.full(20, 0.5), range(20)) is None


def test_best_of_n_from_many_samples_equals_all_subsets():
    random = np.random.default_rng(0)
    proxy, gold = random.normal(size=(2, 1, 6))
    for n in (1, 2, 3, 6):
        best = [max(rows, key=proxy[0].__getitem__) for rows in itertools.combinations(range(6), n)]
        assert stats.best_of_n_weights(6, n).sum() == pytest.approx(1)
        assert stats.best_of_n_values(proxy, proxy, n) == pytest.approx(proxy[0, best].mean())
        assert stats.best_of_n_values(proxy, gold, n) == pytest.approx(gold[0, best].mean())


def test_best_of_n_is_unbiased():
    """The best of 4 standard normal numbers is 1.0294 on average."""
    draws = np.random.default_rng(0).normal(size=(20_000, 16))
    assert stats.best_of_n_values(draws, draws, 4).mean() == pytest.approx(1.0294, abs=0.01)


def test_standard_error_equals_scipy_and_that_of_groups_their_sums():
    from scipy.stats import sem

    values = np.random.default_rng(0).normal(size=30)
    deviations = values - values.mean()
    assert stats.standard_error(deviations, range(30)) == pytest.approx(sem(values))
    assert stats.standard_error([1.0], ["a"]) is None
    # every value four times in its own group: copies add no information
    assert stats.standard_error(np.repeat(deviations, 4), np.repeat(np.arange(30), 4)) == pytest.approx(sem(values))


def test_expected_calibration_error_by_hand():
    error, rows = stats.expected_calibration_error([0.95, 0.85, 0.85, 0.55], [1, 1, 0, 0])
    # bins (0.5, 0.6]: |0.55 - 0|; (0.8, 0.9]: |0.85 - 0.5|, two of them; (0.9, 1]: |0.95 - 1|
    assert error == pytest.approx((0.55 + 2 * 0.35 + 0.05) / 4)
    assert [row["n"] for row in rows] == [1, 2, 1]
    assert rows[1]["low"] == pytest.approx(0.8)
    assert rows[1]["high"] == pytest.approx(0.9)
    assert rows[1]["confidence"] == pytest.approx(0.85)
    assert rows[1]["accuracy"] == 0.5


def test_expected_calibration_error_of_calibrated_and_of_overconfident():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, size=20_000)
    calibrated = random.random(20_000) < confidence
    assert stats.expected_calibration_error(confidence, calibrated)[0] < 0.02
    assert stats.expected_calibration_error(np.ones(20_000), calibrated)[0] == pytest.approx(0.25, abs=0.02)


def test_expected_calibration_error_at_the_edges():
    error, rows = stats.expected_calibration_error([0.0, 1.0], [0, 1])
    assert error == 0
    assert [(row["low"], row["high"], row["n"]) for row in rows] == [(0.0, 0.1, 1), (0.9, 1.0, 1)]
    assert stats.expected_calibration_error([], []) == (None, [])


def test_spearman_by_hand_and_undefined():
    x, y = [10, 20, 30, 40, 50], [1, 3, 2, 5, 4]
    assert stats.spearman(x, y) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert stats.spearman(x, [-v for v in x]) == pytest.approx(-1)
    assert stats.spearman(x, [7] * 5) is None
    assert stats.spearman([1], [2]) is None


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193), (4, 0.636), (16, 1.835), (64, 3.175)])
def test_best_of_n_kl_golden(n, nats):
    assert stats.best_of_n_kl(n) == pytest.approx(nats, abs=5e-4)


def test_best_of_n_kl_equals_brute_force():
    """KL from best-of-3 of a uniform choice among 2,000 to that choice."""
    size, n = 2000, 3
    best = (np.arange(1, size + 1) / size) ** n - (np.arange(size) / size) ** n
    assert stats.best_of_n_kl(n) == pytest.approx(float((best * np.log(best * size)).sum()), abs=1e-3)


def test_distinct_n_by_hand():
    texts = [["a", "b", "a", "b"], ["a", "b"], ["c"]]
    assert stats.distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert stats.distinct_n(texts, 2) == pytest.approx(2 / 4)  # ab ba ab | ab: no pair spans two texts
    assert stats.distinct_n([["a"]], 2) is None
