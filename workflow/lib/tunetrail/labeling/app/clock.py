"""The clock for leases and sessions: it only moves forward, at a steady pace."""

import time


class Clock:
    """Seconds since the epoch, unaffected by changes of the machine's clock.

    It is read once when a store is opened and counts on from there, so it may differ from the machine's clock.
    """

    def __init__(self, start: float):
        self.start, self.since = start, time.monotonic()

    def now(self) -> float:
        return self.start + time.monotonic() - self.since
