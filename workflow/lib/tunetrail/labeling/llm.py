"""A language model as a judge of pairs.

Every pair of a row is asked in both orders. Where the two verdicts name the same completion it wins,
else the pair is a tie: a judge that likes what it reads first cancels out. A completion's score is its
wins plus half its ties; ranks follow from the scores. A verdict that is neither `A`, `B` nor `tie` counts
as a tie and is counted in the metrics (`unparsed`).

The judge is asked once a pair; `labelers` labelers differ by their noise: a share `noise` of the pairs'
verdicts is replaced by a coin flip, seeded by (seed, labeler, row id). The order recorded as shown is that
of the completions, since both orders are.

Finished rows are appended to the state folder, so a stage that is stopped asks nothing twice.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from tunetrail.config.comparisons import LlmJudge, LlmLabeler
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import shown_prompt
from tunetrail.errors import ConfigError, Interrupted
from tunetrail.files import canonical_json, read_finished_rows
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.ranks import generator, ranks_from_scores
from tunetrail.provenance.manifest import list_files, sha256_json

Verdict = Literal["A", "B", "tie"] | None  # None: the answer could not be read
Judge = Callable[[list[str]], list[Verdict]]

QUESTION = """{guideline}

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}

Answer with A, B or tie, and with nothing else."""
PARALLEL = 8
"""Questions an endpoint is asked at once."""
BACKOFF_SECONDS = (1, 2, 4, 8, 16)
TIMEOUT_SECONDS = 60


def parse_verdict(answer: str) -> Verdict:
    """Strictly `A`, `B` or `tie` (in any case), with nothing but space around it; else None."""
    answer = answer.strip()
    if answer in ("A", "B"):
        return answer  # type: ignore[return-value]
    return "tie" if answer.lower() == "tie" else None


def pair_outcome(forward: Verdict, backward: Verdict) -> int:
    """Verdicts on (i, j) and on (j, i) -> 1 where both name i, -1 where both name j, else 0."""
    return {("A", "B"): 1, ("B", "A"): -1}.get((forward, backward), 0)  # type: ignore[arg-type]


def scores_from_outcomes(outcomes: dict[tuple[int, int], int], k: int) -> list[float]:
    """Wins plus half the ties of each of `k` completions, from the outcome of each pair (i, j)."""
    scores = [0.0] * k
    for (i, j), outcome in outcomes.items():
        scores[i] += (1 + outcome) / 2
        scores[j] += (1 - outcome) / 2
    return scores


# ----------------------------------------------------------------------------- judges


def endpoint_judge(config: LlmJudge, key: str) -> Judge:
    """A judge behind an OpenAI-compatible `/chat/completions`, asked at temperature 0.

    The key is read from the environment variable `api_key_env`; without one no key is sent, as servers
    on one's own machine want it. HTTP 429 and 5xx and lost connections are tried again with growing
    pauses, then raise Interrupted; any other HTTP error raises ConfigError.

    Args:
        key: of the judge in the config, for messages.
    """
    url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
    secret = os.environ.get(config.api_key_env)

    def post(question: str) -> bytes:
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 16,
        }
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if secret:
            request.add_unredirected_header(
                "Authorization", f"Bearer {secret}"
            )  # a redirect must not carry it elsewhere
        for pause in (*BACKOFF_SECONDS, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                    return reply.read()
            except urllib.error.HTTPError as e:
                e.close()
                trouble = f"HTTP {e.code} {e.reason}"
                if e.code != 429 and e.code < 500:
                    raise ConfigError(
                        f"{key}.endpoint: {url} refused the request ({trouble}); check endpoint, model "
                        f"and the key in ${config.api_key_env} ({'set' if secret else 'not set'})"
                    ) from None
            except (OSError, http.client.HTTPException) as e:  # no connection, a timeout, a reply cut short
                trouble = str(getattr(e, "reason", e))
            if pause is not None:
                time.sleep(pause)
        raise Interrupted(f"{url} does not answer ({trouble}); finished rows are saved, run the same command again")

    def ask(question: str) -> Verdict:
        reply = post(question)
        try:
            answer = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ConfigError(
                f"{key}.endpoint: {url} answered without choices[0].message.content; is it OpenAI-compatible?"
            ) from None
        return parse_verdict(answer or "")

    def judge(questions: list[str]) -> list[Verdict]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(ask, questions))

    return judge


def local_judge(path: Path, precision: str, key: str) -> Judge:
    """A causal language model in a folder: the verdict is the likelier next token of `A` and `B`. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunetrail.models.runtime import device, quiet_libraries, use_bf16

    quiet_libraries()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if use_bf16(precision) else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"{key}.path: {path}: cannot be loaded as a language model: {reason}") from None
    model.to(device()).eval()
    letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters):
        raise ConfigError(
            f"{key}.path: {path}: its tokenizer has no single tokens for 'A' and 'B'; choose another judge"
        )

    @torch.inference_mode()
    def ask(question: str) -> Verdict:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = f"{question}\n\nAnswer:"
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
        logits = model(ids.to(model.device), logits_to_keep=1).logits[0, -1].float()
        a, b = (logits[letter[0]].item() for letter in letters)
        return "tie" if a == b else "A" if a > b else "B"

    return lambda questions: [ask(question) for question in questions]


