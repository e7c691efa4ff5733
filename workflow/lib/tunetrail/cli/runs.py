"""tunetrail status, plan, doctor, compare."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunetrail.cli.common import FINDING, SOUND, Json, print_json
from tunetrail.errors import ConfigError
from tunetrail.terminal import LINES, escape

if TYPE_CHECKING:
    from tunetrail.config.run import Config
    from tunetrail.monitor.dag import Job
    from tunetrail.provenance.versions import OtherVersion

Profile = Annotated[str, typer.Option(help="Snakemake's profile, by folder or name.")]
ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--configfile", help="As snakemake takes it (default: config/config.yaml).")
]
Snakefile = Annotated[Path | None, typer.Option(help="The workflow, where it lies in another folder.")]


def register(app: typer.Typer) -> None:
    for command in (status, plan, doctor, compare):
        app.command()(command)


def _run(profile: str, configfiles: list[Path], snakefile: Path | None) -> "tuple[Config | None, list[Job]]":
    """(validated config, stages) of the workflow. A bad config ends the command as it ends Snakemake."""
    from tunetrail.config.loading import read_yaml
    from tunetrail.monitor.dag import read_run

    for path in configfiles:
        try:
            read_yaml(path)
        except ConfigError as e:
            print(escape(e, LINES), file=sys.stderr)
            raise typer.Exit(e.exit_code) from None
    return read_run(profile, configfiles, snakefile)


def _other_versions(jobs: "list[Job]") -> "list[OtherVersion]":
    """The artifacts that another version of tunetrail made."""
    from tunetrail.provenance.versions import other_versions, records_of

    return other_versions(records_of({job.name: job.manifest.parent for job in jobs if job.manifest.exists()}))


def status(
    profile: Profile = "profiles/local",
    configfile: ConfigFiles = None,
    snakefile: Snakefile = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run on a live screen.")] = False,
) -> int:
    """Show where each stage of the run stands: done, stale, running, interrupted, failed or waiting."""
    from tunetrail.monitor import status as monitor

    files = configfile or []
    rerun, jobs = monitor.rerun_command(profile, files, snakefile), _run(profile, files, snakefile)[1]
    if watch:
        from tunetrail.monitor.watch import follow

        follow(jobs, rerun)
        return SOUND
    from tunetrail.provenance import memory, versions
    from tunetrail.provenance.versions import records_of

    statuses, other_versions = monitor.statuses(jobs, rerun), _other_versions(jobs)
    if as_json:
        by_name = {other["artifact"]: other for other in versions.as_json(other_versions)}
        print_json([s | {"other_version": by_name.get(s["name"])} for s in monitor.as_json(statuses)])
    else:
        monitor.print_status(statuses, rerun)
        made = records_of({job.name: job.manifest.parent for job in jobs if job.manifest.exists()})
        print("".join(f"\n{escape(line)}\n" for line in memory.as_lines(made)), end="")
        if other_versions:
            print("\n".join(map(escape, ["", *versions.as_lines(other_versions)])))
    return SOUND


def plan(
    profile: Profile = "profiles/local",
    configfile: ConfigFiles = None,
    snakefile: Snakefile = None,
    as_json: Json = False,
    memory: Annotated[bool, typer.Option("--memory", help="Show what each stage needs of its device instead.")] = False,
    model_config: Annotated[
        Path | None, typer.Option(help="With --memory: config.json of the base model, where the model is not here.")
    ] = None,
) -> int:
    """Show what would run and why, the past cost of what would be made again, and how the data is used.

    With --memory: the GB per device of each stage, where it fits, and what to change if it does not, with exit code 1.
    """
    if memory:
        return _memory(profile, configfile or [], snakefile, as_json, model_config)
    from tunetrail.monitor import plan as monitor
    from tunetrail.monitor.forecast import Forecast, forecast
    from tunetrail.provenance import versions

    config, jobs = _run(profile, configfile or [], snakefile)
    steps = monitor.plan(jobs)
    data = next((job for job in jobs if job.name == "data"), None)
    known = Forecast([], [])
    if config and data:  # there is none if the workflow has several runs as modules
        known = forecast(config, data.manifest.parent, data.manifest.exists() and not data.needed)
    other_versions = _other_versions(jobs)
    if as_json:
        print_json(monitor.as_json(steps) | {"notes": known.notes, "other_versions": versions.as_json(other_versions)})
    else:
        notes = [*(f"Note: {note}" for note in known.notes), *versions.as_lines(other_versions)]
        print(escape("\n".join([monitor.as_text(steps), "", *known.table, *map(escape, notes)]), LINES))
    return SOUND


def _memory(
    profile: str, configfiles: list[Path], snakefile: Path | None, as_json: bool, model_config: Path | None
) -> int:
    from tunetrail.monitor import memory as monitor

    config, jobs = _run(profile, configfiles, snakefile)
    if config is None:
        raise ConfigError("plan --memory: this workflow has several runs as modules; give the config of one of them")
    found = monitor.needs(config, jobs, model_config)
    if as_json:
        print_json(monitor.as_json(found))
    else:
        print(monitor.as_text(found))
    return SOUND if all(n.fits for n in found) else FINDING


def doctor(
    profile: Profile = "profiles/slurm",
    configfile: ConfigFiles = None,
    snakefile: Snakefile = None,
    as_json: Json = False,
    jobs: Annotated[bool, typer.Option(help="Also run a small job in each partition.")] = True,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long such a job may take to begin.")] = 120,
) -> int:
    """Check whether this site's Slurm can run what the profile requests: 0 yes, 1 findings, 2 could not check
    everything."""
    from tunetrail.monitor import doctor as monitor

    report = (lambda check: None) if as_json else (lambda check: print(escape(check, LINES), flush=True))
    checks = monitor.diagnose(_run(profile, configfile or [], snakefile)[1], jobs, wait, report)
    if as_json:
        print_json([vars(check) for check in checks])
    return monitor.exit_code(checks)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders such as results/demo.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    samples: Annotated[int, typer.Option(help="Prompts shown side by side.")] = 20,
) -> int:
    """Write one report page for several runs, with their differences."""
    from tunetrail.provenance.manifest import DigestCache
    from tunetrail.reporting.collect import collect, inputs_of, together
    from tunetrail.reporting.figures import FIGURES
    from tunetrail.reporting.page import draw, render

    names = [run.resolve().name for run in runs]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"compare {' '.join(map(str, runs))}: name two or more runs whose folders have different names"
        )
    page, cache = output.parent, DigestCache(Path(os.environ.get("TUNETRAIL_DIGESTS", "state/.digests")))
    collected = together([collect(name, inputs_of(run), page, cache) for name, run in zip(names, runs, strict=True)])
    output.write_text(render(collected, draw(collected, FIGURES), None, samples), encoding="utf-8")
    print(escape(output))
    return SOUND
