"""Prompts as the model is shown them, and how many tokens they have."""

from typing import Any

from jinja2 import TemplateError

from tunetrail.config.data import DataConfig
from tunetrail.data.chat import render
from tunetrail.errors import ConfigError, DataError


class Renderer:
    """Messages -> the prompt string the model is shown, and token counts."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.config = tokenizer, config
        if config.chat and not tokenizer.chat_template:
            raise DataError(
                "data.chat: the base model has no chat template; set data.chat to false, or give base.chat_template"
            )
        if not config.chat and config.system is not None:
            raise ConfigError("data.system: plain prompts have no place for it; set it to null, or data.chat to true")

    def prompt(self, row: dict) -> str:
        messages = row["messages"]
        if not self.config.chat:
            if len(messages) != 1:
                raise DataError(
                    f"data.chat: is false, but the data holds conversations; set it to true ({row['where']})"
                )
            return messages[0]["content"]
        try:
            return render(self.tokenizer, messages)
        except TemplateError as e:
            raise DataError(
                f"{row['where']}: the chat template refuses turns of {', '.join(m['role'] for m in messages)} ({e}); "
                "change the row or data.system, or give base.chat_template"
            ) from None

    def tokens(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def fits(row: dict, config: DataConfig, renderer: Renderer) -> bool:
    """Whether a row is short enough. Raises DataError where too_long is `error`."""
    if "text" in row:
        return True
    completions = row.get("completions") or ([row["completion"]] if "completion" in row else [])
    longest = max(renderer.tokens(completions), default=0)
    if row["max_tokens"]:  # the built-in source takes what is short enough
        code, answer = row["max_tokens"]
        if renderer.tokens([row["messages"][-1]["content"]])[0] > code or longest > answer:
            return False
    prompt = renderer.tokens([row["prompt"]])[0]
    if prompt <= config.max_prompt_tokens and longest <= config.max_completion_tokens:
        return True
    if config.too_long == "drop":
        return False
    key, count = (
        ("max_prompt_tokens", prompt) if prompt > config.max_prompt_tokens else ("max_completion_tokens", longest)
    )
    raise DataError(
        f"{row['where']}: has {count} tokens, more than data.{key} ({getattr(config, key)}): "
        f"{row['prompt'][:60]!r}…; raise it, or set data.too_long to drop"
    )
