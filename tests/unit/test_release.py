"""tunetrail model: exporting a run's model as one folder, pushing it to a hub, and chatting with it."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.audited_run import flip
from tests.records import seal_folder
from tunetrail.cli import main
from tunetrail.config.training import Lora
from tunetrail.files import write_json
from tunetrail.models import release
from tunetrail.models.batching import encode
from tunetrail.models.chat import Speaker, converse
from tunetrail.models.loading import copy_tokenizer, load_causal_lm, load_tokenizer, with_lora
from tunetrail.models.sampling import sample
from tunetrail.models.saving import answers, save_adapter, save_tokenizer, save_weights
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.provenance.exports.model_card import of_stage
from tunetrail.provenance.ledger import seal
from tunetrail.provenance.manifest import identity
from tunetrail.provenance.record import dependency
from tunetrail.reward.kwise import initialise
from tunetrail.stages.base import set_special_tokens
from tunetrail.terminal import PROSE, escape

ROWS = [[5, 6, 7, 8, 9, 10]]


def model_of(seed):
    model = tiny_model(16, 2, 2, len(tiny_tokenizer()), seed)
    model.config.max_position_embeddings = 256
    set_special_tokens(model, tiny_tokenizer(), SimpleNamespace(chat_template=None, pad_token=None))
    return model.eval()


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """results/r: base, data, reward, and the policies dpo (kept whole at step 2) and ppo (kept as an adapter)."""
    run = tmp_path_factory.mktemp("release") / "results/r"
    folders = {name: run / name for name in ("base", "data", "reward", "policies/dpo", "policies/ppo", "policies/best")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {})
    base, parent = folders["base"], folders["base"] / "model"
    save_weights(model_of(0), parent)
    save_tokenizer(tiny_tokenizer(), parent, 256)
    licence = {"licence": "Apache-2.0", "reason": "its files are in the manifest"}
    seal_folder(
        base,
        "base",
        dependencies=[dependency("base", "someone/tiny", uri="pkg:huggingface/someone/tiny@v1", **licence)],
    )
    source = dependency(
        "source", "../../home/ann/rows.jsonl", "5" * 64, files={"../../home/ann/rows.jsonl": "5" * 64}, licence=None
    )
    hub = dependency("source", "someone/chats", version="v2", licence="MIT")
    seal_folder(
        folders["data"], "data", {"base": base}, {"chat": True, "system": "Be brief."}, dependencies=[source, hub]
    )

    def trained(name, stage, model):
        save_weights(model, folders[name] / "model")
        copy_tokenizer(parent, folders[name] / "model")

    scored = initialise(model_of(0), seed=3)
    scored.config.pad_token_id, scored.config.reward_bias = 0, 0.5
    trained("reward", "reward", scored)
    seal_folder(folders["reward"], "reward", {"policy": base, "data": folders["data"]})
    trained("policies/dpo", "dpo", model_of(1))
    save_weights(model_of(2), folders["policies/dpo"] / "checkpoints/2/model")
    copy_tokenizer(parent, folders["policies/dpo"] / "checkpoints/2/model")
    seal_folder(folders["policies/dpo"], "dpo", {"policy": base, "data": folders["data"]})
    adapted = with_lora(load_causal_lm(parent), Lora(r=2), seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    save_adapter(adapted, folders["policies/ppo"] / "checkpoints/4/adapter")
    trained("policies/ppo", "ppo", adapted.merge_and_unload())
    seal_folder(folders["policies/ppo"], "ppo", {"policy": base, "data": folders["data"]})
    write_json(folders["policies/best"] / "policy.json", {"n": 4})
    seal_folder(folders["policies/best"], "best_of_n", {"policy": base, "reward": folders["reward"]})
    points = [{"step": step, "gold": interval(step / 10)} for step in (2, 6)]
    for name in ("dpo", "ppo"):
        folder = run / f"evaluation/{name}"
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {"gold": interval(0.61), "frontier": {"points": points}})
        seal_folder(folder, "evaluation", {"model": run / f"policies/{name}"}, about=("model",))
    seal(run)
    return run


@pytest.fixture
def run(original, monkeypatch):
    monkeypatch.chdir(original.parents[1])
    return Path("results/r")


# ----------------------------------------------------------------------------- export


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
assert not any(m.startswith(("peft", "tunetrail")) for m in sys.modules)
assert tokenizer.chat_template and model.generation_config.eos_token_id == tokenizer.eos_token_id
print(model.dtype, tokenizer.model_max_length, model(torch.tensor([[5, 6, 7]])).logits.sum().item())
"""


