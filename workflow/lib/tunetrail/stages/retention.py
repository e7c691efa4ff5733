"""Text unrelated to the task, to measure what training makes the model forget.

    python -m tunetrail.stages.retention --config C.json --input base=… --output … --state …

`source: chatterbot`: general questions (chatterbot-corpus, BSD) with the base model's own greedy answers; `source:
file`: blocks of the user's text. Writes `retention.jsonl`, with the base model's loss on each row (`base_nll`, in nats
per token), and `choices.jsonl`, multiple-choice questions (which of four answers belongs to a question, or which of
four continuations to the start of a block) and whether the base model chooses correctly (`base_correct`).
`stages.head_to_head` compares models row by row, using what their evaluations measured.
"""

import random
import sys
from pathlib import Path
from typing import Any

from tunetrail.config.evaluation import RetentionConfig
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import render
from tunetrail.data.general import NEUTRAL, Example, general_questions, halves, multiple_choice, text_blocks
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

Corpus = tuple[list[Example], list[dict[str, Any]], list[dict[str, Any]]]
"""(examples, their texts, multiple-choice questions)"""


def from_file(stage: Stage, config: RetentionConfig, path: Path, tokenizer: Any, rng: random.Random) -> Corpus:
    """Blocks of the user's text."""
    ids = encode(tokenizer, path.read_text(encoding="utf-8"))
    examples = text_blocks(ids, config.max_new_tokens, config.prompts, rng, path)
    digest = sha256_file(path)
    stage.draft.dependencies.append(dependency("text", str(path), digest, files={str(path): digest}))
    texts = [{"text": tokenizer.decode(p + r)} for p, r in examples]
    return examples, texts, multiple_choice(halves(examples), examples[0][0], rng)


def from_questions(stage: Stage, config: RetentionConfig, model: Any, tokenizer: Any, rng: random.Random) -> Corpus:
    """General questions with the model's own answers."""
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
            decoding_weights(model, use_bf16(stage.shared["precision"])),
            prompts,
            asked,
            k=1,
            max_new_tokens=config.max_new_tokens,
            temperature=0,
            seed=stage.seed,
            batch_size=config.batch_size,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            on_batch=bar.advance,
        )
    # The sampled ids: decoding and encoding them again might change them.
    examples = [(prompt, answer) for prompt, (answer,) in zip(prompts, answers, strict=True)]
    texts = [
        {"prompt": prompt, "completion": tokenizer.decode(answer, skip_special_tokens=True)}
        for prompt, (_, answer) in zip(rendered, examples, strict=True)
    ]
    return examples, texts, questions


def run(stage: Stage) -> dict[str, Any]:
    config, precision = RetentionConfig(**stage.config), stage.shared["precision"]
    prepare(stage.seed, "retention")
    folder = stage.inputs["base"].folder / "model"
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder).to(device())
    rng = random.Random(derive_seed(stage.seed, "retention"))
    if config.path is not None:
        examples, texts, questions = from_file(stage, config, config.path, tokenizer, rng)
    else:
        examples, texts, questions = from_questions(stage, config, model, tokenizer, rng)
    nlls = mean_nlls(model, examples, tokenizer.pad_token_id, precision)
    rows = [
        text | {"id": str(i), "prompt_ids": prompt, "response_ids": response, "base_nll": nll}
        for i, (text, (prompt, response), nll) in enumerate(zip(texts, examples, nlls, strict=True))
    ]
    write_jsonl(stage.work / "retention.jsonl", rows)
    correct = right_choices(model, questions, tokenizer.pad_token_id, precision)
    choices = [row | {"base_correct": right} for row, right in zip(questions, correct, strict=True)]
    write_jsonl(stage.work / "choices.jsonl", choices)
    return {
        "source": config.source,
        "rows": len(rows),
        "base_nll": sum(nlls) / len(rows),
        "questions": len(questions),
        "base_accuracy": sum(correct) / len(correct) if correct else None,
    }


if __name__ == "__main__":
    sys.exit(start("retention", run))
