"""The held-out loss along training and early stopping: what is measured, which weights are kept, exact resumption."""
# ruff: noqa: F811 (fixtures of another module)

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunetrail.files import read_jsonl
from tunetrail.models.batching import encode, encode_comparison, encode_response
from tunetrail.models.heldout import BEST
from tunetrail.models.loading import load_causal_lm, load_reward_model
from tunetrail.models.supervised import tokenize
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.reporting.collect import Artifact, Run
from tunetrail.reporting.curves import CURVES
from tunetrail.reporting.page import banners

from .test_training import STAGES, log_sigmoid, logp, run_stage, tokenizer_of, workspace, write_artifact  # noqa: F401

pytestmark = pytest.mark.slow

POLICIES = ("dpo", "dpo-lora", "orpo", "kto", "kto-lora")
PLAIN = {"epochs": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}


def block(name: str, **changes) -> dict:
    return PLAIN | ({"checkpoints": 0} if name in POLICIES else {}) | changes


def trained(run_stage, name: str, state: str, **changes) -> Path:
    """The folder of an artifact."""
    code, error, output = run_stage(name, state, config=block(name, **changes))
    assert code == 0, error
    return output.parent


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def losses_of(folder: Path) -> dict[int, float]:
    rows = read_jsonl(folder / "history.jsonl")
    return {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}


# ----------------------------------------------------------------------------- the loss, by plain passes


