"""Simulated labelers that rank by chrF against the author's own text."""

from tunetrail.config.comparisons import ReferenceLabeler
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.ranks import simulated_rankings
from tunetrail.preferences.rows import SampledRow
from tunetrail.scorers.chrf import chrf


def rank(rows: list[SampledRow], config: ReferenceLabeler, stage: Stage) -> Labels:
    """Raises DataError for a row without a reference."""
    rankings = []
    for row in rows:
        reference = row["reference"]
        if reference is None:
            raise DataError(
                f"completions: row {row['id']} has no reference text, which the labeler 'reference' compares with; "
                "give demonstrations with completions, or choose another comparisons.labeler"
            )
        scores = [chrf(completion, reference) for completion in row["completions"]]
        rankings.append(
            simulated_rankings(
                scores,
                row["id"],
                "reference",
                labelers=config.labelers,
                noise=config.noise,
                tie=config.tie,
                seed=stage.seed,
            )
        )
    return Labels(rankings)
