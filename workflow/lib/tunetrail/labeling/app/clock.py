"""The time by which leases and sessions end: it goes forward only, at an even pace."""

import time


class Clock:
    """Seconds since the epoch. Setting the machine's clock moves it neither back nor ahead.

    Read once when a store is opened and counted on from there, it may differ from the machine's clock.
    """

    def __init__(self, start: float):
        self.start, self.since = start, time.monotonic()

    def now(self) -> float:
        return self.start + time.monotonic() - self.since