def pairs(workspace: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of the held-out comparisons."""
    found = []
    for row in read_jsonl(workspace / "comparisons/comparisons.jsonl"):
        prompt, responses = encode_comparison(tiny_tokenizer(), row)
        if row["split"] == "heldout":
            found += [(prompt, responses[w], responses[v]) for w, v in ((0, 1), (0, 2), (1, 2))]
    return found


def sft_loss(workspace: Path, model, reference) -> float:
    nlls = []
    for example in tokenize(read_jsonl(workspace / "data/heldout.jsonl"), tiny_tokenizer(), 1024, "sft"):
        logprobs = model(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        nlls += [-logprobs[i - 1, label].item() for i, label in enumerate(example["labels"]) if label != -100]
    return float(np.mean(nlls))


def dpo_loss(workspace: Path, model, reference) -> float:
    def gained(prompt: list[int], response: list[int]) -> float:
        return logp(model, prompt, response) - logp(reference, prompt, response)

    return -float(np.mean([log_sigmoid(0.1 * (gained(p, w) - gained(p, v))) for p, w, v in pairs(workspace)]))


def orpo_loss(workspace: Path, model, reference) -> float:
    losses = []
    for prompt, *responses in pairs(workspace):
        p, q = (math.exp(logp(model, prompt, r) / len(r)) for r in responses)
        losses.append(-math.log(p) - 0.1 * log_sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q))))
    return float(np.mean(losses))


def kto_loss(workspace: Path, model, reference) -> float:
    tokenizer = tiny_tokenizer()
    rows = [
        (encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"]), rating["label"])
        for row in read_jsonl(workspace / "data/feedback.jsonl") if row["split"] == "heldout"
        for rating in row["ratings"]
    ]  # fmt: skip

    def gained(prompt: list[int], response: list[int]) -> float:
        return logp(model, prompt, response) - logp(reference, prompt, response)

    others = [rows[(i + len(rows) // 2) % len(rows)][1] for i in range(len(rows))]
    kl = max(0.0, float(np.mean([gained(row[0], other) for row, other in zip(rows, others, strict=True)])))
    signs = [(1 if liked else -1, gained(prompt, response)) for prompt, response, liked in rows]
    return float(np.mean([1 - 1 / (1 + math.exp(-0.1 * sign * (x - kl))) for sign, x in signs]))


def reward_loss(workspace: Path, model, reference) -> float:
    def score(prompt: list[int], response: list[int]) -> float:
        return model(torch.tensor([prompt + response])).logits.item()

    return -float(np.mean([log_sigmoid(score(p, w) - score(p, v)) for p, w, v in pairs(workspace)]))


LOSSES = {"sft": sft_loss, "dpo": dpo_loss, "orpo": orpo_loss, "kto": kto_loss, "reward": reward_loss}


def loss_of(name: str, workspace: Path, folder: Path) -> float:
    """Of the published model, on the rows of the held-out split."""
    load = load_reward_model if name == "reward" else load_causal_lm
    with torch.no_grad():
        reference = load_causal_lm(workspace / "base/model").eval()
        return LOSSES[name](workspace, load(folder / "model").eval(), reference)


# ----------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", LOSSES)
def test_measuring_gives_the_loss_of_held_out_rows_and_changes_no_weight(run_stage, workspace, name):
    plain, folder = trained(run_stage, name, "plain"), trained(run_stage, name, "measured", evaluate_every=5)
    weights, others = (load_file(next((f / "model").glob("*.safetensors"))) for f in (plain, folder))
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    rows = read_jsonl(folder / "history.jsonl")
    assert [{k: v for k, v in row.items() if k != "heldout_loss"} for row in rows] == read_jsonl(
        plain / "history.jsonl"
    )
    losses, last = losses_of(folder), len(rows)
    assert list(losses) == sorted({*range(5, last + 1, 5), last})
    found = metrics_of(folder)
    assert found["heldout_loss"] == losses[last] == pytest.approx(loss_of(name, workspace, folder), abs=2e-4)
    if name == "dpo":
        assert found["heldout_loss_at_start"] == pytest.approx(math.log(2), abs=1e-5)
    assert not {"kept_step", "stopped_early"} & found.keys()
    assert not {key for key in metrics_of(plain) if key.startswith("heldout")}


def opposed(workspace: Path) -> None:
    """Held-out rows that what is learnt makes worse: other answers, the other order."""
    data = workspace / "data"
    rows = [row | {"completion": "zzz"} for row in read_jsonl(data / "heldout.jsonl")]
    feedback = [
        row | ({"completion": "no"} if row["split"] == "heldout" and row["ratings"][0]["label"] else {})
        for row in read_jsonl(data / "feedback.jsonl")
    ]
    write_artifact(data, {"heldout.jsonl": rows, "feedback.jsonl": feedback}, tokenizer_of(data))
    compared = read_jsonl(workspace / "comparisons/comparisons.jsonl")
    for row in compared:
        if row["split"] == "heldout":
            row["rankings"][0]["ranks"] = [3, 2, 1]
    digest = tokenizer_of(workspace / "comparisons")
    write_artifact(workspace / "comparisons", {"comparisons.jsonl": compared}, digest)


@pytest.mark.parametrize("name", ["sft", "dpo-lora", "reward-lora", "kto"])
def test_training_stops_early_and_keeps_the_weights_of_the_lowest_loss(run_stage, workspace, caplog, name):
    """Weights that were kept are those of a run that was measured at the same steps and ends there."""
    opposed(workspace)
    folder = trained(run_stage, name, "early", evaluate_every=1, patience=2, schedule="constant", warmup=0)
    found, losses = metrics_of(folder), losses_of(folder)
    kept = min(losses, key=losses.get)
    assert found["stopped_early"]
    assert (found["kept_step"], found["steps"]) == (kept, kept + 2) == (kept, max(losses))
    assert found["heldout_loss"] == losses[kept]
    row = read_jsonl(folder / "history.jsonl")[kept - 1]  # of the weights that are published, not of the last step
    assert found["train_loss"] == row["loss"]
    assert found.get("margin", row.get("rewards/margins")) == row.get("rewards/margins")
    if found["heldout_loss"] > found["heldout_loss_at_start"]:
        assert any("the held-out loss did not fall" in record.message for record in caplog.records)
    if name in LOSSES:
        assert losses[kept] == pytest.approx(loss_of(name, workspace, folder), abs=2e-4)
    else:  # its adapter is that of another measurement of the same training, stopped one step later
        later = trained(run_stage, name, "later", evaluate_every=1, patience=3, schedule="constant", warmup=0)
        one, other = (load_file(next((f / "model").glob("*.safetensors"))) for f in (folder, later))
        assert metrics_of(later)["kept_step"] == kept
        assert all(torch.equal(weight, other[key]) for key, weight in one.items())


@pytest.mark.parametrize("name", ["sft", "dpo-lora", "reward", "kto"])
def test_stopped_after_every_step_it_ends_with_the_same_bytes(run_stage, workspace, name):
    """Each attempt takes one step; the last but one is told to go at the step where training is over."""
    opposed(workspace)
    early = {"evaluate_every": 1, "patience": 2, "schedule": "constant", "warmup": 0}
    straight = trained(run_stage, name, "straight", **early)
    code, attempts = 75, 0
    while code == 75:
        code, error, output = run_stage(name, "stopped", config=block(name, **early), time_limit="0")
        attempts += 1
        if code == 75:
            assert f"stopped by time limit at step {attempts}" in error
            [newest] = (workspace / "state-stopped" / name).glob(f"*/checkpoint-{attempts}")
            assert (newest / BEST).exists()
    assert code == 0, error
    assert attempts == metrics_of(straight)["steps"] + 1
    assert output.read_bytes() == (straight / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_with_nothing_to_measure_on_it_says_so(run_stage, workspace, name):
    data, compared = workspace / "data", workspace / "comparisons"
    feedback = [row for row in read_jsonl(data / "feedback.jsonl") if row["split"] != "heldout"]
    write_artifact(data, {"heldout.jsonl": [], "feedback.jsonl": feedback}, tokenizer_of(data))
    rows = [row for row in read_jsonl(compared / "comparisons.jsonl") if row["split"] != "heldout"]
    write_artifact(compared, {"comparisons.jsonl": rows}, tokenizer_of(compared))
    code, error, output = run_stage(name, "none", config=block(name, evaluate_every=2))
    assert code == 65
    said = error.strip().splitlines()[-1]
    if name == "reward":
        assert "no comparisons on held-out prompts" in said
    else:
        assert said.endswith(
            f"{name}: evaluate_every measures on held-out rows, but there are none; raise data.shares.heldout, or "
            "remove evaluate_every"
        )
    assert not output.exists()


def test_the_curve_is_drawn_for_every_stage_that_can_measure_it():
    for stage in ("sft", "reward", "dpo", "orpo", "simpo", "kto"):
        assert ("held-out loss", ("heldout_loss",), None) in CURVES[stage]


def test_the_page_says_which_step_was_kept_and_what_that_means():
    metrics = {"steps": 40, "kept_step": 25, "stopped_early": True}
    run = Run("r", {"policy.d": Artifact("policy.d", Path("d"), "", "", metrics, None)}, {}, [], False, [])
    assert (
        "d: training stopped early, after step 40; the weights of step 25 are kept, where the held-out loss was "
        "lowest. The held-out rows chose the step, so what is measured on them flatters the model a little; the "
        "evaluation prompts had no part in it."
    ) in [text for text, _ in banners([run])]
