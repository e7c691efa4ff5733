"""Renders prompts and checks how many tokens they have."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from tunetrail.config.data import DataConfig
from tunetrail.data.chat import render, with_system
from tunetrail.data.invalid import Finding, Invalid, first_few, found_invalid, leave_out
from tunetrail.errors import ConfigError, DataError
from tunetrail.preferences.formats import BadRow


class Renderer:
    """Renders messages into prompt strings, and counts tokens."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.config = tokenizer, config
        if config.chat and not tokenizer.chat_template:
            raise DataError(
                "data.chat: the base model has no chat template; set data.chat to false, or give base.chat_template"
            )
        if not config.chat and config.system is not None:
            raise ConfigError("data.system: plain prompts have no place for it; set it to null, or data.chat to true")

    def prompt(self, messages: list[dict]) -> str:
        """The prompt string of messages. Raises BadRow if they cannot be rendered."""
        if not self.config.chat:
            if len(messages) != 1:
                raise BadRow("is a conversation, but data.chat is false; set it to true")
            return messages[0]["content"]
        try:
            return render(self.tokenizer, messages)
        except TemplateError as e:
            raise BadRow(
                f"the chat template refuses turns of {', '.join(m['role'] for m in messages)} ({e}); change the row or "
                "data.system, or give base.chat_template"
            ) from None

    def tokens(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def rendered(rows: list[dict], config: DataConfig, renderer: Renderer) -> list[dict]:
    """The rows with their rendered "prompt"; raw text stays as it is.

    Raises DataError for rows that cannot be rendered, unless data.invalid is `drop`.
    """
    bad, good = [], []
    for row in rows:
        if "messages" in row:
            messages = with_system(row["messages"], config.system)
            try:
                row = row | {"messages": messages, "prompt": renderer.prompt(messages)}
            except BadRow as e:
                bad.append(Invalid(row["where"], str(e)))
                continue
        good.append(row)
    if bad:
        leave_out(found_invalid("data", bad, len(rows)), config.invalid if good else "error")
    return good


class Counts(Protocol):
    """Counts the tokens of texts."""

    def tokens(self, texts: list[str]) -> list[int]: ...


class Measured(NamedTuple):
    """A row that is not raw text, and its numbers of tokens."""

    row: dict
    last_message: int
    """Counted only if the source limits it; else 0."""
    prompt: int
    answer: int
    """Tokens of the longest answer; 0 if there is none."""

    @property
    def whole(self) -> int:
        """Prompt, answer and EOS."""
        return self.prompt + self.answer + 1


def measured(rows: Sequence[dict], counter: Counts) -> list[Measured]:
    answers = [row.get("completions") or ([row["completion"]] if "completion" in row else []) for row in rows]
    lengths = iter(counter.tokens([text for texts in answers for text in texts]))
    last_messages = iter(counter.tokens([row["messages"][-1]["content"] for row in rows if row["max_tokens"]]))
    prompts = counter.tokens([row["prompt"] for row in rows])
    return [
        Measured(
            row, next(last_messages) if row["max_tokens"] else 0, prompt, max(islice(lengths, len(texts)), default=0)
        )
        for row, prompt, texts in zip(rows, prompts, answers, strict=True)
    ]


class Limit(NamedTuple):
    """The most tokens that a part of a row may have."""

    key: str
    most: int
    tokens: Callable[[Measured], int]
    too_long: str
    """What a row over the limit has, for the message."""
    fix: str

    def finding(self, rows: Sequence[Measured], of: str = "rows") -> Finding | None:
        """How many rows exceed the limit, the first of them, and what limit would suffice; None if none does."""
        over = [f"{m.row['where']} ({self.tokens(m)})" for m in rows if self.tokens(m) > self.most]
        if not over:
            return None
        lengths = sorted(map(self.tokens, rows))
        have = "has" if len(over) == 1 else "have"
        return Finding(
            f"{self.key}: {len(over)} of {len(rows)} {of} {have} {self.too_long}: {first_few(over)}; "
            f"{lengths[-(len(rows) // 100) - 1]} would fit 99%, {lengths[-1]} all",
            f"{self.fix}, or leave them out with data.too_long: drop",
        )


def limits(config: DataConfig, positions: int | None) -> list[Limit]:
    prompt, answer = config.max_prompt_tokens, config.max_completion_tokens
    all_limits = [
        Limit(
            "data.max_prompt_tokens", prompt, lambda m: m.prompt, f"a prompt of more than {prompt} tokens", "raise it"
        ),
        Limit(
            "data.max_completion_tokens",
            answer,
            lambda m: m.answer,
            f"an answer of more than {answer} tokens",
            "raise it",
        ),
    ]
    if positions is not None:
        too_long = f"more tokens, prompt and answer together, than the model has positions ({positions})"
        all_limits.append(
            Limit("base", positions, lambda m: m.whole, too_long, "shorten them, take a model that reads more")
        )
    return all_limits


def short_enough(rows: list[dict], config: DataConfig, renderer: Renderer, positions: int | None) -> list[dict]:
    """The rows within all limits. Raw text always is: it is cut into blocks.

    Rows beyond the limits of a built-in source itself are dropped silently.

    Args:
        positions: the base model's; None if it has no limit.

    Raises DataError for rows that are too long, unless data.too_long is `drop`.
    """
    considered = [
        m
        for m in measured([row for row in rows if "text" not in row], renderer)
        if not m.row["max_tokens"] or (m.last_message <= m.row["max_tokens"][0] and m.answer <= m.row["max_tokens"][1])
    ]
    all_limits = limits(config, positions)
    if findings := [finding for limit in all_limits if (finding := limit.finding(considered))]:
        leave_out(findings, config.too_long)
    kept = {id(m.row) for m in considered if all(limit.tokens(m) <= limit.most for limit in all_limits)}
    return [row for row in rows if "text" in row or id(row) in kept]
