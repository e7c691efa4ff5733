"""Supervised fine-tuning with TRL's SFTTrainer: on every token of raw text, and on the completions of prompts and
chats. Or the import of a model that was fine-tuned elsewhere.

    python -m tunetrail.stages.sft --config C.json --input base=… --input data=… --output … --state …

Writes `model/` (with LoRA also `adapter/`) and `history.jsonl`; for an import only `model/`.
"""

import sys

from datasets import Dataset
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from tunetrail.config.imported import ImportedModel
from tunetrail.config.training import SftBlock, SftConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.models import mean_nlls
from tunetrail.evaluation.stats import bootstrap
from tunetrail.models.batching import encode
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.fit import fit_training
from tunetrail.models.heldout import heldout_dataset, kept
from tunetrail.models.importing import check_fits, publish_imported, read_source, sample_texts
from tunetrail.models.lengths import check_blocks
from tunetrail.models.loading import (
    load_causal_lm,
    load_tokenizer,
    trained_parameters,
    training_flops,
    with_lora,
)
from tunetrail.models.packing import PackedCollator, alone, check_packs, tokenize_packed
from tunetrail.models.runtime import prepare
from tunetrail.models.saving import ROWS, TOKENS, save_trained
from tunetrail.models.supervised import given_and_learnt, tokenize
from tunetrail.models.training import epoch_order, rows_left_out, train, trained_model, trainer_arguments
from tunetrail.models.weights import pop_weights, rows_per_epoch
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start


def import_model(stage: Stage, source: ImportedModel) -> dict:
    """Imports a model that was fine-tuned elsewhere. Raises DataError if it does not fit the base model."""
    parent = stage.inputs["base"].folder / "model"
    tokenizer = load_tokenizer(parent)
    model = read_source(stage, source, AutoModelForCausalLM)
    check_fits(stage, source, model, parent, tokenizer)
    rows = [encode(tokenizer, text)[:TOKENS] for text in sample_texts(stage)[:ROWS]]
    return publish_imported(stage, model, parent, tokenizer, rows)


def train_model(stage: Stage, config: SftConfig) -> dict:
    precision = stage.shared["precision"]
    parent = stage.inputs["base"].folder / "model"
    tokenizer = load_tokenizer(parent)
    given = stage.rows("data", "sft.jsonl")
    if config.packing:
        examples, packing = tokenize_packed(given, tokenizer, config.max_length, "sft")
    else:
        examples, packing = tokenize(given, tokenizer, config.max_length, "sft"), {}
    weights = pop_weights(examples)
    per_epoch = rows_per_epoch(weights)
    if per_epoch < config.batch_size:
        raise DataError(f"sft: {per_epoch} examples are fewer than one batch (sft.batch_size: {config.batch_size})")
    order = epoch_order([len(e["input_ids"]) for e in examples], config.batch_size, config.epochs, stage.seed, weights)
    model = with_lora(load_causal_lm(parent), config.lora, derive_seed(stage.seed, "lora"))
    check_blocks(model.config, [example["input_ids"] for example in examples], "sft.max_length")
    if config.packing:
        check_packs(model, "sft")
    answered = [row for row in stage.rows("data", "heldout.jsonl") if "text" in row or "completion" in row]
    heldout = tokenize(answered, tokenizer, config.max_length, "sft")
    counts = trained_parameters(model)
    labelled = max(sum(label != -100 for label in example["labels"]) for example in examples)
    fit_training(stage, config, model, max(len(example["input_ids"]) for example in examples), labelled)
    trainer = SFTTrainer(
        model=model,
        args=TrlSftConfig(
            **trainer_arguments(stage, config), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_list([examples[i] for i in order]),
        eval_dataset=heldout_dataset(config, alone(heldout) if config.packing else heldout),
        data_collator=PackedCollator(tokenizer.pad_token_id) if config.packing else None,
        processing_class=tokenizer,
    )
    score_labels_only(trainer.model)
    rows, about = train(stage, trainer, config)
    tokens = sum(len(examples[i]["input_ids"]) for i in order[: len(rows) * config.batch_size])
    stage.draft.training_flops = training_flops(counts, tokens)
    if not is_main_process():
        return {}
    model = save_trained(stage, trained_model(trainer, parent), parent, (e["input_ids"] for e in examples))
    losses = mean_nlls(model, [given_and_learnt(e) for e in heldout], tokenizer.pad_token_id, precision)
    return (
        {
            "train_loss": rows[kept(about)]["loss"],
            "eval_loss": bootstrap(losses, 1000, stage.seed),
            "steps": len(rows),
            "rows_left_out": rows_left_out("sft", per_epoch, config.batch_size),
            "tokens": tokens,
        }
        | packing
        | about
        | counts
    )


def run(stage: Stage) -> dict:
    prepare(stage.seed, "sft")
    config: SftConfig | ImportedModel = TypeAdapter(SftBlock).validate_python(stage.config)
    if isinstance(config, SftConfig):
        return train_model(stage, config)
    return import_model(stage, config) if is_main_process() else {}


if __name__ == "__main__":
    sys.exit(start("sft", run))
