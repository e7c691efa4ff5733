"""Shared by the commands: exit codes, options, output."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunetrail.terminal import LINES, escape

SOUND, FINDING, INCOMPLETE, WARNING = 0, 1, 2, 3
"""Exit codes."""

Json = Annotated[bool, typer.Option("--json", help="Output for machines.")]
Output = Annotated[Path | None, typer.Option(help="File to write (default: standard output).")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def write(text: str, output: Path | None, as_json: bool = False) -> int:
    """Writes text to a file or to standard output."""
    if output:
        output.write_text(text)
    if as_json:
        print_json({"output": str(output) if output else None, "content": None if output else text})
    elif not output:  # a file or another program gets every byte
        print(escape(text, LINES) if sys.stdout.isatty() else text, end="")
    return SOUND
