"""tunetrail model: export, push, chat."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tunetrail.cli.common import SOUND
from tunetrail.errors import ConfigError, DiskError, TunetrailError
from tunetrail.terminal import LINES, PROSE, escape

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


@contextmanager
def _one_line() -> Iterator[None]:
    """A mistake ends the command with its own exit code: 65 for data, 78 for options, 74 for the disk."""
    try:
        yield
    except TunetrailError as e:
        print(f"tunetrail: error: {escape(e, LINES)}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from None
    except OSError as e:
        print(f"tunetrail: error: {escape(e.filename or 'disk')}: {escape(e.strerror or e)}", file=sys.stderr)
        raise typer.Exit(DiskError.exit_code) from None


@app.command()
def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", show_default=False,
            help="An artifact such as results/demo/policies/dpo, or a kept checkpoint below it (checkpoints/STEP); an "
            "adapter is merged.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The folder to write; a new one.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights: fp32 is what the run measured, bf16 half the size.")
    ] = Dtype.fp32,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also write model.gguf with llama.cpp's convert_hf_to_gguf.py.")
    ] = False,
) -> int:  # fmt: skip
    """Write a model as one plain folder: weights, tokenizer, chat template, full card, checksums.

    The artifact is compared with its manifest first, and the folder is loaded back before it gets its name.
    """
    with _one_line():
        from tunetrail.models import release
        from tunetrail.models.runtime import quiet_libraries

        quiet_libraries()
        release.export(model, out, dtype.value, gguf)
    return SOUND


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False, help="What export wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", show_default=False, help="OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and send nothing.")] = False,
) -> int:
    """Upload an exported folder to the Hugging Face hub, with the account of `hf auth login`."""
    with _one_line():
        from tunetrail.models import release

        release.push(folder, repo, public, dry_run)
    return SOUND


@app.command()
def chat(
    model: Annotated[
        list[Path],
        typer.Option(
            "--model", metavar="MODEL", show_default=False, help="As for export; give it twice to compare two models."
        ),
    ],
    system: Annotated[str | None, typer.Option(help="System message (default: the run's data.system).")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each line as text, without a chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.7,
    seed: Annotated[int, typer.Option(help="The same seed and lines give the same responses.")] = 17,
) -> int:
    """Chat with models of a run, one line per message; /new starts a new conversation, Ctrl-D ends."""
    with _one_line():
        if plain and system is not None:
            raise ConfigError("--plain, --system: choose one; plain text has no place for a system message")
        from tunetrail.models.chat import NEW, Speaker, converse
        from tunetrail.models.runtime import quiet_libraries

        quiet_libraries()
        speakers = [Speaker.load(path, plain, system) for path in model]
        for speaker in speakers:
            style = f"chat template, system message {speaker.style.system!r}" if speaker.style.chat else "plain text"
            print(escape(f"{speaker.name}: {style}"), file=sys.stderr)
        if sys.stdin.isatty():
            print(f"{NEW} begins a new conversation, Ctrl-D ends", file=sys.stderr)
        show = _columns if len(speakers) > 1 and sys.stdout.isatty() else _plainly
        names = [speaker.name for speaker in speakers]
        with suppress(KeyboardInterrupt):
            converse(
                speakers,
                _lines(),
                lambda replies: show(names, replies),
                lambda error: print(escape(error, LINES), file=sys.stderr),
                max_new_tokens,
                temperature,
                seed,
            )
    return SOUND


def _lines() -> Iterator[str]:
    """Standard input, with a prompt if somebody types."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


def _plainly(names: list[str], replies: Iterator[list[str]]) -> None:
    """One model's response as it comes; several models one after the other, each under its name."""
    said = [""] * len(names)
    for now in replies:
        if len(names) == 1:
            print(escape(now[0][len(said[0]) :], PROSE), end="", flush=True)
        said = now
    if len(names) == 1:
        print()
    else:
        print(
            "\n".join(f"[{escape(name)}]\n{escape(text, PROSE)}" for name, text in zip(names, said, strict=True)),
            flush=True,
        )


def _columns(names: list[str], replies: Iterator[list[str]]) -> None:
    """Responses side by side, as they come."""
    from rich.live import Live
    from rich.table import Column, Table
    from rich.text import Text

    with Live(vertical_overflow="visible") as live:
        for now in replies:
            table = Table(*(Column(Text(escape(name))) for name in names), expand=True)
            table.add_row(*(Text(escape(text, PROSE)) for text in now))
            live.update(table)
