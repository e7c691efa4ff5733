"""Rows of demonstrations and raw text as token ids with labels."""

from transformers import PreTrainedTokenizerBase

from tunetrail.models.batching import encode, encode_response
from tunetrail.models.lengths import check_lengths
from tunetrail.models.weights import weight_of


def blocks_of(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of a raw text and its EOS, cut into blocks."""
    ids = encode_response(tokenizer, text)
    return [ids[i : i + max_length] for i in range(0, len(ids), max_length)]


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, stage: str) -> list[dict]:
    """Rows -> {input_ids, labels}; labels are -100 on prompts; raw text is cut into blocks of `max_length`.

    An example has the "weight" of its row, where that has one.

    Raises DataError, in the name of a stage, for prompts with completions longer than `max_length`.
    """
    examples: list[dict] = []
    lengths: list[tuple[str, int]] = []
    for row in rows:
        if "text" in row:
            blocks = blocks_of(row["text"], tokenizer, max_length)
            examples += [{"input_ids": block, "labels": block} | weight_of(row) for block in blocks if len(block) > 1]
            continue
        prompt, response = encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"])
        lengths.append((row["id"], len(prompt) + len(response)))
        examples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response} | weight_of(row))
    check_lengths(stage, lengths, max_length)
    return examples


def given_and_learnt(example: dict) -> tuple[list[int], list[int]]:
    """(ids before the labelled part, labelled ids); raw text keeps its first token as prompt."""
    start = max(1, sum(label == -100 for label in example["labels"]))
    return example["input_ids"][:start], example["input_ids"][start:]
