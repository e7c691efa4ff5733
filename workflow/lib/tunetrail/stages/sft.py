"""Demonstration fine-tuning: next token on raw text, the completion only on prompts and chats (TRL's SFTTrainer).

    python -m tunetrail.stages.sft --config C.json --input base=… --input data=… --output … --state …

Writes `model/` (and `merged/` for LoRA on request) and `history.jsonl`.
"""

import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from tunetrail.config.training import SftConfig
from tunetrail.contract.distributed import is_main_process
from tunetrail.contract.stage import Stage
from tunetrail.errors import DataError
from tunetrail.evaluation.models import mean_nlls
from tunetrail.evaluation.stats import bootstrap
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.loading import (
    load_causal_lm,
    load_tokenizer,
    save_causal_lm,
    trained_parameters,
    training_flops,
    with_lora,
)
from tunetrail.models.runtime import prepare
from tunetrail.models.training import epoch_order, rows_left_out, train, trainer_arguments
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Rows -> {input_ids, labels}; labels are -100 on prompts; raw text is cut into blocks of `max_length`.

    Raises DataError for a prompt and completion longer than `max_length`.
    """
    examples = []
    for row in rows:
        if "text" in row:
            ids = encode_response(tokenizer, row["text"])
            blocks = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            examples += [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]
            continue
        prompt, response = encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"])
        if len(prompt) + len(response) > max_length:
            raise DataError(
                f"sft: row {row['id']} has {len(prompt) + len(response)} tokens; raise sft.max_length ({max_length}) "
                "or lower data.max_prompt_tokens"
            )
        examples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return examples


def prompt_and_response(example: dict) -> tuple[list[int], list[int]]:
    """(ids before the labelled part, labelled ids); raw text keeps its first token as prompt."""
    start = max(1, sum(label == -100 for label in example["labels"]))
    return example["input_ids"][:start], example["input_ids"][start:]


def run(stage: Stage) -> dict:
    config, precision = SftConfig(**stage.config), stage.shared["precision"]
    prepare(stage.seed, "sft")
    parent = stage.inputs["base"].folder / "model"
    tokenizer = load_tokenizer(parent)
    examples = tokenize(stage.rows("data", "sft.jsonl"), tokenizer, config.max_length)
    if len(examples) < config.batch_size:
        raise DataError(f"sft: {len(examples)} examples are fewer than one batch (sft.batch_size: {config.batch_size})")
    order = epoch_order([len(e["input_ids"]) for e in examples], config.batch_size, config.epochs, stage.seed)
    model = with_lora(load_causal_lm(parent), config.lora, derive_seed(stage.seed, "lora"))
    counts = trained_parameters(model)
    stage.draft.training_flops = training_flops(counts, sum(len(examples[i]["input_ids"]) for i in order))
    trainer = SFTTrainer(
        model=model,
        args=TrlSftConfig(
            **trainer_arguments(stage, config), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_list([examples[i] for i in order]),
        processing_class=tokenizer,
    )
    score_labels_only(trainer.model)
    rows = train(stage, trainer, config)
    if not is_main_process():
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    answered = [row for row in stage.rows("data", "heldout.jsonl") if "text" in row or "completion" in row]
    heldout = tokenize(answered, tokenizer, config.max_length)
    losses = mean_nlls(model, [prompt_and_response(e) for e in heldout], tokenizer.pad_token_id, precision)
    save_causal_lm(model, parent, stage.work, config.lora, parent, stage.inputs["base"].manifest)
    return {
        "train_loss": rows[-1]["loss"],
        "eval_loss": bootstrap(losses, 1000, stage.seed),
        "steps": len(rows),
        "rows_left_out": rows_left_out("sft", len(examples), config.batch_size),
        "tokens": sum(len(examples[i]["input_ids"]) for i in order),
    } | counts


if __name__ == "__main__":
    sys.exit(start("sft", run))
