"""SFT and reward models that were trained elsewhere, here by TRL's own trainers: how they are imported, used,
refused."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tunetrail.config.loading import parse
from tunetrail.contract.runner import main
from tunetrail.errors import ConfigError
from tunetrail.files import read_jsonl
from tunetrail.models.runtime import quiet_libraries
from tunetrail.monitor.forecast import steps_of
from tunetrail.provenance.manifest import digest_of
from tunetrail.provenance.record import read_record
from tunetrail.stages.registry import STAGES, stage_config

from .test_config import GOOD, changed
from .test_training import tokenizer_of, write_artifact, write_workspace

pytestmark = pytest.mark.slow

GOOD_ANSWERS, BAD_ANSWERS = ("aaaa", "aaab", "abaa"), ("zzzz", "zzzy", "zyzz")


def chat_rows(n: int, split: str) -> list[dict]:
    """Demonstrations as the data stage writes them, with the tiny template."""
    return [
        {
            "id": f"{split}-{i}",
            "group": f"g{split}{i}",
            "source": "t",
            "prompt": f"<|user|>count {i}<|eos|><|assistant|>",
            "messages": [{"role": "user", "content": f"count {i}"}],
            "completion": GOOD_ANSWERS[i % 3],
        }
        for i in range(n)
    ]


def comparison(row: dict, split: str, i: int) -> dict:
    return {key: row[key] for key in ("id", "group", "prompt", "messages")} | {
        "split": split, "reference": None, "completions": [BAD_ANSWERS[i % 3], GOOD_ANSWERS[(i + 1) % 3]],
        "finished": [True, True],
        "rankings": [{"labeler": "a", "ranks": [2, 1], "order": [0, 1], "time": None, "scores": None}],
    }  # fmt: skip


def write_chats(folder: Path) -> None:
    """A tiny base, chats and comparisons, as artifacts."""
    digest = write_workspace(folder)
    splits = {split: chat_rows(12, split) for split in ("sft", "reward", "rl", "evaluation", "heldout")}
    shutil.rmtree(folder / "data")
    write_artifact(folder / "data", {f"{split}.jsonl": rows for split, rows in splits.items()}, digest)
    compared = [comparison(row, split, i) for split in ("reward", "heldout") for i, row in enumerate(splits[split])]
    write_artifact(folder / "comparisons", {"comparisons.jsonl": compared}, digest)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny run and, as TRL's trainers save them, `trl-sft` and `trl-reward`."""
    folder = tmp_path_factory.mktemp("made")
    write_chats(folder)
    quiet_libraries()
    base, rows = folder / "base/model", chat_rows(24, "own")
    common = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "report_to": [], "save_strategy": "no",
              "num_train_epochs": 4, "use_cpu": True, "bf16": False, "disable_tqdm": True}  # fmt: skip
    answers = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    prompts = [row["messages"] for row in rows]
    sft = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(output_dir=str(folder / "trl-sft"), **common),
        train_dataset=Dataset.from_dict({"prompt": prompts, "completion": answers}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    sft.train()
    sft.save_model()
    worse = [[{"role": "assistant", "content": BAD_ANSWERS[i % 3]}] for i in range(len(rows))]
    reward = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        args=RewardConfig(output_dir=str(folder / "trl-reward"), **common),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": worse}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    reward.train()
    reward.save_model()
    return folder


@pytest.fixture
def run_stage(made, tmp_path, monkeypatch, capfd):
    """Runs a stage in this process on a copy of the tiny run: (exit code, stderr, path of its manifest)."""
    for name in ("base", "data", "comparisons"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def run(stage: str, config: dict, inputs: dict[str, str], **shared) -> tuple[int, str, Path]:
        block = config
        if stage in ("sft", "reward"):
            block = {"path": None, "repo": None, "revision": None, "licence": None} | config
            shared.setdefault("sha256", digest_of(Path(config["path"])))
        content = {"stage": stage, "seed": 5, "precision": "fp32", "config": block} | shared
        path, output = tmp_path / f"{stage}.json", tmp_path / "made" / stage / "manifest.json"
        path.write_text(json.dumps(content))
        options = [f"--input={role}={folder}/manifest.json" for role, folder in inputs.items()]
        capfd.readouterr()
        code = main(
            importlib.import_module(f"tunetrail.stages.{stage}").run,
            ["--config", str(path), *options, "--output", str(output), "--state", str(tmp_path / "state" / stage)],
        )
        return code, capfd.readouterr().err, output

    return run


SFT = {"base": "base", "data": "data"}
REWARD = {"policy": "base", "data": "data", "comparisons": "comparisons"}


def copied(made: Path, name: str, folder: Path, auto_class=AutoModelForSequenceClassification, **config) -> Path:
    """A copy of a model with changes in its config."""
    shutil.copytree(made / name, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


# ----------------------------------------------------------------------------- what TRL made


def test_a_trl_checkpoint_is_the_sft_model_with_the_bases_tokenizer(run_stage, made):
    code, error, output = run_stage("sft", {"path": str(made / "trl-sft"), "licence": "MIT"}, SFT)
    assert code == 0, error
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output.parent / "model", made / "trl-sft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in load_file(
        made / "base/model/model.safetensors").items())  # fmt: skip
    assert tokenizer_of(output.parent) == tokenizer_of(made / "base")
    (found,) = read_record(output.parent).of_role("sft")
    assert found["annotations"]["licence"] == "MIT"
    assert found["digest"]["sha256"] == digest_of(made / "trl-sft")
    assert any(path.endswith("model.safetensors") for path in found["annotations"]["files"])
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["source"]["path"] == str(made / "trl-sft")
    dpo = {"method": "dpo", "learning_rate": 1e-3, "batch_size": 4, "epochs": 4}
    code, error, _ = run_stage("dpo", dpo, {"policy": output.parent, "comparisons": "comparisons"})
    assert code == 0, error


def test_a_trl_reward_model_is_measured_and_ppo_learns_from_it(run_stage, made, caplog):
    code, error, output = run_stage("reward", {"path": str(made / "trl-reward")}, REWARD)
    assert code == 0, error
    assert "warning" not in caplog.text
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["accuracy"]["mean"] > 0.9
    assert metrics["direction"]["pairs"] == 24
    assert metrics["direction"]["p"] < 0.001
    assert metrics["template_correlation"] is None
    assert "probe" not in metrics["gain_over"]
    assert len(read_jsonl(output.with_name("pairs.jsonl"))) == metrics["pairs"] == 12
    assert tokenizer_of(output.parent) == tokenizer_of(made / "base")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (output.parent / "model", made / "trl-reward")
    )
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
    ppo = {"method": "ppo", "steps": 3, "batch_size": 8, "max_new_tokens": 4, "missing_eos_score": None, "gold": None}
    code, error, output = run_stage("ppo", ppo, {"policy": "base", "data": "data", "reward": output.parent})
    assert code == 0, error
    assert len(read_jsonl(output.with_name("history.jsonl"))) == 3


