"""A group's own data through Snakemake: a test set, preferences next to collected comparisons, and bare prompts."""

import json
import subprocess
import sys

import pytest
import yaml

from tunetrail.files import read_jsonl, write_jsonl

from ..conftest import Project

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
CONFIG = {
    "run": "own",
    "seed": 1,
    "precision": "fp32",
    "base": {"source": "random", "hidden_size": 16, "layers": 1, "heads": 2},
    "data": {
        "demonstrations": [
            {"source": "file", "path": "answers.jsonl"},
            {"source": "file", "path": "official.jsonl", "split": "evaluation"},
        ],
        "preferences": [{"source": "file", "path": "pairs.jsonl"}],
        "prompts": [{"source": "file", "path": "prompts.jsonl"}],
        "duplicates": "drop",
        "shares": {"heldout": 0.2},
    },
    "sft": {"learning_rate": 1.0e-3, "batch_size": 4},
    "completions": {"per_prompt": 2, "max_new_tokens": 4, "shards": 1},
    "comparisons": {"labeler": "simulated", "scorer": "length"},
    "reward": {"learning_rate": 1.0e-3, "batch_size": 4},
    "policies": {"dpo": {"method": "dpo", "learning_rate": 1.0e-3, "batch_size": 8}},
    "retention": None,
    "evaluation": {"max_new_tokens": 4, "bootstrap": 100},
}


def prompt(i: int) -> str:
    return " ".join(WORDS[int(d)] for d in f"{i:05d}") + f" number {i}"


