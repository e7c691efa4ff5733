"""The status of a run: what Snakemake would do, and what the stages left in their state folders. Nothing is written."""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from tunetrail.contract.lease import holder
from tunetrail.contract.progress import FILE as PROGRESS_FILE
from tunetrail.contract.progress import Progress, duration
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import whole_rows
from tunetrail.launch.supervise import EXIT_CODE
from tunetrail.monitor.dag import Job, listed
from tunetrail.terminal import escape

STATES = {
    "done": "green",
    "running": "cyan",
    "stale": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "waiting": "dim",
}
"""State of a stage -> its colour. interrupted: it saved and left, and will continue when run again."""
STARTING_SECONDS = 180
"""How long a job may import and verify before it takes its lease. A job that is silent for longer has died."""
TAIL_BYTES = 2**16
LISTED = 5
"""How many stages of the same rule and state are listed one by one; more share a line."""
_ERROR = re.compile(r"(: error: )|^([\w.]*(Error|Exception|Interrupt|Exit)\b)")


@dataclass(frozen=True)
class StageStatus:
    """The status of one stage."""

    name: str
    rule: str
    state: str
    """One of STATES."""
    detail: str
    """Why it is stale, what it waits for, its progress, or the error."""
    progress: Progress | None = None
    left: float | None = None
    """Seconds to the end, as of now."""
    slurm_job: str | None = None
    attempts: int = 0
    log: str | None = None
    rerun: str | None = None
    waits_for_people: bool = False
    exit_code: int | None = None
    """The exit code of the last attempt, if it failed or left; None if it was killed."""


