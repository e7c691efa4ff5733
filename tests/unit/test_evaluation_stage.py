"""Evaluation and head-to-head comparison of tiny models: every number against the rows it was made from."""

import importlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import sem

from tunetrail.contract.runner import main
from tunetrail.contract.stage import Input
from tunetrail.data.general import multiple_choice
from tunetrail.evaluation import stats
from tunetrail.evaluation.comparison import Evaluations
from tunetrail.evaluation.evaluator import Evaluator, Samples
from tunetrail.evaluation.models import kl_divergences, logprobs_of, right_choices
from tunetrail.evaluation.probes import shift
from tunetrail.files import read_jsonl, write_json
from tunetrail.models.batching import collate, encode, encode_comparison, encode_response
from tunetrail.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from tunetrail.models.sampling import sample
from tunetrail.models.scoring import sequence_scores
from tunetrail.models.tiny import tiny_model
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.provenance.manifest import sha256_file
from tunetrail.provenance.record import read_record
from tunetrail.seeds import derive_seed
from tunetrail.stages.head_to_head import verdict_outcomes

from .test_training import tokenizer_of, write_artifact, write_workspace

pytestmark = pytest.mark.slow

EVALUATION = {"max_new_tokens": 6, "bootstrap": 100, "frontier_prompts": 3, "samples": 2,
    "gold": ["chrf", "length"]}  # fmt: skip
RUNS = {  # artifact: its stage, its config block, its inputs by role, and the shared keys
    "reward": ("reward", {"learning_rate": 1e-3, "batch_size": 2}, {"policy": "base", "data": "data",
        "comparisons": "comparisons"}, {}),
    "dpo": ("dpo", {"method": "dpo", "learning_rate": 1e-2, "batch_size": 6, "checkpoints": 2}, {"policy": "base",
        "comparisons": "comparisons"}, {}),
    "kto": ("kto", {"method": "kto", "learning_rate": 1e-2, "batch_size": 6}, {"policy": "base", "data": "data"}, {}),
    "simpo": ("simpo", {"method": "simpo", "learning_rate": 1e-2, "batch_size": 6}, {"policy": "base",
        "comparisons": "comparisons"}, {}),
    "best": ("best_of_n", {"method": "best_of_n", "n": 3}, {"policy": "base", "reward": "reward"}, {}),
    "retention": ("retention", {"prompts": 8, "max_new_tokens": 6}, {"base": "base"}, {}),
    "text": ("retention", {"source": "file", "path": "text.txt", "prompts": 4, "max_new_tokens": 6}, {"base": "base"},
        {}),
    **{
        f"evaluation/{name}": (
            "evaluation",
            EVALUATION,
            {"model": name, "data": "data", "reward": "reward", "retention": "retention", "comparisons": "comparisons"}
            | ({} if name == "base" else {"sft": "base"}),
            {"subject": {"name": name, "method": method}, "data.chat": False, "data.system": None},
        )
        for name, method in [(name, name) for name in ("base", "dpo", "kto", "simpo")] + [("best", "best_of_n")]
    },
    "head_to_head": (
        "head_to_head",
        {},
        {"evaluation.base": "evaluation/base", "evaluation.dpo": "evaluation/dpo",
            "evaluation.best": "evaluation/best"},
        {"evaluation.bootstrap": 100},
    ),
}  # fmt: skip


