"""The cost of planning: `tunetrail plan`, and the bare dry run inside it, for 2,000 sampling shards and 50 policies.

    python -m tests.benchmarks.planning

A separate small process, since the reported peak of a command is never less than that of its parent process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.conftest import Project
from tests.records import seal_folder
from tunetrail.provenance.environment import packages

RUN = ["--profile", "profiles/local", "--configfile", "large.yaml"]
COMMANDS = {
    "plan": [sys.executable, "-m", "tunetrail", "plan", *RUN],
    "dry_run": [sys.executable, "-m", "snakemake", *RUN, "--dry-run", "--quiet", "all"],
}


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Wall-clock seconds, CPU seconds and peak bytes of a command."""
    start = time.perf_counter()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: {(folder / 'output').read_text()[-2000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def large(folder: Path, shards: int, policies: int) -> None:
    """A copy of the project with a config of that size, large.yaml."""
    project = Project(folder)
    config = yaml.safe_load((project.folder / "config/examples/tiny.yaml").read_text())
    config["completions"]["shards"] = shards
    config["policies"] = {
        f"dpo-{i}": {"method": "dpo", "batch_size": 8, "beta": (i + 1) / 100} for i in range(policies)
    }
    (folder / "large.yaml").write_text(yaml.safe_dump(config))


def make(folder: Path) -> int:
    """Puts a made-up artifact with a record wherever the run would make one; returns how many.

    All have the same time except sft, which is newer, so everything made from it must be made again.
    """
    command = [sys.executable, "-m", "snakemake", *RUN, "--summary"]
    summary = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    outputs = [folder / line.split("\t")[0] for line in summary.splitlines()[1:]]
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    manifests = [path for path in outputs if path.name == "manifest.json"]
    for path in manifests:
        path.unlink()
        seal_folder(path.parent, path.parent.name, installed=packages())
    for path in outputs:
        os.utime(path, (1, 2 if path.parent.name == "sft" else 1))
    return len(manifests)


def planning(shards: int = 2000, policies: int = 50) -> dict:
    """Costs of both commands before anything is made (`new`), and with everything made and most of it stale
    (`stale`)."""
    found: dict = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large(folder, shards, policies)
        found |= {f"{command}_new": measured(words, folder) for command, words in COMMANDS.items()}
        found["artifacts"] = make(folder)
        found |= {f"{command}_stale": measured(words, folder) for command, words in COMMANDS.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(planning()))
