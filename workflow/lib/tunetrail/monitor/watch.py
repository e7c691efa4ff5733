"""`tunetrail status --watch`: the stages of a run on a screen that follows it, from what the stages write anyway.

The DAG is built once, which takes Snakemake seconds; after that each update reads state folders and leases, in a
few milliseconds, and asks Slurm every `QUEUE_SECONDS`. Curves of running stages come from `progress.jsonl`, those of
ended ones from `history.jsonl`.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunetrail.contract.progress import FILE as PROGRESS_FILE
from tunetrail.contract.progress import duration, read_progress
from tunetrail.files import read_jsonl
from tunetrail.monitor.dag import Job
from tunetrail.monitor.status import (
    STATES,
    StageStatus,
    failed,
    failure_lines,
    group_name,
    grouped,
    shared,
    slurm_queue,
    stage_status,
    state_folder,
)
from tunetrail.terminal import escape

QUEUE_SECONDS = 10
BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = {"loss": "loss", "score": "reward", "kl": "KL"}
"""The curves: name in progress rows and histories -> name on the screen."""
Curve = dict[str, list[float]]


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Means of `width` equal parts of the values, the lowest as the lowest block; finite values only.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7]), sparkline([3.0, 3.0]), sparkline([1, 3, 8, 8], width=2)
    ('▁▂▃▄▅▆▇█', '▁▁', '▁█')
    """
    values = [value for value in values if math.isfinite(value)]
    parts = min(width, len(values))
    edges = [i * len(values) // parts for i in range(parts + 1)] if parts else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0), max(means, default=0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def reported(folder: Path) -> Curve:
    """The curves of a running stage, from the progress it has reported."""
    curve: Curve = {}
    for row in read_progress(folder / PROGRESS_FILE):
        for key, value in row["values"].items():
            curve.setdefault(key, []).append(value)
    return curve


def published(history: Path) -> Curve:
    """The curves of a stage that has ended."""
    rows = read_jsonl(history) if history.exists() else []
    curve = {key: [row[key] for row in rows if row.get(key) is not None] for key in CURVES}
    return {key: values for key, values in curve.items() if values}


@dataclass
class Watch:
    """A run that is being watched."""

    jobs: list[Job]
    rerun: str
    queue: dict[str, str] = field(default_factory=dict)
    _asked: float = -math.inf
    _seen: dict[str, int | None] = field(default_factory=dict)
    """Stage -> when its manifest was written, as of the first update."""
    _ended: dict[tuple[str, int | None], Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = {job.name: _written(job.manifest) for job in self.jobs}

    def _now(self) -> list[Job]:
        """The jobs without those whose artifact was made since, which are neither needed nor awaited any more."""
        made = {
            job.name for job in self.jobs if job.needed and _written(job.manifest) not in (None, self._seen[job.name])
        }
        return [
            replace(job, needed=job.needed and job.name not in made, after=tuple(n for n in job.after if n not in made))
            for job in self.jobs
        ]

    def look(self) -> list[tuple[StageStatus, Curve]]:
        """The status of every stage, with its curves."""
        if time.monotonic() - self._asked > QUEUE_SECONDS:
            self.queue, self._asked = slurm_queue(), time.monotonic()
        stages = []
        for job in self._now():
            where = stage_status(job, self.queue, self.rerun)
            folder = state_folder(job) if where.state == "running" else None
            curve: Curve = reported(folder) if folder else {}
            if where.state == "done":
                key = (job.name, _written(job.manifest))
                if key not in self._ended:
                    self._ended[key] = published(job.manifest.with_name("history.jsonl"))
                curve = self._ended[key]
            stages.append((where, curve))
        return stages

    def slurm(self, where: StageStatus) -> str:
        if where.slurm_job is None:
            return ""
        return f"{where.slurm_job} {self.queue.get(where.slurm_job, '').lower()}".strip()


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _curves(curve: Curve) -> Text:
    parts: list[str | tuple[str, str]] = []
    for key, label in CURVES.items():
        if values := curve.get(key):
            parts += [f"{label} ", (sparkline(values), "cyan"), f" {values[-1]:.3g}  "]
    return Text.assemble(*parts)


def screen(watch: Watch, found: list[tuple[StageStatus, Curve]], now: datetime, height: int = 40) -> Group:
    """The screen. If there are more stages than lines, finished stages share one."""
    crowded = len(found) > height - 8
    groups = grouped(found, lambda item: (item[0].rule, item[0].state))
    if crowded:
        done = [item for item in found if item[0].state == "done"]
        groups = ([done] if done else []) + [group for group in groups if group[0][0].state != "done"]
    slurm = any(watch.slurm(where) for where, _ in found)
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True, max_width=22)
    table.add_column("state", no_wrap=True, min_width=7)
    table.add_column("progress", width=12)
    table.add_column("", no_wrap=True, justify="right")
    table.add_column("rate", no_wrap=True, justify="right")
    table.add_column("left", no_wrap=True, justify="right")
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
    if slurm:
        table.add_column("Slurm", no_wrap=True)
    for group in groups:
        where, curve = group[0]
        alone, progress = len(group) == 1, where.progress
        name = (
            where.name
            if alone
            else f"done ({len(group)})"
            if crowded and where.state == "done"
            else group_name([w for w, _ in group])
        )
        told = _curves(curve) if alone else Text()
        if not told and where.state != "done":
            told = Text(escape(shared([w.detail for w, _ in group])), style="dim")
        cells: list[Text | ProgressBar | str] = [
            Text(escape(name)),
            Text(where.state, style=STATES[where.state]),
            "",
            "",
            "",
            "",
            told,
        ]
        if alone and progress:
            cells[2] = ProgressBar(total=progress["total"], completed=progress["done"], width=12)
            cells[3] = f"{progress['done']}/{progress['total']}"
            cells[4] = f"{progress['rate']:.3g} {progress['unit']}/s"
            cells[5] = "?" if where.left is None else duration(where.left)
        table.add_row(*cells, *([watch.slurm(where)] if slurm else []))
    counts = {state: sum(where.state == state for where, _ in found) for state in STATES}
    head = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    broken = [
        Text(escape(line), style="red" if i % 3 == 0 else "")
        for i, line in enumerate(failure_lines(failed([w for w, _ in found])))
    ]
    return Group(
        Text.assemble((head, "bold"), (f"   {now:%H:%M:%S}   Ctrl-C ends this screen and nothing else", "dim")),
        Text(),
        table,
        Text(),
        *broken,
    )


def follow(jobs: list[Job], rerun: str, seconds: float = 2.0) -> None:
    """Shows the run until it is done or the user stops. If the output is piped, shows it once."""
    watch, console = Watch(jobs, rerun), Console()
    if not console.is_terminal:
        console.print(screen(watch, watch.look(), datetime.now(), height=10**6))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                stages = watch.look()
                live.update(screen(watch, stages, datetime.now(), console.height), refresh=True)
                if all(where.state == "done" for where, _ in stages):
                    break
                time.sleep(seconds)
    except KeyboardInterrupt:
        pass
    console.print(screen(watch, watch.look(), datetime.now(), height=10**6))
