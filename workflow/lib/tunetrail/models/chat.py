"""Chat with the models of a run: all get the same messages, and each keeps its own conversation."""

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
from tunetrail.models.release import find_model
from tunetrail.models.runtime import device, use_bf16
from tunetrail.models.sampling import inference_weights, pick
from tunetrail.provenance.lineage import Lineage, ancestors, run_of
from tunetrail.provenance.manifest import MANIFEST
from tunetrail.provenance.record import read_record
from tunetrail.seeds import derive_seed

NEW = "/new"
"""The line that starts a new conversation."""


@dataclass(frozen=True)
class Style:
    """How a prompt is presented to a model."""

    chat: bool
    """Use the chat template; otherwise the model gets the bare text, without the earlier conversation."""
    system: str | None = None


def style_of(artifact: Path, has_template: bool) -> Style:
    """The style in which its run rendered the data; without a record of that, the chat template if there is one."""
    node = Lineage().add(artifact)
    data = ancestors(node).get("data")
    if (record := data.record if data else None) is None:  # a base model has no data among its ancestors
        run = run_of(node.folder)
        record = read_record(run / "data") if run and (run / "data" / MANIFEST).exists() else None
    config = record.config if record else {}
    return Style(config.get("chat", has_template), config.get("system"))


@torch.inference_mode()
def stream(
    model: Any, prompt: list[int], *, max_new_tokens: int, temperature: float, seed: int, eos_id: int
) -> Iterator[int]:
    """Yields the tokens of a response as they are drawn, without the final EOS.

    They are the tokens that `sampling.sample` draws for a completion whose random stream has this seed.

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
    """A model and its conversation."""

    name: str
    model: Any
    tokenizer: Any
    style: Style
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, plain: bool = False, system: str | None = None) -> "Speaker":
        """Loads the model that a path names, see `release.find_model`. Raises DataError for a reward model.

        Args:
            plain: use no chat template, whatever the run did.
            system: replaces the run's own system message.
        """
        source = find_model(path)
        if source.is_reward_model:
            raise DataError(f"{path}: a reward model scores text and writes none; name a base, sft or policy model")
        tokenizer, record = load_tokenizer(source.folder), read_record(source.artifact)
        style = style_of(source.artifact, bool(tokenizer.chat_template))
        if plain or system is not None:
            style = Style(not plain, system)
        if style.chat and not tokenizer.chat_template:
            raise DataError(f"{path}: its tokenizer has no chat template; use --plain")
        precision = record.config_file.get("precision", "auto")
        model = inference_weights(plain_attention(source.load()).to(device()), use_bf16(precision))
        return cls(str(path), model, tokenizer, style)

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation so far followed by `text`."""
        if not self.style.chat:
            return encode(self.tokenizer, text)
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            return encode(self.tokenizer, render(self.tokenizer, with_system(messages, self.style.system)))
        except TemplateError as e:
            raise DataError(f"{self.name}: its chat template refuses the conversation ({e}); use --plain") from None

    def reply(self, text: str, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """Yields the response so far after each token, then adds it to the conversation.

        Raises DataError if the conversation leaves the model no room for another token.
        """
        prompt, limit = self.prompt(text), positions(self.model.config)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        if room < 1:
            raise DataError(
                f"{self.name}: the conversation has {len(prompt)} tokens, and the model reads {limit}; {NEW} starts "
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
            yield answer.rstrip("\ufffd")  # the first bytes of a character that is still incomplete
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
    """Sends each line to all speakers, which answer in parallel, a token each in turn.

    Args:
        show: gets an iterator over what each speaker has said so far.
        complain: gets the reason why a line could not be answered.
    """
    for turn, line in enumerate(lines):
        text = line.strip()
        if text == NEW:
            for speaker in speakers:
                speaker.messages.clear()
        elif text:
            reply_seed = derive_seed(seed, "sample", f"turn-{turn}", 0)
            try:
                show(_together([s.reply(text, max_new_tokens, temperature, reply_seed) for s in speakers]))
            except DataError as e:
                complain(str(e))


def _together(replies: Sequence[Iterator[str]]) -> Iterator[list[str]]:
    """Yields what each has said so far, once per token of the longest reply."""
    texts = [""] * len(replies)
    for latest in zip_longest(*replies):
        texts = [before if new is None else new for before, new in zip(texts, latest, strict=True)]
        yield texts
