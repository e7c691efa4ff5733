"""Limits on length: of the texts that a stage trains on, and of what a model can read.

Texts beyond a model's last position are refused: a model with learned positions would crash, and one with rotary
embeddings would silently get worse.
"""

from collections.abc import Sequence
from typing import Any

from tunetrail.data.invalid import first_few
from tunetrail.errors import ConfigError, DataError


def positions(config: Any) -> int | None:
    """How many tokens a model with this config can read, prompt and response together; None if there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_room(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises DataError if prompts leave no room for `max_new_tokens`.

    Args:
        config: the model's config.
        prompts: token ids.
    """
    limit = positions(config)
    lengths = [len(prompt) for prompt in prompts]
    if limit is None or not (over := sum(length + max_new_tokens > limit for length in lengths)):
        return
    raise DataError(
        f"max_new_tokens: {over} of {len(lengths)} prompts leave no room for {max_new_tokens} tokens in the model's "
        f"{limit} positions; the longest prompt has {max(lengths)}: lower max_new_tokens or data.max_prompt_tokens"
    )


def check_lengths(stage: str, rows: Sequence[tuple[str, int]], max_length: int) -> None:
    """Raises DataError if rows have more tokens than the stage's max_length.

    Args:
        rows: the id and number of tokens of each, prompt and response together.
    """
    over = [f"{name} ({length})" for name, length in rows if length > max_length]
    if over:
        raise DataError(
            f"{stage}: {len(over)} of {len(rows)} examples have more tokens than max_length ({max_length}): "
            f"{first_few(over)}; raise it to {max(length for _, length in rows)}, or leave out longer rows by the "
            "limits of data"
        )


def check_blocks(config: Any, blocks: Sequence[Sequence[int]], key: str) -> None:
    """Raises ConfigError if text was cut into blocks longer than a model with this config can read.

    Args:
        blocks: token ids.
        key: the config key that sets their length.
    """
    limit, longest = positions(config), max(map(len, blocks))
    if limit is not None and longest > limit:
        raise ConfigError(f"{key}: {longest} tokens are more than the model's {limit} positions; lower it to {limit}")
