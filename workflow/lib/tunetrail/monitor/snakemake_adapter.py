"""Every private call into Snakemake, in one place.

Snakemake's public API runs a workflow but does not say what its jobs are, which of them have begun, or under which id
the cluster runs them; `--summary` and the executor plugins use the same calls as these. They were written against the
version in envs/requirements.txt: a test fails when the lock moves, and then each has to be looked at again.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from tunetrail.errors import ConfigError, TunetrailError

VERSION = "9.27.1"
"""Of Snakemake, that this was written against."""
EVERY_CORE = 2**20
"""Cores enough for any rule: threads are then what the profile asks for, not what one machine has."""


def has_begun(workflow: Any, manifest: str) -> bool:
    """Whether Snakemake started the job that makes this and has not seen it end: it runs, or its head process died."""
    return bool(workflow.persistence._filter_incomplete_keys([manifest]))


def config_of(workflow: Any) -> Any:
    """The validated config of the Snakefile, `tunetrail.config.run.Config`; None where the Snakefile is another's."""
    return workflow.globals.get("CONFIG")


def submitted_ids(workflow: Any, job: Any) -> tuple[str, ...]:
    """The ids that the cluster gave a job that has not ended, or was killed."""
    return tuple(workflow.persistence.external_jobids(job))


def forget(workflow: Any, job: Any) -> None:
    """Removes what Snakemake remembers about a job: its parameters and the checksums of its inputs."""
    workflow.persistence.cleanup(job)


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

    Raises ConfigError or TunetrailError where there is none to see.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.exceptions import WorkflowError
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    args = _arguments(profile, configfiles, snakefile)
    with SnakemakeApi(OutputSettings(dryrun=True, quiet={Quietness.ALL}, log_level_override="ERROR")) as api:
        # Of a resource that depends on the size of a file that is not there yet; Snakemake drops its own coroutine.
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
