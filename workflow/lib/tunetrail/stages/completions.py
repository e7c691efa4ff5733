"""Completions to compare: K per prompt, sampled from the SFT model in shards.

    python -m tunetrail.stages.completions --part 0/2 --config C.json --input sft=… --input data=… --output … --state …

Writes `completions.jsonl`, one row per prompt of this shard; prompts of preferences are left out, since they already
have completions. Only the first of a prompt's completions with the same text is kept. Finished batches are saved in the
state folder, so a killed shard loses at most one batch.
"""

import sys
from typing import Any

from tunetrail.config.comparisons import CompletionsConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.files import canonical_json, read_finished_rows, write_jsonl
from tunetrail.models.batching import encode
from tunetrail.models.lengths import check_room
from tunetrail.models.loading import load_causal_lm, load_tokenizer
from tunetrail.models.runtime import device, prepare, use_bf16
from tunetrail.models.sampling import inference_weights, sample
from tunetrail.models.weights import weight_of
from tunetrail.preferences.rows import SampledRow
from tunetrail.stages.registry import start


def prompts_to_sample(stage: Stage) -> list[dict]:
    """The prompts of the reward and held-out splits with their "split", except those of preferences and feedback."""
    compared = {
        row["id"] for name in ("comparisons.jsonl", "feedback.jsonl") for row in stage.rows("data", name, optional=True)
    }
    return [
        row | {"split": split}
        for split in ("reward", "heldout")
        for row in stage.rows("data", f"{split}.jsonl")
        if "prompt" in row and row["id"] not in compared
    ]


def shard_rows(rows: list[dict], part: tuple[int, int]) -> list[dict]:
    """Every n-th row, so that all shards have about the same size."""
    return rows[part[0] :: part[1]]


def unique_completions(texts: list[str]) -> dict[str, int]:
    """Text, stripped of surrounding white space -> index of its first completion; empty ones are dropped."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text.strip():
            first.setdefault(text.strip(), i)
    return first


def sampled_row(row: dict, completions: list[list[int]], tokenizer: Any) -> SampledRow:
    """A prompt with its distinct completions, as text and as token ids, and whether each ended with EOS."""
    first = unique_completions(tokenizer.batch_decode(completions, skip_special_tokens=True))
    kept = [completions[i] for i in first.values()]
    return {
        "id": row["id"],
        "group": row["group"],
        "split": row["split"],
        "prompt": row["prompt"],
        "messages": row["messages"],
        "reference": row.get("completion"),
        "completions": list(first),
        "completion_ids": kept,
        "finished": [ids[-1] == tokenizer.eos_token_id for ids in kept],
        **weight_of(row),  # type: ignore[typeddict-item]
    }


def run(stage: Stage) -> dict:
    config = CompletionsConfig(**stage.config)
    prepare(stage.seed, "completions")
    folder = stage.inputs["model"].folder / "model"
    tokenizer = load_tokenizer(folder)
    shard = shard_rows(prompts_to_sample(stage), stage.request.part)
    done_file = stage.state / "completions.jsonl"
    done: dict[str, Any] = {row["id"]: row for row in read_finished_rows(done_file, "id", "completions")}
    # The same batches in every attempt: floating-point sums, and so the samples, may depend on what a batch contains.
    per_batch = max(1, config.batch_size // config.per_prompt)
    batches = [shard[i : i + per_batch] for i in range(0, len(shard), per_batch)]
    todo = [rows for rows in batches if not all(row["id"] in done for row in rows)]
    model = None
    if todo:
        model = inference_weights(load_causal_lm(folder).to(device()), use_bf16(stage.shared["precision"]))
        check_room(model.config, [encode(tokenizer, row["prompt"]) for row in shard], config.max_new_tokens)
    remaining = sum(map(len, todo))
    progress = ProgressBar("completions", len(shard), "prompts", done=len(shard) - remaining)
    with progress as bar, done_file.open("a") as out:
        for rows in todo:
            sampled = sample(
                model,
                [encode(tokenizer, row["prompt"]) for row in rows],
                [row["id"] for row in rows],
                k=config.per_prompt,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=stage.seed,
                batch_size=config.batch_size,
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
            )
            stage.attempt.check()
            for row, completions in zip(rows, sampled, strict=True):
                done[row["id"]] = sampled_row(row, completions, tokenizer)
                out.write(canonical_json(done[row["id"]]) + "\n")
            out.flush()
            bar.advance(len(rows))
            remaining -= len(rows)
            stage.stop.leave_if_requested(f"after {len(shard) - remaining} of {len(shard)} prompts")
    rows = [done[row["id"]] for row in shard]
    write_jsonl(stage.work / "completions.jsonl", rows)
    kept = sum(len(row["completions"]) for row in rows)
    return {
        "prompts": len(rows),
        "completions": kept,
        "duplicates_removed": len(rows) * config.per_prompt - kept,
        "finished": sum(sum(row["finished"]) for row in rows) / max(kept, 1),
    }


if __name__ == "__main__":
    sys.exit(start("completions", run))