# ----------------------------------------------------------------------------- asking


def ask_row(row: dict, guideline: str, judge: Judge) -> dict:
    """Asks all pairs of a row in both orders: {"id", "verdicts": [[i, j, forward, backward]], "time"}."""
    prompt, texts = shown_prompt(row["messages"]), row["completions"]
    pairs = list(combinations(range(len(texts)), 2))
    questions = [
        QUESTION.format(guideline=guideline, prompt=prompt, first=texts[first], second=texts[second])
        for i, j in pairs
        for first, second in ((i, j), (j, i))
    ]
    answers = iter(judge(questions))
    verdicts = [[i, j, next(answers), next(answers)] for i, j in pairs]
    return {"id": row["id"], "verdicts": verdicts, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def ask_rows(rows: list[dict], ask: Callable[[dict], dict], stage: Stage) -> dict[str, dict]:
    """The answers of all rows by id, those of an earlier attempt from the state folder. Raises Interrupted."""
    path = stage.state / "verdicts.jsonl"
    answers = {answer["id"]: answer for answer in read_finished_rows(path)}
    todo = [row for row in rows if row["id"] not in answers]
    with (
        ProgressBar(stage.name, len(rows), "prompts", done=len(answers)) as bar,
        path.open("a", encoding="utf-8") as f,
    ):
        for row in todo:
            stage.stop.leave_if_requested(f"after {len(answers)} of {len(rows)} prompts")
            answers[row["id"]] = ask(row)
            f.write(canonical_json(answers[row["id"]]) + "\n")
            f.flush()
            bar.advance()
    return answers


def judge_rows(rows: list[dict], config: LlmJudge, stage: Stage, key: str) -> tuple[dict[str, dict], dict[str, Any]]:
    """(answers by row id, who judged). Raises Interrupted where the endpoint stays silent or time is over, ConfigError
    for an unfit judge.

    Args:
        rows: with "id", "messages", "completions".
        key: of the judge in the config, for messages.
    """
    if config.path:
        judge = local_judge(config.path, stage.shared.get("precision", "auto"), key)
        source: dict[str, Any] = {"path": str(config.path), "digest": sha256_json(list_files(config.path))}
    else:
        judge = endpoint_judge(config, key)
        source = {"endpoint": config.endpoint, "model": config.model}
    answers = ask_rows(rows, lambda row: ask_row(row, config.guideline, judge), stage)
    return answers, source | {"guideline": sha256_json(config.guideline)}


def rankings_of(answer: dict, k: int, config: LlmLabeler, seed: int) -> list[dict]:
    """The rankings of one row by all labelers, from its verdicts."""
    rankings = []
    for n in range(config.labelers):
        name = f"llm-{n}"
        random = generator(seed, name, answer["id"])
        outcomes = {}
        for i, j, forward, backward in answer["verdicts"]:
            flipped, coin = random.random() < config.noise, random.choice((-1, 1))
            outcomes[i, j] = int(coin) if flipped else pair_outcome(forward, backward)
        scores = scores_from_outcomes(outcomes, k)
        rankings.append(
            {
                "labeler": name,
                "ranks": ranks_from_scores(scores),
                "order": list(range(k)),
                "time": answer["time"],
                "scores": scores,
            }
        )
    return rankings


def rank(rows: list[dict], config: LlmLabeler, stage: Stage) -> Labels:
    """Raises Interrupted where the endpoint stays silent or time is over, ConfigError for an unfit judge."""
    answers, source = judge_rows(rows, config, stage, "comparisons")
    verdicts = [
        v for row in rows for *_, forward, backward in answers[row["id"]]["verdicts"] for v in (forward, backward)
    ]
    return Labels(
        [rankings_of(answers[row["id"]], len(row["completions"]), config, stage.seed) for row in rows],
        metrics={"verdicts": len(verdicts), "unparsed": verdicts.count(None)},
        source=source,
    )