@pytest.mark.slow
def test_export_writes_one_folder_that_loads_by_itself(run, tmp_path, capsys):
    out = tmp_path / "taken/away"
    assert main(["model", "export", str(run / "policies/dpo"), str(out)]) == 0
    assert "fp32" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "SHA256SUMS", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    reply = subprocess.run([sys.executable, "-c", STRANGER], cwd=out, capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    dtype, longest, total = reply.stdout.split()
    assert (dtype, longest) == ("torch.float32", "256")
    expected = AutoModelForCausalLM.from_pretrained(run / "policies/dpo/model")(torch.tensor([[5, 6, 7]])).logits.sum()
    assert float(total) == pytest.approx(expected.item(), abs=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "policies/dpo/model", out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~current_umask()}


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_the_exported_card_names_its_model_and_no_path(run, tmp_path):
    assert main(["model", "export", str(run / "policies/dpo"), str(tmp_path / "my-dpo")]) == 0
    text = (tmp_path / "my-dpo/README.md").read_text()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license, card.data.datasets) == (
        "someone/tiny",
        "apache-2.0",
        ["someone/chats"],
    )
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [("gold", 0.61)]
    for line in (
        "# my-dpo",
        "- gold: 0.61 [0.51, 0.71], n = 8",
        f"sha256 `{identity(run / 'policies/dpo')}`",
        f"- base: manifest `{identity(run / 'base')}`",
        "- licence of the base model: Apache-2.0",
        f"- data: rows.jsonl, licence not stated, sha256 `{'5' * 64}`",
        "- data: someone/chats, licence MIT, version v2",
        'AutoModelForCausalLM.from_pretrained(".")',
        "sha256sum --check SHA256SUMS",
        "vLLM and other engines were not tried",
    ):
        assert line in text, line
    assert "/ann" not in text
    assert "results/r" not in text


def test_bf16_halves_the_weights_and_says_so(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["model", "export", str(run / "policies/dpo/manifest.json"), str(out), "--dtype", "bf16"]) == 0
    assert "rounded to bf16: log-probs of tokens of a test sentence changed by up to" in capsys.readouterr().out
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (run / "policies/dpo/model", out))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert "rounded to bf16, unlike those behind the results above" in (out / "README.md").read_text()


