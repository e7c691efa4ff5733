"""Progress that people watch: a bar on a terminal, a line every so often in a log, and rows in the state folder."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tunetrail.files import whole_rows

log = logging.getLogger("tunetrail")


def duration(seconds: float) -> str:
    """
    >>> duration(3725)
    '1:02:05'
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress(TypedDict):
    """The progress of a stage: a row of `progress.jsonl` in its state folder."""

    time: str
    """ISO 8601 with time zone."""
    label: str
    done: int
    total: int
    unit: str
    rate: float
    """Units per second."""
    left: float | None
    """Seconds to the end; null before the first piece."""
    values: dict[str, float]
    """Named numbers such as loss, score and kl."""
    note: str


FILE = "progress.jsonl"
_file: Path | None = None


def write_to(path: Path | None) -> None:
    """Sets where this process writes progress; None: nowhere. The contract calls it."""
    global _file
    _file = path


def read_progress(path: Path) -> list[Progress]:
    """The complete rows of a progress file, oldest first; a full disk may have truncated some."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return whole_rows(lines, *Progress.__required_keys__)
    except OSError:
        return []


class ProgressBar:
    """Counts `total` units of work, with rate and time left.

    A context manager: call `advance` after each piece. `done` units may already be finished (a resumed stage); they do
    not count in the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, every_seconds: float = 15.0):
        self.label, self.total, self.unit, self.every = label, total, unit, every_seconds
        self.done = self.first = done
        self.start = self.printed = time.monotonic()
        self.bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = RichProgress(*columns, console=Console(stderr=True))
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

    def advance(self, n: int = 1, note: str = "", values: Mapping[str, float] | None = None) -> None:
        """Counts `n` more units.

        Args:
            note: for people.
            values: for curves: loss, score, kl.
        """
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=f"{rate:.3g} {self.unit}/s  {note}")
        if now - self.printed >= self.every or self.done >= self.total:
            self.printed = now
            seconds_left = (self.total - self.done) / rate if rate > 0 else None
            if not self.bar:
                shown = "?" if seconds_left is None else duration(seconds_left)
                text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {shown} left  {note}"
                log.info("%s", text)
            self._write(rate, seconds_left, note, values or {})

    def _write(self, rate: float, left: float | None, note: str, values: Mapping[str, float]) -> None:
        if _file is None:
            return
        row: Progress = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "label": self.label,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": rate,
            "left": left,
            "values": dict(values),
            "note": note,
        }
        try:
            with _file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError:  # a full disk: the stage will report it where it matters
            return
