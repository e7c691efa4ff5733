"""Talking with models of a run: each keeps a conversation of its own, and all get the same messages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import DynamicCache

from tunetrail.data.chat import render, with_system
from tunetrail.errors import DataError
from tunetrail.models.batching import encode
from tunetrail.models.cpu.attention import plain_attention
from tunetrail.models.lengths import positions
from tunetrail.models.loading import load_tokenizer
from tunetrail.models.release import find
from tunetrail.models.runtime import device, use_bf16
from tunetrail.models.sampling import inference_weights, pick
from tunetrail.provenance.lineage import Lineage, ancestors, run_of
from tunetrail.provenance.manifest import MANIFEST
from tunetrail.provenance.record import read_record
from tunetrail.seeds import derive_seed

NEW = "/new"
"""What begins a new conversation."""


@dataclass(frozen=True)
class Style:
    """How a prompt is put to a model."""

    chat: bool
    """By the chat template; else the text alone, without what was said before."""
    system: str | None = None


def style_of(artifact: Path, has_template: bool) -> Style:
    """As the data of its run was rendered; where no record tells, by the chat template if there is one."""
    node = Lineage().add(artifact)
    data = ancestors(node).get("data")
    if (record := data.record if data else None) is None:  # a base model was made before the data
        run = run_of(node.folder)
        record = read_record(run / "data") if run and (run / "data" / MANIFEST).exists() else None
    config = record.config if record else {}
    return Style(config.get("chat", has_template), config.get("system"))


@torch.inference_mode()
def stream(
    model: Any, prompt: list[int], *, max_new_tokens: int, temperature: float, seed: int, eos_id: int
) -> Iterator[int]:
    """The tokens of a response as they are drawn, without the EOS that ends it.

    Those of `sampling.sample`, whose random stream of a completion has this seed.

    Args:
        temperature: 0 decodes greedily.
    """
    uniforms = torch.empty(max_new_tokens, dtype=torch.float64)
    uniforms.uniform_(generator=torch.Generator().manual_seed(seed))
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt], device=model.device)
    for uniform in uniforms:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        token = pick(logits, uniform[None], temperature)[0]
        if token.item() == eos_id:
            return
        yield int(token.item())
        ids = token[:, None]


@dataclass
class Speaker:
    """A model in a conversation."""

    name: str
    model: Any
    tokenizer: Any
    style: Style
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, plain: bool = False, system: str | None = None) -> "Speaker":
        """The model that a path means, see `release.find`. Raises DataError for a reward model.

        Args:
            plain: no chat template, whatever the run did.
            system: instead of the run's own system message.
        """
        found = find(path)
        if found.is_reward_model:
            raise DataError(f"{path}: a reward model scores text and writes none; name a base, sft or policy model")
        tokenizer, record = load_tokenizer(found.folder), read_record(found.artifact)
        style = style_of(found.artifact, bool(tokenizer.chat_template))
        if plain or system is not None:
            style = Style(not plain, system)
        if style.chat and not tokenizer.chat_template:
            raise DataError(f"{path}: its tokenizer has no chat template; use --plain")
        precision = record.config_file.get("precision", "auto")
        model = inference_weights(plain_attention(found.load()).to(device()), use_bf16(precision))
        return cls(str(path), model, tokenizer, style)

    def prompt(self, text: str) -> list[int]:
        """Token ids of everything said, and of `text`."""
        if not self.style.chat:
            return encode(self.tokenizer, text)
        said = [*self.messages, {"role": "user", "content": text}]
        try:
            return encode(self.tokenizer, render(self.tokenizer, with_system(said, self.style.system)))
        except TemplateError as e:
            raise DataError(f"{self.name}: its chat template refuses the conversation ({e}); use --plain") from None

    def reply(self, text: str, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """The response as far as it is there, after each token; then it is part of the conversation.

        Raises DataError where the conversation leaves the model no room for another token.
        """
        prompt, most = self.prompt(text), positions(self.model.config)
        room = max_new_tokens if most is None else min(max_new_tokens, most - len(prompt))
        if room < 1:
            raise DataError(
                f"{self.name}: the conversation has {len(prompt)} tokens, and the model reads {most}; {NEW} begins "
                "another"
            )
        ids: list[int] = []
        answer = ""
        for token in stream(
            self.model, prompt, max_new_tokens=room, temperature=temperature, seed=seed,
            eos_id=self.tokenizer.eos_token_id,
        ):  # fmt: skip
            ids.append(token)
            answer = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield answer.rstrip("\ufffd")  # the first bytes of a character whose others are still to come
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def converse(
    speakers: Sequence[Speaker],
    lines: Iterable[str],
    show: Callable[[Iterator[list[str]]], None],
    complain: Callable[[str], None],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Puts each line to all speakers, who answer in turns of a token.

    Args:
        show: is given what each has said so far, again and again.
        complain: is told what a line could not be answered for.
    """
    for turn, line in enumerate(lines):
        text = line.strip()
        if text == NEW:
            for speaker in speakers:
                speaker.messages.clear()
        elif text:
            drawn = derive_seed(seed, "sample", f"turn-{turn}", 0)
            try:
                show(_together([s.reply(text, max_new_tokens, temperature, drawn) for s in speakers]))
            except DataError as e:
                complain(str(e))


def _together(replies: Sequence[Iterator[str]]) -> Iterator[list[str]]:
    """What each has said so far, after each token of any."""
    said = [""] * len(replies)
    for now in zip_longest(*replies):
        said = [before if new is None else new for before, new in zip(said, now, strict=True)]
        yield said