def test_a_kept_adapter_is_merged_into_the_model_that_the_record_names(run, tmp_path, capsys):
    out, kept = tmp_path / "out", run / "policies/ppo/checkpoints/4"
    assert main(["model", "export", str(kept), str(out)]) == 0
    assert "merged the adapter of step 4 into" in capsys.readouterr().out
    # This made-up run kept the adapter of its final model.
    ours, final, base = (
        answers(AutoModelForCausalLM.from_pretrained(folder), ROWS)[0]
        for folder in (out, run / "policies/ppo/model", run / "base/model")
    )
    torch.testing.assert_close(ours, final, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 0.05
    text = (out / "README.md").read_text()
    assert "kept at step 4, before training ended" in text
    assert "Not measured: no evaluation of this model is in its run." in text  # measurements are of the final model


def test_a_kept_whole_model_has_the_results_of_its_step(run, tmp_path):
    assert main(["model", "export", str(run / "policies/dpo/checkpoints/2/model"), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "- gold: 0.2 [0.1, 0.3], n = 8" in text
    assert "0.61" not in text
    ours, kept = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(run / "policies/dpo/checkpoints/2/model/model.safetensors"),
    )
    assert all(torch.equal(ours[name], kept[name]) for name in kept)


def test_a_reward_model_keeps_its_bias(run, tmp_path):
    assert main(["model", "export", str(run / "reward"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.reward_bias, model.config.reward_pooling) == (0.5, "last")
    assert 'AutoModelForSequenceClassification.from_pretrained(".")' in (tmp_path / "out/README.md").read_text()


@pytest.fixture
def damaged(original, tmp_path, monkeypatch):
    """A copy to damage."""
    subprocess.run(["cp", "-r", str(original.parents[1]), str(tmp_path / "copy")], check=True)
    monkeypatch.chdir(tmp_path / "copy")
    return Path("results/r")


def test_nothing_is_exported_from_an_artifact_that_differs_from_its_manifest(damaged, capsys):
    flip(damaged / "policies/dpo/model/model.safetensors")
    assert main(["model", "export", str(damaged / "policies/dpo"), "out"]) == 65
    assert "model.safetensors: differs from its manifest" in capsys.readouterr().err
    flip(damaged / "base/model/model.safetensors")  # an adapter is merged into this
    assert main(["model", "export", str(damaged / "policies/ppo/checkpoints/4"), "out"]) == 65
    assert "base/model/model.safetensors: differs from its manifest" in capsys.readouterr().err
    assert not list(Path().glob("*out*"))


def test_an_adapter_is_not_merged_into_another_model(damaged, capsys):
    save_weights(model_of(9), damaged / "base/model")
    seal_folder(damaged / "base", "base")
    assert main(["model", "export", str(damaged / "policies/ppo/checkpoints/4"), "out"]) == 65
    assert "the model that this adapter was trained on (../../base) is gone or has changed" in capsys.readouterr().err


def test_an_export_that_loads_as_another_model_is_not_kept(run, tmp_path, monkeypatch, capsys):
    def save(model, folder):
        save_weights(model_of(7), folder)

    monkeypatch.setattr(release, "save_weights", save)
    assert main(["model", "export", str(run / "policies/dpo"), str(tmp_path / "out")]) == 1
    assert "what was written loads as another model: its log-probs or scores are off" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("policies/no", 65, "results/r/policies/no: no such model"),
        ("", 65, "not a model of a run, for neither it nor a folder above has a manifest.json"),
        ("data", 65, "it holds no model; name the artifact of a base, sft, reward, dpo, orpo, simpo, kto or ppo stage"),
        ("policies/best", 65, "best-of-n has no weights of its own"),
        ("policies/ppo/checkpoints/4/adapter/adapter_config.json", 65, "it holds no model"),
        ("policies/dpo/checkpoints/3", 65, "checkpoints/3: no such model"),
    ],
)
def test_the_error_for_a_path_without_a_model_is_one_line(run, tmp_path, capsys, path, code, message):
    assert main(["model", "export", str(run / path), str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_export_overwrites_nothing(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["model", "export", str(run / "policies/dpo"), str(tmp_path / "out")]) == 78
    assert "already exists" in capsys.readouterr().err
    assert main(["model", "export", str(run / "policies/dpo"), str(run / "policies/dpo/out")]) == 78
    assert "is inside the artifact" in capsys.readouterr().err


# ----------------------------------------------------------------------------- the card in a model folder


def test_a_stages_card_names_no_place_time_or_commit(run, tmp_path):
    """It is part of the artifact: equal models must have equal cards, wherever and whenever they were made."""
    metrics = {
        "train_loss": 0.25,
        "steps": 1200,
        "adapter": "lora",
        "accuracy": interval(0.6),
        "losses": [1.0],
        "unknown": None,
        "gain_over": {"longer_wins": interval(0.1)},
        "accuracy_by_source": {"../../home/ann/rows.jsonl": interval(0.5)},
    }
    inputs = {"policy": run / "base", "data": run / "data"}
    text = of_stage("reward", run / "reward", inputs, [], metrics)
    subprocess.run(["cp", "-r", str(run.parent), str(tmp_path / "copy")], check=True)
    (tmp_path / "copy/r/ledger.jsonl").unlink()  # as in the first run of a pipeline
    there = {role: tmp_path / "copy/r" / folder.name for role, folder in inputs.items()}
    assert of_stage("reward", tmp_path / "copy/r/reward", there, [], metrics) == text
    for line in (
        "- train_loss: 0.25\n- steps: 1,200\n- adapter: lora\n- accuracy: 0.6 [0.5, 0.7], n = 8\n"
        "- gain_over.longer_wins: 0.1 [0, 0.2], n = 8\n\n",
        f"- base: manifest `{identity(run / 'base')}`",
        f"- data: manifest `{identity(run / 'data')}`",
        "A model is evaluated after its folder was published",
        "base_model: someone/tiny",
        "license: apache-2.0",
    ):
        assert line in text, line
    for absent in ("/ann", "results", str(tmp_path), "commit", "2026-", "fde7df5d8a2d"):
        assert absent not in text, absent


# ----------------------------------------------------------------------------- GGUF


CONVERTED = """
import pathlib, sys
folder, _, out, _, kind = sys.argv[1:]
assert (pathlib.Path(folder) / "config.json").exists()
pathlib.Path(out).write_text(kind)
"""


def converter(tmp_path, monkeypatch, code):
    """A stand-in for llama.cpp's converter, which was never run here."""
    path = tmp_path / "bin/convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(code)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_the_converter_writes_gguf(run, tmp_path, monkeypatch):
    converter(tmp_path, monkeypatch, CONVERTED)
    assert main(["model", "export", str(run / "policies/dpo"), str(tmp_path / "out"), "--gguf", "--dtype=bf16"]) == 0
    assert (tmp_path / "out/model.gguf").read_text() == "bf16"
    assert "model.gguf" in (tmp_path / "out/SHA256SUMS").read_text()
    assert "`model.gguf` has the same weights for llama.cpp" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (None, 78, "--gguf: convert_hf_to_gguf.py is not on the PATH"),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized')",
            1,
            "BPE pre-tokenizer was not recognized",
        ),
        ("", 1, "it wrote no file"),
    ],
)
def test_without_a_working_converter_there_is_a_clear_line(
    run, tmp_path, monkeypatch, capsys, code, exit_code, message
):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if code is not None:
        converter(tmp_path, monkeypatch, code)
    assert main(["model", "export", str(run / "policies/dpo"), str(tmp_path / "out"), "--gguf"]) == exit_code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


# ----------------------------------------------------------------------------- push


class FakeHub:
    """The part of HfApi that push uses."""

    calls: list
    error: Exception | None = None

    def create_repo(self, repo, **options):
        if self.error:
            raise self.error
        self.calls.append(("create", repo, options))

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), options))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    FakeHub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def exported(run, tmp_path):
    release.export(run / "policies/dpo", tmp_path / "my-dpo", say=lambda line: None)
    return tmp_path / "my-dpo"


