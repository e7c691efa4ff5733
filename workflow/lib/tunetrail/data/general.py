"""General texts unrelated to the task, and multiple-choice questions made from them, to measure forgetting."""

import random
from pathlib import Path

import yaml

from tunetrail.errors import DataError

CHOICES = 4
NEUTRAL = "Say something."
"""A prompt that asks nothing. How much likelier an answer is after its question shows what the question adds."""
Example = tuple[list[int], list[int]]
"""(prompt ids, answer ids)"""


def general_questions() -> dict[str, str]:
    """Question -> human answer, sorted: the English chatterbot-corpus without its files about programming."""
    import chatterbot_corpus

    questions: dict[str, str] = {}
    for path in sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml")):
        if path.stem in ("coding", "computers", "ai"):
            continue
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            first, *answers = (str(turn).strip() for turn in conversation)
            if first.endswith("?") and answers and answers[0]:
                questions.setdefault(first, answers[0])
    return dict(sorted(questions.items()))


def text_blocks(ids: list[int], length: int, count: int, rng: random.Random, path: Path) -> list[Example]:
    """Random blocks of a text, each split into its first token and the rest. Raises DataError for an empty text."""
    blocks = [block for i in range(0, len(ids), length) if len(block := ids[i : i + length]) > 1]
    if not blocks:
        raise DataError(f"retention.path: {path} holds no text")
    return [(block[:1], block[1:]) for block in rng.sample(blocks, min(count, len(blocks)))]


def halves(examples: list[Example]) -> list[Example]:
    """Blocks as (first half, second half), for questions about how a text continues."""
    parts = [(p + r[: len(r) // 2], r[len(r) // 2 :]) for p, r in examples]
    return [part for part in parts if part[1]]


def multiple_choice(examples: list[Example], neutral: list[int], rng: random.Random) -> list[dict]:
    """Makes a question of each (prompt ids, answer ids): its answer and three others, in random order.

    Args:
        neutral: ids of `NEUTRAL`.

    Returns:
        [{"id", "prompt_ids", "neutral_ids", "choices", "answer": index}]; empty if there are fewer than CHOICES answers
    """
    answers = [list(answer) for answer in dict.fromkeys(tuple(answer) for _, answer in examples)]
    if len(answers) < CHOICES:
        return []
    rows = []
    for i, (prompt, answer) in enumerate(examples):
        choices = [answer, *rng.sample([other for other in answers if other != answer], CHOICES - 1)]
        rng.shuffle(choices)
        rows.append(
            {
                "id": str(i),
                "prompt_ids": prompt,
                "neutral_ids": neutral,
                "choices": choices,
                "answer": choices.index(answer),
            }
        )
    return rows
