"""A policy trained by direct preference optimisation (Rafailov et al. 2023), with TRL's DPOTrainer.

    python -m tunetrail.stages.dpo --config C.json --input policy=… --input comparisons=… --output … --state …

The reference's log-probs are computed once, before training. Log-probs are summed over the response.

Writes `model/` (with LoRA also `adapter/`), `history.jsonl` (with separate log-probs of chosen and rejected responses)
and, if `checkpoints` is set, `checkpoints/<step>/model`, or with LoRA `checkpoints/<step>/adapter`.
"""

import functools
import sys

from trl import DPOConfig as TrlDpoConfig

from tunetrail.config.dpo import DpoConfig
from tunetrail.contract.stage import Stage
from tunetrail.models.preference import PretokenizedDpoTrainer, train_on_pairs
from tunetrail.models.runtime import prepare
from tunetrail.models.training import trainer_arguments
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    config = DpoConfig(**stage.config)
    prepare(stage.seed, "dpo")
    arguments = TrlDpoConfig(
        **trainer_arguments(stage, config),
        max_length=None,
        beta=config.beta,
        loss_type=config.losses,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=True,
    )
    return train_on_pairs(stage, config, functools.partial(PretokenizedDpoTrainer, args=arguments))


if __name__ == "__main__":
    sys.exit(start("dpo", run))