def test_push_uploads_what_export_wrote(hub, exported, capsys):
    assert main(["model", "push", str(exported), "ann/my-dpo"]) == 0
    create, upload = hub.calls
    assert create == ("create", "ann/my-dpo", {"private": True, "exist_ok": True})
    assert upload[:3] == ("upload", "ann/my-dpo", sorted(path.name for path in exported.iterdir()))
    assert upload[3]["commit_message"] == "Upload my-dpo, a model of a tunetrail run"
    assert "*.safetensors" in upload[3]["delete_patterns"]
    out = capsys.readouterr().out
    assert "licence apache-2.0, base model someone/tiny" in out
    assert "https://hub/ann/my-dpo/commit/1" in out
    assert main(["model", "push", str(exported), "ann/my-dpo", "--public"]) == 0
    assert hub.calls[2][2]["private"] is False


def test_a_dry_run_contacts_nobody(hub, exported, capsys):
    assert main(["model", "push", str(exported), "ann/my-dpo", "--dry-run"]) == 0
    assert hub.calls == []
    out = capsys.readouterr().out
    for path in exported.iterdir():
        assert f"{path.stat().st_size:>14,}  {path.name}\n" in out
    assert "8 files would go to ann/my-dpo (private if it is new); nothing was sent" in out


def test_only_exported_folders_are_pushed(hub, run, exported, capsys):
    assert main(["model", "push", str(run / "policies/dpo"), "ann/x"]) == 65
    assert "has no SHA256SUMS; write a folder to push with `tunetrail model export`" in capsys.readouterr().err
    (exported / "notes.txt").write_text("secret")
    assert main(["model", "push", str(exported), "ann/x"]) == 65
    assert "1 files differ from SHA256SUMS, notes.txt first" in capsys.readouterr().err
    (exported / "notes.txt").unlink()
    flip(exported / "model.safetensors")
    assert main(["model", "push", str(exported), "ann/x"]) == 65
    assert "model.safetensors first" in capsys.readouterr().err
    assert hub.calls == []


def test_the_error_for_a_refusal_of_the_hub_is_one_line(hub, exported, monkeypatch, capsys):
    monkeypatch.setattr(FakeHub, "error", LocalTokenNotFoundError("Token is required, but no token found.\nmore"))
    assert main(["model", "push", str(exported), "ann/x"]) == 1
    error = capsys.readouterr().err
    assert "ann/x: the hub refused or was not reached: Token is required, but no token found." in error
    assert "`hf auth login` signs in" in error
    assert error.count("\n") == 1


# ----------------------------------------------------------------------------- chat


