"""Every private call into Snakemake, in one place.

Snakemake's public API runs a workflow but does not say what its jobs are, which of them have started, or under which id
the cluster runs them; `--summary` and the executor plugins use the same calls as these. They were written against the
version in envs/requirements.txt: a test fails when the lock changes, and then each call must be reviewed.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from tunetrail.config.run import Config
from tunetrail.errors import ConfigError, Interrupted, Superseded, TunetrailError

VERSION = "9.27.1"
"""The version of Snakemake that this was written for."""
EVERY_CORE = 2**20
"""Enough cores for any rule, so that threads are what the profile requests and not what one machine has."""


def has_begun(workflow: Any, manifest: str) -> bool:
    """Whether Snakemake started the job that makes this and has not seen it end: it runs, or its head process died."""
    return bool(workflow.persistence._filter_incomplete_keys([manifest]))


def _names(rule: Any) -> dict[str, Any]:
    """The names defined by this rule's Snakefile, if it is tunetrail's; else empty."""
    names = rule.module_globals
    return names if isinstance(names.get("CONFIG"), Config) else {}


def run_of(job: Any) -> Path | None:
    """The folder of the run that a job belongs to; None if its rule is of another workflow."""
    return Path(names["RUN"]) if (names := _names(job.rule)) else None


def config_of(workflow: Any) -> Config | None:
    """The validated config; None if the workflow has several runs as modules."""
    configs = {names["RUN"]: names["CONFIG"] for rule in workflow.rules if (names := _names(rule))}
    return next(iter(configs.values())) if len(configs) == 1 else None


def submitted_ids(workflow: Any, job: Any) -> tuple[str, ...]:
    """The ids that the cluster gave a job that has not ended, or was killed."""
    return tuple(workflow.persistence.external_jobids(job))


def forget(workflow: Any, job: Any) -> None:
    """Removes what Snakemake remembers about a job: its parameters and the checksums of its inputs."""
    workflow.persistence.cleanup(job)


# ----------------------------------------------------------------------------- what Snakemake removes


def keep_what_is_published() -> None:
    """Makes Snakemake keep the outputs of a failed stage, and forget the job.

    A stage publishes completely or not at all, so an existing output may be from another attempt, on another node or
    for another head. It may also be from an earlier config, if the job failed before it started. Snakemake has just
    recorded the new inputs as those of this output, so unless it forgets the job it takes the output for current.
    """
    from snakemake.jobs import Job

    remove = Job.cleanup

    async def cleanup(job: Any, skip_outputs: Any) -> None:
        if run_of(job) is None or not hasattr(job.output, "manifest"):
            await remove(job, skip_outputs)
        else:
            forget(job.dag.workflow, job)

    if remove.__module__ != __name__:
        Job.cleanup = cleanup


_looks: list[Callable[[], None]] = []


def look_before_acting(look: Callable[[], None]) -> None:
    """Makes Snakemake call `look` before it starts a job, removes its old outputs, or handles its end."""
    from snakemake.jobs import Job
    from snakemake.scheduling.job_scheduler import JobScheduler

    if look not in _looks:
        _looks.append(look)
    for owner, name in ((JobScheduler, "run"), (Job, "prepare"), (Job, "postprocess")):
        if (act := getattr(owner, name)).__module__ != __name__:
            setattr(owner, name, _after_looking(act))


def _after_looking(act: Callable[..., Any]) -> Callable[..., Any]:
    def looking(*args: Any, **options: Any) -> Any:
        for look in _looks:
            look()
        return act(*args, **options)

    return looking


# ----------------------------------------------------------------------------- planning


def _arguments(profile: str, configfiles: list[Path], snakefile: Path | None) -> Any:
    """Snakemake's options with this profile. Raises ConfigError."""
    from snakemake.cli import get_profile_dir, parse_args

    if not get_profile_dir(profile) and not Path(profile, "config.yaml").exists():
        raise ConfigError(
            f"--profile {profile}: no such profile; name a folder with a config.yaml, profiles/local for one"
        )
    chosen = ["--configfile", *map(str, configfiles)] if configfiles else []
    chosen += ["--snakefile", str(snakefile)] if snakefile else []
    output = StringIO()
    try:
        with redirect_stderr(output):
            return parse_args(["--profile", profile, *chosen, "--dry-run"])[1]
    except SystemExit:
        raise ConfigError(f"--profile {profile}: {output.getvalue().strip().splitlines()[-1]}") from None


