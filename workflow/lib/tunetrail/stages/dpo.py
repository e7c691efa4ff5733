"""A policy by direct preference optimisation (Rafailov et al. 2023), with TRL's DPOTrainer.

    python -m tunetrail.stages.dpo --config C.json --input policy=… --input comparisons=… --output … --state …

The reference log-probs are computed once, before training. Log-probs are summed over the response.
Writes `model/` (and `adapter/` where LoRA trained one), `history.jsonl` (chosen and rejected log-probs apart) and,
where `checkpoints` asks for some, `checkpoints/<step>/model`, or with LoRA `checkpoints/<step>/adapter`.
"""

import sys

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from tunetrail.config.dpo import DpoConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.models.batching import encode_comparison
from tunetrail.models.checkpoints import publish_kept
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.lengths import check_lengths
from tunetrail.models.loading import (
    load_causal_lm,
    load_tokenizer,
    trained_parameters,
    training_flops,
    with_lora,
)
from tunetrail.models.runtime import prepare
from tunetrail.models.saving import save_kept, save_trained
from tunetrail.models.training import (
    KeepCallback,
    epoch_order,
    rows_left_out,
    train,
    trained_model,
    trainer_arguments,
)
from tunetrail.preferences.pairs import widest_pairs
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start


class PretokenizedDpoTrainer(DPOTrainer):
    """DPOTrainer on rows of token ids: prompt and responses are tokenized apart here as everywhere."""

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """TRL hands them over in a file, in a temporary folder that the other processes do not see."""
        score_labels_only(self.model)  # so that policy and reference are scored alike
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        parts = [self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch)) for batch in loader]
        for name, column in zip(("ref_chosen_logps", "ref_rejected_logps"), zip(*parts, strict=True), strict=True):
            dataset = dataset.add_column(name, torch.cat(column).tolist())
        return dataset


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: DpoConfig) -> list[dict]:
    """Comparison rows -> {prompt_ids, chosen_ids, rejected_ids}. Raises DataError for ones that are too long."""
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        prompt, responses = encode_comparison(tokenizer, row)
        for chosen, rejected in widest_pairs(row["rankings"], config.pairs_per_prompt):
            lengths.append((row["id"], len(prompt) + max(len(responses[chosen]), len(responses[rejected]))))
            examples.append(
                {"prompt_ids": prompt, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]}
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
    if len(examples) < config.batch_size:
        raise DataError(
            f"dpo: {len(examples)} pairs are fewer than one batch (batch_size: {config.batch_size}); collect more "
            "comparisons"
        )
    lengths = [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]
    order = epoch_order(lengths, config.batch_size, config.epochs, stage.seed)
    model = with_lora(load_causal_lm(parent), config.lora, derive_seed(stage.seed, "lora"))
    counts = trained_parameters(model)
    stage.draft.training_flops = training_flops(
        counts,
        sum(
            2 * len(examples[i]["prompt_ids"]) + len(examples[i]["chosen_ids"]) + len(examples[i]["rejected_ids"])
            for i in order
        ),
    )
    trainer = PretokenizedDpoTrainer(
        model=model,
        args=TrlDpoConfig(
            **trainer_arguments(stage, config),
            max_length=None,
            beta=config.beta,
            loss_type=config.losses,
            loss_weights=config.loss_weights,
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list([examples[i] for i in order]),
        processing_class=tokenizer,
    )

    trainer.add_callback(
        KeepCallback(
            stage,
            config.checkpoints,
            lambda model, folder: save_kept(trainer.accelerator.unwrap_model(model), parent, folder),
        )
    )
    history = train(stage, trainer, config)
    if not is_main_process():
        return {}
    save_trained(stage, trained_model(trainer), parent, (e["prompt_ids"] + e["chosen_ids"] for e in examples))
    publish_kept(stage)
    return {
        "train_loss": history[-1]["loss"],
        "accuracy": history[-1]["rewards/accuracies"],
        "margin": history[-1]["rewards/margins"],
        "steps": len(history),
        "pairs": len(examples),
        "rows_left_out": rows_left_out("dpo", len(examples), config.batch_size),
    } | counts


if __name__ == "__main__":
    sys.exit(start("dpo", run))