def slurm_queue() -> dict[str, str]:
    """Id -> state (with the reason if pending) of this user's jobs; empty if there is no Slurm."""
    command = ["squeue", "-h", "--me", "-o", "%i|%T|%r"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = (line.split("|") for line in reply.stdout.splitlines() if line.count("|") == 2)
    return {number: f"{state} ({reason})" if state == "PENDING" else state for number, state, reason in rows}


def is_running(job: Job) -> bool:
    """Whether a stage works on this artifact now: the lease on it is held."""
    return job.state is not None and holder(job.state / f"{job.manifest.parent.name}.lock") is not None


def _tail(path: Path | None) -> list[str]:
    try:
        with path.open("rb") if path else open(os.devnull, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
            return [line.rstrip() for line in f.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def error_line(log: Path | None) -> str | None:
    """The last line of a log that reports an error, else its last line; None if there is none.

    If a stage reported several mistakes in a row, it is the first, with the number of others. What Slurm says about
    a step that ended (such as out of memory) counts only if the stage itself said nothing.
    """
    lines = _tail(log)
    errors = [line for line in reversed(lines) if _ERROR.search(line)]
    own = [line for line in errors if not line.startswith(("srun:", "slurmstepd:"))]
    if not own:
        return next(iter([*errors, *lines[-1:]]), None)
    who, error, _ = own[0].partition(": error: ")
    told = list(takewhile(lambda line: error and line.startswith(f"{who}: error: "), own)) or own[:1]
    return told[-1] + (f" · {len(told) - 1} more in the log" if len(told) > 1 else "")


def state_folder(job: Job) -> Path | None:
    """The state of the artifact's latest attempt that has not been published; None if there is none."""
    if job.state is None:
        return None
    attempts = list(job.state.glob("*/attempts.jsonl"))
    return max(attempts, key=lambda path: path.stat().st_mtime).parent if attempts else None


def read_attempts(folder: Path | None) -> list[dict]:
    """Rows of attempts.jsonl. A half-written one, which its writer will replace, is left out."""
    return whole_rows(_tail(folder / "attempts.jsonl"), "start") if folder else []


def exit_code(job: Job) -> int | None:
    """The exit code that the last attempt left, unless it ended well or was killed."""
    with suppress(OSError, ValueError):
        return int((job.state / EXIT_CODE).read_text(encoding="utf-8")) if job.state else None
    return None


def is_running_attempt(attempt: dict) -> bool:
    return "ended" not in attempt


def latest_progress(folder: Path, since: str) -> tuple[Progress, float | None] | None:
    """(the latest progress, seconds to the end as of now) of an attempt that started at `since` (ISO 8601).

    The time left is None if unknown.
    """
    rows: list[Progress] = whole_rows(_tail(folder / PROGRESS_FILE), *Progress.__required_keys__)
    if not rows or datetime.fromisoformat(rows[-1]["time"]) < datetime.fromisoformat(since):
        return None
    row = rows[-1]
    age = time.time() - datetime.fromisoformat(row["time"]).timestamp()
    return row, None if row["left"] is None else max(0.0, row["left"] - age)


def submitted_jobs(job: Job) -> list[str]:
    """Ids of the Slurm jobs that were submitted for it: by Snakemake, or by submitit."""
    ids = list(job.submitted)
    if job.state is not None:
        jobs, name = job.state.parents[job.name.count("/")] / "jobs", ".".join(job.manifest.parent.parts[-2:])
        with suppress(OSError, ValueError, LookupError):
            ids.append(json.loads((jobs / f"{name}.json").read_text())["job"])
    return ids


def _running(job: Job, attempts: list[dict], folder: Path | None, queue: dict[str, str], ids: list[str]) -> StageStatus:
    this = attempts[-1] if attempts and is_running_attempt(attempts[-1]) else {}
    job_id = next((number for number in [this.get("job_id"), *ids] if number in queue), this.get("job_id"))
    latest = latest_progress(folder, this["start"]) if this and folder else None
    progress, seconds_left = latest if latest else (None, None)
    if progress:
        share = f"{progress['done']}/{progress['total']} {progress['unit']}"
        detail = share if seconds_left is None else f"{share}, {duration(seconds_left)} left"
        detail += f"  {progress['note']}" if progress["note"] else ""
    elif this:
        detail = f"since {this['start']}, no progress reported yet"
    else:
        detail = "starting"
    if job_id and queue.get(job_id, "RUNNING") != "RUNNING":
        detail = queue[job_id]
    return StageStatus(job.name, job.rule, "running", detail, progress, seconds_left, job_id, len(attempts))


def _stopped(job: Job, attempts: list[dict], folder: Path | None, rerun: str) -> StageStatus | None:
    """The status of a stage whose last attempt ended without an artifact; None if there was no attempt."""
    log = job.log if job.log and job.log.exists() else None
    error = error_line(log)
    # Without an attempt the log may be that of an artifact that was made successfully and deleted since.
    if not (attempts or job.begun or (error and _ERROR.search(error))):
        return None
    ended = attempts[-1].get("ended") if attempts else None
    if ended is None and attempts:
        error = "killed without a word: kill -9, out of memory, or its node was lost"
    is_interrupted = ended is not None and ended["outcome"] in ("interrupted", "superseded", "waiting")
    if ended is not None and (is_interrupted or not error):
        error = ended["message"] or ended["outcome"]
    return StageStatus(
        job.name,
        job.rule,
        "interrupted" if is_interrupted else "failed",
        error or "it ended before it began",
        attempts=len(attempts),
        slurm_job=attempts[-1].get("job_id") if attempts else None,
        log=str(log or (folder and folder / "log.txt")),
        rerun=f"{rerun} -- {job.manifest}",
        exit_code=exit_code(job),
    )


def _just_started(job: Job, attempts: list[dict]) -> bool:
    """Whether a job began so recently that it may not have taken its lease."""
    log = job.log if job.log and job.log.exists() else None
    return bool(job.begun and not attempts and log and time.time() - log.stat().st_mtime < STARTING_SECONDS)


def stage_status(job: Job, queue: dict[str, str], rerun: str) -> StageStatus:
    """The status of one stage.

    Args:
        queue: from `slurm_queue`.
        rerun: the command that runs the workflow.
    """
    made, works = job.manifest.exists(), is_running(job)
    if made and not job.needed and not works:
        return StageStatus(job.name, job.rule, "done", "")
    folder = state_folder(job)
    attempts, ids = read_attempts(folder), submitted_jobs(job)
    own = attempts[-1].get("job_id") if attempts and is_running_attempt(attempts[-1]) else None
    if works or any(number in queue for number in [own, *ids]):
        return _running(job, attempts, folder, queue, ids)
    if attempts and not job.after and (attempts[-1].get("ended") or {}).get("outcome") == "waiting":
        return StageStatus(job.name, job.rule, "waiting", attempts[-1]["ended"]["message"], waits_for_people=True)
    if made:
        return StageStatus(job.name, job.rule, "stale", job.why)
    if _just_started(job, attempts):
        return StageStatus(job.name, job.rule, "running", "starting")
    if stopped := _stopped(job, attempts, folder, rerun):
        return stopped
    if job.after:
        return StageStatus(job.name, job.rule, "waiting", f"for {listed(list(job.after))}")
    if not job.needed:
        detail = "it is gone, but what was made from it is there; name it to make it again"
        return StageStatus(job.name, job.rule, "stale", detail, rerun=f"{rerun} -- {job.manifest}")
    return StageStatus(job.name, job.rule, "waiting", "ready to run")


def statuses(jobs: list[Job], rerun: str) -> list[StageStatus]:
    queue = slurm_queue()
    return [stage_status(job, queue, rerun) for job in jobs]


def rerun_command(profile: str, configfiles: list[Path], snakefile: Path | None = None) -> str:
    """The command that runs this workflow."""
    chosen = ["--snakefile", str(snakefile)] if snakefile else []
    chosen += ["--profile", profile, *(["--configfile", *map(str, configfiles)] if configfiles else [])]
    return shlex.join(["snakemake", *chosen])


# ----------------------------------------------------------------------------- for people


MEANINGS = {DataError.exit_code: "the data is bad", ConfigError.exit_code: "the config is bad"}
"""Exit codes after which the same command would fail again."""


def failure_lines(found: list[StageStatus]) -> list[str]:
    """What failed: its error, its log, how to run it again."""
    lines = []
    for s in found:
        about = [f"attempt {max(1, s.attempts)}", *([f"Slurm job {s.slurm_job}"] if s.slurm_job else [])]
        about += [f"exit code {s.exit_code}"] if s.exit_code else []
        fix = MEANINGS.get(s.exit_code or 0)
        lines += [
            f"{s.name} {s.state} ({', '.join(about)}): {s.detail}",
            f"    log    {s.log}",
            *([f"    fix    {fix}; change what is named above, then"] if fix else []),
            f"    again  {s.rerun}",
        ]
    return lines


def failed(found: list[StageStatus]) -> list[StageStatus]:
    return [s for s in found if s.state in ("failed", "interrupted")]


def grouped(items: list[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Groups the items of each key with more than `LISTED`; all others stay alone, in their order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [part for group in groups.values() for part in ([group] if len(group) > LISTED else [[i] for i in group])]


def shared(reasons: list[str]) -> str:
    """The first reason of a group, and the number of others."""
    others = len(set(reasons)) - 1
    return reasons[0] + (f" · {others} other reasons" if others > 1 else " · another reason" if others else "")


def group_name(group: list[Any]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].rule} ({len(group)})"


def _detail(s: StageStatus) -> str:
    return " · ".join(filter(None, [s.detail, s.slurm_job and f"Slurm job {s.slurm_job}"]))


def print_status(found: list[StageStatus], rerun: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    groups = grouped(found, lambda s: (s.rule, s.state))
    lines = [(group_name(group), group[0].state, shared([_detail(s) for s in group])) for group in groups]
    width = max((len(name) for name, _, _ in lines), default=0)
    for name, state, detail in lines:
        console.print(
            Text.assemble(
                escape(f"{name:{width}}  "), (f"{state:11}", STATES[state]), escape(f"  {detail}") if detail else ""
            )
        )
    counts = {state: sum(s.state == state for s in found) for state in STATES}
    console.print(Text("\n" + ", ".join(f"{n} {state}" for state, n in counts.items() if n)))
    if broken := failed(found):
        console.print(Text("\n" + "\n".join(map(escape, failure_lines(broken)))))
        console.print(Text(f"\nall that is left: {escape(rerun)}"))


def as_json(found: list[StageStatus]) -> list[dict[str, Any]]:
    return [asdict(s) for s in found]
