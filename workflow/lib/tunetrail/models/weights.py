"""How often rows are seen in training: the `weight` of their source.

A row of weight 2.5 is in every epoch twice and in half of them a third time. Each epoch draws afresh which rows are.
"""

import random
from collections import Counter
from collections.abc import Sequence


def weight_of(row: dict) -> dict[str, float]:
    """{"weight"} of a row that has one, to pass on to what is made from the row; rows without one count once."""
    return {"weight": row["weight"]} if "weight" in row else {}


def pop_weights(examples: Sequence[dict]) -> list[float]:
    """Removes the weights from the examples, since trainers know no such column, and returns them."""
    return [example.pop("weight", 1.0) for example in examples]


def rows_per_epoch(weights: Sequence[float]) -> int:
    """How many rows each epoch has.

    >>> rows_per_epoch([1, 1, 2.5, 2.5, 0.5, 0.5])
    8
    """
    return sum(int(w) * n + _drawn(w, n) for w, n in Counter(weights).items())


def _drawn(weight: float, rows: int) -> int:
    """How many rows of one weight come once more than its whole part says; at least one for weights below 1."""
    return max(round(weight % 1 * rows), 1 if weight < 1 else 0)


def rows_of_epoch(weights: Sequence[float], rng: random.Random) -> list[int]:
    """Indices of one epoch's rows: each as often as the whole part of its weight, plus those drawn for the fraction."""
    rows = [i for i, weight in enumerate(weights) for _ in range(int(weight))]
    for weight in sorted(set(weights)):
        own = [i for i, w in enumerate(weights) if w == weight]
        rows += rng.sample(own, _drawn(weight, len(own)))
    return rows
