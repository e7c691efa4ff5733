"""Conversations in their final form: the one place where a prompt is rendered."""

from typing import Any


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """The messages with `system` before them, unless they begin with a system message of their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def render(tokenizer: Any, messages: list[dict]) -> str:
    """The prompt string of a chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
