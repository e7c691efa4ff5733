"""Progress that people watch: a bar on a terminal, one line every so often in a log file."""

import logging
import re
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("tunetrail")


def duration(seconds: float) -> str:
    """
    >>> duration(3725)
    '1:02:05'
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def seconds(text: str) -> int:
    """
    >>> seconds("1:02:05")
    3725
    """
    total = 0
    for part in text.split(":"):
        total = total * 60 + int(part)
    return total


@dataclass(frozen=True)
class ProgressLine:
    """How far a stage is: `str` writes the line of its log, `parse` reads it."""

    label: str
    done: int
    total: int
    unit: str
    rate: float
    """Units a second."""
    left: float | None
    """Seconds to the end; None before the first piece."""
    note: str = ""

    def __str__(self) -> str:
        left = "?" if self.left is None else duration(self.left)
        return f"{self.label}: {self.done}/{self.total} {self.unit}, {self.rate:.3g}/s, {left} left  {self.note}"


_LINE = re.compile(
    r"(?P<label>[^:]+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>[^,]+), (?P<rate>[\d.e+-]+)/s, (?P<left>[\d:]+|\?) left *(?P<note>.*)"
)


def parse(line: str) -> ProgressLine | None:
    """The progress that a line tells, without what a log writes before it; None where it tells none."""
    if not (found := _LINE.fullmatch(line)):
        return None
    left = None if found["left"] == "?" else seconds(found["left"])
    return ProgressLine(
        found["label"],
        int(found["done"]),
        int(found["total"]),
        found["unit"],
        float(found["rate"]),
        left,
        found["note"],
    )


class ProgressBar:
    """Counts `total` units of work, with rate and time left.

    Used as a context manager; `advance(n, note)` after each piece. `done` units may already be
    finished (a resumed stage); they do not count in the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, every_seconds: float = 15.0):
        self.label, self.total, self.unit, self.every = label, total, unit, every_seconds
        self.done = self.first = done
        self.start = self.printed = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=f"{rate:.3g} {self.unit}/s  {note}")
        elif now - self.printed >= self.every or self.done >= self.total:
            self.printed = now
            left = (self.total - self.done) / rate if rate > 0 else None
            log.info("%s", ProgressLine(self.label, self.done, self.total, self.unit, rate, left, note))
