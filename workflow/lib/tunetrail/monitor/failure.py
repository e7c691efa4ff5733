"""The last words of a run: its seal and audit, or what failed, why, and the next command."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError, TunetrailError, Waiting
from tunetrail.monitor.dag import forget_failed, jobs_of, others_failed
from tunetrail.monitor.status import StageStatus, failed, failure_lines, statuses
from tunetrail.provenance import ledger
from tunetrail.provenance.run_folder import artifacts
from tunetrail.terminal import escape

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
    return "\n".join(map(escape, ["", *failure_lines(failed(found)), *people, again]))


def seal(run: Path) -> str | None:
    """Appends what was made to the run's ledger. Returns what to say where that was impossible."""
    again = f"tunetrail audit seal {shlex.quote(str(run))}"
    try:
        sealed = ledger.seal(run) if run.is_dir() and artifacts(run) else None
    except (TunetrailError, OSError) as e:
        return f"NOT SEALED: {e}; then: {again}"
    if sealed and sealed.torn:
        print(escape(f"{sealed.path}: its last line was cut off by a crash and is removed"), file=sys.stderr)
    if sealed and sealed.refused:
        name, why = next(iter(sealed.refused.items()))
        return f"NOT SEALED: {len(sealed.refused)} of its artifacts, {name} first: {why}; then: {again}"
    return None


def after_success(run: Path, variables: dict[str, str]) -> int:
    """What the head process does when a workflow with this run went through: it seals the run and audits it.

    Returns the exit code that is due. That the run was not sealed is its last line.

    Args:
        variables: environment variables of the audit.
    """
    if said := seal(run):
        print(escape(said), file=sys.stderr)
        return DataError.exit_code
    # What it finds is on the screen; a dirty tree, for one, fails no run.
    command = [sys.executable, "-m", "tunetrail", "audit", "verify", "--recursive", str(run)]
    subprocess.run(command, stdout=sys.stderr, env=os.environ | variables, check=False)
    return 0


def after_failure(workflow: Any, run: Path, arguments: list[str]) -> int:
    """What the head process does when a workflow with this run failed. Returns the exit code that is due."""
    said = seal(run)
    forget_failed(workflow)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    left = [job for job in jobs_of(workflow) if job.needed and job.manifest.is_relative_to(run)]
    found = statuses(left, shlex.join(["snakemake", *options]))
    print(summary(found, arguments), file=sys.stderr)
    if said:
        print(escape(said), file=sys.stderr)
    return FAULT if others_failed(workflow) else common_code(found)
