"""Tasks for people: what labelers are to rank, where `comparisons.labeler` is human.

    python -m tunetrail.stages.tasks --config C.json --input base=…/manifest.json \\
        --input shard0=…/manifest.json --output results/RUN/tasks/manifest.json --state state/RUN/tasks

Writes `tasks.jsonl`, sorted by (split, id), gold tasks last; `tunetrail.labeling.app.store.checked_task` says what a
task is. The prompt is what the user said, or who said what where there is more, without the chat template around it. Which model wrote what is not in it.
"""

import sys
from collections import Counter
from pathlib import Path

from tunetrail.contract import Stage, main, write_jsonl
from tunetrail.errors import DataError
from tunetrail.labeling.app.store import checked_task, read_tasks
from tunetrail.labeling.prompts import chat_turn, shown_prompt
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import dependency
from tunetrail.stages.comparisons import comparable, gather


def read_gold(path: Path) -> list[dict]:
    """The gold tasks of a file. Raises DataError."""
    tasks = read_tasks(path)
    if plain := next((task for task in tasks if task["gold"] is None), None):
        raise DataError(f"{path}: task {plain['id']!r} has no gold; give every task of this file its ranks")
    return tasks


def run(stage: Stage) -> dict:
    turn = chat_turn(stage.inputs["base"])
    tasks = [
        {"id": row["id"], "prompt": shown_prompt(row["prompt"], turn), "completions": row["completions"], "split": row["split"]}
        for row in comparable(gather(stage))
    ]  # fmt: skip
    tasks = [checked_task(task, f"completions: row {task['id']}") for task in tasks]
    gold = read_gold(Path(stage.config["gold"])) if stage.config["gold"] else []
    write_jsonl(stage.work / "tasks.jsonl", tasks + gold)
    if gold:
        path = stage.config["gold"]
        digest = sha256_file(Path(path))
        stage.dependencies.append(dependency("gold", path, digest, files={path: digest}))
    return {"tasks": len(tasks), "gold": len(gold), "by_split": dict(Counter(task["split"] for task in tasks))}


if __name__ == "__main__":
    sys.exit(main(run))