def test_without_comparisons_it_is_tested_on_answers_to_other_prompts(run_stage, made, caplog):
    inputs = {"policy": "base", "data": "data"}
    code, error, output = run_stage("reward", {"path": str(made / "trl-reward")}, inputs)
    assert code == 0, error
    metrics = json.loads(output.with_name("metrics.json").read_text())
    assert metrics["direction"]["pairs"] == 60
    assert "accuracy" not in metrics
    # It learnt nothing about prompts, and a warning says so.
    assert "may not tell better responses from worse: the better one scores higher in" in caplog.text
    assert "60 pairs of an author's answer and one written for another prompt, p " in caplog.text


# ----------------------------------------------------------------------------- what is refused


def test_a_model_that_prefers_worse_responses_is_refused_with_the_numbers(run_stage, made, tmp_path):
    folder = copied(made, "trl-reward", tmp_path / "flipped")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.neg_()
    model.save_pretrained(folder)
    code, error, output = run_stage("reward", {"path": str(folder)}, REWARD)
    assert code == 65
    assert (
        "prefers the worse response: the better one scores higher in 0% of 24 pairs of the run's comparisons, p "
        in error
    )
    assert error.strip().count("\n") == 0
    assert not output.exists()


def edit_tokenizer(folder: Path, change) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


