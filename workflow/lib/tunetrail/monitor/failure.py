"""The end of a run: its seal and audit, or what failed, why, and the next command."""

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
    return "\n".join(map(escape, ["", *failure_lines(failed(found)), *people, advice]))


def seal(run: Path) -> str | None:
    """Appends new artifacts to the run's ledger. If that is impossible, returns a message that says why."""
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
    """What the head process does after a workflow with this run failed. Returns the exit code to use."""
    not_sealed = seal(run)
    forget_failed(workflow)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    jobs = [job for job in jobs_of(workflow) if job.needed and job.manifest.is_relative_to(run)]
    stages = statuses(jobs, shlex.join(["snakemake", *options]))
    print(summary(stages, arguments), file=sys.stderr)
    if not_sealed:
        print(escape(not_sealed), file=sys.stderr)
    return FAULT if others_failed(workflow) else common_code(stages)
