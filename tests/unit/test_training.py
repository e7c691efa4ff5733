"""The stages with Hugging Face trainers: losses, data order, exact resumption, broken checkpoints."""

import functools
import importlib
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainingArguments

from tunetrail.config.base_model import RandomModel
from tunetrail.config.dpo import DpoLoss
from tunetrail.config.kto import KtoConfig
from tunetrail.config.loading import parse
from tunetrail.config.training import Lora, SftConfig
from tunetrail.contract.runner import main
from tunetrail.contract.stage import Attempt, Request, Stage
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import read_jsonl, write_json
from tunetrail.models import fit, training
from tunetrail.models.batching import collate, encode, encode_comparison, encode_response
from tunetrail.models.checkpoints import COMPLETE, is_complete, kept_steps, latest_checkpoint, mark_complete
from tunetrail.models.cpu.label_head import score_labels_only
from tunetrail.models.loading import load_causal_lm, trained_weights, with_lora
from tunetrail.models.preference import PretokenizedDpoTrainer
from tunetrail.models.reference_free import ReferenceFreeTrainer, log_odds, orpo_loss, simpo_loss
from tunetrail.models.saving import save_tokenizer, save_weights
from tunetrail.models.scoring import sequence_scores
from tunetrail.models.supervised import tokenize
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.models.training import (
    bit_sums,
    check_learnt,
    epoch_order,
    history,
    learning_rate_scale,
    rows_at_once,
    rows_left_out,
)
from tunetrail.models.weights import rows_per_epoch
from tunetrail.provenance.manifest import list_files
from tunetrail.provenance.record import read_record
from tunetrail.provenance.verify import Verifier
from tunetrail.reward.calibration import ceiling, evaluate, heldout_pairs, over_groups, reliability, right
from tunetrail.reward.kwise import KWiseCollator, KWiseTrainer, initialise, kwise_loss, kwise_scores
from tunetrail.reward.probe import bradley_terry, fit_probe, frozen_states
from tunetrail.stages.base import set_special_tokens
from tunetrail.stages.kto import check_labels, with_mismatched

from ..records import write_artifact

pytestmark = pytest.mark.slow


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_kwise_loss_by_hand():
    scores = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    targets = torch.full((2, 3, 3), 0.5)
    targets[0] = torch.tensor([[0.5, 1, 1], [0, 0.5, 0.75], [0, 0.25, 0.5]])
    targets[1, 0, 1], targets[1, 1, 0] = 0.0, 1.0
    first = -(log_sigmoid(1) + log_sigmoid(3) + 0.75 * log_sigmoid(2) + 0.25 * log_sigmoid(-2)) / 3
    second = -log_sigmoid(-0.5)
    assert kwise_loss(scores, targets, mask).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_two_completions_give_the_pairwise_loss():
    scores, targets = torch.tensor([[0.3, -0.4]]), torch.tensor([[[0.5, 1.0], [0.0, 0.5]]])
    expected = -torch.nn.functional.logsigmoid(torch.tensor(0.7))
    torch.testing.assert_close(kwise_loss(scores, targets, torch.ones(1, 2, dtype=torch.bool)), expected)


def test_reward_head_starts_small_and_on_the_language_models_trunk():
    causal = tiny_model(64, 2, 4, 30, seed=0)
    model = initialise(causal, seed=3)
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.25)
    assert model.score.bias is None
    for a, b in zip(model.base_model.parameters(), causal.base_model.parameters(), strict=True):
        assert torch.equal(a, b)


EXAMPLES = [
    {"prompt": [5], "responses": [[6], [7, 8], [9]], "targets": np.full((3, 3), 0.5).tolist()},
    {"prompt": [5, 6, 7], "responses": [[6, 1], [7]], "targets": [[0.5, 1.0], [0.0, 0.5]]},
]


