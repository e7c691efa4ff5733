"""Finding the user's own words in a prompt that a chat template has rendered."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "\x02question\x03"


@dataclass(frozen=True)
class ChatTurn:
    """What a chat template writes around the last user message: `header` before it, `tail` after it."""

    header: str
    tail: str

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatTurn | None":
        """Read off two renderings, one turn and two turns long; None where no template marks the user's turn."""
        if not tokenizer.chat_template:
            return None
        user = {"role": "user", "content": _MARK}
        earlier = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        texts = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in ([user], [*earlier, user])
        )
        (head, _, tail), (longer_head, _, _) = (text.partition(_MARK) for text in texts)
        header = os.path.commonprefix([head[::-1], longer_head[::-1]])[::-1]  # noqa: RUF071 (by character, as meant)
        return cls(header, tail) if header else None

    def message(self, rendered: str) -> str | None:
        """The last user message, without space around it; None where the prompt is not of this template."""
        _, header, rest = rendered.rpartition(self.header)
        return rest.removesuffix(self.tail).strip() if header and rest.endswith(self.tail) else None


def chat_turn(base: Path) -> ChatTurn | None:
    """The ChatTurn of the tokenizer in a base artifact."""
    from transformers import AutoTokenizer

    return ChatTurn.of(AutoTokenizer.from_pretrained(base / "model"))


def shown_prompt(rendered: str, turn: ChatTurn | None) -> str:
    """The prompt as who ranks sees it: the user's own words where they are all there is, else the rendered text."""
    if turn and rendered.count(turn.header) == 1:
        return turn.message(rendered) or rendered
    return rendered