TOKENIZERS = {
    "template": (
        lambda folder: edit_tokenizer(folder, lambda t: setattr(t, "chat_template", t.chat_template + "!")),
        "has another chat template than the base model; give base.chat_template the one that it was trained with",
    ),
    "no-template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "has no chat template, the base has",
    ),
    "eos": (
        lambda folder: edit_tokenizer(folder, lambda t: setattr(t, "eos_token", "<|user|>")),
        "is '<|user|>', that of the base model '<|eos|>'; set base to the model that it was trained from",
    ),
    "vocabulary": (
        lambda folder: edit_tokenizer(folder, lambda t: t.add_tokens(["<|new|>"])),
        "(262 tokens) differs from that of the base model (261 tokens)",
    ),
    "splits": (
        lambda folder: edit_json(
            folder / "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}) or c
        ),
        "splits 5 of 130 texts of the data into other tokens than the base model, first 'Upper",
    ),
    "none": (
        lambda folder: [path.unlink() for path in folder.glob("*token*")],
        "has no tokenizer that can be loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_error_for_another_tokenizer_is_one_line_with_a_fix(run_stage, made, tmp_path, stage, name):
    change, message = TOKENIZERS[name]
    folder = copied(made, f"trl-{stage}", tmp_path / "other")
    change(folder)
    digest = tokenizer_of(made / "base")
    for split in ("sft", "reward", "rl", "evaluation", "heldout"):
        rows = read_jsonl(tmp_path / f"data/{split}.jsonl")
        rows.append(rows[0] | {"id": "u", "completion": "Upper"})
        write_artifact(tmp_path / "data", {f"{split}.jsonl": rows}, digest)
    code, error, output = run_stage(stage, {"path": str(folder)}, SFT if stage == "sft" else REWARD)
    assert code == 65
    assert message in error
    assert error.strip().count("\n") == 0
    assert not output.exists()


def two_labels(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)


def encoder(folder: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=261, num_labels=1, **shape)).save_pretrained(folder)


REWARD_MODELS = {
    "two-labels": (two_labels, "has 2 labels; import one with num_labels 1, or use it as a scorer (scorers, `scorer: "),
    "encoder": (encoder, "is a BertForSequenceClassification, which has no linear layer `score`"),
    "pad-is-eos": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(pad_token_id=1)),
        "pads with eos (pad_token_id in its config.json), so it reads its score before eos and the pipeline at eos",
    ),
    "positions": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(max_position_embeddings=64)),
        "reads 64 tokens, the base model 4096; import one that reads as many",
    ),
}


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_a_model_that_the_pipeline_would_read_wrongly_is_refused(run_stage, made, tmp_path, name):
    change, message = REWARD_MODELS[name]
    folder = copied(made, "trl-reward", tmp_path / "other")
    change(folder)
    code, error, output = run_stage("reward", {"path": str(folder)}, REWARD)
    assert code == 65
    assert message in error
    assert error.strip().count("\n") == 0
    assert not output.exists()


