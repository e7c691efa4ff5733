"""Texts that have nothing to do with the task, and a multiple-choice task made of them: what training makes a model
forget.
"""

import random
from pathlib import Path

import yaml

from tunetrail.errors import DataError

CHOICES = 4
NEUTRAL = "Say something."
"""A prompt that asks nothing: next to it an answer's likelihood shows what the question adds."""
Example = tuple[list[int], list[int]]
"""(prompt ids, answer ids)"""


def general_questions() -> dict[str, str]:
    """Question -> the answer people wrote, sorted: chatterbot-corpus in English, without what is about programming."""
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
    """Randomly drawn blocks of a text, each as its first token and the rest. Raises DataError for an empty text."""
    blocks = [block for i in range(0, len(ids), length) if len(block := ids[i : i + length]) > 1]
    if not blocks:
        raise DataError(f"retention.path: {path} holds no text")
    return [(block[:1], block[1:]) for block in rng.sample(blocks, min(count, len(blocks)))]


def halves(examples: list[Example]) -> list[Example]:
    """Blocks as (first half, second half), for the question how a text goes on."""
    parts = [(p + r[: len(r) // 2], r[len(r) // 2 :]) for p, r in examples]
    return [part for part in parts if part[1]]


def multiple_choice(examples: list[Example], neutral: list[int], rng: random.Random) -> list[dict]:
    """Each (prompt ids, answer ids) with its own answer among those of three others, in random order.

    Args:
        neutral: ids of `NEUTRAL`.

    Returns:
        [{"id", "prompt_ids", "neutral_ids", "choices", "answer": index}]; fewer than CHOICES distinct answers make no
        question.
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
