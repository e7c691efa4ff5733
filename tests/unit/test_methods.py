"""Comparing methods of fine-tuning: losses against sums over the vocabulary, training against a separate loop."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tunetrail.config.methods import MethodConfig, MethodsConfig
from tunetrail.contract.runner import main
from tunetrail.contract.stop import Stop
from tunetrail.files import read_jsonl, write_json
from tunetrail.models.finetuning import Cost, build, mean_losses, token_losses, train
from tunetrail.provenance.record import read_record
from tunetrail.stages import methods, retention

from .test_training import write_workspace

pytestmark = pytest.mark.slow

COMPARE = {
    "full": {"learning_rate": 1e-2},
    "lora": {"learning_rate": 1e-2, "lora": {"r": 2}},
    "prompt": {"learning_rate": 1e-1, "prompt_tokens": 3},
}
BLOCK = {"compare": COMPARE, "steps": 6, "points": 3, "batch_size": 4}
INPUTS = {"base": "base", "data": "data", "retention": "retention"}
EXAMPLES = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13])]


def run(block: dict, state: str = "state", output: str = "methods") -> int:
    write_json(Path("config.json"), {"stage": "methods", "seed": 5, "precision": "fp32", "config": block})
    options = [f"--input={role}={path}/manifest.json" for role, path in INPUTS.items()]
    return main(methods.run, ["--config=config.json", *options, f"--output={output}/manifest.json", f"--state={state}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished comparison; its folder is the current one during the tests."""
    folder = tmp_path_factory.mktemp("methods")
    write_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        content = {"stage": "retention", "seed": 5, "precision": "fp32", "config": {"prompts": 8, "max_new_tokens": 6}}
        write_json(folder / "config.json", content)
        options = ["--config=config.json", "--input=base=base/manifest.json"]
        assert main(retention.run, [*options, "--output=retention/manifest.json", "--state=state/retention"]) == 0
        assert run(BLOCK) == 0
        yield folder


def metrics(folder, name="methods"):
    return json.loads((folder / name / "metrics.json").read_text())


def built(folder, **method):
    return build(folder / "base/model", MethodConfig(learning_rate=1, **method), "fp32", 3)


def test_losses_do_not_depend_on_the_batch(folder):
    model = built(folder)
    for (given, learnt), losses in zip(EXAMPLES, token_losses(model, EXAMPLES, 0, "fp32"), strict=True):
        ids = torch.tensor([given + learnt])
        expected = cross_entropy(model(ids).logits[0, len(given) - 1 : -1], torch.tensor(learnt), reduction="none")
        torch.testing.assert_close(losses, expected)


def test_a_tuned_prompt_precedes_every_row(folder):
    """Compared with prepending its vectors to those of the text."""
    model = built(folder, prompt_tokens=3)
    vectors = model.get_prompt(1)[0]
    assert vectors.shape == (3, 16)
    words = model.get_base_model().get_input_embeddings()
    for (given, learnt), losses in zip(EXAMPLES, token_losses(model, EXAMPLES, 0, "fp32"), strict=True):
        embedded = torch.cat([vectors, words(torch.tensor(given + learnt))])[None]
        logits = model.get_base_model()(inputs_embeds=embedded).logits[0, 3:]
        expected = cross_entropy(logits[len(given) - 1 : -1], torch.tensor(learnt), reduction="none")
        torch.testing.assert_close(losses, expected)


def test_a_step_is_adamw_on_the_mean_over_learnt_tokens(folder):
    """Compared with AdamW's first step: each weight moves by the learning rate against its gradient's sign."""
    model, other = built(folder), built(folder)
    train(model, [EXAMPLES], 1e-3, 0, "fp32", Cost(), lambda step: None)
    losses = [
        cross_entropy(other(torch.tensor([g + r])).logits[0, len(g) - 1 : -1], torch.tensor(r), reduction="sum")
        for g, r in EXAMPLES
    ]
    (sum(losses) / 6).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in other.parameters()))
    for moved, p in zip(model.parameters(), other.parameters(), strict=True):
        gradient = p.grad * min(1.0, 1 / norm)
        expected = p - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(moved, expected, atol=2e-6, rtol=0)


def test_every_method_starts_from_the_same_model_and_learns(folder):
    found = metrics(folder)
    assert list(found["methods"]) == sorted(COMPARE)
    for name, method in found["methods"].items():
        points = method["points"]
        assert [point["step"] for point in points] == [0, 2, 4, 6]
        assert points[-1]["learnt"] == method["learnt"] < points[0]["learnt"], name
    for name in ("full", "lora"):
        assert found["methods"][name]["points"][0] == {"step": 0, "learnt": found["base"]["learnt"], "forgotten": 0.0}
    assert found["methods"]["prompt"]["points"][0]["learnt"] != found["base"]["learnt"]  # its vectors are new weights


def test_trained_parameters_are_counted(folder):
    found = metrics(folder)["methods"]
    linear = [m for m in built(folder).modules() if isinstance(m, torch.nn.Linear)]
    sizes = [m.in_features + m.out_features for m in linear if m.out_features != found["full"]["parameters"]]
    sizes.remove(16 + built(folder).config.vocab_size)  # the head has no adapter
    assert found["full"]["parameters_trained"] == found["full"]["parameters"]
    assert found["lora"]["parameters_trained"] == 2 * sum(sizes)
    assert found["prompt"]["parameters_trained"] == 3 * 16
    assert {name: m["kind"] for name, m in found.items()} == {"full": "full", "lora": "LoRA", "prompt": "prompt tuning"}


