"""A policy trained by Kahneman-Tversky optimisation (Ethayarajh et al. 2024), with TRL's KTOTrainer.

    python -m tunetrail.stages.kto --config C.json --input policy=… --input data=… --output … --state …

Learns from single responses that were liked or disliked. A response rated by several people counts once per rating. The
reference's log-probs are computed once, before training. The KL to the reference, at which a response is neither gain
nor loss, is estimated at every optimizer step from its prompts, each paired with the response to another one and cut at
`max_length`.

Writes `model/` (with LoRA also `adapter/`), `history.jsonl` (with separate numbers for liked and disliked responses,
which TRL calls chosen and rejected) and, if `checkpoints` is set, `checkpoints/<step>/model`, or with LoRA
`checkpoints/<step>/adapter`.
"""

import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig as TrlKtoConfig
from trl import KTOTrainer

from tunetrail.config.kto import KtoConfig
from tunetrail.contract.distributed import is_main_process, processes
from tunetrail.contract.stage import Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.heldout import heldout_dataset, kept
from tunetrail.models.lengths import check_lengths, positions
from tunetrail.models.loading import load_tokenizer
from tunetrail.models.preference import Pretokenized, optimise
from tunetrail.models.runtime import prepare
from tunetrail.models.training import rows_at_once, trainer_arguments
from tunetrail.models.weights import weight_of
from tunetrail.stages.registry import start

log = logging.getLogger("tunetrail")


class PretokenizedKtoTrainer(Pretokenized, KTOTrainer):
    """KTOTrainer on rows {prompt_ids, completion_ids, KL_completion_ids, label}.

    TRL estimates the KL from the rows of one forward pass. Here all rows of an optimizer step, on all processes, are
    used, so that the micro-batch size changes nothing.
    """

    reference_columns = ("ref_logps", "ref_KL_logps")

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.measure_kl([self._prepare_inputs(batch) for batch in batches])
        return batches, items

    def measure_kl(self, batches: list[dict[str, Any]]) -> None:
        """The KL to the reference, from these batches of every process together."""
        if self.calculate_KL:
            gained = [super(PretokenizedKtoTrainer, self)._compute_kl_logps(self.model, b) - b["ref_KL_logps"]
                for b in batches]  # fmt: skip
            self.kl = self.accelerator.gather(torch.cat(gained)).mean()

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        """Log-probs whose difference from the reference's is the KL estimate of the whole step."""
        return batch["ref_KL_logps"] + self.kl if self.calculate_KL else None


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: KtoConfig) -> list[dict]:
    """Feedback rows -> {prompt_ids, completion_ids, label} per rating. Raises DataError if one is too long."""
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        prompt, response = encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"])
        lengths.append((row["id"], len(prompt) + len(response)))
        for rating in row["ratings"]:
            example = {"prompt_ids": prompt, "completion_ids": response, "label": rating["label"]}
            examples.append(example | weight_of(row))
    check_lengths("kto", lengths, config.max_length)
    return examples


def with_mismatched(examples: list[dict], batch_size: int) -> list[dict]:
    """The examples with the responses from which the KL is estimated: that of the example half a batch further on.

    The next example may well have the same prompt, since batches are sorted by length.
    """
    mismatched = []
    for start_of_batch in range(0, len(examples), batch_size):
        batch = examples[start_of_batch : start_of_batch + batch_size]
        for i, example in enumerate(batch):
            other = batch[(i + len(batch) // 2) % len(batch)]
            mismatched.append(example | {"KL_completion_ids": other["completion_ids"]})
    return mismatched


def check_labels(examples: list[dict], config: KtoConfig) -> None:
    """Warns if the weights do not balance liked and disliked ratings (eq. 8). Raises DataError if either is missing.

    Args:
        examples: of `tokenize`.
    """
    liked, disliked = (sum(e.get("weight", 1.0) for e in examples if e["label"] == sort) for sort in (True, False))
    if not liked or not disliked:
        one, other = ("liked", "disliked") if liked else ("disliked", "liked")
        raise DataError(f"kto: all {len(examples)} ratings to train on are of {one} responses; add {other} ones")
    ratio = config.desirable_weight * liked / (config.undesirable_weight * disliked)
    if is_main_process() and not 0.995 <= ratio <= 4 / 3 + 0.005:
        key, weight = "desirable_weight", config.desirable_weight / ratio
        if ratio > 1:
            key, weight = "undesirable_weight", config.undesirable_weight * ratio
        log.warning("kto: an epoch has %g ratings of liked responses and %g of disliked ones: %s: %.3g would balance "
            "them", liked, disliked, key, weight)  # fmt: skip


def run(stage: Stage) -> dict:
    config = KtoConfig(**stage.config)
    prepare(stage.seed, "kto")
    parent = stage.inputs["policy"].folder / "model"
    tokenizer = load_tokenizer(parent)
    rows = stage.rows("data", "feedback.jsonl")

    def tokenized(split: str) -> list[dict]:
        return tokenize([row for row in rows if row["split"] == split], tokenizer, config)

    examples, heldout = tokenized("reward"), tokenized("heldout") if config.evaluate_every else []
    liked = sum(example["label"] for example in examples)
    check_labels(examples, config)
    if config.loss == "kto" and rows_at_once("kto", config, processes()) == 1:
        raise ConfigError(
            f"kto: batch_size ({config.batch_size}) leaves one row per forward pass on {processes()} processes, at "
            "least 2 are needed; raise it"
        )

    def trainer_of(model: Any, rows: list[dict]) -> PretokenizedKtoTrainer:
        arguments = TrlKtoConfig(
            **trainer_arguments(stage, config),
            max_length=min(config.max_length, positions(model.config) or math.inf),
            beta=config.beta,
            loss_type=config.loss,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            precompute_ref_log_probs=True,
        )
        unseen = heldout
        if config.loss == "kto":
            rows, unseen = with_mismatched(rows, config.batch_size), with_mismatched(heldout, max(1, len(heldout)))
        return PretokenizedKtoTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=heldout_dataset(config, unseen),
            processing_class=tokenizer,
        )

    history, metrics = optimise(stage, config, parent, examples, ("completion_ids",), "ratings", trainer_of)
    if not history:
        return {}
    # A batch with only liked or only disliked responses has no margin.
    last_step = history[kept(metrics)]["step"]
    margins = [row["rewards/margins"] for row in history if "rewards/margins" in row and row["step"] <= last_step]
    return metrics | {"margin": margins[-1] if margins else None, "liked": liked, "disliked": len(examples) - liked}


if __name__ == "__main__":
    sys.exit(start("kto", run))
