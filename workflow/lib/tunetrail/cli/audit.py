"""tunetrail audit: where a checkpoint came from, and whether it has changed since."""

import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tunetrail.cli.common import FINDING, INCOMPLETE, SOUND, WARNING, Json, Output, print_json, write
from tunetrail.errors import ConfigError
from tunetrail.terminal import LINES, escape

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ArtifactPath = Annotated[Path, typer.Argument(help="An artifact's folder or manifest.", show_default=False)]
WORDS = {SOUND: "SOUND", FINDING: "NOT SOUND", INCOMPLETE: "INCOMPLETE", WARNING: "SOUND, WITH WARNINGS"}
MARKS = {"dirty-tree": "DIRTY", "mixed-environment": "MIXED ENVIRONMENT"}


def _folder(path: Path) -> Path:
    """An artifact may be named by its folder or its manifest."""
    return path.parent if path.is_file() else path


def _anchors(given: list[str]) -> list[str]:
    """The heads that --anchor gives, themselves or in files. Raises ConfigError."""
    heads = []
    for anchor in given:
        head = anchor
        if Path(head).is_file():
            head = (Path(head).read_text().split() or [""])[0]
        if not re.fullmatch(r"[0-9a-f]{64}", head):
            raise ConfigError(f"--anchor {anchor}: neither a head (64 digits) nor a file that begins with one")
        heads.append(head)
    return heads


