"""A policy trained by direct preference optimisation (Rafailov et al. 2023), with TRL's DPOTrainer.

    python -m tunetrail.stages.dpo --config C.json --input policy=… --input comparisons=… --output … --state …

The reference's log-probs are computed once, before training. Log-probs are summed over the response.

Writes `model/` (with LoRA also `adapter/`), `history.jsonl` (with separate log-probs of chosen and rejected responses)
and, if `checkpoints` is set, `checkpoints/<step>/model`, or with LoRA `checkpoints/<step>/adapter`.
"""

import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from tunetrail.config.dpo import DpoConfig
from tunetrail.contract.stage import Stage
from tunetrail.models.batching import encode_comparison
from tunetrail.models.lengths import check_lengths
from tunetrail.models.loading import load_tokenizer
from tunetrail.models.preference import Pretokenized, optimise
from tunetrail.models.runtime import prepare
from tunetrail.models.training import trainer_arguments
from tunetrail.models.weights import weight_of
from tunetrail.preferences.pairs import widest_pairs
from tunetrail.stages.registry import start


class PretokenizedDpoTrainer(Pretokenized, DPOTrainer):
    """DPOTrainer on rows {prompt_ids, chosen_ids, rejected_ids}."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: DpoConfig) -> list[dict]:
    """Comparison rows -> {prompt_ids, chosen_ids, rejected_ids} per pair. Raises DataError if one is too long."""
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        prompt, responses = encode_comparison(tokenizer, row)
        for chosen, rejected in widest_pairs(row["rankings"], config.pairs_per_prompt):
            lengths.append((row["id"], len(prompt) + max(len(responses[chosen]), len(responses[rejected]))))
            examples.append(
                {"prompt_ids": prompt, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]}
                | weight_of(row)
            )
    check_lengths("dpo", lengths, config.max_length)
    return examples


def run(stage: Stage) -> dict:
    config = DpoConfig(**stage.config)
    prepare(stage.seed, "dpo")
    parent = stage.inputs["policy"].folder / "model"
    tokenizer = load_tokenizer(parent)
    rows = [row for row in stage.rows("comparisons", "comparisons.jsonl") if row["split"] == "reward"]
    examples = tokenize(rows, tokenizer, config)
    arguments = TrlDpoConfig(
        **trainer_arguments(stage, config),
        max_length=None,
        beta=config.beta,
        loss_type=config.losses,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=True,
    )
    history, metrics = optimise(
        stage,
        config,
        parent,
        examples,
        ("chosen_ids", "rejected_ids"),
        "pairs",
        lambda model, pairs: PretokenizedDpoTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
        ),
    )
    if not history:
        return {}
    last = history[-1]
    return metrics | {"accuracy": last["rewards/accuracies"], "margin": last["rewards/margins"], "pairs": len(examples)}


if __name__ == "__main__":
    sys.exit(start("dpo", run))
