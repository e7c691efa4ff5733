"""The summary of a failed run: what failed, why, and the next command."""

import shlex
import sys
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, Waiting
from tunetrail.monitor.dag import forget_failed, jobs_of, others_failed
from tunetrail.monitor.status import StageStatus, failed, failure_lines, statuses
from tunetrail.provenance import ledger

FAULT = 1
"""Exit code if stages failed for different reasons, or one did not say why."""


def common_code(found: list[StageStatus]) -> int:
    """The exit code that all failed stages share, or that of waiting for people; else FAULT."""
    codes = {s.exit_code or FAULT for s in failed(found)} | {Waiting.exit_code for s in found if s.waits_for_people}
    return codes.pop() if len(codes) == 1 else FAULT


def summary(found: list[StageStatus], arguments: list[str]) -> str:
    """What failed or waits for people, and how to continue.

    Args:
        arguments: those that snakemake was started with.
    """
    people = [f"{s.name} waits {s.detail}" for s in found if s.waits_for_people]
    advice = f"To go on with all that is left: {shlex.join(['snakemake', *arguments])}"
    return "\n".join(["", *failure_lines(failed(found)), *people, advice])


def seal(run: Path) -> None:
    """Appends new artifacts to the run's ledger; if that is impossible, says why."""
    try:
        if run.is_dir() and ledger.artifacts(run):
            ledger.seal(run)
    except (DataError, OSError) as e:
        print(e, file=sys.stderr)


def after_failure(workflow: Any, run: Path, arguments: list[str]) -> int:
    """What the head process does after a workflow with this run failed. Returns the exit code to use."""
    seal(run)
    forget_failed(workflow)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    jobs = [job for job in jobs_of(workflow) if job.needed and job.manifest.is_relative_to(run)]
    stages = statuses(jobs, shlex.join(["snakemake", *options]))
    print(summary(stages, arguments), file=sys.stderr)
    return FAULT if others_failed(workflow) else common_code(stages)
