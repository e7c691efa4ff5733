"""The last words of a run that failed: what failed, why, and the next command."""

import shlex
import sys
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, Waiting
from tunetrail.monitor.dag import forget_failed, jobs_of, others_failed
from tunetrail.monitor.status import StageStatus, failed, failure_lines, statuses
from tunetrail.provenance import ledger
from tunetrail.provenance.run_folder import artifacts

FAULT = 1
"""Exit code where stages failed for different reasons, or one without saying why."""


def common_code(found: list[StageStatus]) -> int:
    """The exit code on which all stages that failed agree, or that waits for people; else FAULT."""
    codes = {s.exit_code or FAULT for s in failed(found)} | {Waiting.exit_code for s in found if s.waits_for_people}
    return codes.pop() if len(codes) == 1 else FAULT


def summary(found: list[StageStatus], arguments: list[str]) -> str:
    """What failed or waits for people, and how to go on.

    Args:
        arguments: what snakemake was started with.
    """
    people = [f"{s.name} waits {s.detail}" for s in found if s.waits_for_people]
    again = f"To go on with all that is left: {shlex.join(['snakemake', *arguments])}"
    return "\n".join(["", *failure_lines(failed(found)), *people, again])


def seal(run: Path) -> None:
    """Appends what was made to the run's ledger; where that is impossible, says why."""
    try:
        if run.is_dir() and artifacts(run):
            ledger.seal(run)
    except (DataError, OSError) as e:
        print(e, file=sys.stderr)


def after_failure(workflow: Any, run: Path, arguments: list[str]) -> int:
    """What the head process does when a workflow with this run failed. Returns the exit code that is due."""
    seal(run)
    forget_failed(workflow)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    left = [job for job in jobs_of(workflow) if job.needed and job.manifest.is_relative_to(run)]
    found = statuses(left, shlex.join(["snakemake", *options]))
    print(summary(found, arguments), file=sys.stderr)
    return FAULT if others_failed(workflow) else common_code(found)
