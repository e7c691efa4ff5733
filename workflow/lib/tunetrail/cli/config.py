"""tunetrail config: check, resolve, schema, document."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tunetrail.cli.common import SOUND
from tunetrail.errors import TunetrailError
from tunetrail.terminal import LINES, escape

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ConfigFile = Annotated[Path, typer.Argument(help="A config file, such as config/config.yaml.", show_default=False)]


def _load(path: Path, use: Callable[[Any], None]) -> int:
    from tunetrail.config.loading import load

    try:
        use(load(path))
    except TunetrailError as e:
        print(escape(e, LINES), file=sys.stderr)
        return e.exit_code
    return SOUND


@app.command()
def check(path: ConfigFile) -> int:
    """Validate a config file and what it names: exit code 0 and a forecast; else 78, or 65 for bad data,
    with one line per mistake."""
    from tunetrail.launch import preflight
    from tunetrail.monitor.forecast import share_table, unread

    def use(config: Any) -> None:
        for warning in preflight.check(config, str(path)):
            print(escape(f"{path}: warning: {warning}"), file=sys.stderr)
        print("\n".join(map(escape, [*share_table(config), *unread(config)])))

    return _load(path, use)


@app.command()
def resolve(path: ConfigFile) -> int:
    """Print a config file with every default filled in."""
    import yaml

    return _load(path, lambda config: print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end=""))


@app.command()
def schema() -> int:
    """Print the JSON schema of config files."""
    from tunetrail.config.documentation import schema as build

    print(json.dumps(build(), indent=2, sort_keys=True))
    return SOUND


@app.command()
def document(
    write: Annotated[Path | None, typer.Option(help="Put the tables between the markers of this file.")] = None,
) -> int:
    """Print the tables of every key as Markdown."""
    from tunetrail.config.documentation import KEYS_END, KEYS_START
    from tunetrail.config.documentation import document as build

    if write is None:
        print(build(), end="")
        return SOUND
    head, _, rest = write.read_text(encoding="utf-8").partition(KEYS_START)
    write.write_text(f"{head}{KEYS_START}\n{build()}{KEYS_END}{rest.partition(KEYS_END)[2]}", encoding="utf-8")
    return SOUND
