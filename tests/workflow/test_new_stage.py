"""What a new stage takes: its module, its block of the config, its rule and its line in the table. Nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

LIBRARY = Path("workflow/lib/tunetrail")
MODULE = '''"""Counts the prompts of a split."""

import sys

from tunetrail.contract.stage import Stage
from tunetrail.files import write_json
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    rows = stage.rows("data", f"{stage.config['split']}.jsonl")
    write_json(stage.work / "count.json", len(rows))
    return {"rows": len(rows)}


if __name__ == "__main__":
    sys.exit(start("count", run))
'''
BLOCK = '''class CountConfig(Block):
    """Counts rows."""

    split: Text = Field(default="sft", description="which split")


class Config(Block):
    count: CountConfig | None = Field(default=None, description="counts rows; null: not")
'''
LINE = '_TABLE = (\n    StageInfo("count", lambda c, _: {"data": "data"}, "measurement", runs_model=False),\n'
RULE = """

use rule stage as count with:
    pathvars:
        artifact="count",
    input:
        unpack(reads("count")),
    localrule: is_submitted("count")
"""


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1, path
    path.write_text(content.replace(old, new))


def test_a_new_stage_is_known_everywhere(project):
    folder = project.folder
    (folder / LIBRARY / "stages/count.py").write_text(MODULE)
    replace(folder / LIBRARY / "config/run.py", "class Config(Block):\n", BLOCK)
    replace(folder / LIBRARY / "stages/registry.py", "_TABLE = (\n", LINE)
    with (folder / "workflow/rules/evaluation.smk").open("a") as rules:
        rules.write(RULE)
    config = yaml.safe_load((folder / "config/examples/tiny.yaml").read_text())
    (folder / "new.yaml").write_text(yaml.safe_dump(config | {"count": {"split": "rl"}}))

    assert project.pending(config="new.yaml")["count"] == 1
    output = project.run("results/tiny/count/manifest.json", config="new.yaml")
    assert "rule count:" in output
    rows = (folder / "results/tiny/data/rl.jsonl").read_text().splitlines()
    assert json.loads((folder / "results/tiny/count/count.json").read_text()) == len(rows)

    def ask(*words: str) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": str(folder / "workflow/lib"), "PATH": str(Path(sys.executable).parent)}
        command = [sys.executable, "-m", "tunetrail", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    # The report gets it, the audit knows its config, a key of its block reruns it alone.
    code = (
        "from tunetrail.config.loading import load; from pathlib import Path\n"
        "from tunetrail.stages.registry import STAGES, config_name, enabled\n"
        "config = load(Path('new.yaml'))\n"
        "print('count' in enabled(config), STAGES['report'].inputs(config, '')['count'], config_name('count'))"
    )
    known = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": str(folder / "workflow/lib")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert known.stdout.split() == ["True", "count", "count"]
    assert ask("audit", "seal", "results/tiny").returncode == 0
    (folder / "results/tiny/config/count.json").write_text(
        '{"config": {"split": "sft"}, "seed": 0, "stage": "count"}\n'
    )
    verified = ask("audit", "verify", "results/tiny/count")
    assert "config-drift" in verified.stdout, verified.stdout + verified.stderr
    status = ask("status", "--configfile", "new.yaml", "--json")
    assert {"count"} <= {stage["name"] for stage in json.loads(status.stdout)}, status.stderr
