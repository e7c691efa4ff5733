"""The command line: `tunetrail --help`.

    runs     status, plan, doctor, compare
    config   check, resolve, schema, document
    label    serve, add, list, renew, forget, verify, export, import, backup
    audit    verify, trace, diff, show, seal, reproduce, export, card
    model    export, push, chat

Exit codes: 0 sound; 1 a finding; 2 incomplete, or wrong usage; 3 only warnings, which a policy may forbid. A bad config
ends config, status, plan, doctor and model with 78, bad data with 65. status and plan end with 0 whatever they report;
`plan --memory` ends with 1 if a stage does not fit.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer._click.exceptions import ClickException

import tunetrail
from tunetrail.cli import audit, config, label, model, runs
from tunetrail.cli.common import INCOMPLETE, SOUND
from tunetrail.errors import TunetrailError
from tunetrail.terminal import escape

app = typer.Typer(
    name="tunetrail",
    help="Post-training of language models as one auditable DAG.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
runs.register(app)
app.add_typer(config.app, name="config", help="Check, resolve and document config files.")
app.add_typer(label.app, name="label", help="People rank outputs and write answers, on a page of their own.")
app.add_typer(audit.app, name="audit", help="Where a checkpoint came from, and whether it is still what it was.")
app.add_typer(model.app, name="model", help="Take a model of a run away, to a hub, or talk with it.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tunetrail {tunetrail.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    try:
        code = app(args=None if argv is None else list(argv), prog_name="tunetrail", standalone_mode=False)
        return code if isinstance(code, int) else SOUND
    except ClickException as e:  # wrong usage
        e.show()
        return INCOMPLETE
    except TunetrailError as e:
        for line in str(e).split("\n"):
            print(f"tunetrail: error: {escape(line)}", file=sys.stderr)
        return INCOMPLETE
    except FileNotFoundError as e:
        print(f"tunetrail: error: {escape(e.filename)}: no such file", file=sys.stderr)
        return INCOMPLETE
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return SOUND
