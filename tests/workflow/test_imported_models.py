"""Imported SFT, reward and scoring models through Snakemake: all later stages run, and a change of weights reruns
them."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import LlamaForSequenceClassification

from tunetrail.files import write_jsonl
from tunetrail.models.tiny import tiny_model, tiny_tokenizer

from ..conftest import Project

CONFIG = {
    "run": "own",
    "seed": 1,
    "precision": "fp32",
    "base": {"source": "random", "hidden_size": 16, "layers": 1, "heads": 2},
    "data": {"demonstrations": [{"source": "file", "path": "answers.jsonl"}], "duplicates": "drop"},
    "sft": {"path": "my-sft", "licence": "MIT"},
    "reward": {"path": "my-reward"},
    "scorers": {"judge": {"scorer": "reward_model", "path": "my-reward"}},
    "policies": {
        "ppo": {
            "method": "ppo", "steps": 2, "batch_size": 8, "max_new_tokens": 4, "missing_eos_score": None,
            "reward": {"reward_model": 1.0, "judge": 0.5},
        },
        "best-of-2": {"method": "best_of_n", "n": 2},
    },
    "retention": None,
    "evaluation": {"max_new_tokens": 4, "bootstrap": 100, "gold": ["chrf", "judge"]},
}  # fmt: skip


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def reward_model(seed: int) -> LlamaForSequenceClassification:
    config = tiny_model(16, 1, 2, len(tiny_tokenizer()), seed=0).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def test_imported_models_are_used_by_all_later_stages(project: Project):
    rows = [{"prompt": f"question {i} of {i * 37}", "completion": f"answer {i}"} for i in range(80)]
    write_jsonl(project.folder / "answers.jsonl", rows)
    (project.folder / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    save(tiny_model(16, 1, 2, len(tiny_tokenizer()), seed=3), project.folder / "my-sft")
    save(reward_model(1), project.folder / "my-reward")
    project.run(config="own.yaml")
    results = project.folder / "results/own"

    def metrics(name: str) -> dict:
        return json.loads((results / name / "metrics.json").read_text())

    assert metrics("reward")["direction"]["pairs"] > 20
    for name in ("base", "sft", "ppo", "best-of-2"):
        found = metrics(f"evaluation/{name}")
        assert found["reward"]["n"] > 0
        assert found["scores"]["judge"]["n"] == found["reward"]["n"]
    cards = {name: (results / name / "model/README.md").read_text() for name in ("sft", "reward", "policies/ppo")}
    for name in ("sft", "policies/ppo"):  # the base has no licence, and they were not made from it
        assert "license: mit" in cards[name]
        assert "taken from the local folder my-sft, sha256 `" in cards[name]
    assert "answers.jsonl" not in cards["sft"]  # it was only used to test the import
    assert "answers.jsonl" in cards["policies/ppo"]
    assert "license:" not in cards["reward"]
    assert 'AutoModelForSequenceClassification.from_pretrained(".")' in cards["reward"]
    export = [sys.executable, "-m", "tunetrail", "model", "export", "results/own/reward", "taken"]
    subprocess.run(export, cwd=project.folder, check=True, capture_output=True)
    exported, own = (
        LlamaForSequenceClassification.from_pretrained(project.folder / name) for name in ("taken", "my-reward")
    )
    assert torch.equal(exported.score.weight, own.score.weight)

    page = (results / "report/report.html").read_text(encoding="utf-8")
    assert "made 0 by its bias" not in page
    command = [sys.executable, "-m", "tunetrail", "audit", "verify", "--recursive", "results/own"]
    said = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr

    assert not set(project.pending(config="own.yaml")) - {"all"}
    reward_model(2).save_pretrained(project.folder / "my-reward")
    stale = project.pending(config="own.yaml")
    assert {"reward", "ppo", "best_of_n", "evaluation"} <= stale.keys()
    assert not {"base", "data", "sft"} & stale.keys()
    said = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "reward: import-moved: " in said.stdout
    assert "my-reward/model.safetensors is not what was read when this was made" in said.stdout
