"""Runs a stage's command where it was launched: its output goes to a log, signals reach it, its end decides what
follows.

In a Slurm job the stage's own clock tells it when to save and leave, with exit code 75 (`contract.stop`). The job then
goes back into the queue under the same id and uses up none of Snakemake's retries. It does so only if something was
saved: a stage that never reaches its first save would be requeued forever.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tunetrail.errors import Interrupted, Superseded
from tunetrail.launch.time_limit import stage_environment

INTERRUPTED = Interrupted.exit_code
CLEAN_EXITS = (0, INTERRUPTED, Superseded.exit_code)
"""Exit codes of a stage whose processes stop together without a failure."""
EXIT_GRACE_SECONDS = 10
"""Grace period for rank 0 to exit after another rank fails (mostly of the same error), and for the other ranks to exit
when rank 0 leaves: srun would kill them and change their exit codes."""
SLURM_DECISION_SECONDS = 300
"""How long a job that got a signal to end waits for Slurm, which knows whether to requeue or kill it."""
EXIT_CODE = "exit_code"
"""File in an artifact's state folder: the exit code of the last attempt that failed."""
_NO_PROGRESS = (EXIT_CODE, "log.txt", "attempts.jsonl", "progress.jsonl", "lock", "events.out")


def option(command: Sequence[str], name: str) -> Path:
    """The value of one of a stage command's options."""
    return Path(command[list(command).index(name) + 1])


def progress(state: Path) -> set[tuple[str, int, int]]:
    """What a stage has saved: path, size and time of every file that it could resume from."""
    saved = set()
    for path in state.rglob("*"):
        if not any(mark in path.name for mark in _NO_PROGRESS):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            if not path.is_dir():
                saved.add((str(path), stat.st_size, stat.st_mtime_ns))
    return saved


def _copy(source: IO[bytes], log: IO[bytes] | None) -> None:
    """Passes output on as it comes; a full disk for the log must not stop the stage."""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        for sink in (sys.stderr.buffer, log):
            if sink:
                try:
                    sink.write(chunk)
                    sink.flush()
                except OSError:
                    continue


def _slurm(*command: str) -> str | None:
    """The output of one of Slurm's commands; None if it fails."""
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    if reply.returncode:
        print(f"{' '.join(command)}: {reply.stderr.strip()}", file=sys.stderr)
        return None
    return reply.stdout.strip()


def this_job() -> str | None:
    """The id of the Slurm job around us; for a task of an array its own id, not the array's."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def await_slurm_decision(job: str, saved: bool) -> None:
    """Waits for Slurm to decide about a job whose stage left before its end; Slurm then kills this process.

    If Slurm no longer counts the job as running, it was cancelled or preempted. If it does, the job goes back into the
    queue under its id, provided that its stage has saved anything.
    """
    state = _slurm("squeue", "-h", "-j", job, "-o", "%T")
    if state != "RUNNING" or (saved and _slurm("scontrol", "requeue", job) is not None):
        time.sleep(SLURM_DECISION_SECONDS)


def supervise(command: Sequence[str], log: Path | None, state: Path, requeues: bool) -> int:
    """Runs the command to its end and returns its exit code.

    SIGTERM, SIGINT and SIGUSR2 reach it as SIGTERM: it saves and leaves.

    Args:
        log: gets the output, as does standard error; None: the output stays as it is.
        state: the stage's state folder.
        requeues: whether to put the Slurm job around us back into the queue when the stage left with progress saved.
    """
    before = progress(state)
    sink = log.open("wb") if log else None
    child = subprocess.Popen(
        command,
        env=stage_environment(),
        stdout=subprocess.PIPE if sink else None,
        stderr=subprocess.STDOUT if sink else None,
        # A terminal sends Ctrl-C to all its processes, but the stage must save first.
        # Slurm may signal all processes of a job: only what is passed on counts.
        preexec_fn=lambda: [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGUSR2)],
    )

    def pass_on(signum: int, _: object) -> None:
        child.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(signum, pass_on)
    copier = threading.Thread(target=_copy, args=(child.stdout, sink), daemon=True)
    if sink:
        copier.start()
    code = child.wait()
    if sink:
        copier.join()
        sink.close()
    if requeues and code == INTERRUPTED and (job := this_job()):
        await_slurm_decision(job, bool(progress(state) - before))
    return code if code >= 0 else 128 - code


def for_srun(code: int, rank: int) -> int:
    """The exit code with which one of a stage's processes tells srun whether to kill the others.

    Rank 0 decides for all; another rank has them killed only if it failed.
    """
    if rank and code in CLEAN_EXITS:
        return 0
    if rank or code in CLEAN_EXITS[1:]:
        time.sleep(EXIT_GRACE_SECONDS)
    return code
