"""Simulated labelers that rank by a scorer."""

from tunetrail.config.comparisons import SimulatedLabeler
from tunetrail.contract.stage import Stage
from tunetrail.labeling.labels import Labels, ranked_by_scores
from tunetrail.preferences.rows import SampledRow
from tunetrail.scorers.build import Completion, build


def rank(rows: list[SampledRow], config: SimulatedLabeler, stage: Stage) -> Labels:
    """Raises DataError for rows without a reference if the scorer needs one, and whatever a user's scorer raises."""
    scorer = build(config.scorer, stage.shared.get("scorers", {}))
    completions = [
        Completion(row["prompt"], text, row["reference"], row, finished)
        for row in rows
        for text, finished in zip(row["completions"], row["finished"], strict=True)
    ]
    return Labels(ranked_by_scores(rows, scorer.scores(completions), config, stage.seed))
