"""The evaluation harness as a stage: its message without the package, its table, and (if installed) a task of the
user's own.
"""

import importlib.util
import json

import pytest

from tunetrail.config.evaluation import LmEvalConfig
from tunetrail.contract.runner import main
from tunetrail.files import write_json
from tunetrail.provenance.record import read_record
from tunetrail.stages import lm_eval

from .test_training import write_workspace

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs the stage on a tiny base model: (exit code, stderr, metrics)."""
    write_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)

    def of(**block):
        write_json(
            tmp_path / "c.json",
            {"stage": "lm_eval", "seed": 1, "precision": "fp32", "subject": "base", "config": block},
        )
        code = main(
            lm_eval.run,
            ["--config=c.json", "--input=model=base/manifest.json", "--output=out/manifest.json", "--state=state"],
        )
        metrics = tmp_path / "out/metrics.json"
        return code, capfd.readouterr().err, json.loads(metrics.read_text()) if metrics.exists() else None

    return of


def test_without_the_package_there_is_one_clear_line(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, error, _ = run(tasks=["arc_easy"])
    assert code == 78
    assert [line for line in error.splitlines() if "lm_eval.tasks" in line] == [
        "c: error: lm_eval.tasks: the package lm-eval is not installed; run `pip install lm-eval`, or set lm_eval to "
        "null"
    ]
    assert "Traceback" not in error


def test_the_table_has_a_row_for_each_task_and_metric():
    results = {
        "results": {
            "b": {"alias": "b", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75,
                "acc_norm_stderr,none": 0.09},
        },
        "n-samples": {"a": {"original": 30, "effective": 20}},
        "higher_is_better": {"a": {"acc": True}},
    }  # fmt: skip
    assert lm_eval.table(results) == [
        {"task": "a", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 20, "higher_is_better": True},
        {"task": "a", "metric": "acc_norm", "value": 0.75, "stderr": 0.09, "n": 20, "higher_is_better": None},
        {"task": "b", "metric": "exact_match "
                                "(strict-match)", "value": 0.25, "stderr": None, "n": None, "higher_is_better": None},
    ]  # fmt: skip


def test_the_files_of_user_tasks_exclude_caches(tmp_path):
    for name in ("b/own.yaml", "a.py", "b/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    own = LmEvalConfig(tasks=["own"], include_path=tmp_path).own_files()
    assert own == [tmp_path / "a.py", tmp_path / "b/own.yaml"]
    assert LmEvalConfig(tasks=["arc_easy"]).own_files() == []


def test_a_user_task(run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"count {i}:", "choices": ["x", "y"], "answer": i % 2} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks/own.yaml").write_text(TASK.format(name="own", data=tmp_path / "rows.jsonl"))
    code, error, metrics = run(tasks=["own"], include_path="tasks", limit=8)
    assert code == 0, error
    (row,) = metrics["tasks"]
    assert (metrics["subject"], row["task"], row["metric"], row["n"]) == ("base", "own", "acc", 8)
    assert row["value"] * 8 == int(row["value"] * 8)
    assert row["stderr"] > 0
    (source,) = read_record(tmp_path / "out").of_role("tasks")
    assert source["annotations"]["files"].keys() == {"../tasks/own.yaml"}
    before = (tmp_path / "out/manifest.json").read_bytes()
    assert run(tasks=["own"], include_path="tasks", limit=8)[0] == 0
    assert (tmp_path / "out/manifest.json").read_bytes() == before
    code, error, _ = run(tasks=["own", "no_such_task"], include_path="tasks")
    assert code == 78
    assert "lm_eval.tasks: the harness knows no no_such_task" in error