@pytest.fixture
def own(project: Project) -> Project:
    answers = [{"prompt": prompt(i), "completion": f"answer {i}"} for i in range(60)]
    rows = {
        "answers": answers,
        "official": [{"prompt": prompt(i), "completion": f"official {i}"} for i in range(55, 67)],  # 5 are leaked
        "pairs": [{"prompt": prompt(i), "chosen": "good", "rejected": "bad"} for i in range(100, 140)],
        "prompts": [{"prompt": prompt(i)} for i in range(200, 230)],
    }
    for name, content in rows.items():
        write_jsonl(project.folder / f"{name}.jsonl", content)
    (project.folder / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    return project


def test_an_edited_file_is_read_again(own):
    data = "results/own/data/manifest.json"
    own.run("--", data, config="own.yaml")
    answers = own.folder / "answers.jsonl"
    answers.write_text(answers.read_text().replace('"answer 30"', '"another"'))
    own.run("--", data, config="own.yaml")
    rows = [row for path in (own.folder / "results/own/data").glob("*.jsonl") for row in read_jsonl(path)]
    completions = [row["completion"] for row in rows if "completion" in row]
    assert "another" in completions
    assert "answer 30" not in completions


def test_own_and_collected_preferences_are_used_together_and_the_test_set_stays(own):
    own.run(config="own.yaml")
    results = own.folder / "results/own"

    def metrics(name: str) -> dict:
        return json.loads((results / name / "metrics.json").read_text())

    tested = read_jsonl(results / "evaluation/dpo/samples.jsonl")
    assert sorted(row["reference"] for row in tested) == sorted(f"official {i}" for i in range(55, 67))
    assert not {row["prompt"] for row in tested} & {row["prompt"] for row in read_jsonl(results / "data/sft.jsonl")}
    left_out = {out["reason"]: out["rows"] for out in metrics("data")["left_out"]}
    assert left_out == {"group_of_a_test_set": 5}

    uses = {(use["source"], use["split"]): use["rows"] for use in metrics("data")["uses"]}
    assert uses.pop(("official.jsonl", "evaluation")) == 12
    assert {source: sum(n for (name, _), n in uses.items() if name == source) for source, _ in uses} == {
        "answers.jsonl": 55, "pairs.jsonl": 40, "prompts.jsonl": 30,
    }  # fmt: skip
    assert ("pairs.jsonl", "sft") not in uses
    assert not any(split == "rl" for _, split in uses)

    ranked = read_jsonl(results / "comparisons/comparisons.jsonl")
    labelers = [row["rankings"][0]["labeler"] for row in ranked]
    assert labelers.count("recorded") == metrics("comparisons")["from_data"] == 40
    assert labelers.count("simulated-0") > 10
    trained = [row for row in ranked if row["split"] == "reward"]
    assert metrics("reward")["prompts"] == len(trained)
    assert metrics("policies/dpo")["pairs"] >= sum(row["rankings"][0]["labeler"] == "recorded" for row in trained)

    page = (results / "report/report.html").read_text(encoding="utf-8")
    assert "How rows are used" in page
    assert "Too few optimizer steps to learn from" in page


def test_the_plan_says_which_stage_reads_what_before_anything_runs(own):
    reply = subprocess.run(
        [sys.executable, "-m", "tunetrail", "plan", "--configfile", "own.yaml"],
        cwd=own.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert reply.returncode == 0, reply.stderr
    lines = [line.split("  ") for line in reply.stdout.splitlines()]
    table = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert table["reward"] == ["80%", "18%", "80%", "-", "at most 66", "reward, policies.dpo, completions"]
    assert table["rl"] == ["-", "-", "-", "-", "0", "-"]
    assert "Note: policies.dpo: at most 8 optimizer steps, fewer than 10" in reply.stdout
    assert not (own.folder / "results").exists()


def test_pairs_train_policies_without_a_reference(project):
    """ORPO from the base model, SimPO from the SFT model; both are evaluated and reported."""
    rows = [{"prompt": prompt(i), "chosen": "good", "rejected": "bad"} for i in range(120)]
    write_jsonl(project.folder / "own-pairs.jsonl", rows)
    trained = {"learning_rate": 1.0e-2, "batch_size": 8}
    content = {
        "run": "unreferenced",
        "base": CONFIG["base"],
        "data": {
            "preferences": [{"source": "file", "path": "own-pairs.jsonl"}], "sft_on_chosen": True,
            "near_duplicate": 1.0,
        },
        "sft": trained,
        "policies": {"orpo": trained | {"method": "orpo"}, "simpo": trained | {"method": "simpo"}},
        "retention": None,
        "evaluation": {"max_new_tokens": 4, "bootstrap": 100, "gold": None},
    }  # fmt: skip
    (project.folder / "unreferenced.yaml").write_text(yaml.safe_dump(content))
    project.run(config="unreferenced.yaml")
    results = project.folder / "results/unreferenced"

    def metrics(name: str) -> dict:
        return json.loads((results / name / "metrics.json").read_text())

    assert metrics("evaluation/orpo")["start"] == "base"
    assert metrics("evaluation/simpo").get("start") is None
    for name in ("orpo", "simpo"):
        assert metrics(f"policies/{name}")["pairs"] == 96
        found = metrics(f"evaluation/{name}")["comparisons"]
        assert (found["accuracy"]["mean"], found["measure"]) == (1, "log-prob per token")
    page = (results / "report/report.html").read_text(encoding="utf-8")
    told = "tells held-out preferred responses from others in 100% [100, 100] by log-prob per token"
    for said in (told, "orpo: log odds ratio", "simpo: margin"):
        assert said in page


def test_a_policy_can_be_trained_on_feedback_alone(project):
    """From a file of feedback to a report that says how well the policy tells liked from disliked responses."""
    rows = [{"prompt": prompt(i), "completion": "good" if i % 2 else "bad", "label": bool(i % 2)} for i in range(120)]
    write_jsonl(project.folder / "thumbs.jsonl", rows)
    policy = {"method": "kto", "learning_rate": 1.0e-2, "batch_size": 8, "epochs": 2, "checkpoints": 1}
    content = {
        "run": "rated",
        "base": CONFIG["base"],
        "data": {"feedback": [{"source": "file", "path": "thumbs.jsonl"}], "near_duplicate": 1.0},
        "policies": {"kto": policy},
        "retention": None,
        "evaluation": {"max_new_tokens": 4, "bootstrap": 100, "gold": None},
    }
    (project.folder / "rated.yaml").write_text(yaml.safe_dump(content))
    plan = subprocess.run(
        [sys.executable, "-m", "tunetrail", "plan", "--configfile", "rated.yaml"],
        cwd=project.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert ["reward", "80%", "at most 96", "policies.kto"] in [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in plan.stdout.splitlines()
    ]
    project.run(config="rated.yaml")
    results = project.folder / "results/rated"

    def metrics(name: str) -> dict:
        return json.loads((results / name / "metrics.json").read_text())

    trained = metrics("policies/kto")
    assert trained["liked"] + trained["disliked"] == 96
    assert trained["steps"] == 24
    told = metrics("evaluation/kto")["feedback"]
    assert told["accuracy"]["mean"] == 1
    assert told["accuracy"]["n"] == 12
    assert len(metrics("evaluation/kto")["frontier"]["points"]) == 2
    page = (results / "report/report.html").read_text(encoding="utf-8")
    assert "tells held-out liked responses from disliked ones in 100%" in page
    assert "kto: KL to its start" in page
