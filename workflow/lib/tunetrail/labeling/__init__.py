"""Labelers: who ranks the completions of a prompt.

A labeler is a function `rank(rows, config, stage) -> Labels` that maps comparison rows without
rankings to their rankings; `LABELERS` finds it by the name that `comparisons.labeler` gives. To add
one, write such a function, its config class in `tunetrail.config`, and one line here.
"""

from collections.abc import Callable
from typing import Any

from tunetrail.contract import Stage
from tunetrail.labeling import human, llm, recorded, reference, reward_model
from tunetrail.labeling.labels import Labels

LABELERS: dict[str, Callable[[list[dict], Any, Stage], Labels]] = {
    "reference": reference.rank,
    "recorded": recorded.rank,
    "reward_model": reward_model.rank,
    "llm": llm.rank,
    "human": human.rank,
}