def test_language_models_and_adapters_are_refused_as_reward_models(run_stage, made, tmp_path):
    from peft import LoraConfig, get_peft_model

    code, error, _ = run_stage("reward", {"path": str(made / "trl-sft")}, REWARD)
    assert code == 65
    assert "holds no trained score.weight; give a sequence-classification model" in error
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(made / "base/model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    code, error, _ = run_stage("sft", {"path": str(adapter)}, SFT)
    assert code == 65
    assert "is an adapter; merge it into its model first" in error


def test_a_template_that_ends_after_eos_is_compared(run_stage, made, tmp_path, caplog):
    """A line break after eos: TRL would have trained the score there."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = copied(made, "trl-reward", tmp_path / "other")
    for place in (tmp_path / "base/model", folder):
        edit_tokenizer(place, lambda t: setattr(t, "chat_template", template))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    for path in (tmp_path / "base").glob("manifest.json"):
        path.unlink()
    write_artifact(tmp_path / "base", {}, tokenizer_of(made / "base"))
    code, error, output = run_stage("reward", {"path": str(folder)}, REWARD)
    assert code == 0, error
    found = json.loads(output.with_name("metrics.json").read_text())["template_correlation"]
    assert found < 0.9
    assert f"the scores of both have a rank correlation of {found:.2f}" in caplog.text


def test_a_folder_that_changed_since_the_run_was_planned_is_refused(run_stage, made):
    code, error, _ = run_stage("sft", {"path": str(made / "trl-sft")}, SFT, sha256="0" * 64)
    assert code == 65
    assert "trl-sft differs from what it was when this run was planned; run snakemake again" in error


# ----------------------------------------------------------------------------- the config


def test_a_block_with_a_path_is_an_import_and_changes_no_other_stage(tmp_path):
    (tmp_path / "weights").write_text("1")
    content = changed("reward", {"path": str(tmp_path)}) | {"sft": {"path": str(tmp_path), "licence": "MIT"}}
    for policy in content["policies"].values():
        if policy["method"] == "ppo":
            policy["missing_eos_score"] = None
    config = parse(content, "c.yaml")
    assert config.trained_sft is config.trained_reward is None
    before = stage_config(config, "sft")
    assert before["config"]["licence"] == "MIT"
    assert before["sha256"] == digest_of(tmp_path)
    (tmp_path / "weights").write_text("2")
    assert stage_config(config, "sft")["sha256"] != before["sha256"]
    assert not {"sft", "reward"} & set(steps_of(config, {split: [] for split in ("sft", "reward")}))
    assert STAGES["reward"].inputs(config, "")["comparisons"] == "comparisons"


def test_an_imported_reward_model_needs_no_comparisons(tmp_path):
    content = GOOD | {"sft": None, "completions": None, "comparisons": None, "reward": {"path": "x"}}
    content["policies"] = {"ppo": {"method": "ppo", "steps": 1, "missing_eos_score": None}}
    config = parse(content, "c.yaml")
    assert STAGES["reward"].inputs(config, "") == {"policy": "base", "data": "data"}
    assert "reward" not in config.shares["demonstrations"]
    del content["policies"]["ppo"]["missing_eos_score"]
    with pytest.raises(ConfigError, match=r"missing_eos_score: its default \(-1\) .* gives whole ones any number"):
        parse(content, "c.yaml")


@pytest.mark.parametrize(("changes", "message"), [
    ({"sft": {"path": "x", "repo": "a/b"}}, "sft: give either path (a local folder) or repo (a hub repository with "
        "its revision)"),
    ({"reward": {"repo": "a/b"}}, "reward: revision is needed with repo, so that a rerun gets the same model"),
    ({"reward": {"path": "x", "epochs": 2}}, "reward.epochs: unknown key; see config/README.md for the keys of this "
        "block"),
    ({"sft": {"path": "x", "licens": "MIT"}}, "sft.licens: unknown key; did you mean licence?"),
    ({"sft": {"batchsize": 4}}, "sft.batchsize: unknown key; did you mean batch_size?"),
    ({"sft": {"lora": {"r": 0}}}, "sft.lora.r: must be greater than or equal to 1, got 0"),
])  # fmt: skip
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError) as error:
        parse(GOOD | {"policies": {}} | changes, "c.yaml")
    assert str(error.value) == f"c.yaml: {message}"