def talk(monkeypatch, capsys, text, *options):
    """A chat's answers to these lines: (exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = main(["model", "chat", "--max-new-tokens", "12", *options])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_chat_draws_the_same_tokens_as_the_runs_sampler(run, monkeypatch, capsys):
    """The same tokens as `sample` draws for the rendered conversation, turn by turn."""
    folder = run / "policies/dpo/model"
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    monkeypatch.setattr("tunetrail.models.chat.use_bf16", lambda precision: False)
    code, out, err = talk(monkeypatch, capsys, "Hello\nAgain\n", "--model", str(run / "policies/dpo"), "--seed", "3")
    assert code == 0
    assert "chat template, system message 'Be brief.'" in err
    messages, answers = [{"role": "system", "content": "Be brief."}], []
    for turn, text in enumerate(("Hello", "Again")):
        messages.append({"role": "user", "content": text})
        prompt = encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        [[ids]] = sample(
            model, [prompt], [f"turn-{turn}"], k=1, max_new_tokens=12, temperature=0.7, seed=3, batch_size=1,
            eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(escape(answer.rstrip("\ufffd"), PROSE) + "\n" for answer in answers)
    assert len(set(answers)) == 2


def test_two_models_answer_the_same_prompt(run, monkeypatch, capsys):
    names = [str(run / "base"), str(run / "policies/ppo/checkpoints/4")]
    alone = [talk(monkeypatch, capsys, "Hi\n", "--model", name)[1] for name in names]
    code, out, _ = talk(monkeypatch, capsys, "Hi\n", "--model", names[0], "--model", names[1])
    assert code == 0
    assert out == "".join(f"[{name}]\n{said}" for name, said in zip(names, alone, strict=True))
    assert alone[0] != alone[1]


def test_the_same_seed_gives_the_same_answers_and_a_new_conversation_forgets(run, monkeypatch, capsys):
    def said(text, *options):
        return talk(monkeypatch, capsys, text, "--model", str(run / "policies/dpo"), *options)[1]

    assert said("Hi\n") == said("Hi\n")
    assert said("Hi\n") != said("Hi\n", "--seed", "4")


def test_a_conversation_is_remembered_until_a_new_one_starts(run):
    speaker = Speaker.load(run / "policies/dpo")

    def last(*lines):
        found = []
        converse([speaker], [*lines, "/new"], lambda said: found.append(list(said)), pytest.fail, 8, 1.0, seed=3)
        return found[-1]

    assert last("Hi", "", "How?") != last("Hello there", "", "How?")  # the third line draws the same numbers
    assert last("Hi", "/new", "How?") == last("Hello there", "/new", "How?")


def test_chat_streams_a_response_token_by_token(run, monkeypatch):
    monkeypatch.setattr("tunetrail.models.chat.use_bf16", lambda precision: False)
    speaker = Speaker.load(run / "policies/dpo", system="Be long.")
    said = list(speaker.reply("Hi", max_new_tokens=8, temperature=1.0, seed=1))
    assert len(said) == 8
    assert [len(text) for text in said] == sorted(len(text) for text in said)
    assert speaker.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": speaker.messages[1]["content"]},
    ]
    assert "Be long." in speaker.tokenizer.decode(speaker.prompt("more"))
    assert speaker.messages[1]["content"] in speaker.tokenizer.decode(speaker.prompt("more"))


def test_plain_text_is_continued_as_it_is(run, monkeypatch, capsys):
    speaker = Speaker.load(run / "base", plain=True)
    assert speaker.tokenizer.decode(speaker.prompt("def f(")) == "def f("
    code, _, err = talk(monkeypatch, capsys, "a\n", "--model", str(run / "base"), "--plain", "--system", "x")
    assert code == 78
    assert "--plain, --system: choose one" in err


def test_a_full_context_is_reported_and_does_not_end_the_chat(run, monkeypatch, capsys):
    code, out, err = talk(monkeypatch, capsys, "x" * 300 + "\n/new\nHi\n", "--model", str(run / "policies/dpo"))
    assert code == 0
    assert "and the model reads 256; /new starts another" in err
    assert out.count("\n") >= 1


def test_a_reward_model_cannot_chat(run, monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, "Hi\n", "--model", str(run / "reward"))
    assert code == 65
    assert "a reward model scores text and writes none" in err


@pytest.mark.slow
def test_chat_reads_a_pipe_in_a_separate_process(run):
    command = [
        sys.executable,
        "-m",
        "tunetrail",
        "model",
        "chat",
        "--model",
        str(run / "base"),
        "--max-new-tokens",
        "4",
    ]
    reply = subprocess.run(command, input="Hi\n", capture_output=True, text=True, check=False)
    assert reply.returncode == 0, reply.stderr
    assert reply.stdout.strip("\n")
