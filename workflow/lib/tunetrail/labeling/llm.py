"""A language model as a judge of pairs.

Every pair of a row is judged in both orders. If the two verdicts name the same completion, it wins; otherwise the pair
is a tie, so that a judge's preference for what it reads first cancels out. A completion's score is its wins plus half
its ties, and ranks follow from the scores. A verdict that is neither `A`, `B` nor `tie` counts as a tie and is counted
in the metrics (`unparsed`).

The judge is asked once about each pair and order; `labelers` labelers differ by their noise: a share `noise` of the
pairs' outcomes is replaced by a coin flip, seeded by (seed, labeler, row id). Both orders are shown, so the order
recorded is that of the completions.

Finished rows are appended to the state folder: a stage that is stopped and run again repeats no question about them.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypedDict

import tenacity

from tunetrail.config.comparisons import LlmJudge, LlmLabeler
from tunetrail.contract.progress import ProgressBar
from tunetrail.contract.stage import Stage
from tunetrail.data.chat import shown_prompt
from tunetrail.errors import ConfigError, Interrupted
from tunetrail.files import canonical_json, read_finished_rows
from tunetrail.labeling.labels import Labels
from tunetrail.preferences.ranks import generator, ranks_from_scores
from tunetrail.preferences.rows import Ranking, SampledRow
from tunetrail.provenance.manifest import list_files, sha256_json

Verdict = Literal["A", "B", "tie"] | None
"""None: the answer could not be parsed."""
Judge = Callable[[list[str]], list[Verdict]]
"""Questions -> their verdicts."""

QUESTION = """{guideline}

Prompt:
{prompt}

Response A:
{first}

Response B:
{second}

Answer with A, B or tie, and with nothing else."""
PARALLEL = 8
"""Questions that an endpoint is asked at the same time."""
BACKOFF_SECONDS = (1, 2, 4, 8, 16)
"""Pauses before a request is sent again."""
TIMEOUT_SECONDS = 60


class Answer(TypedDict):
    """All verdicts on one row: a line of `verdicts.jsonl` in the state folder."""

    id: str
    """The id of the row."""
    verdicts: list[tuple[int, int, Verdict, Verdict]]
    """(i, j, verdict with i first, verdict with j first) for every pair of completions i < j."""
    time: str


class _Unavailable(Exception):
    """The endpoint did not answer, or asked to be called later."""


class _Refused(Exception):
    """The endpoint rejected the request itself."""


def parse_verdict(answer: str) -> Verdict:
    """Strictly `A`, `B` or `tie` (in any case), surrounded by nothing but space; else None."""
    answer = answer.strip()
    if answer in ("A", "B"):
        return answer  # type: ignore[return-value]
    return "tie" if answer.lower() == "tie" else None


def pair_outcome(forward: Verdict, backward: Verdict) -> int:
    """Verdicts on (i, j) and on (j, i) -> 1 if both name i, -1 if both name j, else 0."""
    return {("A", "B"): 1, ("B", "A"): -1}.get((forward, backward), 0)  # type: ignore[arg-type]


def scores_from_outcomes(outcomes: dict[tuple[int, int], int], k: int) -> list[float]:
    """Wins plus half the ties of each of `k` completions, from the outcome of each pair (i, j)."""
    scores = [0.0] * k
    for (i, j), outcome in outcomes.items():
        scores[i] += (1 + outcome) / 2
        scores[j] += (1 - outcome) / 2
    return scores


# ----------------------------------------------------------------------------- judges


def _send(request: urllib.request.Request) -> bytes:
    """The reply to a request. Raises _Unavailable if it makes sense to try again, else _Refused."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            return reply.read()
    except urllib.error.HTTPError as e:
        e.close()
        trouble = f"HTTP {e.code} {e.reason}"
        if e.code != 429 and e.code < 500:
            raise _Refused(trouble) from None
        raise _Unavailable(trouble) from None
    except (OSError, http.client.HTTPException) as e:  # no connection, a timeout, a reply cut short
        raise _Unavailable(str(getattr(e, "reason", e))) from None


