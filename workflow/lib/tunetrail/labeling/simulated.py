"""Simulated labelers that rank by a scorer."""

from tunetrail.config.comparisons import SimulatedLabeler
from tunetrail.contract.stage import Stage
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.ranks import simulated_rankings
from tunetrail.preferences.rows import SampledRow
from tunetrail.scorers.build import Completion, build


def rank(rows: list[SampledRow], config: SimulatedLabeler, stage: Stage) -> Labels:
    """Raises DataError for rows without a reference where the scorer needs one, and what the user's own raises."""
    scorer = build(config.scorer, stage.shared.get("scorers", {}))
    completions = [
        Completion(row["prompt"], text, row["reference"], row) for row in rows for text in row["completions"]
    ]
    scores = iter(scorer.scores(completions))
    return Labels(
        [
            simulated_rankings(
                [next(scores) for _ in row["completions"]],
                row["id"],
                "simulated",
                labelers=config.labelers,
                noise=config.noise,
                tie=config.tie,
                seed=stage.seed,
            )
            for row in rows
        ]
    )
