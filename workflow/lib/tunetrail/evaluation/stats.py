"""Statistics as small pure functions; an interval is {"mean", "low", "high", "n"}, 95% by bootstrap.

A value that cannot be measured (no data, a constant) is None, never 0.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

_BLOCK = 1 << 20  # indices drawn at once: bounds the memory of a bootstrap over many prompts


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
        _, member = np.unique([str(g) for g in groups], return_inverse=True)
        sums, counts = np.bincount(member, x), np.bincount(member).astype(float)
    random = np.random.default_rng(seed)
    size = len(sums)
    means, block = np.empty(n_resamples), max(1, _BLOCK // size)
    for start in range(0, n_resamples, block):
        drawn = random.integers(size, size=(min(block, n_resamples - start), size))
        means[start : start + block] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def win_rate(
    ours: Sequence[float],
    theirs: Sequence[float],
    tie: float = 0.0,
    n_resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any] | None:
    """How often our score beats theirs on the same prompt; a gap of at most `tie` is a tie and counts half.

    Args:
        ours, theirs: [n], a score for each prompt.

    Returns:
        The bootstrap interval over prompts (or groups) with "wins", "ties", "losses"; None for no prompts.
    """
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    outcome = np.where(np.abs(gap) <= tie, 0.5, gap > 0)
    interval = bootstrap(outcome.tolist(), n_resamples, seed, groups)
    if interval is None:
        return None
    return interval | {
        name: int((outcome == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))
    }


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


def expected_accuracy(accuracy: float, label_noise: float) -> float:
    """Accuracy seen on labels of which a share is wrong: a(1-e) + (1-a)e."""
    return accuracy * (1 - label_noise) + (1 - accuracy) * label_noise


def distinct_n(token_lists: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016); None where no text has n tokens."""
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
