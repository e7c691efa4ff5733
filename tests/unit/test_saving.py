"""Model folders load by themselves, and a stage whose folder does not publishes nothing."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tunetrail.config.training import Lora
from tunetrail.contract.runner import main
from tunetrail.files import read_jsonl, write_json
from tunetrail.models import saving
from tunetrail.models.batching import encode_comparison
from tunetrail.models.loading import load_causal_lm, load_tokenizer, with_adapter, with_lora
from tunetrail.models.saving import answers, portable_config, save_adapter, save_tokenizer
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.preferences.pairs import decided_pairs, preference_targets
from tunetrail.provenance.manifest import identity

from .test_training import write_workspace

LORA = {"lora": {"r": 2, "alpha": 16}}
RUNS = {  # config/examples/demo-lora.yaml on the tiny model: stage, its config block, its inputs, the shared keys
    "sft": ("sft", {"learning_rate": 1e-2, "batch_size": 4, "epochs": 4} | LORA, {"base": "base", "data": "data"}, {}),
    "reward": (
        "reward",
        {"learning_rate": 1e-2, "batch_size": 2} | LORA,
        {"policy": "sft", "data": "data", "comparisons": "comparisons"},
        {},
    ),
    "dpo": (
        "dpo",
        {"method": "dpo", "learning_rate": 1e-2, "batch_size": 6, "checkpoints": 1} | LORA,
        {"policy": "sft", "comparisons": "comparisons"},
        {},
    ),
    "ppo": (
        "ppo",
        {"method": "ppo", "steps": 3, "checkpoints": 1, "batch_size": 8, "max_new_tokens": 6, "learning_rate": 3e-2}
        | {"advantage": "rloo", "completions_per_prompt": 4}
        | LORA,
        {"policy": "sft", "reward": "reward", "data": "data"},
        {},
    ),
    **{
        f"evaluation/{name}": (
            "evaluation",
            {"max_new_tokens": 6, "bootstrap": 100, "frontier_prompts": 3},
            {"model": name, "data": "data", "reward": "reward", "comparisons": "comparisons"}
            | ({"sft": "sft"} if name in ("dpo", "ppo") else {}),
            {"subject": {"name": name, "method": name}, "data.chat": False, "data.system": None},
        )
        for name in ("base", "sft", "dpo", "ppo")
    },
}
MODELS = ("base", "sft", "dpo", "ppo", "reward")
STRANGER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

found = {}
for name, rows in json.load(sys.stdin).items():
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(sys.argv[1] + "/" + name + "/model").eval()
    found[name] = []
    for prompt, response in rows:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(ids).logits[0]
        if name == "reward":
            found[name].append(float(logits) - model.config.reward_bias)
        else:
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found[name].append(float(logps.gather(1, ids[0, len(prompt):, None]).sum()))
assert not any(module.startswith(("peft", "tunetrail")) for module in sys.modules)
json.dump(found, sys.stdout)
"""


