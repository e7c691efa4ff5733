"""Reads a tokenizer's files without transformers, whose import takes seconds.

A tokenizer's class may have special tokens that no file names. Anything uncertain is left to the stage that loads it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunetrail.config.base_model import AnyModel

NO_PAD_OF_THEIR_OWN = {
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
    *(f"{family}Tokenizer{kind}" for family in ("GPT2", "Llama") for kind in ("", "Fast")),
}
"""Tokenizer classes without a default pad token: they have the one in their files, or none."""


def read(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the folder; empty if the file is missing or holds none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def special_token(folder: Path, name: str) -> str | None:
    """`eos_token` or `pad_token`, as the files name it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read(folder, file).get(name)
        if token is not None:
            return token["content"] if isinstance(token, dict) else str(token)
    return None


def has_template(folder: Path) -> bool:
    return (
        bool(read(folder, "tokenizer_config.json").get("chat_template"))
        or any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
        or (folder / "additional_chat_templates").is_dir()
    )


def positions(folder: Path) -> int | None:
    """Like `models.lengths.positions`, but from the folder's config.json."""
    config = read(folder, "config.json")
    for place in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(place.get(name), int):
                return place[name]
    return None


class Counter:
    """Counts tokens by `tokenizer.json` alone."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(self, texts: list[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def has(self, token: str) -> bool:
        return self.tokenizer.token_to_id(token) is not None


def problems(folder: Path, base: AnyModel, chat: bool) -> Iterator[str]:
    """Yields a line for each mistake at which the stage `base` or `data` would certainly stop."""
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        is_artifact = (folder / "model/config.json").exists()
        fix = f"its model is in {folder / 'model'}" if is_artifact else "name a folder that from_pretrained can load"
        yield f"base.path: {folder} has no config.json; {fix}"
        return
    if not (folder / "tokenizer_config.json").exists():
        return
    eos, pad = (special_token(folder, name) for name in ("eos_token", "pad_token"))
    if base.pad_token is not None:
        if (folder / "tokenizer.json").exists() and not Counter(folder).has(base.pad_token):
            yield (f"base.pad_token: {base.pad_token!r} is not in the vocabulary; choose a special token the model has")
        pad = base.pad_token
    elif pad is None and read(folder, "tokenizer_config.json").get("tokenizer_class") in NO_PAD_OF_THEIR_OWN:
        yield "base.pad_token: the tokenizer has no pad token; name a special token of its vocabulary other than eos"
    if eos is not None and pad == eos:
        yield f"base.pad_token: pad must be a token other than eos ({eos!r}); name a special token of its vocabulary"
    if chat and base.chat_template is None and not has_template(folder):
        yield "data.chat: the base model has no chat template; set data.chat to false, or give base.chat_template"
