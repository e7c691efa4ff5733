"""A policy trained by odds ratio preference optimisation (Hong et al. 2024).

    python -m tunetrail.stages.orpo --config C.json --input policy=… --input comparisons=… --output … --state …

Starts from the base model by default, since its loss fine-tunes on the preferred responses as well.
Writes `model/` (with LoRA also `adapter/`), `history.jsonl` (with separate log-probs of chosen and rejected responses,
summed over the response) and, if `checkpoints` is set, `checkpoints/<step>/model`, or with LoRA
`checkpoints/<step>/adapter`.
"""

import functools
import sys

from tunetrail.config.reference_free import OrpoConfig
from tunetrail.contract.stage import Stage
from tunetrail.models.reference_free import orpo_loss, train_reference_free
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    config = OrpoConfig(**stage.config)
    return train_reference_free(stage, config, functools.partial(orpo_loss, weight=config.odds_ratio_weight))


if __name__ == "__main__":
    sys.exit(start("orpo", run))
