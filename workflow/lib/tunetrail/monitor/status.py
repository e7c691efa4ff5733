"""Where a run stands: what Snakemake would do, beside what the stages left in their state folders. Nothing is written."""

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
from pathlib import Path
from typing import Any

from tunetrail.contract.lease import holder
from tunetrail.contract.progress import ProgressLine, duration, parse
from tunetrail.errors import PEOPLE, Waiting
from tunetrail.monitor.dag import Job, jobs_of, listed

STATES = {
    "done": "green",
    "running": "cyan",
    "stale": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "waiting": "dim",
}
"""State of a stage -> its colour. interrupted: it saved and left, or was asked to, and goes on when run again."""
STARTING_SECONDS = 180
"""How long a job may import and verify before it takes its lease. One silent for longer has died."""
TAIL_BYTES = 2**16
LISTED = 5
"""Stages of one rule in one state that are listed one by one; more are one line."""
_ERROR = re.compile(r"(: error: )|^([\w.]*(Error|Exception|Interrupt|Exit)\b)")


@dataclass(frozen=True)
class Standing:
    """Where one stage stands."""

    name: str
    rule: str
    state: str
    """One of STATES."""
    detail: str
    """Why it is stale, what it waits for, how far it is, or the error."""
    progress: ProgressLine | None = None
    left: float | None = None
    """Seconds to the end, as of now."""
    slurm_job: str | None = None
    attempts: int = 0
    log: str | None = None
    rerun: str | None = None


def slurm_queue() -> dict[str, str]:
    """Id -> state (with the reason where it is pending) of this user's jobs; empty where there is no Slurm."""
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
    """The last line of a log that tells an error, else its last line; None where there is none.

    What Slurm says of a step that ended counts where the stage itself said nothing: out of memory, for one.
    """
    lines = _tail(log)
    errors = [line for line in reversed(lines) if _ERROR.search(line)]
    own = [line for line in errors if not line.startswith(("srun:", "slurmstepd:"))]
    return next(iter([*own, *errors, *lines[-1:]]), None)


