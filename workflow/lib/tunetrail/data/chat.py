"""Renders conversations. This is the only place where a prompt string is made."""

from typing import Any


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """The messages preceded by `system`, unless they already begin with a system message."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def shown_prompt(messages: list[dict]) -> str:
    """A prompt as labelers see it: just the text of a single message, else each message with its role."""
    turns = [(message["role"], message["content"].strip()) for message in messages]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def render(tokenizer: Any, messages: list[dict]) -> str:
    """Renders messages with the chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
