"""Labelers: who ranks the completions of a prompt.

A labeler is a function `rank(rows, config, stage) -> Labels` in the module `tunetrail.labeling.<name>`, where <name> is
the value of `comparisons.labeler`. It ranks sampled rows. To add one, write such a module, its config class in
`tunetrail.config.comparisons`, and add that class to `ComparisonsConfig`. A labeler is imported when it is used.
"""

import importlib
from typing import Any

from tunetrail.contract.stage import Stage
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.rows import SampledRow


def rank(labeler: str, rows: list[SampledRow], config: Any, stage: Stage) -> Labels:
    """The rankings of sampled rows by the labeler with this name."""
    return importlib.import_module(f"tunetrail.labeling.{labeler}").rank(rows, config, stage)
