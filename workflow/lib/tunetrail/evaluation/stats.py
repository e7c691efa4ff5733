"""Statistics as small pure functions; an interval is {"mean", "low", "high", "n"}, 95% by bootstrap.

A value that cannot be measured (no data, a constant) is None, never 0.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

Interval = dict[str, Any]
Groups = Sequence[Hashable] | np.ndarray
"""What each value belongs to."""

_BLOCK = 1 << 20  # indices drawn at once: bounds the memory of a bootstrap over many prompts


def members(groups: Groups) -> np.ndarray:
    """[n] int64: the number of the group, from 0, that each value belongs to."""
    return np.unique([str(g) for g in groups], return_inverse=True)[1]


def bootstrap(
    values: Sequence[float] | np.ndarray, n_resamples: int, seed: int, groups: Sequence[Hashable] | None = None
) -> dict[str, Any] | None:
    """Mean with its 95% percentile bootstrap interval (Efron 1979).

    Args:
        values: [n].
        groups: [n], what each value belongs to (a prompt, a module). Then whole groups are resampled,
            since values of one group are not independent and resampling them one by one would give too
            narrow an interval.

    Returns:
        {"mean", "low", "high", "n"}; None for no values. A single value (or group) is its own interval.
    """
    if len(values) == 0:
        return None
    x = np.asarray(values, dtype=float)
    if groups is None:
        sums, counts = x, np.ones(len(x))
    else:
        member = members(groups)
        sums, counts = np.bincount(member, x), np.bincount(member).astype(float)
    random = np.random.default_rng(seed)
    size = len(sums)
    means, block = np.empty(n_resamples), max(1, _BLOCK // size)
    for start in range(0, n_resamples, block):
        drawn = random.integers(size, size=(min(block, n_resamples - start), size))
        means[start : start + block] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def bootstrap_of(
    statistic: Callable[[np.ndarray], np.ndarray], groups: Sequence[Hashable], n_resamples: int, seed: int
) -> list[Interval]:
    """Bootstrap intervals of any statistics of n rows, over rows and over the groups that rows belong to.

    Args:
        statistic: [B, n] (how often each row was drawn) -> [B, K]; NaN where it is undefined for what was drawn, which
            then does not count.
        groups: [n].

    Returns:
        K times {"mean": the statistic of the rows themselves, "low", "high", "n", "group_low", "group_high",
        "groups"}; the group's bounds are None where all rows are of one group.
    """
    member = members(groups)
    n, random = len(member), np.random.default_rng(seed)
    size = int(member.max()) + 1

    def bounds(units: int, spread: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        block = max(1, _BLOCK // n)
        drawn = [
            statistic(spread(random.multinomial(units, np.full(units, 1 / units), min(block, n_resamples - start))))
            for start in range(0, n_resamples, block)
        ]
        return np.nanpercentile(np.concatenate(drawn), [2.5, 97.5], axis=0)

    estimates = statistic(np.ones((1, n)))[0]
    rows = bounds(n, lambda counts: counts)
    clusters = bounds(size, lambda counts: counts[:, member]) if size > 1 else np.full_like(rows, None, dtype=object)
    return [
        {
            "mean": float(mean),
            "low": float(low),
            "high": float(high),
            "n": n,
            "group_low": g_low,
            "group_high": g_high,
            "groups": size,
        }
        for mean, low, high, g_low, g_high in zip(estimates, *rows, *clusters.tolist(), strict=True)
    ]


def mean_of(values: Sequence[float] | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of [n] values, or of each of the K columns of [n, K], as a statistic for `bootstrap_of`."""
    columns = np.asarray(values, dtype=float).reshape(len(values), -1)
    return lambda counts: counts @ columns / counts.sum(1, keepdims=True)


def outcomes(ours: Sequence[float], theirs: Sequence[float], tie: float = 0.0) -> np.ndarray:
    """[n]: 1 where our score is the higher one, 0 where theirs is, one half where they lie within `tie`."""
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return np.where(np.abs(gap) <= tie, 0.5, gap > 0)


def tally(outcome: np.ndarray) -> dict[str, int]:
    """ "wins", "ties" and "losses" of [n] outcomes."""
    return {name: int((outcome == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))}


