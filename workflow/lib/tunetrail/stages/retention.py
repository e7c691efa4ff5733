"""Text unrelated to the task, to see what training makes the model forget.

    python -m tunetrail.stages.retention --config C.json --input base=… --output … --state …

`source: chatterbot`: general questions (chatterbot-corpus, BSD) with the base model's own greedy answers;
`source: file`: blocks of the user's text. Writes `retention.jsonl`, each row with the base model's loss
on it (`base_nll`, nats a token), and `choices.jsonl`, a multiple-choice task: which of four answers belongs to a
question (of four continuations to the start of a block), with whether the base model chooses it (`base_correct`).
Models are compared row by row in `stages.head_to_head`, by what each one's evaluation measured.
"""

import random
import sys
from pathlib import Path

import yaml

from tunetrail.config.evaluation import RetentionConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import render
from tunetrail.errors import DataError
from tunetrail.evaluation.models import mean_nlls, right_choices
from tunetrail.files import write_jsonl
from tunetrail.models.batching import encode, encode_response
from tunetrail.models.loading import load_causal_lm, load_tokenizer
from tunetrail.models.runtime import device, prepare, use_bf16
from tunetrail.models.sampling import decoding_weights, sample
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency
from tunetrail.seeds import derive_seed
from tunetrail.stages.registry import start

CHOICES, NEUTRAL = 4, "Say something."


def general_questions() -> dict[str, str]:
    """Question -> the answer people wrote, of chatterbot-corpus in English, sorted, without those about programming."""
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


def multiple_choice(examples: list[tuple[list[int], list[int]]], neutral: list[int], rng: random.Random) -> list[dict]:
    """Each (prompt ids, answer ids) with its own answer among those of three others, in random order.

    Args:
        neutral: ids of a prompt that asks nothing, beside which an answer's likelihood is seen.

    Returns:
        [{"id", "prompt_ids", "neutral_ids", "choices", "answer": index}]; fewer than CHOICES distinct answers make no question.
    """
    answers = [list(answer) for answer in dict.fromkeys(tuple(answer) for _, answer in examples)]
    if len(answers) < CHOICES:
        return []
    rows = []
    for i, (prompt, answer) in enumerate(examples):
        choices = [answer, *rng.sample([other for other in answers if other != answer], CHOICES - 1)]
        rng.shuffle(choices)
        rows.append(
            {"id": str(i), "prompt_ids": prompt, "neutral_ids": neutral, "choices": choices, "answer": choices.index(answer)}
        )  # fmt: skip
    return rows


def run(stage: Stage) -> dict:
    config, precision = RetentionConfig(**stage.config), stage.shared["precision"]
    prepare(stage.seed, "retention")
    folder = stage.inputs["base"].folder / "model"
    tokenizer = load_tokenizer(folder)
    model = load_causal_lm(folder).to(device())
    rng = random.Random(derive_seed(stage.seed, "retention"))
    if config.source == "file":
        ids = encode(tokenizer, config.path.read_text(encoding="utf-8"))  # type: ignore[union-attr]
        blocks = [ids[i : i + config.max_new_tokens] for i in range(0, len(ids), config.max_new_tokens)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise DataError(f"retention.path: {config.path} holds no text")
        digest = sha256_file(config.path)  # type: ignore[arg-type]
        stage.draft.dependencies.append(dependency("text", str(config.path), digest, files={str(config.path): digest}))
        examples = [(block[:1], block[1:]) for block in rng.sample(blocks, min(config.prompts, len(blocks)))]
        texts = [{"text": tokenizer.decode(p + r)} for p, r in examples]
        halves = [(p + r[: len(r) // 2], r[len(r) // 2 :]) for p, r in examples]
        questions = multiple_choice([half for half in halves if half[1]], examples[0][0], rng)
    else:
        answered = general_questions()
        asked = rng.sample(list(answered), min(config.prompts, len(answered)))
        rendered, neutral = asked, NEUTRAL
        if tokenizer.chat_template:
            *rendered, neutral = (render(tokenizer, [{"role": "user", "content": q}]) for q in [*asked, NEUTRAL])
        prompts = [encode(tokenizer, text) for text in rendered]
        written = [encode_response(tokenizer, answered[question]) for question in asked]
        questions = multiple_choice(list(zip(prompts, written, strict=True)), encode(tokenizer, neutral), rng)
        with ProgressBar("retention", len(prompts), "questions") as bar:
            answers = sample(
                decoding_weights(model, use_bf16(precision)), prompts, asked,
                k=1, max_new_tokens=config.max_new_tokens, temperature=0, seed=stage.seed, batch_size=config.batch_size,
                eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, on_batch=bar.advance,
            )  # fmt: skip
        # The ids as they were sampled: decoding and encoding again may give others.
        examples = [(prompt, answer) for prompt, (answer,) in zip(prompts, answers, strict=True)]
        texts = [
            {"prompt": prompt, "completion": tokenizer.decode(answer, skip_special_tokens=True)}
            for prompt, (_, answer) in zip(rendered, examples, strict=True)
        ]
    nlls = mean_nlls(model, examples, tokenizer.pad_token_id, precision)
    rows = [
        text | {"id": str(i), "prompt_ids": prompt, "response_ids": response, "base_nll": nll}
        for i, (text, (prompt, response), nll) in enumerate(zip(texts, examples, nlls, strict=True))
    ]
    write_jsonl(stage.work / "retention.jsonl", rows)
    correct = right_choices(model, questions, tokenizer.pad_token_id, precision)
    write_jsonl(
        stage.work / "choices.jsonl",
        [row | {"base_correct": right} for row, right in zip(questions, correct, strict=True)],
    )
    return {
        "source": config.source,
        "rows": len(rows),
        "base_nll": sum(row["base_nll"] for row in rows) / len(rows),
        "questions": len(questions),
        "base_accuracy": sum(correct) / len(correct) if correct else None,
    }


if __name__ == "__main__":
    sys.exit(start("retention", run))
