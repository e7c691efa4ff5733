"""A new stage needs a module, a block in the config, a rule and a line in the table, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tunetrail.files import canonical_json

LIBRARY = Path("workflow/lib/tunetrail")
MODULE = '''"""Counts the prompts of a split."""

import sys

from tunetrail.contract.stage import Stage
from tunetrail.files import write_json
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    rows = stage.rows("data", f"{stage.config['split']}.jsonl")
    write_json(stage.work / "tally.json", len(rows))
    return {"rows": len(rows)}


if __name__ == "__main__":
    sys.exit(start("tally", run))
'''
BLOCK = '''class TallyConfig(Block):
    """Counts rows."""

    split: str = Field(default="sft", description="which split")


class Config(Block):
    tally: TallyConfig | None = Field(default=None, description="counts rows; null: not")
'''
LINE = '_TABLE = (\n    StageInfo("tally", lambda c, _: {"data": "data"}, "measurement", runs_model=False),\n'
RULE = """

use rule stage as tally with:
    pathvars:
        artifact="tally",
    input:
        unpack(reads("tally")),
    localrule: is_submitted("tally")
"""


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert content.count(old) == 1, path
    path.write_text(content.replace(old, new))


def test_a_new_stage_is_known_everywhere(edited_project, monkeypatch):
    project, folder = edited_project, edited_project.folder
    monkeypatch.setenv("PYTHONPATH", str(folder / LIBRARY.parent))
    (folder / LIBRARY / "stages/tally.py").write_text(MODULE)
    replace(folder / LIBRARY / "config/run.py", "class Config(Block):\n", BLOCK)
    replace(folder / LIBRARY / "stages/registry.py", "_TABLE = (\n", LINE)
    with (folder / "workflow/rules/evaluation.smk").open("a") as rules:
        rules.write(RULE)
    config = yaml.safe_load((folder / "config/examples/tiny.yaml").read_text())
    (folder / "new.yaml").write_text(yaml.safe_dump(config | {"tally": {"split": "rl"}}))

    assert project.pending(config="new.yaml")["tally"] == 1
    output = project.run("--", "results/tiny/tally/manifest.json", config="new.yaml")
    assert "rule tally:" in output
    rows = (folder / "results/tiny/data/rl.jsonl").read_text().splitlines()
    assert json.loads((folder / "results/tiny/tally/tally.json").read_text()) == len(rows)

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout

    # The report gets it, the audit knows its config, and a key of its block reruns only this stage.
    code = (
        "from tunetrail.config.loading import load; from pathlib import Path\n"
        "from tunetrail.stages.registry import STAGES, config_name, enabled\n"
        "config = load(Path('new.yaml'))\n"
        "print('tally' in enabled(config), STAGES['report'].inputs(config, '')['tally'], config_name('tally'))"
    )
    assert python("-c", code).split() == ["True", "tally", "tally"]
    python("-m", "tunetrail", "audit", "seal", "results/tiny")
    changed = {"stage": "tally", "seed": 0, "config": {"split": "sft"}}
    (folder / "results/tiny/config/tally.json").write_text(canonical_json(changed) + "\n")
    assert "config-drift" in python("-m", "tunetrail", "audit", "verify", "results/tiny/tally")
    status = json.loads(python("-m", "tunetrail", "status", "--configfile", "new.yaml", "--json"))
    assert "tally" in {stage["name"] for stage in status}
