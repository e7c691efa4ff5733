"""tunetrail label: the page on which people rank outputs and write answers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tunetrail.cli.common import FINDING, SOUND, Output, write
from tunetrail.errors import ConfigError
from tunetrail.terminal import escape

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
StoreName = Annotated[str, typer.Option("--store", help="Where labels are kept: a file, or postgresql://…")]
Pseudonym = Annotated[str, typer.Argument(help="Such as human-1.", show_default=False)]
STORE = "state/labels.db"
SETTINGS = "How tasks are handed out (with --tasks)"


def _open(store: str, create: bool = False) -> Any:
    from tunetrail.labeling.app.store import Store

    return Store(store, create=create)


def _setting(text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=SETTINGS, show_default=False, **options)


@app.command()
def serve(
    store: StoreName = STORE,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    prefix: Annotated[str, typer.Option(help="Path under which a proxy serves the page, such as /labels.")] = "",
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESSES",
            help="Of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed; without it nobody's are.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name under which a proxy serves the page; may be repeated.", show_default=False),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="JSONL to publish first; without it, serve what is published.")
    ] = None,
    overlap: Annotated[int | None, _setting("Labelers per task (default: 1).")] = None,
    per_labeler: Annotated[int | None, _setting("The most answers of one labeler.")] = None,
    lease_minutes: Annotated[
        float | None, _setting("How long an untouched task stays with its labeler (default: 30).")
    ] = None,
    skips: Annotated[int | None, _setting("Skips after which a task goes to nobody else (default: 2).")] = None,
    training: Annotated[int | None, _setting("Gold tasks that come first, with feedback (default: 0).")] = None,
    gold_every: Annotated[
        int | None, _setting("One gold task comes among every n others; 0: none (default: 10).")
    ] = None,
    repeat_every: Annotated[
        int | None, _setting("One earlier task is repeated among every n others; 0: none (default: 20).")
    ] = None,
    ratings: Annotated[
        bool | None, _setting("Also ask for ratings from 1 to 7 (default: yes).", "--ratings/--no-ratings")
    ] = None,
    guidelines: Annotated[Path | None, _setting("Markdown file for labelers.")] = None,
) -> int:
    """Serve the page, to this machine only unless --host says otherwise."""
    from tunetrail.labeling.app.serve import serve as run
    from tunetrail.labeling.app.store import RUN
    from tunetrail.labeling.tasks import read_tasks

    settings: dict[str, Any] = {
        "overlap": overlap, "per_labeler": per_labeler, "lease_minutes": lease_minutes, "skips": skips,
        "training": training, "gold_every": gold_every, "repeat_every": repeat_every, "ratings": ratings,
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    if guidelines:
        settings["guidelines"] = _read_guidelines(guidelines)
    if settings and not tasks:
        raise ConfigError(f"--{min(settings).replace('_', '-')}: settings are published with tasks; add --tasks FILE")
    labels = _open(store, create=True)
    if fault := labels.fault():
        raise ConfigError(f"{labels.database.shown}: {fault}; restore it from a copy")
    if tasks:
        if of_run := labels.noted(RUN):
            raise ConfigError(f"--tasks: {store} holds the tasks of the run {of_run}; name another --store")
        labels.publish(read_tasks(tasks), settings)
    return run(labels, host, port, prefix, proxy, _quality, name or ())


def _read_guidelines(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--guidelines {path}: not UTF-8") from None


def _quality(labels: Any) -> dict[str, Any]:
    from tunetrail.reporting.label_quality import page_values  # the drawing libraries take seconds to import

    return page_values(labels)


def _link(store: Any, token: str) -> str:
    return f"{store.noted('address') or 'http://127.0.0.1:8000'}/enter#{token}"


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Kept apart from the pseudonym, and can be deleted.")],
    store: StoreName = STORE,
    admin: Annotated[bool, typer.Option("--admin", help="May see the quality page.")] = False,
) -> int:
    """Add a labeler; print the pseudonym and the link with which they enter."""
    from tunetrail.labeling.app.access import add_labeler

    labels = _open(store, create=True)
    pseudonym, token = add_labeler(labels, name, admin)
    print(escape(f"{pseudonym}: {_link(labels, token)}"))
    return SOUND


@app.command("list")
def list_labelers(store: StoreName = STORE) -> int:
    """Show who labels."""
    from tunetrail.labeling.app.access import roster

    for one in roster(_open(store)):
        state = "" if one["active"] else "  may not enter"
        name = one["name"] or "(name deleted)"
        print(escape(f"{one['pseudonym']:10} {one['role']:8} {one['events']:6} events  {name}{state}"))
    return SOUND


@app.command()
def renew(pseudonym: Pseudonym, store: StoreName = STORE) -> int:
    """Give a labeler a new link; the old one stops working."""
    from tunetrail.labeling.app.access import renew_token

    labels = _open(store)
    print(escape(f"{pseudonym}: {_link(labels, renew_token(labels, pseudonym))}"))
    return SOUND


@app.command()
def forget(pseudonym: Pseudonym, store: StoreName = STORE) -> int:
    """Delete a labeler's name and link; their answers stay, under the pseudonym."""
    from tunetrail.labeling.app import access

    access.forget(_open(store), pseudonym)
    print(escape(f"{pseudonym}: name and link deleted"))
    return SOUND


@app.command()
def verify(store: StoreName = STORE) -> int:
    """Check that the chain of events is intact; print its head."""
    labels = _open(store)
    fault = labels.fault()
    print(escape(f"{labels.database.shown}: {fault or 'the chain is whole'}, head {labels.head()}"))
    return FINDING if fault else SOUND


@app.command()
def backup(
    output: Annotated[Path, typer.Argument(help="A file that is not there yet.", show_default=False)],
    store: StoreName = STORE,
) -> int:
    """Copy the whole store into one file, also while the page is served; print the head of its chain.

    The copy holds names and everybody's digests of tokens: keep it as you keep the store.
    """
    head = _open(store).backup(output)
    print(f"{output}: head {head}")
    return SOUND


class ImportFormat(StrEnum):
    jsonl = "jsonl"
    trl = "trl"


class ExportFormat(StrEnum):
    jsonl = "jsonl"
    trl = "trl"
    demonstrations = "demonstrations"


@app.command("export")
def export_labels(
    format: Annotated[ExportFormat, typer.Option(show_default=False)], store: StoreName = STORE, output: Output = None
) -> int:
    """Write the rankings that count, or the demonstrations, for other tools."""
    from tunetrail.labeling import exchange

    labels = _open(store)
    tasks, answers = labels.tasks(), labels.labels()
    if format == ExportFormat.demonstrations:
        return write(exchange.written(exchange.demonstrations(tasks, answers)), output)
    rows = exchange.EXPORT[format.value](exchange.items_of(tasks, answers))
    return write(exchange.written(rows), output)


@app.command("import")
def import_labels(
    path: Path,
    format: Annotated[ImportFormat, typer.Option(show_default=False)],
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Write tasks for `label serve --tasks` instead, to be ranked here.")
    ] = False,
    output: Output = None,
) -> int:
    """Turn rankings of other tools into JSONL that data.preferences and the labeler `recorded` read."""
    from tunetrail.labeling import exchange

    items = exchange.read(path, format.value)
    return write(exchange.written(exchange.as_tasks(items) if tasks else exchange.to_jsonl(items)), output)