@contextmanager
def planned_workflow(profile: str, configfiles: list[Path], snakefile: Path | None = None) -> Iterator[Any]:
    """The workflow in this folder with its DAG, as a dry run sees it; nothing is locked and nothing is written.

    Args:
        configfiles: none: the Snakefile's default.
        snakefile: None: the one in this folder.

    Raises ConfigError or TunetrailError if there is none.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.exceptions import WorkflowError
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    args = _arguments(profile, configfiles, snakefile)
    with SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL}, log_level_override="ERROR")) as api:
        # For resources that depend on the size of a missing file, Snakemake drops its own coroutine.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            dag = api.workflow(
                resource_settings=ResourceSettings(
                    cores=EVERY_CORE,
                    overwrite_threads=args.set_threads,
                    overwrite_resources=args.set_resources,
                    default_resources=args.default_resources,
                ),
                config_settings=ConfigSettings(configfiles=args.configfile or []),
                snakefile=args.snakefile,
                workdir=args.directory,
            ).dag(DAGSettings(rerun_triggers=args.rerun_triggers, max_checksum_file_size=args.max_checksum_file_size))
            workflow = dag.workflow_api._workflow
            # As Snakemake's --summary does it: no lock is taken, so another Snakemake may be running.
            workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True)
            workflow._build_dag()
        except WorkflowError as e:
            raise TunetrailError(f"Snakemake cannot plan this: {' '.join(str(e).split())}") from e
        yield workflow


# ----------------------------------------------------------------------------- as a module of another workflow


def module_name(workflow: Any) -> str | None:
    """The name of the module that is being read; None for the main workflow."""
    return None if workflow.modifier.is_main_snakefile() else workflow.modifier.namespace


def located(workflow: Any, path: str) -> str:
    """Where a rule's path is: a module's `prefix` or `replace_prefix` moves it."""
    return workflow.modifier.path_modifier.replace_prefix(path)


def renamed(workflow: Any, rule: str) -> str | None:
    """The name of a rule here (`use rule * from … as tt_*`); None if it is not used."""
    return workflow.modifier.avail_rulename(rule)


def apply_profile(workflow: Any, rules: Iterable[str]) -> None:
    """Gives renamed rules the threads and resources that the profile sets for their own names.

    What the profile sets for a rule's new name has priority.
    """
    threads = workflow.resource_settings._parsed_overwrite_threads
    resources = workflow.resource_settings._parsed_overwrite_resources
    for rule in rules:
        if (name := renamed(workflow, rule)) in (rule, None):
            continue
        if rule in threads:
            threads.setdefault(name, threads[rule])
        if rule in resources:
            both = resources[rule].copy()
            both.update(resources.get(name, {}))
            resources[name] = both


def launcher_of(workflow: Any, rule: str) -> str | None:
    """The resource `launcher` that the profile gives a rule."""
    settings = workflow.resource_settings
    own = settings._parsed_overwrite_resources.get(renamed(workflow, rule))
    for given in (own, settings.default_resources):
        if given and "launcher" in given:
            return str(given["launcher"].raw).strip("'\"")
    return None


def run_handlers(workflow: Any, run: str) -> None:
    """Makes Snakemake call `onstart`, `onsuccess` and `onerror` of the module that is being read, which it ignores.

    They are called in addition to the main workflow's own, wherever these are defined, and once, however often `use
    rule` reads the module.

    Args:
        run: the folder of the module's run.
    """
    known = vars(workflow).setdefault("tunetrail_runs", set())
    if run not in known:
        known.add(run)
        for event in ("onstart", "onsuccess", "onerror"):
            _call_too(workflow, event, workflow.globals[event])


def _exit_code_of(handler: Callable[[], None]) -> int | None:
    """The exit code with which a handler ends the process, 1 for one that fails; None where it returns."""
    try:
        handler()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return None


def most_serious(codes: Sequence[int]) -> int:
    """One exit code for several runs: the first of a failure, before those that say only to go on.

    >>> most_serious([75, 65, 78]), most_serious([76, 75])
    (65, 75)
    """
    goes_on = (Superseded.exit_code, 0)
    failures = [code for code in codes if code not in (Interrupted.exit_code, *goes_on)]
    return next(iter(failures), Interrupted.exit_code if Interrupted.exit_code in codes else max(codes))


def _call_too(workflow: Any, event: str, ours: Callable[[], None]) -> None:
    register = getattr(workflow, event)

    def both(theirs: Callable[[Any], None]) -> Callable[[Any], None]:
        def handler(log: Any) -> None:
            handlers: list[Callable[[], None]] = [ours, partial(theirs, log)]
            if event == "onerror":  # the main workflow has its word first
                handlers.reverse()
            codes = []
            for each in handlers:
                if (code := _exit_code_of(each)) is not None:
                    codes.append(code)
                    if event == "onstart":  # a workflow that may not start does nothing more
                        break
            if codes:
                sys.exit(most_serious(codes))

        return handler

    def register_both(theirs: Callable[[Any], None]) -> None:
        register(both(theirs) if workflow.modifier.is_main_snakefile() else theirs)

    setattr(workflow, f"_{event}", both(getattr(workflow, f"_{event}")))
    setattr(workflow, event, register_both)