def test_collator_masks_missing_completions():
    batch = KWiseCollator(0)(EXAMPLES)
    assert batch["input_ids"].shape == (5, 5)  # K sequences per prompt, not K(K-1)
    assert batch["mask"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["targets"][1, 0, 1] == 1
    assert batch["input_ids"][:, 3:].tolist() == [[6, 0], [7, 8], [9, 0], [6, 1], [7, 0]]
    assert batch["response_mask"].tolist() == [[True, n == 2] for n in (1, 2, 1, 2, 1)]


def test_kwise_scores_do_not_depend_on_the_batch():
    model = initialise(tiny_model(16, 2, 2, 30, seed=0), seed=1).eval()
    model.config.pad_token_id = 0
    scores = kwise_scores(model, KWiseCollator(0)(EXAMPLES))
    plain = [[model(torch.tensor([e["prompt"] + r])).logits.item() for r in e["responses"]] for e in EXAMPLES]
    torch.testing.assert_close(scores, torch.tensor([plain[0], [*plain[1], 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_training_and_scoring_read_the_same_scores(pooling):
    model = initialise(tiny_model(16, 2, 2, 30, seed=0), seed=1, pooling=pooling).eval()
    model.config.pad_token_id = 0
    sequences = [(e["prompt"], response) for e in EXAMPLES for response in e["responses"]]
    scores = sequence_scores(model, collate(*zip(*sequences, strict=True), 0))
    trained = kwise_scores(model, KWiseCollator(0)(EXAMPLES))
    torch.testing.assert_close(trained[trained != 0], scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_the_head_has_its_own_learning_rate(tmp_path, lora):
    model = with_lora(initialise(tiny_model(16, 2, 2, 30, seed=0), seed=1), lora, seed=1, extra_modules=["score"])
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    optimizer = KWiseTrainer(model=model, args=arguments, head_learning_rate=0.5).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    for name, p in named.items():
        assert rates[id(p)] == (0.5 if "score" in name else 1e-3), name
    assert {group["weight_decay"] for group in optimizer.param_groups if group["lr"] == 0.5} == {0.1}


def test_the_probe_is_where_its_gradient_is_0():
    """One feature and three pairs with soft targets, compared with the root found by bisection."""
    x, y, weights = np.array([[1.0], [2.0], [-0.5]]), np.array([1.0, 0.25, 0.5]), np.array([0.5, 0.25, 0.25])

    def slope(w: float) -> float:
        return float(sum(weights * (1 / (1 + np.exp(-x[:, 0] * w)) - y) * x[:, 0]) + 0.1 * w)

    low, high = -10.0, 10.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if slope((low + high) / 2) < 0 else (low, (low + high) / 2)
    assert abs(low) > 0.05
    assert bradley_terry(x, y, weights, 0.1) == pytest.approx([low], abs=1e-4)


def planted(random, prompts: int, strength: float) -> tuple[list, list]:
    """States of 3 responses per prompt, on very different scales; labelers prefer a large sum of all features."""
    scale = np.geomspace(0.01, 100, 12)
    states, targets = [], []
    for _ in range(prompts):
        features = random.standard_normal((3, 12))
        utility = strength * features.sum(1) + random.gumbel(size=3)
        states.append(features * scale)
        targets.append((utility[:, None] > utility).astype(float) + 0.5 * np.eye(3))
    return states, targets


def test_the_probe_finds_linear_preferences_and_nothing_in_noise():
    def accuracy(strength: float, seed: int) -> tuple[float, float]:
        random = np.random.default_rng(seed)
        states, targets = planted(random, 200, strength)
        probe = fit_probe(states, targets, [str(i // 4) for i in range(200)])
        unseen, truth = planted(random, 400, strength)
        margins = [(s @ probe)[:, None] - s @ probe for s in unseen]
        upper = np.triu_indices(3, 1)
        found = np.mean([(m[upper] > 0) == (t[upper] > 0.5) for m, t in zip(margins, truth, strict=True)])
        return float(found), float(np.std([s @ probe for s in unseen]))

    (clear, wide), (nothing, narrow) = accuracy(1.0, 0), accuracy(0.0, 1)
    assert clear > 0.85  # the labelers' noise allows about 0.88
    assert 0.45 < nothing < 0.55
    assert narrow < wide / 5  # the ridge chosen by cross-validation keeps it small


def test_the_probe_of_one_group_is_fitted_without_cross_validation():
    states, targets = planted(np.random.default_rng(0), 3, 1.0)
    assert np.isfinite(fit_probe(states, targets, ["g", "g", "g"])).all()


def test_frozen_states_do_not_depend_on_the_batch():
    model = tiny_model(16, 2, 2, 30, seed=0).eval()
    for pooling in ("last", "mean"):
        found = frozen_states(model, EXAMPLES, 0, "fp32", pooling)
        for example, states in zip(EXAMPLES, found, strict=True):
            for response, state in zip(example["responses"], states, strict=True):
                hidden = model.model(torch.tensor([example["prompt"] + response])).last_hidden_state[0].detach()
                alone = hidden[-1] if pooling == "last" else hidden[len(example["prompt"]) :].mean(0)
                assert state == pytest.approx(alone.double().numpy(), abs=1e-5)


def test_reward_metrics_by_hand():
    rows = [
        {"id": "a", "group": "g", "completions": ["long one", "x"], "rankings": [{"labeler": "l", "ranks": [1, 2]}]},
        {"id": "b", "group": "g", "completions": ["x", "long one"], "rankings": [{"labeler": "l", "ranks": [1, 2]},
            {"labeler": "m", "ranks": [1, 1]}]},
        {"id": "c", "group": "g", "completions": ["x", "y"], "rankings": [{"labeler": "m", "ranks": [2, 1]}]},
    ]  # fmt: skip
    scores = [np.array([2.0, 0.0]), np.array([0.0, 1.0]), np.array([0.0, 3.0])]
    probe = [np.array([1.0, 0.5]), np.array([4.0, 1.0]), np.array([0.0, 0.0])]
    pairs = heldout_pairs(rows, scores, probe, {"a": "web", "b": "book", "c": "web"})
    assert [p["probe"] for p in pairs] == [0.5, 3.0, 0.0]
    assert [round(p["margin"], 3) for p in pairs] == [2.0, -1.0, 3.0]  # the tie decides nothing
    metrics = evaluate(pairs, seed=0)
    assert metrics["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert metrics["accuracy_longer_wins"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["accuracy_shorter_wins"]["mean"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert metrics["accuracy_probe"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)
    gains = {name: gain["mean"] for name, gain in metrics["gain_over"].items()}
    assert gains == pytest.approx({"longer_wins": 0.5 / 3, "shorter_wins": 0.5 / 3, "probe": -0.5 / 3})
    assert metrics["accuracy_longer_preferred"]["mean"] == 1  # a
    assert metrics["accuracy_shorter_preferred"]["mean"] == 0  # b; in c they have equal lengths
    assert metrics["accuracy_by_labeler"]["m"]["mean"] == 1
    assert metrics["accuracy_by_labeler"]["l"]["mean"] == 0.5
    assert metrics["accuracy_by_source"]["web"]["mean"] == 1
    assert metrics["accuracy_by_source"]["book"]["mean"] == 0


def test_the_interval_of_a_gain_covers_the_true_one_where_groups_differ():
    """30 groups of 10 pairs; in some groups the model is better, in others the baseline."""
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        pairs = []
        for group in range(30):
            ours, theirs = np.clip(random.normal([0.7, 0.55], 0.2), 0.05, 0.95)
            for i in range(10):
                margin, probe = (1.0 if random.random() < p else -1.0 for p in (ours, theirs))
                pairs.append({"id": f"{group}-{i}", "group": str(group), "margin": margin, "probe": probe})
        gain = over_groups(right(pairs, "margin") - right(pairs, "probe"), pairs, seed=seed)
        covered += gain["low"] <= 0.141 <= gain["high"]
    assert 0.9 <= covered / 200 <= 0.985


def test_every_bin_and_the_calibration_error_have_an_interval():
    """A calibrated model, and one that is twice as sure as it should be."""
    random = np.random.default_rng(0)
    margins = random.exponential(1.0, size=4000)
    right = random.random(4000) < 1 / (1 + np.exp(-margins))
    pairs = [
        {"id": str(i // 2), "group": "g", "margin": m if ok else -m}
        for i, (m, ok) in enumerate(zip(margins, right, strict=True))
    ]
    calibrated = reliability(pairs, seed=0)
    assert all(
        row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in calibrated["accuracy_by_confidence"]
    )
    covered = [
        row["accuracy_low"] <= row["confidence"] <= row["accuracy_high"] for row in calibrated["accuracy_by_confidence"]
    ]
    assert sum(covered) >= len(covered) - 2
    assert calibrated["ece"] < 0.03
    sure = reliability([pair | {"margin": 2 * pair["margin"]} for pair in pairs], seed=0)
    assert sure["ece_interval"]["low"] <= sure["ece"] <= sure["ece_interval"]["high"]
    assert sure["ece_interval"]["low"] > calibrated["ece"]


def test_the_calibration_error_of_a_calibrated_model_reaches_0():
    """With few pairs it is far above 0 itself, and its plain percentiles never reach 0."""
    reached, errors = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        margins = random.exponential(1.0, size=300)
        right = random.random(300) < 1 / (1 + np.exp(-margins))
        pairs = [
            {"id": str(i), "group": "g", "margin": m if ok else -m}
            for i, (m, ok) in enumerate(zip(margins, right, strict=True))
        ]
        found = reliability(pairs, seed=0)
        errors.append(found["ece"])
        reached.append(found["ece_interval"]["low"] == 0)
        assert found["ece_interval"]["low"] <= found["ece"] <= found["ece_interval"]["high"]
    assert min(errors) > 0.02
    assert np.mean(reached) >= 0.9


def test_the_ceiling_follows_from_the_agreement_of_labelers():
    def row(name, *ranks):
        return {"id": name, "rankings": [{"labeler": str(i), "ranks": list(r)} for i, r in enumerate(ranks)]}

    # Three labelers on one pair: two agree, one does not. The tie on the fourth prompt decides nothing.
    rows = [row("a", [1, 2], [1, 2], [2, 1]), row("b", [1, 2], [1, 1], [1, 2])]
    found = ceiling(rows, seed=0)
    assert found["labelers"] == 3
    assert found["agreement"]["mean"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    # a: for two of them the others' vote is split, the third has a majority against it; b: both are confirmed.
    assert found["majority"]["mean"] == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    assert ceiling([row("a", [1, 2])], seed=0) is None
    assert found["at_most"]["mean"] == found["at_most"]["low"] == 0.5  # coin flips agree half of the time
    assert ceiling([row("a", [1, 2], [2, 1])], seed=0)["at_most"] is None


def test_a_perfect_model_is_between_the_bounds_if_pairs_differ_in_difficulty():
    """A labeler is right on a pair with probability 0.55 to 1: the true order agrees in 0.775, the bound is higher."""
    random = np.random.default_rng(1)
    right = random.random((2000, 3)) < random.uniform(0.55, 1, size=2000)[:, None]
    rows = [
        {"id": str(i), "rankings": [{"labeler": str(j), "ranks": [1, 2] if r else [2, 1]} for j, r in enumerate(pair)]}
        for i, pair in enumerate(right)
    ]
    found = ceiling(rows, seed=0)
    assert found["majority"]["mean"] < right.mean() < found["at_most"]["low"]
    # E[(2p - 1)²] = 0.37 for 2p - 1 uniform on 0.1 to 1
    assert found["at_most"]["mean"] == pytest.approx((1 + 0.37**0.5) / 2, abs=0.015)


def test_the_ceiling_of_noisy_labelers_follows_from_their_noise():
    """Each is wrong on one pair in five: two agree on 0.8² + 0.2²; one agrees with nine others as often as it is
    right."""
    random = np.random.default_rng(0)
    wrong = random.random((600, 10)) < 0.2
    rows = [
        {
            "id": str(i),
            "rankings": [{"labeler": str(j), "ranks": [2, 1] if w else [1, 2]} for j, w in enumerate(prompt)],
        }
        for i, prompt in enumerate(wrong)
    ]
    found = ceiling(rows, seed=0)
    assert found["agreement"]["mean"] == pytest.approx(0.68, abs=0.015)
    # A perfect model agrees with each of them more often than they agree with each other.
    assert found["at_most"]["mean"] == pytest.approx(1 - wrong.mean(), abs=0.015)
    assert found["at_most"]["low"] > found["agreement"]["high"]
    assert found["majority"]["mean"] == pytest.approx(
        0.8 - 0.6 * 0.0196, abs=0.02
    )  # nine others are wrong 2% of the time


def test_the_order_has_full_batches_of_similar_length_and_uses_every_row():
    lengths = [i % 10 for i in range(43)]
    order = epoch_order(lengths, 8, 3, seed=1)
    assert len(order) == 3 * 40
    for start in range(0, 120, 40):
        assert len(set(order[start : start + 40])) == 40
    spreads = [
        max(lengths[i] for i in order[s : s + 8]) - min(lengths[i] for i in order[s : s + 8]) for s in range(0, 120, 8)
    ]
    assert max(spreads) <= 3
    assert order[:40] != order[40:80]
    assert order == epoch_order(lengths, 8, 3, seed=1)


def test_a_row_is_in_every_epoch_as_often_as_its_weight_says():
    weights = [1.0] * 10 + [2.5] * 10 + [0.5] * 10
    assert rows_per_epoch(weights) == 10 + 25 + 5
    assert rows_per_epoch([0.4]) == 1  # at least one row per epoch
    order = epoch_order([5] * 30, 8, 2, seed=1, weights=weights)
    thirds = []
    for epoch in (Counter(order[:40]), Counter(order[40:])):
        assert {epoch[i] for i in range(10)} == {1}
        assert Counter(epoch[i] for i in range(10, 20)) == {2: 5, 3: 5}
        assert Counter(epoch[i] for i in range(20, 30)) == {0: 5, 1: 5}
        thirds.append({i for i in range(10, 30) if epoch[i] in (1, 3)})
    assert thirds[0] != thirds[1]  # drawn afresh for each epoch
    assert epoch_order(list(range(30)), 8, 2, 1, [1.0] * 30) == epoch_order(list(range(30)), 8, 2, 1)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "orpo", "kto"])
def test_rows_with_a_weight_are_trained_on_that_often(run_stage, workspace, name):
    """Half of the rows 2.5 times; held-out rows have no weight."""
    folder, table = {"sft": ("data", "sft"), "kto": ("data", "feedback")}.get(name, ("comparisons", "comparisons"))
    rows = read_jsonl(workspace / folder / f"{table}.jsonl")
    rows = [row | ({"weight": 2.5} if i % 2 else {}) for i, row in enumerate(rows)]
    write_artifact(workspace / folder, {f"{table}.jsonl": rows}, tokenizer_of(workspace / folder))
    config = {"epochs": 2, "batch_size": 4, "micro_batch_size": 4}
    code, error, output = run_stage(
        name, "weighted", config=config | ({} if name in ("sft", "reward") else {"checkpoints": 0})
    )
    assert code == 0, error
    metrics = json.loads(output.with_name("metrics.json").read_text())
    per_row = {
        "sft": lambda row: 1,
        "reward": lambda row: 1,
        "dpo": lambda row: 3,
        "orpo": lambda row: 3,
        "kto": lambda row: len(row["ratings"]),
    }
    counted = [row for row in rows if row.get("split", "reward") == "reward"]
    plain = sum(per_row[name](row) for row in counted if "weight" not in row)
    weighted = sum(per_row[name](row) for row in counted if "weight" in row)
    per_epoch = plain + 2 * weighted + round(weighted / 2)
    assert metrics["steps"] == 2 * (per_epoch // 4)
    assert metrics["rows_left_out"] == per_epoch % 4


def test_learning_rates_by_hand():
    def rates(steps: int, warmup: int, schedule: str) -> list[float]:
        return [learning_rate_scale(step, steps, warmup, schedule) for step in range(1, steps + 1)]

    # Two steps up, then three down in quarters.
    assert rates(5, 2, "linear") == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5) / 2
    assert rates(5, 2, "cosine") == pytest.approx([0.5, 1, 0.5 + half, 0.5, 0.5 - half])
    assert rates(4, 3, "constant") == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(3, 0, "linear") == pytest.approx([1, 2 / 3, 1 / 3])
    assert rates(1, 1, "cosine") == [1]


def test_rows_that_do_not_fill_a_batch_are_reported(caplog):
    with caplog.at_level("INFO", "tunetrail"):
        assert rows_left_out("dpo", 43, 8) == 3
        assert rows_left_out("dpo", 40, 8) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "dpo: 3 of 43 rows do not fill a batch of 8; each epoch leaves out different ones"
    ]


def test_kept_steps_are_spread_and_never_the_last():
    assert kept_steps(12, 3) == [3, 6, 9]
    assert kept_steps(2, 5) == [1]
    assert kept_steps(1, 1) == kept_steps(9, 0) == []


def test_sft_labels_only_the_completion_and_all_of_raw_text():
    tokenizer = tiny_tokenizer()
    rows = [{"id": "1", "prompt": "ab", "completion": "c"}, {"id": "2", "text": "abcdefg"}]
    chat, *blocks = tokenize(rows, tokenizer, 5, "sft")
    assert chat["labels"] == [-100, -100, *chat["input_ids"][2:]]
    assert chat["input_ids"][-1] == tokenizer.eos_token_id
    assert [len(b["input_ids"]) for b in blocks] == [5, 3]
    assert all(b["labels"] == b["input_ids"] for b in blocks)
    with pytest.raises(DataError, match=r"sft: 1 of 1 examples have more tokens than max_length \(3\): 1 \(4\); "):
        tokenize(rows, tokenizer, 3, "sft")


def test_history_does_not_depend_on_the_clock():
    log = [{"loss": 1.0, "step": 1, "train_runtime": 3.0}, {"train_runtime": 5.0, "train_loss": 1.0}]
    assert history(log) == [{"loss": 1.0, "step": 1}]


def test_an_interrupted_save_is_skipped_and_the_previous_one_used(tmp_path):
    noted = {}
    stage = Stage(Request("s", {}, {}, tmp_path), {}, Attempt(tmp_path, tmp_path, stop=None, note=noted.__setitem__))  # type: ignore[arg-type]
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"x" * 100)
        if step < 3:
            mark_complete(stage, folder)
    (tmp_path / "checkpoint-2/weights.safetensors").write_bytes(b"x" * 99)  # truncated by a crash of the machine
    assert not is_complete(tmp_path / "checkpoint-2")
    assert [state["name"] for state in noted["states_out"]] == ["checkpoint-1", "checkpoint-2"]
    first = noted["states_out"][0]
    assert latest_checkpoint(stage) == tmp_path / "checkpoint-1"
    assert noted["state_in"] == first
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


# ----------------------------------------------------------------------------- whole stages, stopped and resumed


def tokenizer_of(folder: Path) -> str:
    """The digest that an artifact's manifest names."""
    return json.loads((folder / "manifest.json").read_text())["tokenizer"]


def write_workspace(folder: Path) -> str:
    """A tiny base model, demonstrations and comparisons, as artifacts. Returns the tokenizer's digest."""
    from tunetrail.models.loading import tokenizer_digest

    model = folder / "base/model"
    tiny, tokenizer = tiny_model(16, 2, 2, len(tiny_tokenizer()), seed=0), tiny_tokenizer()
    set_special_tokens(tiny, tokenizer, RandomModel(source="random"))
    save_weights(tiny, model)
    save_tokenizer(tokenizer, model, tiny.config.max_position_embeddings)
    write_json(folder / "base/metrics.json", {})
    digest = tokenizer_digest(model)
    demonstrations = [
        {
            "id": str(i),
            "group": str(i),
            "source": "t",
            "prompt": f"count {i}: ",
            "messages": [{"role": "user", "content": f"count {i}:"}],
            "completion": "x" * (i % 7 + 1),
        }
        for i in range(24)
    ]
    comparisons = [
        {
            "id": f"heldout-{i // 4}" if i % 4 == 3 else str(i), "group": str(i),
            "split": "heldout" if i % 4 == 3 else "reward", "prompt": f"count {i}: ", "reference": None,
            "completions": ["x" * (i % 3 + 2), "y", "zz"], "finished": [True, True, False],
            "rankings": [{"labeler": "a", "ranks": [1, 2, 3], "order": [0, 1, 2], "time": None, "scores": None}],
        }
        for i in range(24)
    ]  # fmt: skip
    feedback = [
        {
            "id": f"rated-{i}", "group": str(i), "split": "heldout" if i % 4 == 3 else "reward",
            "prompt": f"count {i}: ", "messages": [], "completion": "x" * (i % 5 + 1) if i % 3 else "no" * (i % 4 + 1),
            "ratings": [{"labeler": "a", "label": bool(i % 3)}] * (1 + i % 2),
        }
        for i in range(24)
    ]  # fmt: skip
    write_artifact(folder / "base", {}, digest)
    splits = {"feedback.jsonl": feedback} | {
        f"{name}.jsonl": [row | {"id": f"{name}-{row['id']}"} for row in demonstrations[:n]]
        for name, n in (("sft", 24), ("reward", 12), ("rl", 12), ("evaluation", 4), ("heldout", 6))
    }
    write_artifact(folder / "data", splits, digest)
    write_artifact(folder / "comparisons", {"comparisons.jsonl": comparisons}, digest)
    return digest


@pytest.fixture
def workspace(tmp_path):
    write_workspace(tmp_path)
    return tmp_path


STAGES = {
    "sft": ({"learning_rate": 1e-3, "batch_size": 4, "epochs": 2}, {"base": "base", "data": "data"}),
    "sft-lora": (
        {"learning_rate": 1e-3, "batch_size": 4, "lora": {"r": 2}},
        {"base": "base", "data": "data"},
    ),
    "reward": (
        {"learning_rate": 1e-3, "batch_size": 2},
        {"policy": "base", "data": "data", "comparisons": "comparisons"},
    ),
    "dpo": (
        {"method": "dpo", "learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 3, "checkpoints": 8},
        {"policy": "base", "comparisons": "comparisons"},
    ),
    "orpo": (
        {"method": "orpo", "learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 3, "checkpoints": 1},
        {"policy": "base", "comparisons": "comparisons"},
    ),
    "simpo-lora": (
        {"method": "simpo", "learning_rate": 1e-3, "batch_size": 6, "lora": {"r": 2}, "checkpoints": 1},
        {"policy": "base", "comparisons": "comparisons"},
    ),
    "reward-probe": (
        {"learning_rate": 1e-3, "batch_size": 2, "head_learning_rate": 1e-2, "warm_start": "probe", "pooling": "mean"},
        {"policy": "base", "data": "data", "comparisons": "comparisons"},
    ),
    "reward-lora": (
        {"learning_rate": 1e-3, "batch_size": 2, "lora": {"r": 2}, "warm_start": "probe"},
        {"policy": "base", "data": "data", "comparisons": "comparisons"},
    ),
    "kto": (
        {"method": "kto", "learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 3, "checkpoints": 1, "epochs": 2},
        {"policy": "base", "data": "data"},
    ),
    "kto-lora": (
        {"method": "kto", "learning_rate": 1e-3, "batch_size": 6, "lora": {"r": 2}, "checkpoints": 1, "epochs": 2},
        {"policy": "base", "data": "data"},
    ),
    "dpo-lora": (
        {
            "method": "dpo",
            "learning_rate": 1e-3,
            "batch_size": 6,
            "lora": {"r": 2},
            "checkpoints": 1,
        },
        {"policy": "base", "comparisons": "comparisons"},
    ),
}


@pytest.fixture
def run_stage(workspace, monkeypatch, capfd):
    """Runs a stage under the contract in this process: (exit code, stderr, path of its manifest)."""

    def run(
        name: str, state: str, config: dict | None = None, time_limit: str = "", shared: dict | None = None
    ) -> tuple[int, str, Path]:
        stage = name.split("-")[0]
        block, inputs = STAGES[name]
        path = workspace / f"{name}.json"
        content = {"stage": stage, "seed": 5, "precision": "fp32", "config": block | (config or {})} | (shared or {})
        path.write_text(json.dumps(content))
        output = workspace / state / name / "manifest.json"
        options = [f"--input={role}={workspace / folder}/manifest.json" for role, folder in inputs.items()]
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("TUNETRAIL_TIME_LIMIT", time_limit)
        module = importlib.import_module(f"tunetrail.stages.{stage}")
        capfd.readouterr()
        AcceleratorState._reset_state(True)  # of an earlier stage in this process, perhaps of another precision
        code = main(
            module.run,
            [
                "--config",
                str(path),
                *options,
                "--output",
                str(output),
                "--state",
                str(workspace / f"state-{state}" / name),
            ],
        )
        return code, capfd.readouterr().err, output

    return run


@pytest.mark.parametrize("name", STAGES)
def test_stopped_and_resumed_equals_uninterrupted(run_stage, name):
    code, error, straight = run_stage(name, "straight")
    assert code == 0, error
    for _ in range(2):  # a time limit that expires at once: the attempt saves after one step and exits with 75
        code, error, stopped = run_stage(name, "stopped", time_limit="0")
        assert code == 75, error
        assert "stopped by time limit at step" in error
        assert not stopped.exists()
    code, error, stopped = run_stage(name, "stopped")
    assert code == 0, error
    assert stopped.read_bytes() == straight.read_bytes()
    if "checkpoints" in STAGES[name][0]:
        kept = sorted(int(path.name) for path in (stopped.parent / "checkpoints").iterdir())
        assert kept == (list(range(1, 9)) if name == "dpo" else [4])  # in the middle
        part = "adapter" if name.endswith("-lora") else "model"  # a hundredth of the size
        assert [path.name for path in (stopped.parent / "checkpoints" / str(kept[-1])).iterdir()] == [part]
        folders = (stopped.parent / "checkpoints" / str(kept[-1]), stopped.parent)
        weights = (load_file(next((folder / part).glob("*.safetensors"))).values() for folder in folders)
        assert not all(torch.equal(kept, last) for kept, last in zip(*weights, strict=True))
    # Neither a resumption nor an adapter alarms the audit.
    verdict = Verifier().run([stopped.parent])
    assert {finding.name for finding in verdict.findings} <= {"not-sealed", "dirty-tree"}
    if name == "sft-lora":  # peft keeps them in a set
        adapter = json.loads((stopped.parent / "adapter/adapter_config.json").read_text())
        assert adapter["target_modules"] == sorted(adapter["target_modules"])
        assert adapter["base_model_name_or_path"] is None
    attempts = read_record(stopped.parent).attempts
    assert [a.get("state_in") for a in attempts] == [None, attempts[0]["states_out"][-1], attempts[1]["states_out"][-1]]


def digests(manifest: Path) -> dict[str, str]:
    return {entry["path"]: entry["sha256"] for entry in json.loads(manifest.read_text())["files"]}


@pytest.mark.parametrize("name", ["sft", "reward-lora", "dpo-lora"])
def test_checkpointing_changes_no_byte_and_resumes(run_stage, monkeypatch, name):
    calls, checkpoint = [], transformers.modeling_utils.checkpoint
    counted = lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    code, error, plain = run_stage(name, "plain", config={"gradient_checkpointing": False})
    assert code == 0, error
    assert not calls  # TRL would by itself
    assert run_stage(name, "less", config={"gradient_checkpointing": True}, time_limit="0")[0] == 75
    assert calls
    code, error, less = run_stage(name, "less", config={"gradient_checkpointing": True})
    assert code == 0, error
    assert digests(less) == digests(plain)


def test_auto_checkpoints_where_the_plan_exceeds_the_device(run_stage, monkeypatch, caplog):
    for size, expected in ((3_000_000, True), (3_000_000_000, None)):
        monkeypatch.setattr(fit, "device_bytes", lambda size=size: size)
        with caplog.at_level("INFO", "tunetrail"):
            code, error, output = run_stage("sft", f"of-{size}")
        assert code == 0, error
        (attempt,) = read_record(output.parent).attempts
        assert attempt["peak_bytes"] > 50_000_000  # of this process
        assert (attempt.get("planned") or {}).get("gradient_checkpointing") == expected
    assert "tunetrail plan --memory says what to change" in caplog.text


@pytest.mark.parametrize("name", ["sft-lora", "reward-lora", "dpo-lora", "kto-lora"])
def test_below_an_adapter_bf16_weights_give_the_bytes_of_fp32_ones_under_autocast(run_stage, monkeypatch, name):
    code, error, narrow = run_stage(name, "narrow", shared={"precision": "bf16"})
    assert code == 0, error
    monkeypatch.setattr(fit, "narrow_below_adapter", lambda *_: None)
    code, error, wide = run_stage(name, "wide", shared={"precision": "bf16"})
    assert code == 0, error
    assert digests(narrow) == digests(wide)


@pytest.mark.parametrize("name", ["sft-lora", "reward-lora", "dpo-lora"])
def test_qlora_learns_on_rounded_weights_and_publishes_whole_ones(run_stage, workspace, monkeypatch, name):
    pytest.importorskip("bitsandbytes")
    seen, widen = [], training.widen_below_adapter
    monkeypatch.setattr(
        training,
        "widen_below_adapter",
        lambda model, parent: seen.append({type(m).__name__ for m in model.modules()}) or widen(model, parent),
    )
    config = {"four_bit": True, "learning_rate": 1e-2}
    code, error, straight = run_stage(name, "straight", config=config)
    assert code == 0, error
    assert "Linear4bit" in seen[0]
    assert run_stage(name, "stopped", config=config, time_limit="0")[0] == 75
    code, error, stopped = run_stage(name, "stopped", config=config)
    assert code == 0, error
    assert digests(stopped) == digests(straight)
    code, error, plain = run_stage(name, "plain", config={"learning_rate": 1e-2})
    assert code == 0, error
    assert digests(plain) != digests(straight)
    published = load_file(straight.parent / "model/model.safetensors")
    start = load_file(workspace / "base/model/model.safetensors")
    assert all(weights.dtype == torch.float32 for weights in published.values())
    if name == "reward-lora":  # it has no adapter of its own
        return
    adapter = load_file(straight.parent / "adapter/adapter_model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    moved = published[f"{layer}.weight"] - start[f"{layer}.weight"]
    torch.testing.assert_close(moved, 32 / 2 * b @ a, atol=1e-6, rtol=1e-5)  # alpha / r, and no rounding to 16 values


def test_qlora_without_bitsandbytes_is_one_clear_line(run_stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    code, error, _ = run_stage("sft-lora", "none", config={"four_bit": True})
    assert code == 78
    assert error.count("\n") == 1
    assert "four_bit: needs bitsandbytes, which cannot be imported" in error
    with pytest.raises(ConfigError, match="four_bit holds frozen weights; train an adapter on them"):
        parse({"run": "r", "base": {"source": "random"}, "data": {}, "sft": {"four_bit": True}})


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "orpo", "kto"])
def test_the_first_and_the_last_step_train(run_stage, workspace, name):
    """An optimizer step with a learning rate of 0 would waste a batch."""
    code, error, output = run_stage(
        name, "rates", config={"epochs": 1, "warmup": 0.4, "batch_size": 5, "micro_batch_size": 5}
    )
    assert code == 0, error
    rates = [row["learning_rate"] for row in read_jsonl(output.with_name("history.jsonl"))]
    warmup = math.ceil(0.4 * len(rates))
    expected = [1e-3 * learning_rate_scale(n, len(rates), warmup, "cosine") for n in range(1, len(rates) + 1)]
    assert rates == pytest.approx(expected)
    assert min(rates) > 0
    rows = {"sft": 24, "reward": 18, "dpo": 54, "orpo": 54, "kto": 24}[name]
    assert json.loads(output.with_name("metrics.json").read_text())["rows_left_out"] == rows % 5


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "orpo", "kto"])
def test_training_that_changes_no_weight_fails(run_stage, name):
    """Even with a finite loss: the artifact would be a copy of its parent that looks like a result."""
    code, error, output = run_stage(name, "still", config={"learning_rate": 1e-30})
    assert code == 78
    steps = {"sft": 12, "reward": 9, "dpo": 9, "orpo": 9, "kto": 8}[name]
    assert error.strip().splitlines()[-1] == (
        f"{name}: error: {name}: {steps} optimizer steps left every weight as it was, so nothing was learnt; raise "
        "learning_rate, or see whether its data, or its scores, can teach anything"
    )
    assert not output.exists()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_ppo_that_learns_nothing_fails(run_stage, monkeypatch, lora):
    """If all episodes score the same, no gradient reaches the adapter; without an adapter, the steps are too small."""
    block = {
        "method": "ppo", "steps": 2, "batch_size": 4, "epochs": 1, "max_new_tokens": 3, "lora": lora, "gold": None,
        "reward": {"always": 1.0}, "missing_eos_score": None, "kl_coef": 0.0, "advantage": "rloo",
        "completions_per_prompt": 2, "learning_rate": 1e-3 if lora else 1e-30,
    }  # fmt: skip
    monkeypatch.setitem(STAGES, "ppo", (block, {"policy": "base", "data": "data"}))
    always = {"scorers": {"always": {"scorer": "regex", "pattern": "$"}}}
    code, error, output = run_stage("ppo", "still", shared=always)
    assert code == 78
    assert "ppo: 2 optimizer steps left every weight as it was, so nothing was learnt" in error
    assert not output.exists()


def test_one_changed_value_of_one_weight_is_a_change():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = torch.nn.Linear(40, 30).to(dtype)
        before = bit_sums(trained_weights(model))
        check = lambda: check_learnt("s", before, bit_sums(trained_weights(model)), 1)  # noqa: E731, B023
        with pytest.raises(ConfigError, match="s: 1 optimizer steps left every weight as it was"):
            check()
        value = model.weight.data[7, 3]
        model.weight.data[7, 3] = (
            torch.nextafter(value.float(), torch.tensor(9.0)) if dtype == torch.float32 else -value
        )
        check()
        model.weight.requires_grad = False  # frozen: only the bias counts
        with pytest.raises(ConfigError):
            check_learnt("s", bit_sums(trained_weights(model)), bit_sums(trained_weights(model)), 1)


def test_too_few_steps_are_reported_at_the_start(run_stage, caplog):
    code, error, _ = run_stage("dpo", "few", config={"checkpoints": 0})
    assert code == 0, error
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "dpo: 9 optimizer steps, fewer than 10: next to nothing can be learnt; raise epochs, lower batch_size, or add "
        "data"
    ]
    caplog.clear()
    assert run_stage("sft", "enough")[0] == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_held_out_prompts_without_answers_are_ignored(run_stage, workspace, name):
    data = workspace / "data"
    rows = {split: read_jsonl(data / f"{split}.jsonl") for split in ("heldout", "reward")}
    for split in rows.values():
        del split[0]["completion"]
    write_artifact(data, {f"{split}.jsonl": own for split, own in rows.items()}, tokenizer_of(data))
    code, error, output = run_stage(name, "prompts")
    assert code == 0, error
    if name == "sft":
        assert json.loads(output.with_name("metrics.json").read_text())["eval_loss"]["n"] == len(rows["heldout"]) - 1


def test_the_audit_finds_a_checkpoint_of_another_run(run_stage, workspace):
    """State swapped between attempts: complete and loadable, but not what the previous attempt left."""
    for name in ("mine", "theirs"):
        assert run_stage("sft", name, time_limit="0")[0] == 75
    mine, theirs = (next((workspace / f"state-{name}/sft").glob("*/checkpoint-*")) for name in ("mine", "theirs"))
    (theirs / "foreign").write_text("x")
    listed = [f for f in list_files(theirs) if f["path"] != COMPLETE]
    write_json(theirs / COMPLETE, listed)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    code, _, manifest = run_stage("sft", "mine")
    assert code == 0
    assert "state-swapped" in {finding.name for finding in Verifier().run([manifest.parent]).findings}


def test_sft_loss_is_the_mean_nll_of_the_labelled_tokens(run_stage, workspace):
    """The first logged loss, compared with plain forward passes, one row at a time."""
    code, error, output = run_stage("sft", "one", config={"batch_size": 24, "micro_batch_size": 8, "epochs": 1})
    assert code == 0, error
    tokenizer, model = tiny_tokenizer(), load_causal_lm(workspace / "base/model")
    nlls = []
    for example in tokenize(read_jsonl(workspace / "data/sft.jsonl"), tokenizer, 1024, "sft"):
        logprobs = model(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        nlls += [-logprobs[i - 1, label].item() for i, label in enumerate(example["labels"]) if label != -100]
    assert read_jsonl(output.with_name("history.jsonl"))[0]["loss"] == pytest.approx(sum(nlls) / len(nlls), abs=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_scoring_only_labels_equals_trls_head(tmp_path, lora):
    """Every number TRL reads from its fused head, and the gradients, on a batch of uneven prompts."""
    from datasets import Dataset
    from trl import DPOConfig

    tiny_model(16, 2, 2, 60, seed=0).save_pretrained(tmp_path)
    model = with_lora(load_causal_lm(tmp_path), lora and Lora(**lora), seed=1)
    arguments = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
    )
    rows = {"prompt_ids": [[5]], "chosen_ids": [[6]], "rejected_ids": [[7]]}
    trainer = PretokenizedDpoTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tiny_tokenizer()
    )
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, (first, last) in enumerate([(7, 12), (9, 11), (8, 12)]):
        labels[row, :first] = labels[row, last:] = -100
    found = []
    for ours in (False, True):
        if ours:
            score_labels_only(trainer.model)
        trainer.model.zero_grad()
        output = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True)
        output.log_probs.sum().backward()
        found.append((output, [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
    (theirs, their_gradients), (ours, our_gradients) = found
    assert theirs.log_probs.count_nonzero() == 5 + 2 + 4
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    for name in ("is_top1", "label_mask"):
        assert torch.equal(ours[name].bool(), theirs[name].bool())
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for labels_of_none in (ids, torch.full_like(ids, -100)):  # mostly labels, or none: TRL's own head
        found = trainer.model(input_ids=ids, labels=labels_of_none, fused_lm_head=True)
        assert found.log_probs.count_nonzero() == (labels_of_none[:, 1:] != -100).sum()
    plain = trainer.model(input_ids=ids, labels=labels)  # without the flag, the model is what it was
    assert plain.logits.shape == (3, 12, 60)
    assert torch.isfinite(plain.loss)


def test_dpo_starts_at_log_2_and_margin_0(run_stage):
    code, error, output = run_stage("dpo", "straight")
    assert code == 0, error
    first = read_jsonl(output.with_name("history.jsonl"))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    last = read_jsonl(output.with_name("history.jsonl"))[-1]
    assert last["rewards/margins"] > first["rewards/margins"]


def test_dpo_logprobs_are_sums_over_the_response(run_stage, workspace):
    """TRL's first chosen log-probs, compared with a plain forward pass over the same pairs."""
    from tunetrail.models.batching import collate, encode, encode_response
    from tunetrail.models.scoring import response_logprobs

    code, error, output = run_stage("dpo", "one", config={"batch_size": 54, "micro_batch_size": 54})
    assert code == 0, error
    tokenizer, model = tiny_tokenizer(), load_causal_lm(workspace / "base/model")
    rows = [r for r in read_jsonl(workspace / "comparisons/comparisons.jsonl") if r["split"] == "reward"]
    chosen = [(r["prompt"], r["completions"][i], r["finished"][i]) for r in rows for i in (0, 0, 1)]
    batch = collate(
        [encode(tokenizer, p) for p, _, _ in chosen],
        [encode_response(tokenizer, t, f) for _, t, f in chosen],
        tokenizer.pad_token_id,
    )
    expected = response_logprobs(model, batch).sum(1).mean().item()
    assert read_jsonl(output.with_name("history.jsonl"))[0]["logps/chosen"] == pytest.approx(expected, abs=1e-3)


def test_the_sft_term_is_the_mean_nll_of_preferred_tokens(run_stage, workspace):
    """The first loss is log 2, since policy and reference are still equal, plus the term by plain forward passes."""
    config = {"batch_size": 54, "micro_batch_size": 54, "loss": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5]}
    code, error, output = run_stage("dpo", "one", config=config)
    assert code == 0, error
    tokenizer, model = tiny_tokenizer(), load_causal_lm(workspace / "base/model")
    nlls = []
    for row in read_jsonl(workspace / "comparisons/comparisons.jsonl"):
        prompt, responses = encode_comparison(tokenizer, row)
        for i in (0, 0, 1) if row["split"] == "reward" else ():
            logprobs = model(torch.tensor([prompt + responses[i]])).logits[0].log_softmax(-1)
            nlls += [-logprobs[len(prompt) + n - 1, token].item() for n, token in enumerate(responses[i])]
    expected = 2 * math.log(2) + 0.5 * sum(nlls) / len(nlls)
    assert read_jsonl(output.with_name("history.jsonl"))[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_with_the_sft_term_preferred_responses_become_likelier(run_stage, workspace):
    """The same pairs of nearly equal responses, with and without the term."""
    rows = read_jsonl(workspace / "comparisons/comparisons.jsonl")
    rows = [row | {"completions": ["abcdefgh", "abcdefgi", "abcdefgj"]} for row in rows]
    digest = json.loads((workspace / "comparisons/manifest.json").read_text())["tokenizer"]
    write_artifact(workspace / "comparisons", {"comparisons.jsonl": rows}, digest)
    moved = []
    for loss in (["sigmoid"], ["sigmoid", "sft"]):
        config = {"loss": loss, "learning_rate": 1e-2, "batch_size": 27, "micro_batch_size": 27, "epochs": 6}
        code, error, output = run_stage("dpo", "-".join(loss), config=config | {"checkpoints": 0})
        assert code == 0, error
        history = read_jsonl(output.with_name("history.jsonl"))
        assert history[-1]["rewards/margins"] > 0.1
        moved.append(history[-1]["logps/chosen"] - history[0]["logps/chosen"])
    plain, with_term = moved
    assert with_term > 10
    assert with_term > plain + 5


def test_every_dpo_loss_trains(run_stage):
    for loss in get_args(DpoLoss):
        smoothing = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
        code, error, output = run_stage(
            "dpo", f"loss-{loss}", config={"loss": loss, "batch_size": 27, "micro_batch_size": 27} | smoothing
        )
        assert code == 0, f"{loss}: {error}"
        assert len(read_jsonl(output.with_name("history.jsonl"))) == 2


@pytest.mark.parametrize(
    ("name", "config"),
    [("orpo", {"odds_ratio_weight": 0.7}), ("simpo-lora", {"beta": 1.5, "gamma": 0.4, "lora": None})],
)
def test_losses_without_a_reference_by_hand(run_stage, workspace, name, config):
    """The second step, from the weights after the first: the papers' formulas on plain passes over the ids of each
    pair, three pairs at a time in training. Responses that were cut off have no EOS."""
    batches = {"batch_size": 54, "micro_batch_size": 3, "epochs": 2, "learning_rate": 1e-2}
    code, error, output = run_stage(name, "one", config=batches | config)
    assert code == 0, error
    tokenizer, policy = tiny_tokenizer(), load_causal_lm(output.parent / "checkpoints/1/model")
    losses, margins, chosen_logps = [], [], []
    for row in read_jsonl(workspace / "comparisons/comparisons.jsonl"):
        prompt, responses = encode_comparison(tokenizer, row)
        for w, v in ((0, 1), (0, 2), (1, 2)) if row["split"] == "reward" else ():
            logps = [logp(policy, prompt, responses[i]) for i in (w, v)]
            # Hong et al. 2024, eq. 2: the log-likelihood of a response is the mean over its m tokens.
            p_w, p_v = (math.exp(x / len(responses[i])) for x, i in zip(logps, (w, v), strict=True))
            if name == "orpo":
                margin = math.log((p_w / (1 - p_w)) / (p_v / (1 - p_v)))  # the log of eq. 4
                loss = -math.log(p_w) + 0.7 * -log_sigmoid(margin)  # eq. 6 and 7
            else:
                margin = 1.5 / len(responses[w]) * logps[0] - 1.5 / len(responses[v]) * logps[1]
                loss = -log_sigmoid(margin - 0.4)  # Meng et al. 2024, eq. 6
            losses.append(loss)
            margins.append(margin)
            chosen_logps.append(logps[0])
    assert len(losses) == 54
    second = read_jsonl(output.with_name("history.jsonl"))[1]
    assert second["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert second["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert second["rewards/accuracies"] == pytest.approx(np.mean([m > 0 for m in margins]), abs=1e-4)
    assert second["logps/chosen"] == pytest.approx(np.mean(chosen_logps), abs=1e-3)


def test_odds_are_finite_where_the_model_is_certain():
    logps = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -60.0], requires_grad=True)
    odds = log_odds(logps)
    expected = [-1e-3 - math.log(-math.expm1(-1e-3)), -1 - math.log(-math.expm1(-1)), -60.0]
    assert odds[2:].tolist() == pytest.approx(expected, rel=1e-5)
    orpo_loss(logps, logps.detach().flip(0), 0.1)[0].sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(logps.grad).all()


def test_experts_are_balanced_as_in_dpo(tmp_path):
    """The loss of a mixture of experts holds its routers' loss, weighted as the model's config says."""
    from datasets import Dataset
    from transformers import MixtralConfig, MixtralForCausalLM
    from trl import DPOConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 60, "num_local_experts": 4, "router_aux_loss_coef": 0.5}  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.config._name_or_path = str(tmp_path)
    rows = Dataset.from_dict({"prompt_ids": [[5, 6]], "chosen_ids": [[7, 8, 9]], "rejected_ids": [[9]]})
    arguments = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, precompute_ref_log_probs=True)  # fmt: skip
    trainer = ReferenceFreeTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer(),
        pair_loss=functools.partial(simpo_loss, beta=2.0, gamma=0.0))  # fmt: skip
    batch = trainer.data_collator(list(rows))
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    logps = [logp(model, [5, 6], response) for response in ([7, 8, 9], [9])]
    expected = -log_sigmoid(2 * (logps[0] / 3 - logps[1])) + 0.5 * plain.aux_loss.item()
    assert plain.aux_loss.item() > 0.1
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["orpo", "simpo-lora"])
def test_without_a_reference_preferred_responses_become_likelier_than_others(run_stage, name):
    code, error, output = run_stage(name, "learnt", config={"learning_rate": 1e-2, "epochs": 4, "lora": None})
    assert code == 0, error
    rows = read_jsonl(output.with_name("history.jsonl"))
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.1
    if name == "orpo":  # it fine-tunes as well
        assert rows[-1]["logps/chosen"] > rows[0]["logps/chosen"] + 1
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["margin"] == rows[-1]["rewards/margins"]
    assert metrics["pairs"] == 54


def logp(model, prompt: list[int], response: list[int]) -> float:
    """The log-prob of a response, by a plain forward pass."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + n - 1, token].item() for n, token in enumerate(response))


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_the_kto_loss_by_hand(run_stage, workspace, loss):
    """The second step, from the weights after the first, by plain passes over all rows, three at a time in training:
    the KL is that of the whole step all the same."""
    n = 24
    weights = {"desirable_weight": 0.5, "undesirable_weight": 1.5, "beta": 0.3}
    config = {"batch_size": n, "micro_batch_size": 3, "epochs": 2, "learning_rate": 1e-2, "loss": loss}
    code, error, output = run_stage("kto", loss, config=config | weights)
    assert code == 0, error
    tokenizer = tiny_tokenizer()
    reference = load_causal_lm(workspace / "base/model")
    policy = load_causal_lm(output.parent / "checkpoints/1/model")
    rows = [
        (encode(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"]), rating["label"])
        for row in read_jsonl(workspace / "data/feedback.jsonl") if row["split"] == "reward"
        for rating in row["ratings"]
    ]  # fmt: skip
    assert len(rows) == n
    order = epoch_order([len(prompt) + len(response) for prompt, response, _ in rows], n, 2, seed=5)[n:]

    def gained(prompt: list[int], response: list[int]) -> float:
        return logp(policy, prompt, response) - logp(reference, prompt, response)

    others = [order[(k + n // 2) % n] for k in range(n)]
    kl = max(0.0, sum(gained(rows[i][0], rows[j][1]) for i, j in zip(order, others, strict=True)) / n)
    kl = kl if loss == "kto" else 0.0
    losses = []
    for prompt, response, liked in rows:
        sign, weight = (1, 0.5) if liked else (-1, 1.5)
        losses.append(weight * (1 - 1 / (1 + math.exp(-0.3 * sign * (gained(prompt, response) - kl)))))
    second = read_jsonl(output.with_name("history.jsonl"))[1]
    assert second["loss"] == pytest.approx(sum(losses) / n, abs=1e-4)
    assert second["kl"] == pytest.approx(kl, abs=1e-4)
    if loss == "kto":
        assert kl > 0.02
    liked = [gained(prompt, response) for prompt, response, is_liked in rows if is_liked]
    assert json.loads(output.with_name("metrics.json").read_text())["liked"] == len(liked)


def test_kto_makes_liked_responses_likelier_than_disliked_ones(run_stage):
    code, error, output = run_stage("kto", "learnt", config={"learning_rate": 1e-2, "epochs": 4})
    assert code == 0, error
    rows = read_jsonl(output.with_name("history.jsonl"))
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["kl"] == 0
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["margin"] > 0.05


def test_feedback_with_only_one_label_is_refused(run_stage, workspace):
    rows = [
        row | {"ratings": [rating for rating in row["ratings"] if rating["label"]]}
        for row in read_jsonl(workspace / "data/feedback.jsonl")
    ]
    write_artifact(workspace / "data", {"feedback.jsonl": rows}, tokenizer_of(workspace / "data"))
    code, error, _ = run_stage("kto", "liked")
    assert code == 65
    assert error.strip().splitlines()[-1] == (
        "kto: error: kto: all 16 ratings to train on are of liked responses; add disliked ones"
    )


def test_unbalanced_feedback_causes_a_warning(caplog):
    def said(liked: int, disliked: int, weight: float = 1.0, **weights: float) -> list[str]:
        caplog.clear()
        examples = [{"label": True, "weight": weight}] * liked + [{"label": False}] * disliked
        check_labels(examples, KtoConfig(method="kto", **weights))
        return [record.message for record in caplog.records]

    assert said(40, 40) == said(40, 30) == said(10, 40, desirable_weight=4.0) == said(20, 60, weight=3.0) == []
    assert said(40, 10) == ["kto: an epoch has 40 ratings of liked responses and 10 of disliked ones: "
        "undesirable_weight: 4 would balance them"]  # fmt: skip
    assert said(10, 40) == ["kto: an epoch has 10 ratings of liked responses and 40 of disliked ones: "
        "desirable_weight: 4 would balance them"]  # fmt: skip
    with pytest.raises(DataError, match="all 16 ratings to train on are of liked responses"):
        said(16, 0, weight=3.0)


def test_ratings_are_paired_within_their_batch():
    examples = [{"completion_ids": [i]} for i in range(8)]
    found = [e["KL_completion_ids"][0] for e in with_mismatched(examples, 4)]
    assert found == [2, 3, 0, 1, 6, 7, 4, 5]


def test_reward_scores_reload_the_same_and_demonstrations_average_zero(run_stage, workspace):
    from tunetrail.evaluation.models import reward_scores
    from tunetrail.models.batching import encode, encode_response
    from tunetrail.models.loading import load_reward_model

    code, error, output = run_stage("reward", "straight")
    assert code == 0, error
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["score_mean_demonstrations"] == pytest.approx(0, abs=1e-5)
    tokenizer = tiny_tokenizer()
    rows = [r for s in ("reward", "sft") for r in read_jsonl(workspace / f"data/{s}.jsonl")]
    examples = [(encode(tokenizer, r["prompt"]), encode_response(tokenizer, r["completion"])) for r in rows]
    model = load_reward_model(output.parent / "model")
    scores = np.array(reward_scores(model, examples, tokenizer.pad_token_id, "fp32"))
    assert scores.std() > 1e-4
    assert scores.mean() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["reward-probe", "reward-lora"])
def test_a_reward_model_that_starts_from_the_probe_scores_like_it(run_stage, workspace, name):
    config = {"learning_rate": 1e-12, "head_learning_rate": None, "pooling": "mean"}
    code, error, output = run_stage(name, "first", config=config)
    assert code == 0, error
    pairs = read_jsonl(output.with_name("pairs.jsonl"))
    assert [p["margin"] for p in pairs] == pytest.approx([p["probe"] for p in pairs], abs=1e-4)
    assert max(abs(p["probe"]) for p in pairs) > 0.5
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["gain_over"]["probe"]["mean"] == 0
    assert metrics["accuracy_probe"]["mean"] == 1  # these rankings are linear in the states


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sft", {"batch_size": 25}, "24 examples are fewer than one batch (sft.batch_size: 25)"),
        ("sft", {"max_length": 5}, "sft: 24 of 24 examples have more tokens than max_length (5): "),
        ("reward", {"batch_size": 19}, "18 prompts with comparisons are fewer than one batch (reward.batch_size: 19)"),
        ("reward", {"max_length": 5}, "reward: 18 of 18 examples have more tokens than max_length (5): "),
        ("dpo", {"batch_size": 60, "micro_batch_size": 60}, "dpo: 54 pairs are fewer than one batch (batch_size: 60); "
            "collect more, or lower it"),
        ("kto", {"batch_size": 28, "micro_batch_size": 28}, "kto: 24 ratings are fewer than one batch (batch_size: "),
        ("orpo", {"batch_size": 60, "micro_batch_size": 60}, "orpo: 54 pairs are fewer than one batch (batch_size: "),
        ("simpo-lora", {"max_length": 5}, "simpo: 54 of 54 examples have more tokens than max_length (5): "),
        ("kto", {"max_length": 5}, "kto: 18 of 18 examples have more tokens than max_length (5): "),
        ("dpo", {"max_length": 5}, "dpo: 54 of 54 examples have more tokens than max_length (5): "),
    ],
)  # fmt: skip
def test_the_error_for_unsuitable_data_is_one_line(run_stage, name, config, message):
    code, error, output = run_stage(name, "bad", config=config)
    assert code == 65
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_sft_config_has_a_default_learning_rate():
    assert SftConfig().learning_rate == 5e-5


def test_a_batch_is_divided_equally_among_processes():
    def at_once(batch: int, processes: int, micro: int | None = None) -> int:
        return rows_at_once("sft", SftConfig(batch_size=batch, micro_batch_size=micro), processes)

    assert at_once(12, 1) == 12
    assert at_once(12, 1, micro=4) == 4
    assert at_once(12, 2) == 6
    assert at_once(12, 2, micro=4) == 3  # not 6: it bounds the memory
    with pytest.raises(ConfigError, match=r"sft: batch_size \(12\) must be a multiple of the 5 processes"):
        at_once(12, 5)


def test_only_prompts_without_completions_are_sampled(workspace, monkeypatch):
    """Not the prompts of preference rows; a bare prompt has no reference."""
    from tunetrail.stages import completions

    data = workspace / "data"
    reward = read_jsonl(data / "reward.jsonl")
    del reward[1]["completion"]
    write_artifact(data, {"reward.jsonl": reward, "comparisons.jsonl": [{"id": reward[0]["id"]}]}, tokenizer_of(data))
    monkeypatch.setattr(completions, "sample", lambda model, prompts, keys, k, **_: [[[7], [8]] for _ in keys])
    monkeypatch.chdir(workspace)
    config = {"stage": "completions", "seed": 5, "precision": "fp32", "config": {"per_prompt": 2, "max_new_tokens": 1}}
    (workspace / "c.json").write_text(json.dumps(config))
    arguments = ["--config=c.json", "--input=model=base/manifest.json", "--input=data=data/manifest.json"]
    assert main(completions.run, [*arguments, "--output=a/manifest.json", "--state=state"]) == 0
    sampled = {row["id"]: row for row in read_jsonl(workspace / "a/completions.jsonl") if row["split"] == "reward"}
    assert sampled.keys() == {row["id"] for row in reward[1:]}
    assert sampled[reward[1]["id"]]["reference"] is None
    assert sampled[reward[2]["id"]]["reference"] == reward[2]["completion"]


def test_a_resumed_shard_samples_the_same_batches(workspace, monkeypatch):
    """A killed attempt may have written only one of a batch's two rows: both are sampled again together."""
    from tunetrail.stages import completions

    batches = []

    def sampled(model, prompts, keys, k, **_):
        batches.append(keys)
        return [[[7], [8]] for _ in keys]

    monkeypatch.setattr(completions, "sample", sampled)
    monkeypatch.chdir(workspace)
    config = {"per_prompt": 2, "batch_size": 4, "max_new_tokens": 1}
    (workspace / "c.json").write_text(
        json.dumps({"stage": "completions", "seed": 5, "precision": "fp32", "config": config})
    )
    arguments = ["--config=c.json", "--input=model=base/manifest.json", "--input=data=data/manifest.json"]
    assert main(completions.run, [*arguments, "--output=a/manifest.json", "--state=state"]) == 0
    straight, batches[:] = list(batches), []
    [rows] = (workspace / "state").glob("*/completions.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:3]))
    assert main(completions.run, [*arguments, "--output=b/manifest.json", "--state=state"]) == 0
    assert batches == straight[1:]
    assert (workspace / "a/manifest.json").read_bytes() == (workspace / "b/manifest.json").read_bytes()