@app.command()
def verify(
    path: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Artifact folders, or whole runs.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte (the default).")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Trust digests of files whose size and times have not changed since.")
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also check everything they were made from, down to the raw data.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are findings.")] = False,
    policy: Annotated[Path | None, typer.Option(help="YAML: whose signatures count and what is required.")] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option(help="A ledger's head kept elsewhere: the 64 digits, or a file with them. One for each run."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Compare files, records and ledger; report all differences."""
    from tunetrail.provenance.manifest import DigestCache
    from tunetrail.provenance.signing import read_policy
    from tunetrail.provenance.verify import Verifier

    if deep and quick:
        raise ConfigError("--deep, --quick: choose one")
    heads = _anchors(anchor or [])
    cache = DigestCache(Path(os.environ.get("TUNETRAIL_DIGESTS", "state/.digests"))) if quick else None
    trusted = read_policy(policy) if policy else None
    result = Verifier(cache=cache, recursive=recursive, policy=trusted, anchors=heads).run(path)
    code = result.exit_code(strict)
    if as_json:
        print_json(result.as_json(strict))
    else:
        _print_result(result, code)
    return code


def _print_result(result: Any, code: int) -> None:
    from tunetrail.provenance.versions import as_lines

    for finding in result.findings:
        print(finding)
    signers = sorted({name for names in result.signed.values() for name in names})
    kinds = {finding.name for finding in result.findings}
    marks = ["UNSIGNED" if result.unsigned else f"signed by {', '.join(signers)}"]
    marks += [mark for name, mark in MARKS.items() if name in kinds]
    print(
        f"{WORDS[code]}: {len(result.artifacts)} artifacts, {result.bytes_read / 1e9:.2f} GB compared, "
        f"{len(result.findings)} findings, {', '.join(marks)}"
    )
    if result.not_at_hand:
        print(f"not checked, since not where it was read: {', '.join(sorted(result.not_at_hand))}")
    for line in as_lines(result.other_versions):
        print(escape(line))
    for run, name in result.renamed.items():
        print(f"{run} was made as the run {name}")
    for ledger, head in result.heads.items():
        print(f"head of {ledger}: {head}")


@app.command()
def trace(
    path: Annotated[
        str,
        typer.Argument(
            help="An artifact; with --reverse also dataset:NAME, group:NAME, labeler:NAME or package:NAME[==VERSION].",
            show_default=False,
        ),
    ],
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Every artifact that came from it; checkpoints must be trained again.")
    ] = False,
    runs: Annotated[
        list[Path] | None, typer.Option("--in", help="Runs to search with --reverse (default: results).")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw it.")] = None,
    as_json: Json = False,
) -> int:
    """Show the tree of what an artifact was made from, or (--reverse) what was made from something."""
    if reverse:
        return _trace_reverse(path, runs or [Path("results")], svg, as_json)
    from tunetrail.provenance import lineage as lines
    from tunetrail.provenance import picture

    lineage = lines.Lineage()
    node = lineage.add(_folder(Path(path)))
    if as_json:
        print_json(lines.table(node))
    else:
        picture.print_tree(node)
    if svg:
        svg.write_text(picture.svg(list(lineage.nodes.values())))
    missing = any(parent is None for n in lineage.nodes.values() for parent in n.parents.values())
    return INCOMPLETE if missing else SOUND


def _trace_reverse(what: str, runs: list[Path], svg: Path | None, as_json: bool) -> int:
    from tunetrail.provenance import lineage as lines
    from tunetrail.provenance import picture

    lineage = lines.Lineage()
    for run in runs:
        lineage.add_run(run)
    origins = lines.artifacts_using(lineage, what)
    affected = {node.folder: node for node in [*origins, *lineage.descendants(origins)]}
    artifacts = sorted(affected.values(), key=lambda node: node.folder)
    checkpoints = [node for node in artifacts if lines.is_checkpoint(node)]
    if as_json:
        print_json(
            {
                "origins": [str(node.folder) for node in origins],
                "artifacts": [str(node.folder) for node in artifacts],
                "retrain": [str(node.folder) for node in checkpoints],
            }
        )
    else:
        names = ", ".join(node.name for node in origins[:8])
        print(escape(f"{what} is in {names}{' …' if len(origins) > 8 else ''}"))
        print(
            f"{len(artifacts)} artifacts come from it. If it is withdrawn, "
            f"{len(checkpoints)} checkpoints must be trained again:"
        )
        for node in checkpoints:
            print(f"  {escape(os.path.relpath(node.folder))}")
    if svg:
        svg.write_text(picture.svg(artifacts))
    return SOUND


@app.command()
def diff(a: Path, b: Path, as_json: Json = False) -> int:
    """Show what differs between two artifacts and what they were made from."""
    from tunetrail.provenance.diff import as_text
    from tunetrail.provenance.diff import diff as compare

    differences = compare(_folder(a), _folder(b))
    if as_json:
        print_json(differences)
    else:
        print(escape(as_text(differences), LINES))
    return SOUND if differences["equal"] else FINDING


@app.command()
def show(path: ArtifactPath, as_json: Json = False) -> int:
    """Show what a record says."""
    from tunetrail.provenance.manifest import identity
    from tunetrail.provenance.record import read_record

    folder = _folder(path)
    record = read_record(folder)
    if as_json:
        print_json(record.statement)
        return SOUND
    code, hours = record.code, record.usage.get("device_hours", 0)
    lines = [
        f"{folder}: made by the stage {record.stage}, part {record.part}",
        f"  manifest  {identity(folder)}",
        f"  record    {record.digest}",
        f"  from      {record.started} to {record.finished}, {len(record.attempts)} attempts, {hours:.4f} device-hours",
    ]
    lines += [f"  made as   {record.place.artifact} of the run {record.place.run}"] if record.place else []
    for role, parent in record.parents.items():
        lines.append(f"  input     {role}: {parent['name']}, manifest {parent['manifest'][:16]}…")
    for role in ("base", "source", "labels"):
        lines += [f"  {role:9} {dependency['name']}" for dependency in record.of_role(role)]
    lines.append(f"  code      commit {code.get('commit')}{', DIRTY' if code.get('dirty') else ''}")
    for attempt in record.attempts:
        where = f"{attempt['start']} on {attempt.get('host')}, job {attempt.get('job_id')}"
        lines.append(f"  attempt   {where}: {_ended(attempt.get('ended', 'running'))}")
    print("\n".join(map(escape, lines)))
    return SOUND


def _ended(how: Any) -> str:
    """How an attempt ended; early records have text."""
    return how if isinstance(how, str) else f"{how['outcome']}{': ' + how['message'] if how['message'] else ''}"


@app.command()
def seal(
    run: Annotated[Path, typer.Argument(help="A folder such as results/demo.", show_default=False)],
    key: Annotated[
        Path | None, typer.Option(help="PEM file of an ed25519 private key: signs every record of the run.")
    ] = None,
    anchor: Annotated[Path | None, typer.Option(help="File outside the run that gets the head.")] = None,
    as_json: Json = False,
) -> int:
    """Append what is new to the run's ledger and print its head."""
    from tunetrail.provenance import ledger as ledgers
    from tunetrail.provenance.run_folder import artifacts as artifacts_of
    from tunetrail.provenance.signing import sign

    if not run.is_dir() or not (artifacts := artifacts_of(run)):
        print(f"{escape(run)}: no run, there is no artifact in it", file=sys.stderr)
        return INCOMPLETE
    ledger = ledgers.seal(run)
    if key:
        for folder in artifacts:
            if folder.relative_to(run).as_posix() not in ledger.refused:
                sign(folder, key)
    for name, why in ledger.refused.items():
        print(f"{escape(name)} was not sealed: {escape(why)}", file=sys.stderr)
    if ledger.torn:
        said = f"{ledger.path}: its last line was cut off after {ledger.torn} bytes and is removed"
        print(escape(said), file=sys.stderr)
    if anchor:
        anchor.write_text(f"{ledger.head}  {run}\n")
    if as_json:
        print_json(
            {
                "ledger": str(ledger.path),
                "lines": len(ledger.entries),
                "head": ledger.head,
                "signed": bool(key),
                "refused": list(ledger.refused),
                "torn": ledger.torn,
            }
        )
    else:
        print(f"{escape(ledger.path)}: {len(ledger.entries)} lines, head {ledger.head}")
        if not anchor:
            print(
                "to prove later that it was not rewritten, keep the head elsewhere: "
                f"git tag -s -m {ledger.head} {escape(run.name)}-sealed"
            )
    return FINDING if ledger.refused else SOUND


@app.command()
def reproduce(
    path: ArtifactPath,
    scratch: Annotated[Path | None, typer.Option(help="Folder to work in (default: state/reproduce/NAME).")] = None,
    tolerance: Annotated[float, typer.Option(help="Relative, of tensors and metrics.")] = 1e-3,
    as_json: Json = False,
) -> int:
    """Run a stage again from its record and say how similar the result is."""
    from tunetrail.provenance.reproduce import TIERS
    from tunetrail.provenance.reproduce import reproduce as rerun

    folder = _folder(path)
    result = rerun(folder, scratch or Path("state/reproduce") / folder.resolve().name, tolerance)
    if as_json:
        print_json({"tier": result.tier, "folder": str(result.folder), "details": result.details})
    else:
        print(escape(f"{folder}: {result.tier}; the new one is in {result.folder}"))
        for key, value in result.details.items():
            print(escape(f"  {key}: {value}"))
    return FINDING if result.tier == TIERS[-1] else SOUND


class Format(StrEnum):
    slsa = "slsa"
    ro_crate = "ro-crate"
    prov = "prov"
    spdx = "spdx"
    model_card = "model-card"


@app.command()
def export(
    path: ArtifactPath,
    format: Annotated[Format, typer.Option(show_default=False)],
    output: Output = None,
    as_json: Json = False,
) -> int:
    """Write an artifact's lineage in another format."""
    from tunetrail.provenance import exports

    return write(exports.export(_folder(path), format.value), output, as_json)


@app.command()
def card(path: ArtifactPath, output: Output = None, as_json: Json = False) -> int:
    """Write the model card, as Hugging Face reads it."""
    from tunetrail.provenance import exports

    return write(exports.export(_folder(path), "model-card"), output, as_json)
