"""Decides when a stage saves and when it leaves."""

import math
import os
import signal
import time
from typing import Any

from tunetrail.contract.distributed import of_all_processes
from tunetrail.contract.lease import Lease, lease_seconds
from tunetrail.errors import ConfigError, Interrupted, Superseded

TIME_LIMIT = "TUNETRAIL_TIME_LIMIT"
"""Environment variable: how many minutes a stage may take, from its start."""
DEADLINE = "TUNETRAIL_DEADLINE"
"""Environment variable: when the allocation ends, in seconds since 1970."""
TAKEOVER = "another attempt of this stage"
LEASE_LOST = "lease lost"


def number_from(variable: str, unit: str) -> float | None:
    """An environment variable as a number of `unit`; None if it is not set. Raises ConfigError."""
    if not (text := os.environ.get(variable)):
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"{variable}: must be a number of {unit}, 0 or more, got {text!r}")
    return number


def seconds_left() -> float | None:
    """Seconds until the earlier of $TUNETRAIL_TIME_LIMIT and $TUNETRAIL_DEADLINE; None without either.

    The deadline is in wall-clock time, which processes and nodes share: the time that the interpreter, imports or srun
    took to start counts against it.
    """
    minutes, end = number_from(TIME_LIMIT, "minutes"), number_from(DEADLINE, "seconds since 1970")
    limits = [60 * minutes] if minutes is not None else []
    return min(limits + ([end - time.time()] if end is not None else []), default=None)


class Stop:
    """Says when to save and when to leave: on SIGTERM, before the time limit, or for another attempt.

    Stages ask `save_due()` after each step. `$TUNETRAIL_CHECKPOINT_MINUTES` (default 10; 0: after every step) spaces
    the saves; saving never changes a result, and neither does the spacing. A stage leaves five minutes before
    `seconds_left` are over, or a tenth of them if that is less. `tunetrail.launch` sets `$TUNETRAIL_DEADLINE`.

    All processes of a stage give the same answer, since they save and leave together: a signal to one holds for all. If
    another attempt has taken over, `requested` raises Superseded in all of them before anything is saved.
    """

    def __init__(self) -> None:
        remaining = seconds_left()
        self.deadline = None if remaining is None else time.monotonic() + max(remaining * 0.9, remaining - 300)
        minutes = number_from("TUNETRAIL_CHECKPOINT_MINUTES", "minutes")
        self.interval = 60 * (10 if minutes is None else minutes)
        self.last_save = time.monotonic()
        self.reason: str | None = None
        self.leases: list[Lease] = []
        self.last_request_check = self.last_lease_check = -math.inf
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.reason = self.reason or signal.Signals(signum).name

    def requested(self) -> bool:
        """Whether to save and leave. Raises Superseded if another attempt has taken over."""
        now = time.monotonic()
        if self.reason is None and self.deadline is not None and now >= self.deadline:
            self.reason = "time limit"
        if self.reason is None and self.leases and now - self.last_request_check >= 1:
            self.last_request_check = now
            if who := next(filter(None, (lease.requested_by() for lease in self.leases)), None):
                self.reason = f"{TAKEOVER} ({who})"
        # Not more often than the lease is renewed: each check costs the file server a new file.
        if self.leases and now - self.last_lease_check >= lease_seconds() / 6:
            self.last_lease_check = now
            if any(lease.lost() for lease in self.leases):
                self.reason = LEASE_LOST
        agreed = next((reason for reason in of_all_processes(self.reason) if reason), None)
        if agreed:  # a signal that came in the meantime takes effect in all processes the next time
            self.reason = agreed
        if agreed == LEASE_LOST:
            raise Superseded("another attempt has taken over while this one was silent; it goes on, this one ends")
        return agreed is not None

    def interruption(self, progress: str) -> Interrupted:
        """What to raise once `requested`, when all progress is on disk."""
        if str(self.reason).startswith(TAKEOVER):
            return Superseded(f"stopped for {self.reason} {progress}; progress is saved, and it goes on")
        return Interrupted(f"stopped by {self.reason} {progress}; progress is saved, run the same command again")

    def save_due(self) -> bool:
        due = time.monotonic() - self.last_save >= self.interval
        return self.requested() or any(of_all_processes(due))

    def saved(self) -> None:
        self.last_save = time.monotonic()

    def leave_if_requested(self, progress: str) -> None:
        """Call when all progress is on disk. Raises Interrupted if the stage was told to leave."""
        if self.requested():
            raise self.interruption(progress)
