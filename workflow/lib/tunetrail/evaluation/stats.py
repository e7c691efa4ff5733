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
    """Bootstrap intervals of any statistics of n rows, by resampling the groups that rows belong to.

    Rows of one group depend on one another: resampling rows would give too narrow an interval. Where all rows are of
    one group nothing else can be resampled.

    Args:
        statistic: [B, n] (how often each row was drawn) -> [B, K]; NaN where it is undefined for what was drawn, which
            then does not count.
        groups: [n].

    Returns:
        K times {"mean": the statistic of the rows themselves, "low", "high", "n", "groups"}.
    """
    member = members(groups)
    n, random, size = len(member), np.random.default_rng(seed), int(member.max()) + 1
    unit = member if size > 1 else np.arange(n)
    units, block = int(unit.max()) + 1, max(1, _BLOCK // n)
    drawn = [
        statistic(random.multinomial(units, np.full(units, 1 / units), min(block, n_resamples - start))[:, unit])
        for start in range(0, n_resamples, block)
    ]
    bounds = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    return [
        {"mean": float(mean), "low": float(low), "high": float(high), "n": n, "groups": size}
        for mean, low, high in zip(statistic(np.ones((1, n)))[0], *bounds, strict=True)
    ]


def mean_of(values: Sequence[float] | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of [n] values, or of each of the K columns of [n, K], as a statistic for `bootstrap_of`."""
    columns = np.asarray(values, dtype=float).reshape(len(values), -1)
    return lambda counts: counts @ columns / counts.sum(1, keepdims=True)


def auc_of(values: Sequence[float] | np.ndarray, positive: Sequence[bool]) -> Callable[[np.ndarray], np.ndarray]:
    """How often a positive one of [n] values is above a negative one, a tie counting one half (the area under the ROC
    curve), as a statistic for `bootstrap_of`; NaN where one sort was not drawn."""
    order = np.argsort(values, kind="stable")
    x, is_positive = np.asarray(values, dtype=float)[order], np.asarray(positive, dtype=float)[order]
    starts = np.flatnonzero(np.r_[True, x[1:] != x[:-1]])  # of runs of equal values

    def statistic(counts: np.ndarray) -> np.ndarray:
        drawn = counts[:, order].astype(float)
        above, below = (np.add.reduceat(drawn * of, starts, axis=1) for of in (is_positive, 1 - is_positive))
        won = (above * (below.cumsum(1) - below / 2)).sum(1)
        with np.errstate(invalid="ignore"):
            return (won / (above.sum(1) * below.sum(1)))[:, None]

    return statistic


def outcomes(ours: np.ndarray | Sequence, theirs: np.ndarray | Sequence, tie: float = 0.0) -> np.ndarray:
    """[n]: of each prompt the mean outcome over all pairs of our samples and theirs. An outcome is 1 where our score is
    the higher one, 0 where theirs is, one half where they lie within `tie`.

    With several samples of a prompt (the rows of each side) their mean over S x S pairs is the U-statistic of Mann and
    Whitney: it varies less than S pairs do. Outcomes of one prompt depend on one another; the prompt stays one value.

    Args:
        ours: [n, S], or [n] for a sample each.
        theirs: [n, T], or [n].
    """
    a, b = (np.asarray(side, dtype=float).reshape(len(side), -1) for side in (ours, theirs))
    gap = a[:, :, None] - b[:, None, :]
    return np.where(np.abs(gap) <= tie, 0.5, gap > 0).mean((1, 2))


def tally(outcome: np.ndarray) -> dict[str, int]:
    """ "wins", "ties" and "losses": on how many of n prompts the outcome lies above, at and below one half."""
    signs = np.sign(outcome - 0.5)
    return {name: int((signs == value).sum()) for name, value in (("wins", 1), ("ties", 0), ("losses", -1))}


def group_sums(values: np.ndarray, groups: Groups) -> np.ndarray:
    """[n], [n] -> [G]: the sum of each group's values."""
    return np.bincount(members(groups), values)


def sign_flip_p(outcome: np.ndarray, groups: Groups, seed: int = 0) -> float:
    """Two-sided p-value that neither side is the better one: if so, each group's outcomes could as well be the other's.

    Fisher's randomisation test with whole groups as units: all flips where they are at most 9,999 (13 groups that are
    not tied), else 9,999 drawn ones. With groups of one prompt that is the sign test, exact where all are listed.

    Args:
        outcome: [n] in [0, 1]; of several samples the mean outcome of a prompt.
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
    tests: (z(1 - 0.05/(2 tests)) + z(power)) standard errors of a win rate near one half.

    The spread of outcomes is that around their own mean m, scaled as sqrt(m (1 - m)) is, to what it is at one half.
    Spread around one half would grow with the effect. Where all groups agree none is seen, and each counts as one
    outcome.

    Args:
        outcome: [n] in [0, 1].

    Returns:
        at most one half, which is to win everything; None if even that would show nothing, since all flips of so few
        groups are too few, and where all are ties.
    """
    from scipy.stats import norm

    flips = len(set(groups)) - 1
    mean = float(outcome.mean())
    own = standard_error(outcome - mean, groups) if 0 < mean < 1 else None
    error = 0.5 * own / math.sqrt(mean * (1 - mean)) if own else standard_error(outcome - 0.5, groups)
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
    """Rank correlation of [n] and [n]; None if it is undefined (a constant, or fewer than two values)."""
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
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016); None if no text has n tokens."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
