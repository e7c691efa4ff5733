"""Adapts scorers of texts to episodes of token ids."""

from collections.abc import Callable
from typing import Any

from tunetrail.scorers.build import Completion, Scorer

Scoring = Callable[[list[int], list[list[int]]], list[float]]
"""(indices of the prompts [N], ids of their responses [N]) -> scores [N]"""


def scoring(scorer: Scorer, rows: list[dict], tokenizer: Any) -> Scoring:
    """A scorer of responses to these rows, for the trainer."""

    def score(indices: list[int], responses: list[list[int]]) -> list[float]:
        texts = [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
        prompts = [rows[i] for i in indices]
        return scorer.scores(
            [
                Completion(row["prompt"], text, row.get("completion"), row, ids[-1:] == [tokenizer.eos_token_id])
                for row, text, ids in zip(prompts, texts, responses, strict=True)
            ]
        )

    return score
