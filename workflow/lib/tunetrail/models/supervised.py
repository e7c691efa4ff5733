"""Rows of demonstrations and raw text as token ids with labels."""

from transformers import PreTrainedTokenizerBase

from tunetrail.errors import DataError
from tunetrail.models.batching import encode, encode_response


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, stage: str) -> list[dict]:
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
                f"{stage}: row {row['id']} has {len(prompt) + len(response)} tokens; raise {stage}.max_length "
                f"({max_length}) or lower data.max_prompt_tokens"
            )
        examples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return examples


def given_and_learnt(example: dict) -> tuple[list[int], list[int]]:
    """(ids before the labelled part, labelled ids); raw text keeps its first token as prompt."""
    start = max(1, sum(label == -100 for label in example["labels"]))
    return example["input_ids"][:start], example["input_ids"][start:]
