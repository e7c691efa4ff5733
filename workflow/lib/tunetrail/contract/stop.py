"""When a stage saves and when it leaves."""

import math
import os
import signal
import subprocess
import time
from typing import Any

from tunetrail.contract.distributed import of_all_processes
from tunetrail.contract.lease import Lease, lease_seconds
from tunetrail.errors import ConfigError, Displaced, Interrupted

ANOTHER = "another attempt of this stage"
LOST = "lost"


def _minutes(variable: str) -> float | None:
    """An environment variable in minutes; None where it is not set. Raises ConfigError."""
    if not (text := os.environ.get(variable)):
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise ConfigError(f"{variable}: must be a number of minutes, 0 or more, got {text!r}")
    return minutes


def _minutes_left() -> float | None:
    """Minutes the allocation has left: $TUNETRAIL_TIME_LIMIT (minutes from now), or what Slurm says; None: no limit."""
    limit, job = _minutes("TUNETRAIL_TIME_LIMIT"), os.environ.get("SLURM_JOB_ID")
    if limit is not None or job is None:
        return limit
    try:
        reply = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):  # in a container there may be no squeue
        return None
    # An array's first id names all its tasks: the shortest time is safe.
    left = [parse_time_left(line.strip()) for line in reply.stdout.splitlines()] if reply.returncode == 0 else []
    return min((minutes for minutes in left if minutes is not None), default=None)


def parse_time_left(text: str) -> float | None:
    """Slurm's time left (`D-HH:MM:SS`, `HH:MM:SS`, `MM:SS`) in minutes; None where there is no limit.

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


class Stop:
    """Says when to save and when to leave: on SIGTERM, before the allocation's time is over, or for another attempt.

    `save_due()` is asked after each step; `$TUNETRAIL_CHECKPOINT_MINUTES` (default 10; 0: after every
    step) spaces the saves. Saving never changes a result, so neither does the spacing. The processes of a stage
    answer alike, since they save and leave together: what one was told holds for all. Where another attempt has taken
    over, asking raises Displaced in all of them, before anything is saved.
    """

    def __init__(self) -> None:
        left = _minutes_left()
        self.deadline = None if left is None else time.monotonic() + 60 * max(left * 0.9, left - 5)
        minutes = _minutes("TUNETRAIL_CHECKPOINT_MINUTES")
        self.interval = 60 * (10 if minutes is None else minutes)
        self.last_save = time.monotonic()
        self.reason: str | None = None
        self.leases: list[Lease] = []
        self.asked = self.looked = -math.inf
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.reason = self.reason or signal.Signals(signum).name

    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "time limit"
        if self.reason is None and self.leases and time.monotonic() - self.asked >= 1:
            self.asked = time.monotonic()
            if who := next(filter(None, (lease.wanted_by() for lease in self.leases)), None):
                self.reason = f"{ANOTHER} ({who})"
        # As often as the lease is renewed: it costs the file server a new file.
        if self.leases and time.monotonic() - self.looked >= lease_seconds() / 6:
            self.looked = time.monotonic()
            if any(lease.lost() for lease in self.leases):
                self.reason = LOST
        agreed = next((reason for reason in of_all_processes(self.reason) if reason), None)
        if agreed:  # else a signal may have come meanwhile, and all answer to it the next time
            self.reason = agreed
        if agreed == LOST:
            raise Displaced("another attempt has taken over while this one was silent; it goes on, this one ends")
        return agreed is not None

    def interruption(self, progress: str) -> Interrupted:
        """What to raise once `requested`, where all progress is on disk."""
        if str(self.reason).startswith(ANOTHER):
            return Displaced(f"stopped for {self.reason} {progress}; progress is saved, and it goes on")
        return Interrupted(f"stopped by {self.reason} {progress}; progress is saved, run the same command again")

    def save_due(self) -> bool:
        due = time.monotonic() - self.last_save >= self.interval
        return self.requested() or any(of_all_processes(due))

    def saved(self) -> None:
        self.last_save = time.monotonic()

    def leave_if_requested(self, progress: str) -> None:
        """Raises Interrupted. Call it where all progress is on disk."""
        if self.requested():
            raise self.interruption(progress)