def state_folder(job: Job) -> Path | None:
    """The state of the artifact's latest attempt that has not been published; None where there is none."""
    if job.state is None:
        return None
    found = list(job.state.glob("*/attempts.jsonl"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def read_attempts(folder: Path | None) -> list[dict]:
    """Rows of attempts.jsonl. A half-written one, which its writer will replace, is left out."""
    rows = []
    for line in _tail(folder / "attempts.jsonl") if folder else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def latest_progress(log: Path, since: str) -> tuple[ProgressLine, float] | None:
    """(the progress last logged, seconds to the end as of now), by an attempt that began at `since` (ISO 8601)."""
    for line in reversed(_tail(log)):
        stamp, text = line[:19], line[24:]
        if found := parse(text):
            try:
                written = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").astimezone()
            except ValueError:
                continue
            if written < datetime.fromisoformat(since):
                return None
            left = 0.0 if found.left is None else found.left - (time.time() - written.timestamp())
            return found, max(0.0, left)
    return None


def submitted_jobs(job: Job) -> list[str]:
    """Ids of the Slurm jobs that were submitted for it: by Snakemake, or by submitit."""
    found = list(job.submitted)
    if job.state is not None:
        name = ".".join(job.manifest.parent.parts[-2:])
        with suppress(OSError, ValueError, LookupError):
            found.append(json.loads(Path(*job.state.parts[:2], "jobs", f"{name}.json").read_text())["job"])
    return found


def _running(job: Job, attempts: list[dict], folder: Path | None, queue: dict[str, str], ids: list[str]) -> Standing:
    this = attempts[-1] if attempts and "ended" not in attempts[-1] else {}
    known = next((number for number in [this.get("job_id"), *ids] if number in queue), this.get("job_id"))
    found = latest_progress(folder / "log.txt", this["start"]) if this and folder else None
    progress, left = found if found else (None, None)
    if progress:
        share = f"{progress.done}/{progress.total} {progress.unit}"
        detail = f"{share}, {duration(left)} left" if progress.left is not None and left is not None else share
        detail += f"  {progress.note}" if progress.note else ""
    elif this:
        detail = f"since {this['start']}, no progress told yet"
    else:
        detail = "starting"
    if known and queue.get(known, "RUNNING") != "RUNNING":
        detail = queue[known]
    return Standing(job.name, job.rule, "running", detail, progress, left, known, len(attempts))


def standing(job: Job, queue: dict[str, str], rerun: str) -> Standing:
    """Where one stage stands.

    Args:
        queue: from `slurm_queue`.
        rerun: the command that runs the workflow.
    """
    made = job.manifest.exists()
    if made and not job.needed and not is_running(job):
        return Standing(job.name, job.rule, "done", "")
    folder = state_folder(job)
    attempts, ids = read_attempts(folder), submitted_jobs(job)
    own = attempts[-1].get("job_id") if attempts and "ended" not in attempts[-1] else None
    if is_running(job) or any(number in queue for number in [own, *ids]):
        return _running(job, attempts, folder, queue, ids)
    if attempts and not job.after and str(attempts[-1].get("ended")).startswith(Waiting.word):
        return Standing(job.name, job.rule, "waiting", attempts[-1]["ended"].removeprefix(f"{Waiting.word} "))
    if made:
        return Standing(job.name, job.rule, "stale", job.why)
    log = job.log if job.log and job.log.exists() else None
    if job.begun and not attempts and log and time.time() - log.stat().st_mtime < STARTING_SECONDS:
        return Standing(job.name, job.rule, "running", "starting")
    error = error_line(log)
    # Without an attempt the log may be that of an artifact that was made well and deleted since.
    if attempts or job.begun or (error and _ERROR.search(error)):
        ended = attempts[-1].get("ended") if attempts else None
        is_interrupted = ended is not None and not ended.startswith("failed") and ended not in ("done", "killed")
        if ended is None and attempts:
            error = "killed without a word: kill -9, out of memory, or its node was lost"
        text = ended if is_interrupted else error or ended or "it ended before it began"
        return Standing(
            job.name, job.rule, "interrupted" if is_interrupted else "failed", str(text), attempts=len(attempts),
            slurm_job=attempts[-1].get("job_id") if attempts else None,
            log=str(log or (folder and folder / "log.txt")), rerun=f"{rerun} -- {job.manifest}",
        )  # fmt: skip
    if job.after:
        return Standing(job.name, job.rule, "waiting", f"for {listed(list(job.after))}")
    if not job.needed:
        return Standing(
            job.name,
            job.rule,
            "stale",
            "it is gone, but what was made from it is there; name it to make it again",
            rerun=f"{rerun} -- {job.manifest}",
        )
    return Standing(job.name, job.rule, "waiting", "ready to run")


def standings(jobs: list[Job], rerun: str) -> list[Standing]:
    queue = slurm_queue()
    return [standing(job, queue, rerun) for job in jobs]


def rerun_command(profile: str, configfiles: list[Path]) -> str:
    """The command that runs this workflow."""
    chosen = ["--configfile", *map(str, configfiles)] if configfiles else []
    return shlex.join(["snakemake", "--profile", profile, *chosen])


# ----------------------------------------------------------------------------- for people


def failure_lines(found: list[Standing]) -> list[str]:
    """What failed: its error, its log, how to run it again."""
    lines = []
    for s in found:
        job = f", Slurm job {s.slurm_job}" if s.slurm_job else ""
        lines += [
            f"{s.name} {s.state} (attempt {max(1, s.attempts)}{job}): {s.detail}",
            f"    log    {s.log}",
            f"    again  {s.rerun}",
        ]
    return lines


def failed(found: list[Standing]) -> list[Standing]:
    return [s for s in found if s.state in ("failed", "interrupted")]


def grouped(items: list[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Items of one key that are more than `LISTED` as one group, all others alone, in their order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [part for group in groups.values() for part in ([group] if len(group) > LISTED else [[i] for i in group])]


def shared(reasons: list[str]) -> str:
    """The first of the reasons that a group has, and how many others there are."""
    others = len(set(reasons)) - 1
    return reasons[0] + (f" · {others} other reasons" if others > 1 else " · another reason" if others else "")


def group_name(group: list[Any]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].rule} ({len(group)})"


def _detail(s: Standing) -> str:
    return " · ".join(filter(None, [s.detail, s.slurm_job and f"Slurm job {s.slurm_job}"]))


def print_status(found: list[Standing], rerun: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    groups = grouped(found, lambda s: (s.rule, s.state))
    lines = [(group_name(group), group[0].state, shared([_detail(s) for s in group])) for group in groups]
    width = max((len(name) for name, _, _ in lines), default=0)
    for name, state, detail in lines:
        console.print(
            Text.assemble(f"{name:{width}}  ", (f"{state:11}", STATES[state]), f"  {detail}" if detail else "")
        )
    counts = {state: sum(s.state == state for s in found) for state in STATES}
    console.print(Text("\n" + ", ".join(f"{n} {state}" for state, n in counts.items() if n)))
    if broken := failed(found):
        console.print(Text("\n" + "\n".join(failure_lines(broken))))
        console.print(Text(f"\nall that is left: {rerun}"))


def as_json(found: list[Standing]) -> list[dict[str, Any]]:
    return [asdict(s) for s in found]


def failure_summary(workflow: Any, arguments: list[str]) -> tuple[str, int]:
    """(what failed or waits for people in a workflow that has just ended, to be its last words; its exit code).

    Args:
        arguments: what snakemake was started with.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    found = standings([job for job in jobs_of(workflow) if job.needed], shlex.join(["snakemake", *options]))
    people = [f"{s.name} waits {s.detail}" for s in found if s.state == "waiting" and s.detail.startswith(PEOPLE)]
    broken, again = failed(found), f"To go on with all that is left: {shlex.join(['snakemake', *arguments])}"
    code = Waiting.exit_code if people and not broken else 1
    return "\n".join(["", *failure_lines(broken), *people, again]), code
