"""Conversations in their final form: the one place where a prompt is rendered."""

from typing import Any


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """The messages with `system` before them, unless they begin with a system message of their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def shown_prompt(messages: list[dict]) -> str:
    """A prompt as whoever ranks sees it: the user's own words where they are all there is, else who said what."""
    said = [(message["role"], message["content"].strip()) for message in messages]
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in said)


def render(tokenizer: Any, messages: list[dict]) -> str:
    """The prompt string of a chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