def endpoint_judge(config: LlmJudge, key: str) -> Judge:
    """A judge behind an OpenAI-compatible `/chat/completions`, asked at temperature 0.

    The key is read from the environment variable `api_key_env`; without one no key is sent, which is what servers on
    your own machine expect. HTTP 429 and 5xx and lost connections are retried with growing pauses and then raise
    Interrupted; any other HTTP error raises ConfigError.

    Args:
        key: of the judge in the config, for messages.
    """
    url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
    secret = os.environ.get(config.api_key_env)
    send = tenacity.retry(
        retry=tenacity.retry_if_exception_type(_Unavailable),
        wait=tenacity.wait_chain(*map(tenacity.wait_fixed, BACKOFF_SECONDS)),
        stop=tenacity.stop_after_attempt(1 + len(BACKOFF_SECONDS)),
        reraise=True,
    )(_send)

    def ask(question: str) -> Verdict:
        messages = [{"role": "user", "content": question}]
        body = {"model": config.model, "messages": messages, "temperature": 0, "max_tokens": 16}
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if secret:
            # Unredirected: a redirect must not carry the key elsewhere.
            request.add_unredirected_header("Authorization", f"Bearer {secret}")
        try:
            answer = json.loads(send(request))["choices"][0]["message"]["content"]
        except _Unavailable as e:
            raise Interrupted(
                f"{url} does not answer ({e}); finished rows are saved, run the same command again"
            ) from None
        except _Refused as e:
            raise ConfigError(
                f"{key}.endpoint: {url} refused the request ({e}); check endpoint, model "
                f"and the key in ${config.api_key_env} ({'set' if secret else 'not set'})"
            ) from None
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
    """A causal language model in a folder: its verdict is the likelier next token, `A` or `B`. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunetrail.models.loading import why_not_loaded
    from tunetrail.models.runtime import device, quiet_libraries, use_bf16

    quiet_libraries()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        dtype = torch.bfloat16 if use_bf16(precision) else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{key}.path: {path}: cannot be loaded as a language model: {why_not_loaded(e)}") from None
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


def ask_row(row: Mapping[str, Any], guideline: str, judge: Judge) -> Answer:
    """Asks about all pairs of a row in both orders."""
    prompt, texts = shown_prompt(row["messages"]), row["completions"]
    pairs = list(combinations(range(len(texts)), 2))
    questions = [
        QUESTION.format(guideline=guideline, prompt=prompt, first=texts[first], second=texts[second])
        for i, j in pairs
        for first, second in ((i, j), (j, i))
    ]
    answers = iter(judge(questions))
    verdicts = [(i, j, next(answers), next(answers)) for i, j in pairs]
    return {"id": row["id"], "verdicts": verdicts, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def ask_rows(
    rows: Sequence[Mapping[str, Any]], ask: Callable[[Mapping[str, Any]], Answer], stage: Stage
) -> dict[str, Answer]:
    """The answers by row id; those of an earlier attempt come from the state folder. Raises Interrupted."""
    path = stage.state / "verdicts.jsonl"
    answers: dict[str, Any] = {answer["id"]: answer for answer in read_finished_rows(path, "id", "verdicts")}
    unanswered = [row for row in rows if row["id"] not in answers]
    with (
        ProgressBar(stage.name, len(rows), "prompts", done=len(answers)) as bar,
        path.open("a", encoding="utf-8") as f,
    ):
        for row in unanswered:
            stage.stop.leave_if_requested(f"after {len(answers)} of {len(rows)} prompts")
            answers[row["id"]] = ask(row)
            stage.attempt.check()
            f.write(canonical_json(answers[row["id"]]) + "\n")
            f.flush()
            bar.advance()
    return answers


def judge_rows(
    rows: Sequence[Mapping[str, Any]], config: LlmJudge, stage: Stage, key: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(each row's `Answer` by its id, who judged).

    Args:
        rows: with "id", "messages", "completions".
        key: of the judge in the config, for messages.

    Raises:
        Interrupted: the endpoint does not answer, or the stage was asked to stop.
        ConfigError: the judge cannot be used.
    """
    if config.path:
        judge = local_judge(config.path, stage.shared.get("precision", "auto"), key)
        source: dict[str, Any] = {"path": str(config.path), "digest": sha256_json(list_files(config.path))}
    else:
        judge = endpoint_judge(config, key)
        source = {"endpoint": config.endpoint, "model": config.model}
    answers = ask_rows(rows, lambda row: ask_row(row, config.guideline, judge), stage)
    return answers, source | {"guideline": sha256_json(config.guideline)}


def rankings_of(answer: Answer, k: int, config: LlmLabeler, seed: int) -> list[Ranking]:
    """The rankings of one row by all labelers, from its verdicts."""
    rankings: list[Ranking] = []
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


def rank(rows: list[SampledRow], config: LlmLabeler, stage: Stage) -> Labels:
    """Raises what `judge_rows` raises."""
    answers, source = judge_rows(rows, config, stage, "comparisons")
    verdicts = [
        v for row in rows for *_, forward, backward in answers[row["id"]]["verdicts"] for v in (forward, backward)
    ]
    return Labels(
        [rankings_of(answers[row["id"]], len(row["completions"]), config, stage.seed) for row in rows],
        metrics={"verdicts": len(verdicts), "unparsed": verdicts.count(None)},
        source=source,
    )