def test_forgetting_is_the_rise_of_the_loss_text_by_text(folder):
    texts = [(row["prompt_ids"], row["response_ids"]) for row in read_jsonl(folder / "retention/retention.jsonl")]
    before = [row["base_nll"] for row in read_jsonl(folder / "retention/retention.jsonl")]
    assert mean_losses(built(folder), texts, 0, "fp32", 3) == pytest.approx(before, rel=1e-5)
    forgotten = metrics(folder)["methods"]["full"]["forgotten"]
    assert forgotten["n"] == len(texts)
    assert forgotten["low"] < forgotten["mean"] < forgotten["high"]
    assert forgotten["mean"] == pytest.approx(metrics(folder)["methods"]["full"]["points"][-1]["forgotten"])


def test_machine_dependent_measurements_are_in_the_record_and_not_in_the_artifact(folder):
    [attempt] = read_record(folder / "methods").attempts
    assert list(attempt["measurements"]) == sorted(COMPARE)
    for cost in attempt["measurements"].values():
        assert cost["seconds_per_step"] > 0
        assert cost["peak_bytes"] is None or cost["peak_bytes"] >= 0
    assert "seconds" not in json.dumps(metrics(folder))


def test_an_interrupted_comparison_keeps_finished_methods_and_ends_with_the_same_bytes(folder, monkeypatch, capfd):
    asked = iter(range(100))
    monkeypatch.setattr(Stop, "requested", lambda self: next(asked) == 8)  # full: 6 times; lora: after its 2nd step
    monkeypatch.setattr(Stop, "interruption", lambda self, progress: Stopped(progress))
    with pytest.raises(Stopped, match="while training lora, which will start over"):
        interrupted(folder)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    finished = [row["name"] for row in read_jsonl(folder / "again/methods.jsonl")]
    assert finished == ["full"]
    assert run(BLOCK, "state2", "methods2") == 0
    assert (folder / "methods2/metrics.json").read_bytes() == (folder / "methods/metrics.json").read_bytes()


class Stopped(Exception):
    pass


def interrupted(folder):
    """Runs the stage without the runner, in its own state folder."""
    from tunetrail.contract.stage import Attempt, Input, Request, Stage

    for name in ("again", "again-work"):
        (folder / name).mkdir()
    shared = {"seed": 5, "precision": "fp32"}
    inputs = {role: Input(folder / path, {}, {}) for role, path in INPUTS.items()}  # type: ignore[typeddict-item]
    attempt = Attempt(folder / "again-work", folder / "again", Stop())
    return methods.run(Stage(Request("methods", BLOCK, shared, folder / "out"), inputs, attempt))


def test_fewer_rows_than_a_batch_are_refused(folder, capfd):
    assert run(BLOCK | {"batch_size": 25}, "state3", "methods3") == 65
    assert "24 rows are fewer than one batch (methods.batch_size: 25); lower it" in capfd.readouterr().err


def test_a_method_that_changed_no_weight_is_refused_and_few_steps_are_reported(folder, caplog, capfd):
    block = BLOCK | {"compare": {"still": {"learning_rate": 1e-30}}, "steps": 2}
    assert run(block, "state4", "methods4") == 78
    assert capfd.readouterr().err.splitlines()[-1] == (
        "config: error: methods.compare.still: 2 optimizer steps left every weight as it was, so nothing was learnt; "
        "raise learning_rate, or see whether its data, or its scores, can teach anything"
    )
    assert not (folder / "methods4").exists()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "methods: 2 optimizer steps, fewer than 10: next to nothing can be learnt; raise steps"
    ]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")
def test_lora_on_four_bits(folder):
    block = BLOCK | {"compare": {"small": {"learning_rate": 1e-2, "lora": {"r": 2}, "four_bit": True}}}
    assert run(block, "state5", "methods5") == 0
    found = metrics(folder, "methods5")["methods"]["small"]
    assert found["kind"] == "4-bit LoRA"
    assert found["learnt"] < found["points"][0]["learnt"] != metrics(folder)["base"]["learnt"]


def test_batches_are_the_same_for_every_method_and_as_many_as_steps():
    rows = [([1], [2] * (i + 1)) for i in range(6)]
    config = MethodsConfig(compare={"full": MethodConfig(learning_rate=1)}, steps=5, batch_size=4)
    batches = methods.batches_of(rows, config, 0)
    assert [len(batch) for batch in batches] == [4] * 5
    assert batches == methods.batches_of(rows, config, 0) != methods.batches_of(rows, config, 1)


def test_the_page_has_the_cost_of_the_attempt_that_trained_each_method():
    from tunetrail.reporting.course import method_rows

    attempts = [
        {"measurements": {"full": {"seconds_per_step": 1.0, "peak_bytes": 5}}},
        {"measurements": {"lora": {"seconds_per_step": 2.0, "peak_bytes": None}}},
        {},
    ]
    found = {name: {"kind": name, "learnt": 1.0} for name in ("full", "lora", "prompt")}
    artifact = SimpleNamespace(attempts=attempts, metrics={"methods": found})
    rows = method_rows(SimpleNamespace(artifacts={"methods": artifact}))  # type: ignore[arg-type]
    assert [(row["name"], row["seconds_per_step"], row["peak_bytes"]) for row in rows] == [
        ("full", 1.0, 5), ("lora", 2.0, None), ("prompt", None, None),
    ]  # fmt: skip
    assert method_rows(SimpleNamespace(artifacts={})) == []  # type: ignore[arg-type]
