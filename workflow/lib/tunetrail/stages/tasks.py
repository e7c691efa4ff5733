"""Tasks for people: the completions to rank if `comparisons.labeler` is human.

    python -m tunetrail.stages.tasks --config C.json --input shard0=…/manifest.json \\
        --output results/RUN/tasks/manifest.json --state state/RUN/tasks

Writes `tasks.jsonl` (`Task`), sorted by (split, id), with gold tasks last. The prompt of a task is what the user wrote,
or the conversation with its speakers, without the chat template. A task does not reveal which model wrote what.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import cast

from tunetrail.contract.stage import Stage
from tunetrail.data.chat import shown_prompt
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl
from tunetrail.labeling.tasks import Task, checked_task, read_tasks
from tunetrail.preferences.rows import SampledRow
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency
from tunetrail.stages.comparisons import comparable, gather
from tunetrail.stages.registry import start


def read_gold(path: Path) -> list[Task]:
    """The gold tasks of a file. Raises DataError."""
    tasks = read_tasks(path)
    if plain := next((task for task in tasks if task["gold"] is None), None):
        raise DataError(f"{path}: task {plain['id']!r} has no gold; give every task of this file its ranks")
    return tasks


def as_task(row: SampledRow) -> Task:
    task = {
        "id": row["id"],
        "prompt": shown_prompt(cast(list[dict], row["messages"])),
        "completions": row["completions"],
        "split": row["split"],
    }
    return checked_task(task, f"completions: row {row['id']}")


def run(stage: Stage) -> dict:
    tasks = [as_task(row) for row in comparable(gather(stage))]
    gold = read_gold(Path(stage.config["gold"])) if stage.config["gold"] else []
    write_jsonl(stage.work / "tasks.jsonl", cast(list[dict], tasks + gold))
    if gold:
        path = stage.config["gold"]
        digest = sha256_file(Path(path))
        stage.draft.dependencies.append(dependency("gold", path, digest, files={path: digest}))
    return {"tasks": len(tasks), "gold": len(gold), "by_split": dict(Counter(task["split"] for task in tasks))}


if __name__ == "__main__":
    sys.exit(start("tasks", run))
