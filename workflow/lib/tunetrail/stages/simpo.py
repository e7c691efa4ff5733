"""A policy trained by simple preference optimisation (Meng et al. 2024).

    python -m tunetrail.stages.simpo --config C.json --input policy=… --input comparisons=… --output … --state …

Rewards are log-probs per token times beta. Without a reference, only the data holds the policy back.
Writes `model/` (with LoRA also `adapter/`), `history.jsonl` (with separate log-probs of chosen and rejected responses,
summed over the response) and, if `checkpoints` is set, `checkpoints/<step>/model`, or with LoRA
`checkpoints/<step>/adapter`.
"""

import functools
import sys

from tunetrail.config.reference_free import SimpoConfig
from tunetrail.contract.stage import Stage
from tunetrail.models.reference_free import simpo_loss, train_reference_free
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    config = SimpoConfig(**stage.config)
    return train_reference_free(stage, config, functools.partial(simpo_loss, beta=config.beta, gamma=config.gamma))


if __name__ == "__main__":
    sys.exit(start("simpo", run))
