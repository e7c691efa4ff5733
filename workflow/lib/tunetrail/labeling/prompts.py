"""Reading a prompt that a chat template has rendered: what was said, and by whom."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

_SYSTEM, _FIRST, _ANSWER, _LAST = ("\x02system\x03", "\x02first\x03", "\x02answer\x03", "\x02last\x03")


def _between(rendered: str, *marks: str) -> list[str]:
    """What stands around marks that follow one another: one text more than there are marks."""
    found = []
    for mark in marks:
        before, _, rendered = rendered.partition(mark)
        found.append(before)
    return [*found, rendered]


@dataclass(frozen=True)
class ChatTurn:
    """What a chat template writes around messages."""

    header: str
    """Before the last user message of any prompt."""
    tail: str
    """After it."""
    head: str
    """All that stands before a user message that is the only message; a system message of the template's own is in it."""
    to_assistant: str
    """From a user's message to the answer."""
    to_user: str
    """From an answer to the next message."""
    around_system: tuple[str, str] | None
    """Before and after a system message; None where the template does not take one."""

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatTurn | None":
        """Read off renderings of one turn, of two, and of a system message; None where no template marks the user's turn."""
        if not tokenizer.chat_template:
            return None

        def rendered(**messages: str) -> str:
            turns = [{"role": role.rstrip("_"), "content": content} for role, content in messages.items()]
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

        head, tail = _between(rendered(user=_LAST), _LAST)
        longer = rendered(user=_FIRST, assistant=_ANSWER, user_=_LAST)
        _, to_assistant, to_user, _ = _between(longer, _FIRST, _ANSWER, _LAST)
        longer_head, _ = _between(longer, _LAST)
        header = os.path.commonprefix([head[::-1], longer_head[::-1]])[::-1]  # noqa: RUF071 (by character, as meant)
        try:
            opened, closed, _ = _between(rendered(system=_SYSTEM, user=_LAST), _SYSTEM, _LAST)
        except TemplateError:  # a template may refuse system messages
            closed = ""
        around_system = (opened, closed) if closed else None
        return cls(header, tail, head, to_assistant, to_user, around_system) if header else None

    def message(self, rendered: str) -> str | None:
        """The last user message, without space around it; None where the prompt is not of this template."""
        _, header, rest = rendered.rpartition(self.header)
        return rest.removesuffix(self.tail).strip() if header and rest.endswith(self.tail) else None

    def conversation(self, rendered: str) -> list[tuple[str, str]] | None:
        """(role, text) of all messages, without space around them; None where the prompt is not of this template."""
        said = []
        if not rendered.endswith(self.tail):
            return None
        rest = rendered.removesuffix(self.tail)
        if rest.startswith(self.head):
            rest = rest.removeprefix(self.head)
        elif self.around_system and rest.startswith(self.around_system[0]) and self.around_system[1] in rest:
            system, _, rest = rest.removeprefix(self.around_system[0]).partition(self.around_system[1])
            said.append(("system", system.strip()))
        else:
            return None
        first, *later = rest.split(self.to_assistant) if self.to_assistant else [rest]
        said.append(("user", first.strip()))
        for turn in later:
            answer, ended, user = turn.partition(self.to_user)
            if not ended:
                return None
            said += [("assistant", answer.strip()), ("user", user.strip())]
        return said


def chat_turn(base: Path) -> ChatTurn | None:
    """The ChatTurn of the tokenizer in a base artifact."""
    from transformers import AutoTokenizer

    return ChatTurn.of(AutoTokenizer.from_pretrained(base / "model"))


def shown_prompt(rendered: str, turn: ChatTurn | None) -> str:
    """The prompt as who ranks sees it: the user's own words where they are all there is, else who said what.

    A prompt that is not of the template stays as it is.
    """
    said = turn.conversation(rendered) if turn else None
    if not said:
        return rendered
    if len(said) == 1:
        return said[0][1] or rendered
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in said)
