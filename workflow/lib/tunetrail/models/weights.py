"""How often rows are seen in training: the `weight` of their source.

A row of weight 2.5 is in every epoch twice, and a third time in half of them: which rows are is drawn anew each time.
"""

import random
from collections import Counter
from collections.abc import Sequence


def weight_of(row: dict) -> dict[str, float]:
    """{"weight"} of a row that has one, to go on with what is made of it; rows without one count once."""
    return {"weight": row["weight"]} if "weight" in row else {}


def taken_weights(examples: Sequence[dict]) -> list[float]:
    """The weights of the examples, taken out of them: trainers know no such column."""
    return [example.pop("weight", 1.0) for example in examples]


def rows_per_epoch(weights: Sequence[float]) -> int:
    """How many rows an epoch has, the same number each time.

    >>> rows_per_epoch([1, 1, 2.5, 2.5, 0.5, 0.5])
    8
    """
    return sum(int(w) * n + _drawn(w, n) for w, n in Counter(weights).items())


def _drawn(weight: float, rows: int) -> int:
    """How many of the rows of one weight come once more than its whole part says: of a weight below 1 at least one."""
    return max(round(weight % 1 * rows), 1 if weight < 1 else 0)


def rows_of_epoch(weights: Sequence[float], rng: random.Random) -> list[int]:
    """Indices of the rows of one epoch, each as often as its weight says; what is left of a weight is drawn."""
    rows = [i for i, weight in enumerate(weights) for _ in range(int(weight))]
    for weight in sorted(set(weights)):
        own = [i for i, w in enumerate(weights) if w == weight]
        rows += rng.sample(own, _drawn(weight, len(own)))
    return rows