def run(name, output=None, of=RUNS, precision="fp32", **changes):
    """Runs one of RUNS in this process and folder; returns its exit code."""
    stage, block, inputs, shared = of[name]
    config = {"stage": stage, "seed": 5, "precision": precision, "config": block | changes}
    write_json(Path("config.json"), config | shared)
    module = importlib.import_module(f"tunetrail.stages.{stage}")
    options = [f"--input={role}={path}/manifest.json" for role, path in inputs.items()]
    to = [f"--output={output or name}/manifest.json", f"--state=state/{output or name}"]
    return main(module.run, ["--config=config.json", *options, *to])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The artifacts of all RUNS; it is the current folder during the tests."""
    folder = tmp_path_factory.mktemp("saving")
    write_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in RUNS:
            assert run(name) == 0, name
        yield folder


@pytest.fixture(scope="module")
def pairs(folder):
    """(prompt, preferred response, other response) of the held-out comparisons, as ids."""
    tokenizer, found = load_tokenizer(folder / "base/model"), []
    for row in read_jsonl(folder / "comparisons/comparisons.jsonl"):
        if row["split"] == "heldout":
            prompt, responses = encode_comparison(tokenizer, row)
            found += [
                (prompt, responses[a], responses[b]) for a, b in decided_pairs(preference_targets(row["rankings"]))
            ]
    return found


@pytest.fixture(scope="module")
def stranger(folder, pairs, tmp_path_factory):
    """What each model gives for the held-out pairs, preferred ones first, in a new Python with only the folders."""
    moved, elsewhere = tmp_path_factory.mktemp("moved"), tmp_path_factory.mktemp("elsewhere")
    for name in MODELS:
        shutil.copytree(folder / name / "model", moved / name / "model")
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, other) for prompt, _, other in pairs]
        command = [sys.executable, "-c", STRANGER, str(moved)]
        reply = subprocess.run(
            command, cwd=elsewhere, input=json.dumps(dict.fromkeys(MODELS, rows)), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    finally:
        hidden.rename(folder)
    assert reply.returncode == 0, reply.stderr
    return json.loads(reply.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sft", "dpo", "ppo"])
def test_a_copied_folder_gives_the_log_probs_that_evaluation_measured(folder, stranger, name):
    """LoRA on LoRA: without the adapter of the policy, or of SFT, they would be those of another model."""
    measured = read_jsonl(folder / f"evaluation/{name}/pairs.jsonl")
    logps = [row["chosen_logp"] for row in measured] + [row["rejected_logp"] for row in measured]
    assert stranger[name] == pytest.approx(logps, abs=1e-4)
    for other in {"base", "sft", "dpo", "ppo"} - {name}:
        assert max(abs(a - b) for a, b in zip(stranger[name], stranger[other], strict=True)) > 0.05, other


@pytest.mark.slow
def test_a_copied_reward_model_gives_the_scores_that_were_measured(folder, stranger):
    margins = [row["margin"] for row in read_jsonl(folder / "reward/pairs.jsonl")]
    half = len(stranger["reward"]) // 2
    found = [a - b for a, b in zip(stranger["reward"][:half], stranger["reward"][half:], strict=True)]
    assert found == pytest.approx(margins, abs=1e-4)
    assert json.loads((folder / "reward/metrics.json").read_text())["adapter"] == "lora"


@pytest.mark.slow
def test_published_files_name_no_path(folder):
    for path in folder.glob("*/*/*.json"):
        assert str(folder) not in path.read_text(), path
    for path in folder.rglob("*config.json"):
        if path.parent.name in ("model", "adapter") and "state" not in path.parts:
            config = json.loads(path.read_text())
            assert config.get("use_cache", True) is True, path
            assert not [key for key, value in config.items() if key.endswith("name_or_path") and value], path


@pytest.mark.slow
def test_every_model_folder_has_a_card_with_what_its_stage_measured(folder):
    for name in MODELS[1:]:
        text = (folder / name / "model/README.md").read_text()
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert f"Made by the stage `{name}` of tunetrail." in text
        assert f"- steps: {metrics['steps']}\n" in text
        assert f"- parameters_trained: {metrics['parameters_trained']:,}\n" in text
        assert ("`adapter/`, next to this folder, is the LoRA adapter" in text) == (folder / name / "adapter").is_dir()
        assert str(folder) not in text
        listed = json.loads((folder / name / "manifest.json").read_text())["files"]
        assert "model/README.md" in [file["path"] for file in listed]
    assert f"- sft: manifest `{identity(folder / 'sft')}`" in (folder / "dpo/model/README.md").read_text()


@pytest.mark.slow
def test_evaluation_says_how_a_model_was_trained(folder):
    found = {n: json.loads((folder / f"evaluation/{n}/metrics.json").read_text())["adapter"] for n in MODELS[:-1]}
    assert found == {"base": None, "sft": "lora", "dpo": "lora", "ppo": "lora"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_an_adapter_on_its_parent_equals_the_published_model(folder, name):
    rows = [[5, 6, 7, 8, 9, 10]]
    (published,) = answers(load_causal_lm(folder / name / "model"), rows)
    (adapted,) = answers(with_adapter(folder / "sft/model", folder / name / "adapter"), rows)
    torch.testing.assert_close(published, adapted, atol=1e-5, rtol=0)
    assert sorted(path.name for path in (folder / name / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_kept_adapter_is_evaluated_on_the_model_it_was_trained_on(folder, name):
    [checkpoint] = (folder / name / "checkpoints").iterdir()
    assert [path.name for path in checkpoint.iterdir()] == ["adapter"]
    first, last = json.loads((folder / f"evaluation/{name}/metrics.json").read_text())["frontier"]["points"]
    assert 0 < first["kl"]["mean"] < 2 * last["kl"]["mean"]  # the base model's would be far off


# ----------------------------------------------------------------------------- what the check refuses


def rotate_otherwise(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 100.0
    write_json(path, config)


def forget_the_adapter(folder):
    shutil.copy("base/model/model.safetensors", folder / "model.safetensors")


def end_otherwise(folder):
    path = folder / "generation_config.json"
    write_json(path, json.loads(path.read_text()) | {"eos_token_id": 7})


def chat_otherwise(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def split_otherwise(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    write_json(folder / "tokenizer.json", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rotate_otherwise, "log-probs or scores are off by up to"),
        (forget_the_adapter, "log-probs or scores are off by up to"),
        (end_otherwise, "generation_config.json has other pad and eos tokens than its tokenizer"),
        (chat_otherwise, "other special tokens or another chat template"),
        (split_otherwise, "its tokenizer splits text differently"),
    ],
)
def test_a_folder_that_loads_as_a_different_model_is_not_published(folder, monkeypatch, capfd, damage, message):
    def copy_tokenizer(source, target):
        copied(source, target)
        damage(target)

    copied = saving.copy_tokenizer
    monkeypatch.setattr(saving, "copy_tokenizer", copy_tokenizer)
    assert run("sft", damage.__name__) == 1
    error = capfd.readouterr().err
    assert "sft: the written model folder does not load as the model in memory: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (folder / damage.__name__).exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA["lora"]])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_models_trained_in_bf16_are_compared_in_float32(folder, monkeypatch, name, lora):
    """Trainers leave autocast around the forward pass, and bf16 alone would exceed the tolerance."""
    monkeypatch.setattr(saving, "TOLERANCE", 1e-5)
    assert run(name, f"{name}-bf16-{bool(lora)}", precision="bf16", lora=lora) == 0


# ----------------------------------------------------------------------------- one's own base model


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with a model in `own` that somebody else trained and saved."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model(16, 2, 2, len(tiny_tokenizer()), seed=1), tiny_tokenizer()
    model.config.use_cache, model.generation_config.eos_token_id = False, [7, 8]
    model.config.rope_parameters["rope_theta"] = 500.0
    model.save_pretrained("own")
    tokenizer.save_pretrained("own")
    return {"base": ("base", {"source": "local", "path": "own", "licence": "MIT"}, {}, {})}


def test_a_users_base_model_is_written_like_any_other(own):
    assert run("base", of=own) == 0
    written, tokenizer = (json.loads(Path(f"base/model/{name}config.json").read_text()) for name in ("", "tokenizer_"))
    assert written["use_cache"] is True
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
    assert tokenizer["model_max_length"] == written["max_position_embeddings"]
    ours, theirs = (answers(AutoModelForCausalLM.from_pretrained(f), [[5, 6, 7]]) for f in ("base/model", "own"))
    torch.testing.assert_close(ours, theirs)
    card = ModelCard.load("base/model/README.md")
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert "none: random weights or a local folder" in card.text
    assert "`own`" not in card.text
    assert run("base", "elsewhere/again", of=own) == 0
    assert identity(Path("elsewhere/again")) == identity(Path("base"))


def test_an_adapter_is_refused_as_a_base_model(own, capfd):
    """The weights that it needs are at another path, and may themselves be an adapter."""
    save_adapter(with_lora(load_causal_lm(Path("own")), Lora(r=2), seed=0), Path("adapter"))
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    write_json(Path("adapter/adapter_config.json"), config | {"base_model_name_or_path": str(Path("own").resolve())})
    tiny_tokenizer().save_pretrained("adapter")
    own["base"][1]["path"] = "adapter"
    assert run("base", of=own) == 65
    assert "base: adapter is an adapter; merge it into its model first" in capfd.readouterr().err


# ----------------------------------------------------------------------------- other versions of transformers


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
            {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_the_rotary_embedding_is_written_for_both_versions(tmp_path, rope, old):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes, rope_parameters=dict(rope)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = portable_config(json.loads(path.read_text()))
    assert config["rope_parameters"] == rope
    assert {key: config.get(key) for key in old} == old
    assert ("rope_scaling" in config) == ("rope_scaling" in old)
    write_json(path, config)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope  # neither form invalidates the other


def test_rotary_embeddings_by_type_of_layer_stay_as_they_are():
    config = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert portable_config(config) == config


def test_no_traces_of_training_or_of_this_machine_are_written():
    config = {"_name_or_path": "/home/a/b", "_model_name_or_path": "b", "use_cache": False, "hidden_size": 8}
    assert portable_config(config) == {"use_cache": True, "hidden_size": 8}


def test_a_tokenizer_names_its_models_limit_and_loads_in_both_versions(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end of turn|>"]})
    tokenizer.save_pretrained(tmp_path / "first")
    save_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "first"), tmp_path / "second", 4096)
    config = json.loads((tmp_path / "second/tokenizer_config.json").read_text())
    assert config["model_max_length"] == 4096
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|end of turn|>"]
    assert not config.keys() & {"extra_special_tokens", "is_local", "local_files_only", "name_or_path"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert loaded.extra_special_tokens == ["<|end of turn|>"]
    assert loaded.encode("a<|end of turn|>b") == tokenizer.encode("a<|end of turn|>b")
    save_tokenizer(loaded, tmp_path / "third", 1_000_000)  # a tokenizer with a lower limit keeps it
    assert json.loads((tmp_path / "third/tokenizer_config.json").read_text())["model_max_length"] == 4096
    save_tokenizer(loaded, tmp_path / "fourth", None)