def group_sums(values: np.ndarray, groups: Groups) -> np.ndarray:
    """[n], [n] -> [G]: the sum of each group's values."""
    return np.bincount(members(groups), values)


def sign_flip_p(outcome: np.ndarray, groups: Groups, seed: int = 0) -> float:
    """Two-sided p-value that neither side is the better one: if so, each group's outcomes could as well be the other's.

    Fisher's randomisation test with whole groups as units: all flips where they are at most 9,999 (13 groups that are
    not tied), else 9,999 drawn ones. With groups of one prompt that is the sign test, exact where all are listed.

    Args:
        outcome: [n] of 1, 0.5, 0.
    """
    from scipy.stats import permutation_test

    sums = group_sums(2 * outcome - 1, groups)
    sums = sums[sums != 0]  # turned around they are the same
    if len(sums) < 2:
        return 1.0
    result = permutation_test((sums,), np.sum, permutation_type="samples", vectorized=True, batch=1000, rng=seed)
    return float(min(1.0, result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of m tests such that under 0.05 with 95% confidence none is a false alarm (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def standard_error(deviations: Sequence[float] | np.ndarray, groups: Groups) -> float | None:
    """Of a mean of values that depend on one another within a group (Liang and Zeger 1986); None for a single group.

    Args:
        deviations: [n], from the mean, or from what a hypothesis says it is.
        groups: [n]; of independent values each is its own.
    """
    sums = group_sums(np.asarray(deviations, dtype=float), groups)
    if len(sums) < 2:
        return None
    return math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(deviations)


def minimum_detectable(outcome: np.ndarray, groups: Groups, tests: int = 1, power: float = 0.8) -> float | None:
    """How far the true win rate must lie from one half for `sign_flip_p` to show it with this power, at 5% over so many
    tests: (z(1 - 0.05/(2 tests)) + z(power)) standard errors under the hypothesis that it is one half.

    Args:
        outcome: [n] of 1, 0.5, 0.

    Returns:
        at most one half, which is to win everything; None where even that would show nothing, since all flips of so few
        groups are too few, and where all are ties.
    """
    from scipy.stats import norm

    flips = len(set(groups)) - 1
    error = standard_error(outcome - 0.5, groups)
    if not error or 0.5**flips * tests > 0.05:
        return None
    return min(0.5, float((norm.ppf(1 - 0.05 / (2 * tests)) + norm.ppf(power)) * error))


def expected_calibration_error(
    confidence: Sequence[float], correct: Sequence[float], bins: int = 10
) -> tuple[float | None, list[dict]]:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by size (Naeini et al. 2015).

    Args:
        confidence: [n] in [0, 1].
        correct: [n] in [0, 1]; one half is a tie.

    Returns:
        (error, or None for no data; one row {"low", "high", "confidence", "accuracy", "n"} a non-empty bin,
        each bin without its low edge but for the first).
    """
    p, y = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, bins - 1)
    rows = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "confidence": float(p[bin_of == b].mean()),
            "accuracy": float(y[bin_of == b].mean()),
            "n": int((bin_of == b).sum()),
        }
        for b in np.unique(bin_of)
    ]
    if not rows:
        return None, []
    return sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(p), rows


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Rank correlation of [n] and [n]; None where it is undefined (a constant, or fewer than two values)."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats of the KL from the best of n samples to one sample, log n - (n-1)/n (Stiennon et al. 2020).

    Exact only where no two samples tie.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(samples: int, n: int) -> np.ndarray:
    """[samples]: probability that the sample of each rank, worst first, is the best of n drawn without replacement.

    With them the mean over sorted samples is the unbiased estimate of what best-of-n gets (Nakano et al. 2021, app. I):
    C(i - 1, n - 1) / C(samples, n) for rank i.
    """
    return np.array([math.comb(i, n - 1) for i in range(samples)]) / math.comb(samples, n)


def best_of_n_values(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """[P]: the expected value of the best of n samples by `proxy`, of each prompt.

    Args:
        proxy: [P, S], the score that chooses.
        values: [P, S], what is measured of the chosen one; `proxy` itself or a gold score.
    """
    order = np.argsort(proxy, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1) @ best_of_n_weights(proxy.shape[1], n)


def distinct_n(token_lists: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016); None where no text has n tokens."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
