"""How long a text a stage trains on, and a model can read.

Past its last position a model with learned positions crashes, and one with rotary embeddings goes on and gets worse
without a word: hence both are refused.
"""

from collections.abc import Sequence
from typing import Any

from tunetrail.data.invalid import first_few
from tunetrail.errors import ConfigError, DataError


def positions(config: Any) -> int | None:
    """How many tokens a model of this config reads, prompt and response together; None where there is no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_room(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises DataError where prompts leave no room for so many tokens.

    Args:
        config: of the model.
        prompts: token ids.
    """
    most = positions(config)
    lengths = [len(prompt) for prompt in prompts]
    if most is None or not (over := sum(length + max_new_tokens > most for length in lengths)):
        return
    raise DataError(
        f"max_new_tokens: {over} of {len(lengths)} prompts leave no room for {max_new_tokens} tokens in the model's "
        f"{most} positions; the longest prompt has {max(lengths)}: lower max_new_tokens or data.max_prompt_tokens"
    )


def check_lengths(stage: str, rows: Sequence[tuple[str, int]], most: int) -> None:
    """Raises DataError where rows have more tokens than the stage's max_length.

    Args:
        rows: the id of each and its tokens, prompt and response together.
    """
    over = [f"{name} ({length})" for name, length in rows if length > most]
    if over:
        raise DataError(
            f"{stage}: {len(over)} of {len(rows)} examples have more tokens than max_length ({most}): "
            f"{first_few(over)}; raise it to {max(length for _, length in rows)}, or leave out longer rows by the "
            "limits of data"
        )


def check_blocks(config: Any, blocks: Sequence[Sequence[int]], key: str) -> None:
    """Raises ConfigError where text was cut into blocks longer than a model of this config reads.

    Args:
        blocks: token ids.
        key: of the config, that decides how long they are.
    """
    most, longest = positions(config), max(map(len, blocks))
    if most is not None and longest > most:
        raise ConfigError(f"{key}: {longest} tokens are more than the model's {most} positions; lower it to {most}")
