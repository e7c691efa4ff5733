"""The DAG as Snakemake sees it now: every stage's job, whether it would run, and why.

`read_run` builds it in this process as a dry run does, without taking the lock, so it also works while another
Snakemake runs; `jobs_of` reads it from a workflow that is already loaded. No file is written.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunetrail.files import changed, flatten
from tunetrail.monitor import snakemake_adapter


@dataclass(frozen=True)
class Job:
    """One artifact to make."""

    name: str
    """Its folder below results/<run>, such as `policies/ppo`."""
    rule: str
    manifest: Path
    state: Path | None
    log: Path | None
    benchmark: Path | None
    threads: int
    resources: dict[str, Any]
    needed: bool
    """Whether it would run."""
    why: str = ""
    after: tuple[str, ...] = ()
    """Names of the stages it waits for."""
    begun: bool = False
    """Snakemake has started it and has not seen it end: it runs, or its head process died."""
    submitted: tuple[str, ...] = ()
    """Ids that the cluster gave it, if the run has not ended or was killed."""


def artifact_name(manifest: str | Path, run: Path) -> str:
    """
    >>> artifact_name("results/demo/policies/ppo/manifest.json", Path("results/demo"))
    'policies/ppo'
    """
    return Path(manifest).parent.relative_to(run).as_posix()


def listed(names: list[str]) -> str:
    """The names in one line; several of a kind are counted.

    >>> listed(["sft", *(f"completions/{i}-of-9" for i in range(9))])
    'completions (9), sft'
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        kinds.setdefault(name.partition("/")[0], []).append(name)
    return ", ".join(f"{kind} ({len(them)})" if len(them) > 2 else ", ".join(them) for kind, them in kinds.items())


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key: shard 2 comes before shard 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def config_changes(old: Path, new: str) -> list[str]:
    """Keys whose values differ between a stage's config file and what it will be, as `key: old -> new`.

    Keys of the stage's own block have no prefix.
    """
    try:
        before, after = flatten(json.loads(old.read_text(encoding="utf-8"))), flatten(json.loads(new))
    except (OSError, ValueError):
        return []
    return [
        f"{key.removeprefix('config.')}: {json.dumps(was)} -> {json.dumps(now)}"
        for key, (was, now) in changed(before, after).items()
    ]


def _why(reason: Any, changes: dict[str, list[str]], names: dict[str, str]) -> str:
    """Snakemake's reason for a job, in terms of stages.

    Args:
        changes: config file -> its keys that change.
        names: manifest -> the artifact's name, of those that this run makes.
    """

    def named(files: Any) -> str:
        own = listed([names[str(f)] for f in files if str(f) in names])
        return ", ".join(filter(None, [own, *sorted(str(f) for f in files if str(f) not in names)]))

    configs = [f for f in reason.updated_input | reason.updated_input_run if str(f) in changes]
    said = [
        f"config: {', '.join(changes[str(f)])}" if changes[str(f)] else "its config is written again" for f in configs
    ]
    rerun = reason.updated_input_run.difference(configs)
    changed = reason.updated_input.difference(configs, rerun)
    parts = [
        ("forced", reason.forced),
        ("not made yet", reason.missing_output),
        ("; ".join(said), configs and not reason.missing_output),
        (f"{named(changed)} changed", changed),
        (f"{named(rerun)} will be made again", rerun and not reason.missing_output),
        ("it has other inputs than before", reason.input_changed),
        ("its command has other parameters than before", reason.params_changed),
        ("its rule has changed", reason.code_changed),
        ("its software environment has changed", reason.software_stack_changed),
        ("its output is incomplete", reason.incomplete_output),
    ]
    return "; ".join(text for text, holds in parts if holds)


def jobs_of(workflow: Any) -> list[Job]:
    """The stages of a loaded workflow, parents first. Stage configs are left out, but `why` names their changes.

    If the workflow has modules, the jobs of others are left out too.
    """
    dag = workflow.dag
    ours = {job: run for job in dag.jobs if (run := snakemake_adapter.run_of(job))}
    needed = {job for job in ours if dag.needrun(job) and not dag.finished(job)}
    changes = {
        str(config): config_changes(Path(config), job.params.json)
        for job in needed
        if (config := job.output.get("config"))
    }
    names = {str(path): artifact_name(path, run) for job, run in ours.items() if (path := job.output.get("manifest"))}
    jobs = []
    stages = [[job for job in level if str(job.output.get("manifest")) in names] for level in dag.toposorted()]
    for job in (job for level in stages for job in sorted(level, key=lambda job: _natural(job.output.manifest))):
        manifest = job.output.manifest
        parents = {file: parent for parent, files in dag.dependencies[job].items() for file in files}
        awaited = {str(file) for file, parent in parents.items() if parent in needed}
        state = job.params.get("state")
        jobs.append(
            Job(
                name=names[str(manifest)],
                rule=job.rule.name,
                manifest=Path(manifest),
                state=Path(state) if state else None,
                log=Path(job.log[0]) if job.log else None,
                benchmark=Path(job.benchmark) if job.benchmark else None,
                threads=job.threads,
                resources={k: v for k, v in job.resources.items() if not k.startswith("_")},
                needed=job in needed,
                why=_why(dag.reason(job), changes, names) if job in needed else "",
                after=tuple(sorted(names[file] for file in awaited & names.keys())),
                begun=snakemake_adapter.has_begun(workflow, str(manifest)),
                submitted=snakemake_adapter.submitted_ids(workflow, job) if job in needed else (),
            )
        )
    return jobs


def forget_failed(workflow: Any) -> None:
    """Makes Snakemake forget the jobs of a workflow that failed or never started, and whose artifact is missing.

    After a failure Snakemake removes the manifest and keeps the checksums of inputs. If artifacts that were made from
    an earlier version still exist, it would next time report that there is nothing to do, whatever has changed
    upstream.
    """
    dag = workflow.dag
    for job in dag.jobs:
        manifest = job.output.get("manifest")
        if not snakemake_adapter.run_of(job) or not manifest or Path(manifest).exists():
            continue
        if not dag.needrun(job) or dag.finished(job):
            continue
        if not snakemake_adapter.has_begun(workflow, str(manifest)):  # else it may still run on the cluster
            snakemake_adapter.forget(workflow, job)


def has_made(workflow: Any, run: Path) -> bool:
    """Whether a workflow that has ended made anything of this run."""
    return any(workflow.dag.finished(job) and snakemake_adapter.run_of(job) == run for job in workflow.dag.jobs)


def others_failed(workflow: Any) -> bool:
    """Whether a job of another workflow, of which this is a module, had all its inputs and did not succeed."""
    dag = workflow.dag
    unfinished = {job for job in dag.jobs if dag.needrun(job) and not dag.finished(job)}
    return any(
        snakemake_adapter.run_of(job) is None and not unfinished.intersection(dag.dependencies[job])
        for job in unfinished
    )


def read_run(profile: str, configfiles: list[Path], snakefile: Path | None = None) -> tuple[Any, list[Job]]:
    """(validated config, stages) of the workflow in this folder. Raises ConfigError or TunetrailError if there is
    none to see.

    Args:
        configfiles: none: the Snakefile's default.
        snakefile: None: the one in this folder.
    """
    with snakemake_adapter.planned_workflow(profile, configfiles, snakefile) as workflow:
        return snakemake_adapter.config_of(workflow), jobs_of(workflow)
