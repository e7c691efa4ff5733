"""Finds out how long the Slurm job around a stage may still run."""

import os
import subprocess
import time

from tunetrail.contract.stop import DEADLINE, TIME_LIMIT


def parse_time_left(text: str) -> float | None:
    """Slurm's time left (`D-HH:MM:SS`, `HH:MM:SS`, `MM:SS`) in minutes; None if there is no limit.

    >>> parse_time_left("1-02:00:30")
    1560.5
    """
    if not text or not text[0].isdigit():
        return None
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 1440 + seconds / 60


def minutes_left() -> float | None:
    """Minutes that squeue says the job around us has left; None outside Slurm or without a limit."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%L"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # in a container there may be no squeue
        return None
    # The id of an array stands for all its tasks: the shortest time is safe.
    limits = [parse_time_left(line.strip()) for line in reply.stdout.splitlines()] if reply.returncode == 0 else []
    return min((minutes for minutes in limits if minutes is not None), default=None)


def stage_environment() -> dict[str, str]:
    """The environment of a stage's command: ours with the deadline of the Slurm job, unless a limit is set."""
    now = time.time()  # before squeue is asked, which may take its time
    if TIME_LIMIT in os.environ or DEADLINE in os.environ or (minutes := minutes_left()) is None:
        return dict(os.environ)
    return os.environ | {DEADLINE: f"{now + 60 * minutes:.0f}"}
