"""Labelers: who ranks the completions of a prompt.

A labeler is a function `rank(rows, config, stage) -> Labels` in the module `tunetrail.labeling.<name>`, where <name> is
what `comparisons.labeler` says; it maps comparison rows without rankings to their rankings. To add one, write such a
module, its config class in `tunetrail.config.comparisons`, and its name there. A labeler is imported when it is used.
"""

import importlib
from typing import Any

from tunetrail.labeling.labels import Labels


def rank(labeler: str, rows: list[dict], config: Any, stage: Any) -> Labels:
    """The rankings of comparison rows by the labeler of this name."""
    return importlib.import_module(f"tunetrail.labeling.{labeler}").rank(rows, config, stage)
