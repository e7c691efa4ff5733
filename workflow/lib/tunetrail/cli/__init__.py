"""The command line.

    tunetrail status                  where does the run stand: done, stale, running, failed, waiting; --watch: live
    tunetrail plan                    what would run, and what would be made again that took long
    tunetrail doctor                  can this site's Slurm run it?
    tunetrail compare RUN RUN…        one page across runs
    tunetrail label serve             the page on which people rank outputs and write answers
    tunetrail label add NAME          a labeler: a pseudonym and the link with which they enter; list, renew, forget
    tunetrail label verify            is the chain of events whole?
    tunetrail label export --format F the answers as jsonl, trl or demonstrations; import FILE
    tunetrail audit verify PATH…      is it still what it was?
    tunetrail audit trace PATH        what was it made from? --reverse: what was made from this?
    tunetrail audit diff A B          what differs?
    tunetrail audit show PATH         what does its record say?
    tunetrail audit seal RUN          append what is new to the run's ledger, sign it
    tunetrail audit reproduce PATH    run its stage again and compare
    tunetrail audit export PATH --format slsa|ro-crate|prov|spdx|model-card
    tunetrail audit card PATH         the model card

Exit codes: 0 sound; 1 a finding; 2 incomplete, or wrong usage; 3 only what a policy may forbid. status and plan end
with 0, whatever they have to tell, unless they cannot.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunetrail.errors import ConfigError, TunetrailError
from tunetrail.provenance.manifest import DigestCache

SOUND, FINDING, INCOMPLETE, WARNING = 0, 1, 2, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tunetrail", description="Post-training as one auditable DAG.")
    areas = parser.add_subparsers(required=True, metavar="AREA")

    def area(name: str, function: Any, about: str, profile: str) -> argparse.ArgumentParser:
        found = areas.add_parser(name, help=about, description=about)
        found.add_argument(
            "--profile", default=profile, help="Snakemake's profile, by folder or name (default: %(default)s)"
        )
        found.add_argument(
            "--configfile",
            type=Path,
            action="append",
            default=[],
            help="as snakemake gets it (default: config/config.yaml)",
        )
        found.add_argument("--json", action="store_true", help="for machines")
        found.set_defaults(function=function)
        return found

    status = area(
        "status",
        _status,
        "where each stage of the run stands: done, stale, running, failed or waiting",
        "profiles/local",
    )
    status.add_argument("--watch", action="store_true", help="a screen that follows the run: progress, rates, curves")
    area("plan", _plan, "what would run and why, and what it took to make what would be made again", "profiles/local")
    doctor = area(
        "doctor",
        _doctor,
        "whether this site's Slurm can run what the profile asks for; 0: all well, 1: findings, 2: could not look",
        "profiles/slurm",
    )
    doctor.add_argument(
        "--jobs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run a small job in each partition (default: yes)",
    )
    doctor.add_argument(
        "--wait", type=float, default=120, metavar="SECONDS", help="for such a job to begin (default: %(default)s)"
    )

    compare = areas.add_parser("compare", help="the report's page across runs, and what they differ in")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders such as results/demo")
    compare.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    compare.add_argument("--samples", type=int, default=20, help="prompts shown side by side (default: %(default)s)")
    compare.set_defaults(function=_compare)

    _label_commands(areas.add_parser("label", help="people rank outputs and write answers, on a page of their own"))

    audit = areas.add_parser("audit", help="where a checkpoint came from, and whether it is still what it was")
    commands = audit.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        found.add_argument("--json", action="store_true", help="for machines")
        found.set_defaults(function=function)
        return found

    verify = command("verify", _verify, "compare files, records and ledger; say what does not hold")
    verify.add_argument("path", type=Path, nargs="+", help="artifact folders, or whole runs")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument("--deep", action="store_true", help="read every byte (the default)")
    depth.add_argument(
        "--quick", action="store_true", help="trust digests of files that have not changed since by size and times"
    )
    verify.add_argument(
        "--recursive", action="store_true", help="also everything they were made from, down to the raw data"
    )
    verify.add_argument("--strict", action="store_true", help="warnings are findings")
    verify.add_argument("--policy", type=Path, help="YAML: whose signatures count and what is required")
    verify.add_argument("--anchor", help="a ledger's head kept elsewhere: the 64 digits, or a file that holds them")

    trace = command("trace", _trace, "the tree of what an artifact was made from, or of what was made from something")
    trace.add_argument(
        "path",
        help="an artifact; with --reverse: dataset:NAME, group:NAME, labeler:NAME, package:NAME[==VERSION] or an artifact",
    )
    trace.add_argument(
        "--reverse", action="store_true", help="every artifact that came from it; checkpoints must be trained again"
    )
    trace.add_argument(
        "--in",
        dest="runs",
        type=Path,
        nargs="+",
        default=[Path("results")],
        help="runs to search, with --reverse (default: results)",
    )
    trace.add_argument("--svg", type=Path, help="also draw it")

    diff = command("diff", _diff, "what differs between two artifacts and what they were made from")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)

    show = command("show", _show, "what a record says")
    show.add_argument("path", type=Path)

    seal = command("seal", _seal, "append what is new to the run's ledger and print its head")
    seal.add_argument("run", type=Path)
    seal.add_argument("--key", type=Path, help="PEM file of an ed25519 private key: signs every record of the run")
    seal.add_argument("--anchor", type=Path, help="file outside the run that gets the head")

    reproduce = command("reproduce", _reproduce, "run a stage again from its record and say how alike the result is")
    reproduce.add_argument("path", type=Path)
    reproduce.add_argument("--scratch", type=Path, help="folder for it (default: state/reproduce/NAME)")
    reproduce.add_argument("--tolerance", type=float, default=1e-3, help="relative, of tensors and metrics")

    export = command("export", _export, "an artifact's lineage in another format")
    export.add_argument("path", type=Path)
    export.add_argument("--format", required=True, choices=("slsa", "ro-crate", "prov", "spdx", "model-card"))
    export.add_argument("--output", type=Path, help="file (default: standard output)")

    card = command("card", _card, "the model card, as Hugging Face reads it")
    card.add_argument("path", type=Path)
    card.add_argument("--output", type=Path, help="file (default: standard output)")
    return parser


def _label_commands(label: argparse.ArgumentParser) -> None:
    commands = label.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about, description=about)
        found.add_argument(
            "--store",
            default="state/labels.db",
            help="where labels are kept: a file, or postgresql://… (default: %(default)s)",
        )
        found.set_defaults(function=function)
        return found

    serve = command("serve", _label_serve, "serve the page, to this machine only unless --host says otherwise")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="(default: %(default)s; 0: any that is free)")
    serve.add_argument("--prefix", default="", help="path under which a proxy serves it, such as /labels")
    serve.add_argument(
        "--proxy",
        metavar="ADDRESSES",
        help="of proxies that say in X-Forwarded-For and -Proto who asks and whether by https; without it nobody is believed",
    )
    serve.add_argument("--tasks", type=Path, help="JSONL to publish first; without it, what is published is served")
    settings = serve.add_argument_group("how tasks are handed out (with --tasks)")
    settings.add_argument("--overlap", type=int, help="labelers a task (default: 1)")
    settings.add_argument("--per-labeler", type=int, help="the most answers of one labeler")
    settings.add_argument(
        "--lease-minutes", type=float, help="how long an untouched task stays with its labeler (default: 30)"
    )
    settings.add_argument("--skips", type=int, help="a task that so many skipped goes to nobody else (default: 2)")
    settings.add_argument("--training", type=int, help="so many gold tasks come first, with feedback (default: 0)")
    settings.add_argument(
        "--gold-every", type=int, help="a gold task comes after so many others; 0: none (default: 10)"
    )
    settings.add_argument(
        "--repeat-every", type=int, help="a task comes again after so many others; 0: none (default: 20)"
    )
    settings.add_argument(
        "--ratings", action=argparse.BooleanOptionalAction, help="ask for ratings from 1 to 7 too (default: yes)"
    )
    settings.add_argument("--seed", type=int, help="of the order in which outputs are shown (default: 0)")
    settings.add_argument("--guidelines", type=Path, help="markdown file for labelers")

    add = command("add", _label_add, "add a labeler; prints the pseudonym and the link with which they enter")
    add.add_argument("name", help="kept apart from the pseudonym, and can be deleted")
    add.add_argument("--admin", action="store_true", help="may see the quality page")
    command("list", _label_list, "who labels")
    for name, function, about in (
        ("renew", _label_renew, "give a labeler another link; the old one ends"),
        ("forget", _label_forget, "delete a labeler's name and link; their answers stay, under the pseudonym"),
    ):
        command(name, function, about).add_argument("pseudonym")
    command("verify", _label_verify, "whether the chain of events is whole; prints its head")
    export = command("export", _label_export, "the rankings that count, or the demonstrations, for other tools")
    formats = ("jsonl", "trl")
    export.add_argument("--format", required=True, choices=(*formats, "demonstrations"))
    imported = commands.add_parser(
        "import", help="rankings of other tools as JSONL that data.preferences and the labeler `recorded` read"
    )
    imported.add_argument("path", type=Path)
    imported.add_argument("--format", required=True, choices=formats)
    imported.add_argument(
        "--tasks", action="store_true", help="write tasks for `label serve --tasks` instead, to be ranked here"
    )
    imported.set_defaults(function=_label_import)
    for one in (export, imported):
        one.add_argument("--output", type=Path, help="file (default: standard output)")
        one.set_defaults(json=False)


def _folder(path: Path) -> Path:
    """An artifact may be named by its folder or its manifest."""
    return path.parent if path.is_file() else path


def _print(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _status(args: argparse.Namespace) -> int:
    from tunetrail.monitor import status
    from tunetrail.monitor.dag import read_dag

    rerun, jobs = status.rerun_command(args.profile, args.configfile), read_dag(args.profile, args.configfile)
    if args.watch:
        from tunetrail.monitor.watch import follow

        follow(jobs, rerun)
        return SOUND
    found = status.standings(jobs, rerun)
    if args.json:
        _print(status.as_json(found))
    else:
        status.print_status(found, rerun)
    return SOUND


def _plan(args: argparse.Namespace) -> int:
    from tunetrail.monitor import plan
    from tunetrail.monitor.dag import read_dag

    steps = plan.plan(read_dag(args.profile, args.configfile))
    if args.json:
        _print(plan.as_json(steps))
    else:
        print(plan.as_text(steps))
    return SOUND


def _doctor(args: argparse.Namespace) -> int:
    from tunetrail.monitor import doctor
    from tunetrail.monitor.dag import read_dag

    tell = (lambda check: None) if args.json else (lambda check: print(check, flush=True))
    found = doctor.diagnose(read_dag(args.profile, args.configfile), args.jobs, args.wait, tell)
    if args.json:
        _print([vars(check) for check in found])
    return doctor.exit_code(found)


def _compare(args: argparse.Namespace) -> int:
    from tunetrail.reporting.collect import collect, inputs_of, together
    from tunetrail.reporting.figures import FIGURES
    from tunetrail.reporting.page import draw, render

    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"compare {' '.join(map(str, args.runs))}: name two or more runs whose folders have different names"
        )
    page, cache = args.output.parent, DigestCache(Path(os.environ.get("TUNETRAIL_DIGESTS", "state/.digests")))
    runs = together([collect(name, inputs_of(run), page, cache) for name, run in zip(names, args.runs, strict=True)])
    args.output.write_text(render(runs, draw(runs, FIGURES), None, args.samples), encoding="utf-8")
    print(args.output)
    return SOUND


def _label_serve(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.serve import serve
    from tunetrail.labeling.app.store import RUN, Settings, Store
    from tunetrail.labeling.tasks import read_tasks

    given = {name: value for name in Settings.names() if (value := getattr(args, name)) is not None}
    if args.guidelines:
        try:
            given["guidelines"] = args.guidelines.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"--guidelines {args.guidelines}: not UTF-8") from None
    if given and not args.tasks:
        raise ConfigError(f"--{min(given).replace('_', '-')}: settings are published with tasks; add --tasks FILE")
    store = Store(args.store)
    if fault := store.fault():
        raise ConfigError(f"{store.database.shown}: {fault}; restore it from a copy")
    if args.tasks:
        if run := store.noted(RUN):
            raise ConfigError(f"--tasks: {args.store} holds the tasks of the run {run}; name another --store")
        store.publish(read_tasks(args.tasks), given)
    return serve(store, args.host, args.port, args.prefix, args.proxy)


def _label_link(store: Any, token: str) -> str:
    return f"{store.noted('address') or 'http://127.0.0.1:8000'}/enter#{token}"


def _label_add(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.access import add_labeler
    from tunetrail.labeling.app.store import Store

    store = Store(args.store)
    pseudonym, token = add_labeler(store, args.name, args.admin)
    print(f"{pseudonym}: {_label_link(store, token)}")
    return SOUND


def _label_list(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.access import roster
    from tunetrail.labeling.app.store import Store

    for one in roster(Store(args.store, create=False)):
        state = "" if one["active"] else "  may not enter"
        print(
            f"{one['pseudonym']:10} {one['role']:8} {one['events']:6} events  {one['name'] or '(name deleted)'}{state}"
        )
    return SOUND


def _label_renew(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.access import renew_token
    from tunetrail.labeling.app.store import Store

    store = Store(args.store, create=False)
    print(f"{args.pseudonym}: {_label_link(store, renew_token(store, args.pseudonym))}")
    return SOUND


def _label_forget(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.access import forget
    from tunetrail.labeling.app.store import Store

    forget(Store(args.store, create=False), args.pseudonym)
    print(f"{args.pseudonym}: name and link deleted")
    return SOUND


def _label_verify(args: argparse.Namespace) -> int:
    from tunetrail.labeling.app.store import Store

    store = Store(args.store, create=False)
    fault = store.fault()
    print(f"{store.database.shown}: {fault or 'the chain is whole'}, head {store.head()}")
    return FINDING if fault else SOUND


def _label_export(args: argparse.Namespace) -> int:
    from tunetrail.labeling import exchange
    from tunetrail.labeling.app.store import Store

    store = Store(args.store, create=False)
    tasks, labels = store.tasks(), store.labels()
    if args.format == "demonstrations":
        return _written(exchange.written(exchange.demonstrations(tasks, labels)), args)
    rows = exchange.EXPORT[args.format](exchange.items_of(tasks, labels))
    return _written(exchange.written(rows), args)


def _label_import(args: argparse.Namespace) -> int:
    from tunetrail.labeling import exchange

    items = exchange.read(args.path, args.format)
    rows = exchange.as_tasks(items) if args.tasks else exchange.to_jsonl(items)
    return _written(exchange.written(rows), args)


def _verify(args: argparse.Namespace) -> int:
    from tunetrail.provenance.signing import read_policy
    from tunetrail.provenance.verify import Verifier

    anchor = args.anchor
    if anchor is not None and Path(anchor).is_file():
        anchor = (Path(anchor).read_text().split() or [""])[0]
    if anchor is not None and not re.fullmatch(r"[0-9a-f]{64}", anchor):
        raise ConfigError(f"--anchor {args.anchor}: neither a head (64 digits) nor a file that begins with one")
    cache = DigestCache(Path(os.environ.get("TUNETRAIL_DIGESTS", "state/.digests"))) if args.quick else None
    policy = read_policy(args.policy) if args.policy else None
    verdict = Verifier(cache=cache, recursive=args.recursive, policy=policy, anchor=anchor).run(args.path)
    code = verdict.exit_code(args.strict)
    if args.json:
        _print(verdict.as_json(args.strict))
        return code
    for finding in verdict.findings:
        print(finding)
    word = {SOUND: "SOUND", FINDING: "NOT SOUND", INCOMPLETE: "INCOMPLETE", WARNING: "SOUND, WITH WARNINGS"}[code]
    marks = [
        "UNSIGNED"
        if verdict.unsigned
        else "signed by " + ", ".join(sorted({n for ns in verdict.signed.values() for n in ns}))
    ]
    names = {finding.name for finding in verdict.findings}
    marks += [
        mark for name, mark in (("dirty-tree", "DIRTY"), ("mixed-environment", "MIXED ENVIRONMENT")) if name in names
    ]
    print(
        f"{word}: {len(verdict.artifacts)} artifacts, {verdict.bytes_read / 1e9:.2f} GB compared, {len(verdict.findings)} findings, {', '.join(marks)}"
    )
    if verdict.not_at_hand:
        print(f"not checked, since not where it was read: {', '.join(sorted(verdict.not_at_hand))}")
    for ledger, head in verdict.heads.items():
        print(f"head of {ledger}: {head}")
    return code


def _trace(args: argparse.Namespace) -> int:
    from tunetrail.provenance import lineage as lines
    from tunetrail.provenance import picture

    lineage = lines.Lineage()
    if not args.reverse:
        node = lineage.add(_folder(Path(args.path)))
        if args.json:
            _print(lines.table(node))
        else:
            picture.print_tree(node)
        if args.svg:
            args.svg.write_text(picture.svg(list(lineage.nodes.values())))
        missing = any(parent is None for n in lineage.nodes.values() for parent in n.parents.values())
        return INCOMPLETE if missing else SOUND
    for run in args.runs:
        lineage.add_run(run)
    found = lines.origins(lineage, args.path)
    touched = sorted({n.folder: n for n in [*found, *lineage.descendants(found)]}.values(), key=lambda n: n.folder)
    checkpoints = [n for n in touched if lines.is_checkpoint(n)]
    if args.json:
        _print({
            "origins": [str(n.folder) for n in found],
            "artifacts": [str(n.folder) for n in touched],
            "retrain": [str(n.folder) for n in checkpoints],
        })  # fmt: skip
    else:
        print(f"{args.path} is in {', '.join(n.name for n in found[:8])}{' …' if len(found) > 8 else ''}")
        print(
            f"{len(touched)} artifacts come from it. If it is withdrawn, {len(checkpoints)} checkpoints must be trained again:"
        )
        for n in checkpoints:
            print(f"  {os.path.relpath(n.folder)}")
    if args.svg:
        args.svg.write_text(picture.svg(touched))
    return SOUND


def _diff(args: argparse.Namespace) -> int:
    from tunetrail.provenance.diff import as_text, diff

    found = diff(_folder(args.a), _folder(args.b))
    if args.json:
        _print(found)
    else:
        print(as_text(found))
    return SOUND if found["equal"] else FINDING


def _show(args: argparse.Namespace) -> int:
    from tunetrail.provenance.manifest import identity
    from tunetrail.provenance.record import read_record

    folder = _folder(args.path)
    record = read_record(folder)
    if args.json:
        _print(record.statement)
        return SOUND
    code = record.code
    print(f"{folder}: made by the stage {record.stage}, part {record.part}")
    print(f"  manifest  {identity(folder)}")
    print(f"  record    {record.digest}")
    print(
        f"  from      {record.started} to {record.finished}, {len(record.attempts)} attempts, {record.usage.get('device_hours', 0):.4f} device-hours"
    )
    for role, parent in record.parents.items():
        print(f"  input     {role}: {parent['name']}, manifest {parent['manifest'][:16]}…")
    for role in ("base", "source", "labels"):
        for d in record.of_role(role):
            print(f"  {role:9} {d['name']}")
    print(f"  code      commit {code.get('commit')}{', DIRTY' if code.get('dirty') else ''}")
    for attempt in record.attempts:
        print(
            f"  attempt   {attempt['start']} on {attempt.get('host')}, job {attempt.get('job_id')}: {attempt.get('ended')}"
        )
    return SOUND


def _seal(args: argparse.Namespace) -> int:
    from tunetrail.provenance.ledger import artifacts, seal
    from tunetrail.provenance.manifest import PROVENANCE
    from tunetrail.provenance.signing import sign

    if not args.run.is_dir() or not (found := artifacts(args.run)):
        print(f"{args.run}: no run, there is no artifact in it", file=sys.stderr)
        return INCOMPLETE
    ledger = seal(args.run)
    if args.key:
        for folder in found:
            if (folder / PROVENANCE).exists():
                sign(folder, args.key)
    for name in ledger.refused:
        print(f"{name!r} was not sealed: its record is missing, or of another manifest", file=sys.stderr)
    if args.anchor:
        args.anchor.write_text(f"{ledger.head}  {args.run}\n")
    if args.json:
        _print(
            {
                "ledger": str(ledger.path),
                "lines": len(ledger.entries),
                "head": ledger.head,
                "signed": bool(args.key),
                "refused": ledger.refused,
            }
        )
        return FINDING if ledger.refused else SOUND
    print(f"{ledger.path}: {len(ledger.entries)} lines, head {ledger.head}")
    if not args.anchor:
        print(
            f"to prove later that it was not written anew, keep the head elsewhere: git tag -s -m {ledger.head} {args.run.name}-sealed"
        )
    return FINDING if ledger.refused else SOUND


def _reproduce(args: argparse.Namespace) -> int:
    from tunetrail.provenance.reproduce import TIERS, reproduce

    folder = _folder(args.path)
    result = reproduce(folder, args.scratch or Path("state/reproduce") / folder.resolve().name, args.tolerance)
    if args.json:
        _print({"tier": result.tier, "folder": str(result.folder), "details": result.details})
    else:
        print(f"{folder}: {result.tier}; the new one is in {result.folder}")
        for key, value in result.details.items():
            print(f"  {key}: {value}")
    return FINDING if result.tier == TIERS[-1] else SOUND


def _written(text: str, args: argparse.Namespace) -> int:
    if args.output:
        args.output.write_text(text)
    if args.json:
        _print({"output": str(args.output) if args.output else None, "content": None if args.output else text})
    elif not args.output:
        print(text, end="")
    return SOUND


def _export(args: argparse.Namespace) -> int:
    from tunetrail.provenance.export import FORMATS

    return _written(FORMATS[args.format](_folder(args.path)), args)


def _card(args: argparse.Namespace) -> int:
    from tunetrail.provenance.export import model_card

    return _written(model_card(_folder(args.path)), args)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.function(args)
    except TunetrailError as e:
        for line in str(e).split("\n"):
            print(f"tunetrail: error: {line}", file=sys.stderr)
        return INCOMPLETE
    except FileNotFoundError as e:
        print(f"tunetrail: error: {e.filename}: no such file", file=sys.stderr)
        return INCOMPLETE
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return SOUND


if __name__ == "__main__":
    sys.exit(main())