def run(folder, name, state="state", **changes):
    """Runs one of RUNS in this process; returns its exit code."""
    stage, block, inputs, shared = RUNS[name]
    content = {"stage": stage, "seed": 5, "precision": "fp32", "config": block} | shared | changes
    write_json(folder / "config.json", content)
    module = importlib.import_module(f"tunetrail.stages.{stage}")
    options = [f"--input={role}={path}/manifest.json" for role, path in inputs.items()]
    output = f"--output={name}/manifest.json"
    return main(module.run, ["--config=config.json", *options, output, f"--state={state}/{name}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The artifacts of all RUNS; it is the current folder during the tests."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_workspace(folder)
    (folder / "text.txt").write_text("a text of one's own, and not a short one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in RUNS:
            assert run(folder, name) == 0, name
        yield folder


def metrics(folder, name):
    return json.loads((folder / name / "metrics.json").read_text())


def test_kl_compares_whole_distributions(folder):
    """Compared with a sum over the vocabulary at every prefix, at a temperature."""
    model, reference = load_causal_lm(folder / "dpo/model"), load_causal_lm(folder / "base/model")
    examples = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13])]
    found = kl_divergences(model, reference, examples, 0, "fp32", temperature=0.7)
    for (prompt, response), kl in zip(examples, found, strict=True):
        ids = torch.tensor([prompt + response])
        p, q = ((m(ids).logits.detach()[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1) for m in (model, reference))
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert kl > 0
    assert kl_divergences(model, model, examples, 0, "fp32") == [0, 0]


def test_kl_has_the_mean_of_other_estimates_and_less_variance(folder):
    """On 3,000 responses of two tokens from a model that is far from its reference."""
    model, reference = tiny_model(16, 1, 2, 24, seed=0).eval(), tiny_model(16, 1, 2, 24, seed=1).eval()
    for m, scale in ((model, 30), (reference, 15)):
        m.get_output_embeddings().weight.data.mul_(scale)
    keys = [str(i) for i in range(3000)]
    responses = sample(
        model,
        [[5, 6]] * 3000,
        keys,
        k=1,
        max_new_tokens=2,
        temperature=1.0,
        seed=0,
        batch_size=1000,
        eos_id=23,
        pad_id=0,
    )
    examples = [([5, 6], response) for (response,) in responses]
    full = np.array(kl_divergences(model, reference, examples, 0, "fp32"))
    ours, theirs = (logprobs_of(m, examples, 0, "fp32") for m in (model, reference))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    k1, k3 = (np.array([float(f(d).sum()) for d in gaps]) for f in (lambda d: d, lambda d: (-d).expm1() + d))
    assert full.mean() > 0.05
    for other in (k1, k3):
        assert full.mean() == pytest.approx(other.mean(), abs=4 * math.hypot(*map(sem, (full, other))))
        assert full.std() < other.std()


def test_a_win_rate_compares_gold_scores_prompt_by_prompt(folder):
    rows, theirs = (read_jsonl(folder / f"evaluation/{name}/samples.jsonl") for name in ("dpo", "base"))
    assert [row["id"] for row in rows] == [row["id"] for row in theirs]
    outcome = stats.outcomes([r["gold"] for r in rows], [r["gold"] for r in theirs])
    sampled = metrics(folder, "head_to_head")["sampled"]
    pairs = {(row["first"], row["second"]): row for row in sampled["pairs"]}
    assert pairs.keys() == {("dpo", "base"), ("best", "base"), ("dpo", "best")}
    found = pairs["dpo", "base"]["win_rate"]
    assert found["mean"] == pytest.approx(outcome.mean())
    both = list(zip(rows, theirs, strict=True))
    by_hand = [[(np.sign(a - b) + 1) / 2 for a in r["gold"] for b in s["gold"]] for r, s in both]
    assert found["mean"] == pytest.approx(np.mean(by_hand))
    assert np.shape(by_hand) == (4, 4)
    gained = [np.mean(r["gold"]) - np.mean(s["gold"]) for r, s in both]
    assert pairs["dpo", "base"]["difference"]["mean"] == pytest.approx(np.mean(gained))
    for name, own in (("dpo", rows), ("base", theirs)):
        assert metrics(folder, f"evaluation/{name}")["gold"]["mean"] == pytest.approx(np.mean([r["gold"] for r in own]))
    assert found["groups"] == len({row["group"] for row in rows}) == 4
    assert [row["name"] for row in metrics(folder, "head_to_head")["greedy"]["scores"]] == [
        "base",
        "dpo",
    ]  # best-of-n has none
    assert metrics(folder, "head_to_head")["judge"] is None


def test_every_further_scorer_is_measured_like_the_first(folder):
    rows, theirs = (read_jsonl(folder / f"evaluation/{name}/samples.jsonl") for name in ("dpo", "base"))
    words = [[float(len(text.split())) for text in row["completions"]] for row in rows]
    assert [row["scores"]["length"] for row in rows] == words
    assert metrics(folder, "evaluation/dpo")["scores"]["length"]["mean"] == pytest.approx(np.mean(words))
    others = metrics(folder, "head_to_head")["others"]
    assert list(others) == ["length"]
    pair = next(p for p in others["length"]["pairs"] if (p["first"], p["second"]) == ("dpo", "base"))
    gained = np.mean(words) - np.mean([row["scores"]["length"] for row in theirs])
    assert pair["difference"]["mean"] == pytest.approx(gained)
    assert {len(row["scores"]["length"]) for row in read_jsonl(folder / "evaluation/best/samples.jsonl")} == {2}


def evaluator(folder, name, rows):
    method = "best_of_n" if name == "best" else "dpo"
    return Evaluator(
        SimpleNamespace(
            config=EVALUATION,
            seed=5,
            shared={"precision": "fp32", "subject": {"name": name, "method": method}},
            inputs={
                role: Input(folder / source, {}, {})
                for role, source in (("model", name), ("sft", "base"), ("reward", "reward"))
            },
        ),  # type: ignore[arg-type]
        rows,
    )


def test_scorers_without_reference_answers_are_named(folder, caplog):
    """The rest is measured; the second scorer does not become the main one."""
    data = folder / "prompts-only"
    shutil.copytree(folder / "data", data)
    rows = read_jsonl(data / "evaluation.jsonl")
    del rows[0]["completion"]
    write_artifact(data, {"evaluation.jsonl": rows}, tokenizer_of(data))
    stage, block, inputs, shared = RUNS["evaluation/dpo"]
    RUNS["evaluation/alone"] = (stage, block, inputs | {"data": "prompts-only"}, shared)
    assert run(folder, "evaluation/alone") == 0
    assert "evaluation: 1 of 4 prompts have no reference answer, which chrf compares with" in caplog.text
    found = metrics(folder, "evaluation/alone")
    assert found["not_measured"] == {"scorers": ["chrf"], "prompts": 1}
    assert (found["gold"], found["greedy_gold"]) == (None, None)
    assert found["scores"]["length"]["n"] == found["reward"]["n"] == found["length"]["n"] == 4
    samples = read_jsonl(folder / "evaluation/alone/samples.jsonl")
    assert [row["reference"] is None for row in samples] == [True, False, False, False]
    assert metrics(folder, "evaluation/dpo")["not_measured"] is None


def test_best_of_n_does_not_choose_among_its_opponents_samples(folder):
    """Otherwise it could not lose to them: one of 4 samples would be the opponent's, and 80% wins would become 87%."""
    rows = read_jsonl(folder / "data/evaluation.jsonl")

    def drawn(name, k):
        found = evaluator(folder, name, rows)
        samples, _ = found.sampled(found.model, rows, k)
        return [[tuple(response) for _, response in samples.examples[i : i + k]] for i in range(0, k * len(rows), k)]

    assert not any(set(ours) & set(theirs) for ours, theirs in zip(drawn("best", 3), drawn("base", 1), strict=True))
    assert not any(set(ours) & set(theirs) for ours, theirs in zip(drawn("best", 3), drawn("base", 3), strict=True))
    assert drawn("base", 3)[0][0] == drawn("base", 1)[0][0]


def test_best_of_n_is_what_the_reward_model_prefers(folder):
    rows = read_jsonl(folder / "data/evaluation.jsonl")
    found = evaluator(folder, "best", rows)
    samples, _ = found.sampled(found.model, rows, 6)
    found.reward([samples])
    best = np.reshape(samples.reward, (-1, 3)).argmax(1)
    chosen = read_jsonl(folder / "evaluation/best/samples.jsonl")
    texts = [samples.texts[3 * i + b] for i, b in enumerate(best)]
    assert [row["completions"] for row in chosen] == [texts[i : i + 2] for i in range(0, 8, 2)]


def test_best_of_n_has_no_weights_to_probe(folder):
    """Its forgetting and preferences would be those of its model, measured again with noise."""
    found = metrics(folder, "evaluation/best")
    assert found["retention"] is found["comparisons"] is None
    assert not (folder / "evaluation/best/probes.json").exists()
    head_to_head = metrics(folder, "head_to_head")
    assert {row["after"] for row in head_to_head["preferences"]} == {"dpo"}
    assert {row["first"] for row in head_to_head["forgetting"]} == {"dpo"}


def test_a_kl_bound_has_no_estimated_interval(folder):
    found = metrics(folder, "evaluation/best")["kl_to_sft"]
    assert found == {
        "mean": stats.best_of_n_kl(3),
        "low": 0,
        "high": stats.best_of_n_kl(3),
        "n": 4,
        "se": None,
        "estimator": "analytic bound",
    }


def test_prompts_of_a_source_group_are_resampled_together(folder):
    rows = read_jsonl(folder / "data/evaluation.jsonl")
    values, groups = [0.0, 0.1, 1.0, 1.1], ["a", "a", "b", "b"]
    grouped = evaluator(folder, "base", [row | {"group": g} for row, g in zip(rows, groups, strict=True)])
    assert grouped.over_prompts(values) == stats.bootstrap(values, 100, 5, groups)
    divergence = grouped.divergence(Samples(1, [], [], kl=values))
    assert divergence["low"] == grouped.over_prompts(values)["low"]
    # two groups, whose sums are 1 below and 1 above their expectation: sqrt(2/1 * (1 + 1)) / 4
    assert divergence["se"] == pytest.approx(0.5)
    assert sem(values) < 0.3
    one = evaluator(folder, "base", [row | {"group": "a"} for row in rows])
    assert one.over_prompts(values) == stats.bootstrap(values, 100, 5)


def test_the_frontier_has_every_checkpoint_and_the_last_model_on_the_same_prompts(folder):
    found = metrics(folder, "evaluation/dpo")
    points = found["frontier"]["points"]
    assert [(p["step"], p["chosen"]) for p in points] == [(3, False), (6, False), (9, True)]
    assert found["frontier"]["prompts"] == 3
    rows = read_jsonl(folder / "evaluation/dpo/samples.jsonl")[:3]
    for key in ("kl", "reward", "gold"):
        assert points[-1][key]["mean"] == pytest.approx(np.mean([row[key] for row in rows]), abs=1e-6)
        assert all(p[key]["n"] == 3 for p in points)
    kl = np.array([np.mean(row["kl"]) for row in read_jsonl(folder / "evaluation/dpo/samples.jsonl")])
    assert found["kl_to_sft"]["se"] == pytest.approx(stats.standard_error(kl - kl.mean(), range(len(kl))))
    assert metrics(folder, "evaluation/base")["frontier"] is None
    assert metrics(folder, "evaluation/best")["frontier"] is None


def test_a_checkpoint_is_scored_as_its_own_model_would_be(folder):
    """One prompt of the middle checkpoint, sampled, scored and compared separately."""
    tokenizer, row = load_tokenizer(folder / "base/model"), read_jsonl(folder / "data/evaluation.jsonl")[0]
    model = load_causal_lm(folder / "dpo/checkpoints/6/model").eval()
    points = []
    for row in read_jsonl(folder / "data/evaluation.jsonl")[:3]:
        prompt = encode(tokenizer, row["prompt"])
        ((response,),) = sample(
            model,
            [prompt],
            [row["id"]],
            k=1,
            max_new_tokens=6,
            temperature=1.0,
            seed=derive_seed(5, "dpo"),
            batch_size=1,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
        reward = load_reward_model(folder / "reward/model").eval()
        with torch.no_grad():
            score = float(sequence_scores(reward, collate([prompt], [response], 0)))
        (kl,) = kl_divergences(model, load_causal_lm(folder / "base/model"), [(prompt, response)], 0, "fp32")
        points.append((score, kl))
    found = metrics(folder, "evaluation/dpo")["frontier"]["points"][1]
    assert [found["reward"]["mean"], found["kl"]["mean"]] == pytest.approx(np.mean(points, 0).tolist(), abs=1e-4)


def test_the_yardstick_rises_with_n_and_has_its_bound(folder):
    found = metrics(folder, "evaluation/base")["best_of_n"]
    assert (found["samples"], found["prompts"]) == (8, 3)
    assert [p["n"] for p in found["points"]] == [1, 2, 4, 8]
    assert [p["kl_bound"] for p in found["points"]] == [stats.best_of_n_kl(n) for n in (1, 2, 4, 8)]
    rewards = [p["reward"]["mean"] for p in found["points"]]
    assert rewards == sorted(rewards)
    assert metrics(folder, "evaluation/dpo")["best_of_n"] is None


def test_forgetting_is_a_difference_text_by_text(folder):
    retention = metrics(folder, "evaluation/dpo")["retention"]
    rows = read_jsonl(folder / "evaluation/dpo/retention.jsonl")
    assert retention["perplexity"]["mean"] == pytest.approx(math.exp(np.mean([r["nll"] for r in rows])))
    assert retention["choices"]["chance"] == 0.25
    base = metrics(folder, "evaluation/base")["retention"]
    assert base["choices"]["accuracy"]["mean"] == pytest.approx(metrics(folder, "retention")["base_accuracy"])
    pairs = {(row["first"], row["second"]): row for row in metrics(folder, "head_to_head")["forgetting"]}
    texts = {row["id"]: row["base_nll"] for row in read_jsonl(folder / "retention/retention.jsonl")}
    changes = [row["nll"] - texts[row["id"]] for row in rows]
    assert pairs["dpo", "base"]["nll"]["mean"] == pytest.approx(np.mean(changes), abs=1e-4)
    gain = retention["choices"]["accuracy"]["mean"] - base["choices"]["accuracy"]["mean"]
    assert pairs["dpo", "base"]["choices"]["mean"] == pytest.approx(gain)
    assert pairs["dpo", "base"]["adapters"] == ["full", None]


def test_the_users_text_is_in_the_record(folder):
    (source,) = read_record(folder / "text").of_role("text")
    assert source["annotations"]["files"] == {"../text.txt": sha256_file(folder / "text.txt")}


def test_preference_shifts_are_measured_pair_by_pair(folder):
    (found,) = [row for row in metrics(folder, "head_to_head")["preferences"] if row["after"] == "dpo"]
    before, after = (read_jsonl(folder / f"evaluation/{name}/pairs.jsonl") for name in ("base", "dpo"))
    for name in ("chosen", "rejected"):
        changes = [b[f"{name}_logp"] - a[f"{name}_logp"] for a, b in zip(before, after, strict=True)]
        assert found[name]["mean"] == pytest.approx(np.mean(changes))
    assert found["margin"]["mean"] == pytest.approx(found["chosen"]["mean"] - found["rejected"]["mean"])
    assert found["margin"]["mean"] > 0  # as training intended


def test_held_out_accuracy_uses_the_implicit_reward_over_all_decided_pairs(folder):
    rows = [r for r in read_jsonl(folder / "comparisons/comparisons.jsonl") if r["split"] == "heldout"]
    decided = [len(decided_pairs(preference_targets(row["rankings"]))) for row in rows]
    before, after = (read_jsonl(folder / f"evaluation/{name}/pairs.jsonl") for name in ("base", "dpo"))
    assert len(before) == len(after) == len({row["id"] for row in after}) == sum(decided) > len(rows)
    both = list(zip(before, after, strict=True))
    raw = np.mean([a["chosen_logp"] > a["rejected_logp"] for a in before])
    implicit = np.mean([b["chosen_logp"] - a["chosen_logp"] > b["rejected_logp"] - a["rejected_logp"] for a, b in both])
    for name, expected, measure in (("base", raw, "log-prob"), ("dpo", implicit, "implicit reward")):
        found = metrics(folder, f"evaluation/{name}")["comparisons"]
        assert (found["accuracy"]["mean"], found["measure"]) == (pytest.approx(expected), measure)


def test_without_a_reference_held_out_accuracy_uses_the_log_prob_per_token(folder):
    tokenizer, model = load_tokenizer(folder / "base/model"), load_causal_lm(folder / "simpo/model").eval()
    correct = []
    for row in read_jsonl(folder / "comparisons/comparisons.jsonl"):
        prompt, responses = encode_comparison(tokenizer, row)
        logps = [float(logprobs_of(model, [(prompt, r)], 0, "fp32")[0].sum()) / len(r) for r in responses]
        decided = decided_pairs(preference_targets(row["rankings"])) if row["split"] == "heldout" else []
        correct += [logps[w] > logps[v] for w, v in decided]
    found = metrics(folder, "evaluation/simpo")
    assert found["comparisons"]["measure"] == "log-prob per token"
    assert found["comparisons"]["accuracy"]["mean"] == pytest.approx(np.mean(correct))
    assert found["kl_to_sft"]["mean"] > 0  # from the model it started from, although training had no reference


def test_held_out_feedback_accuracy_uses_the_implicit_reward(folder):
    """Compared with all pairs of a liked and a disliked response, by plain forward passes."""
    tokenizer = load_tokenizer(folder / "base/model")
    rows = [r for r in read_jsonl(folder / "data/feedback.jsonl") if r["split"] == "heldout"]
    examples = [(encode(tokenizer, r["prompt"]), encode_response(tokenizer, r["completion"])) for r in rows]
    liked = [row["ratings"][0]["label"] for row in rows]
    assert (sum(liked), len(liked)) == (4, 6)

    def logps(name: str) -> np.ndarray:
        model = load_causal_lm(folder / name / "model").eval()
        return np.array([float(row.sum()) for row in logprobs_of(model, examples, 0, "fp32")])

    before, after = logps("base"), logps("kto")
    for name, values, measure in (("base", before, "log-prob"), ("kto", after - before, "implicit reward")):
        found = metrics(folder, f"evaluation/{name}")["feedback"]
        pairs = [values[i] > values[j] for i in range(6) for j in range(6) if liked[i] and not liked[j]]
        assert (found["accuracy"]["mean"], found["measure"]) == (pytest.approx(np.mean(pairs)), measure)
    assert found["liked_logps"]["mean"] == pytest.approx(after[liked].mean(), abs=1e-4)
    assert found["disliked_logps"]["n"] == 2
    assert metrics(folder, "evaluation/best")["feedback"] is None
    frontier = metrics(folder, "evaluation/kto")["frontier"]
    assert [point["step"] for point in frontier["points"]] == [metrics(folder, "kto")["steps"]]
    assert metrics(folder, "evaluation/kto")["comparisons"]["measure"] == "implicit reward"


def test_probes_have_the_likeliest_tokens_of_both(folder):
    probes = json.loads((folder / "head_to_head/probes.json").read_text())["pairs"]
    assert [(p["before"], p["after"]) for p in probes] == [("base", "dpo")]
    before, after = (
        json.loads((folder / f"evaluation/{n}/probes.json").read_text())["sentence"] for n in ("base", "dpo")
    )
    position = probes[0]["positions"][4]
    assert position["before"] == before[5]["prob"]
    probs = {t["id"]: t["before"] for t in position["tokens"]}
    assert all(probs[t["id"]] == t["prob"] for t in before[5]["top"][:8])
    assert {t["id"] for t in after[5]["top"][:8]} <= probs.keys()


def test_shift_by_hand():
    def row(prob, *top):
        return {"position": 1, "token": "x", "prob": prob, "top": [{"id": i, "token": t, "prob": p} for i, t, p in top]}

    before = [{}, row(0.2, (1, "a", 0.5), (2, "b", 0.3), (3, "x", 0.2))]
    after = [{}, row(0.6, (3, "x", 0.6), (1, "a", 0.3), (4, "c", 0.1))]
    (found,) = shift(before, after, top=2)
    assert found["tokens"] == [
        {"id": 3, "token": "x", "before": 0.2, "after": 0.6},
        {"id": 1, "token": "a", "before": 0.5, "after": 0.3},
        {"id": 2, "token": "b", "before": 0.3, "after": None},
    ]  # the largest gain first; c is not among the two likeliest of either


def test_multiple_choice_has_the_answer_once_among_other_answers():
    import random

    examples = [([i], [10 + i]) for i in range(6)] + [([9], [10])]  # two prompts share an answer
    rows = multiple_choice(examples, [1], random.Random(0))
    for row, (prompt, answer) in zip(rows, examples, strict=True):
        assert row["prompt_ids"] == prompt
        assert row["choices"][row["answer"]] == answer
        assert len({tuple(choice) for choice in row["choices"]}) == 4
    assert len({row["answer"] for row in rows}) > 1
    assert multiple_choice(examples[:3], [1], random.Random(0)) == []


def test_evaluations_of_different_prompts_are_not_compared(folder, capfd, monkeypatch):
    real = Evaluations.rows

    def one_prompt_less(evaluations, name):
        return {
            subject: dict(list(rows.items())[subject == "dpo" :]) for subject, rows in real(evaluations, name).items()
        }

    monkeypatch.setattr(Evaluations, "rows", one_prompt_less)
    assert run(folder, "head_to_head", "other", **{"evaluation.bootstrap": 101}) == 65
    assert "head_to_head: dpo and base were evaluated on different prompts" in capfd.readouterr().err


def test_a_judge_is_asked_in_both_orders(folder, monkeypatch):
    """A judge that always prefers the first response decides nothing; one that prefers length decides everything."""
    from tunetrail.labeling import llm

    def judge(verdict):
        def of(config, key):
            assert key == "head_to_head.judge"
            return lambda questions: [
                verdict(*q.partition("Response A:")[2].partition("Response B:")[::2]) for q in questions
            ]

        return of

    def longer(a, b):
        a, b = len(a.strip()), len(b.partition("Answer with")[0].strip())
        return "tie" if a == b else "A" if a > b else "B"

    settings = {"config": {"judge": {"endpoint": "http://localhost/v1", "model": "m"}}}
    for i, verdict in enumerate((lambda a, b: "A", longer)):
        monkeypatch.setattr(llm, "endpoint_judge", judge(verdict))
        assert run(folder, "head_to_head", f"judged{i}", **settings) == 0
        found = metrics(folder, "head_to_head")
        rows = {name: read_jsonl(folder / f"evaluation/{name}/samples.jsonl") for name in found["subjects"]}
        for pair in found["judge"]["pairs"]:
            a, b = ([len(row["completions"][0]) for row in rows[pair[side]]] for side in ("first", "second"))
            expected = stats.outcomes(a, b).mean() if i else 0.5
            assert pair["win_rate"]["mean"] == pytest.approx(expected)
        asked = found["judge_verdicts"]
        assert asked["verdicts"] == 2 * 3 * 4
        assert asked["inconsistent"] == (0 if i else 12)
        assert i or asked["first_wins"] == 1
    assert len(read_jsonl(folder / "head_to_head/judgements.jsonl")) == 4
    monkeypatch.setattr(llm, "endpoint_judge", judge(lambda a, b: None))
    assert run(folder, "head_to_head", "silent", **settings) == 0
    found = metrics(folder, "head_to_head")
    assert found["judge"] is None
    assert found["judge_verdicts"] == {"verdicts": 24, "unparsed": 24, "inconsistent": 0, "first_wins": None}
    assert run(folder, "head_to_head", "plain") == 0


def test_an_unreadable_verdict_is_no_tie():
    verdicts = [["A", "B"], ["B", "A"], [None, "A"], ["A", "A"], ["B", None]]
    answers = [{"verdicts": [[0, 1, *both], [0, 2, None, "A"], [1, 2, "A", "B"]]} for both in verdicts]
    found = verdict_outcomes(["base", "sft", "dpo"], answers)
    assert found["sft", "base"] == pytest.approx([0, 1, np.nan, 0.5, np.nan], nan_ok=True)
    assert ("dpo", "base") not in found  # none could be read
    assert found["dpo", "sft"].tolist() == [0] * 5


def test_the_model_chooses_the_answer_that_the_question_makes_likelier(folder):
    """Compared with brute force; texts that are likely whatever the question do not count."""
    model = load_causal_lm(folder / "base/model").eval()
    prompt, neutral = [5, 6, 7], [9]
    given, bare = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in (prompt, neutral))
    choices = [[int(given.argmax())], [int((given - bare).argmax())], [8, 3], [11, 12, 2]]

    def logp(context, choice):
        ids = torch.tensor([context + choice])
        rows = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1).detach()
        return float(rows.gather(1, torch.tensor(choice)[:, None]).sum())

    gains = [logp(prompt, choice) - logp(neutral, choice) for choice in choices]
    questions = [{"prompt_ids": prompt, "neutral_ids": neutral, "choices": choices, "answer": i} for i in range(4)]
    assert right_choices(model, questions, 0, "fp32") == [gain == max(gains) for gain in gains]
    assert max(gains) == gains[1] > gains[0]  # although the first is the likeliest token of all


def test_blocks_of_a_text_file_are_continued(folder, monkeypatch):
    (folder / "text.txt").write_text(" ".join(f"word{i}" for i in range(200)))
    block = {"source": "file", "path": "text.txt", "prompts": 6, "max_new_tokens": 9}
    monkeypatch.setitem(RUNS, "of-a-file", ("retention", block, {"base": "base"}, {}))
    assert run(folder, "of-a-file") == 0
    texts, questions = (read_jsonl(folder / f"of-a-file/{name}.jsonl") for name in ("retention", "choices"))
    for text, question in zip(texts, questions, strict=True):
        whole = question["prompt_ids"] + question["choices"][question["answer"]]
        assert whole == text["prompt_ids"] + text["response_ids"]
        assert len(question["choices"]) == 4
    assert metrics(folder, "of-a-file")["questions"] == 6
