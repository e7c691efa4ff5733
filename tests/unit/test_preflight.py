"""The checks before any job starts."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tunetrail.cli import main
from tunetrail.config.loading import parse
from tunetrail.config.run import Config
from tunetrail.errors import ConfigError, DataError
from tunetrail.launch import preflight
from tunetrail.models.tiny import tiny_tokenizer

ROWS = [{"prompt": f"question {i}", "completion": "yes"} for i in range(40)]


def write(name: str, rows: list[dict]) -> dict:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"source": "file", "path": name}


def save_base(files: dict[str, dict] | None = None, positions: int = 4096, **tokens: str | None) -> None:
    tokenizer = tiny_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained("base")
    LlamaConfig(max_position_embeddings=positions).save_pretrained("base")
    for name, content in (files or {}).items():
        Path("base", name).write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base()


def config(rows: list[dict] = ROWS, data: dict | None = None, base: dict | None = None, **more) -> Config:
    return parse(
        {
            "run": "r",
            "base": {"source": "local", "path": "base"} | (base or {}),
            "data": {"demonstrations": [write("d.jsonl", rows)]} | (data or {}),
        }
        | more
    )


def told(given: Config, error: type[Exception] = ConfigError, **options) -> list[str]:
    with pytest.raises(error) as raised:
        preflight.check(given, "c.yaml", **options)
    assert type(raised.value) is error
    return str(raised.value).splitlines()


def test_a_valid_config_prints_nothing():
    assert preflight.check(config(sft={})) == []


def test_packages_that_the_config_needs_must_be_installed():
    vllm = {"method": "ppo", "steps": 1, "reward": {"length": 1}, "missing_eos_score": 0, "vllm": {}}
    small = {"learning_rate": 1e-3, "lora": {}, "four_bit": True}
    given = config(lm_eval={"tasks": ["arc_easy"]}, policies={"p": vllm}, methods={"compare": {"small": small}})
    assert told(given) == [
        "c.yaml: lm_eval.tasks: the package lm-eval is not installed; run `pip install lm-eval`, or set lm_eval to "
        "null",
        "c.yaml: methods.compare.small.four_bit: bitsandbytes is not installed; run `pip install bitsandbytes`, or "
        "remove the method",
        "c.yaml: policies.p.vllm: vLLM is not installed; run `pip install vllm`, or set vllm to null",
    ]
    assert preflight.check(given, packages=False) == []  # conda environments and containers have their own


def test_bitsandbytes_must_be_installed_for_every_stage_that_trains_in_4_bits(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    small = {"lora": {}, "four_bit": True}
    pairs = write("p.jsonl", [{"prompt": f"ask {i}", "chosen": "good", "rejected": "bad"} for i in range(40)])
    policies = {"p": {"method": "orpo"} | small, "q": {"method": "simpo"}}
    given = config(sft=small, policies=policies, data={"preferences": [pairs]})
    assert told(given) == [
        f"c.yaml: {block}.four_bit: bitsandbytes is not installed; run `pip install bitsandbytes`, or set it to false"
        for block in ("sft", "policies.p")
    ]


BAD_BASES = [
    ({"chat_template": None}, {}, "data.chat: the base model has no chat template; set data.chat to false, or give "
                                  "base.chat_template"),
    ({"pad_token": "<|eos|>"}, {}, "base.pad_token: pad must be a token other than eos ('<|eos|>'); name a special "
                                   "token of its vocabulary"),
    ({"pad_token": None}, {}, "base.pad_token: the tokenizer has no pad token; name a special token of its vocabulary "
                              "other than eos"),
    ({}, {"pad_token": "<|nil|>"}, "base.pad_token: '<|nil|>' is not in the vocabulary; choose a special token the "
                                   "model has"),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "base", "line"), BAD_BASES)
def test_pad_eos_and_template_of_a_local_base(tokens, base, line, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    save_base(**tokens)
    assert told(config(base=base)) == [f"c.yaml: {line}"]
    mended = {"chat_template": "{{ messages[0].content }}", "pad_token": "<|pad|>"}
    assert preflight.check(config(base=mended)) == []


def test_a_tokenizer_class_that_may_have_a_default_pad_is_left_to_the_stage():
    save_base({"tokenizer_config.json": {"eos_token": "<|eos|>", "tokenizer_class": "T5Tokenizer"}})
    assert preflight.check(config()) == []
    save_base({"tokenizer_config.json": {"eos_token": {"content": "<|eos|>"}, "tokenizer_class": "GPT2Tokenizer"}})
    assert told(config())[0].startswith("c.yaml: base.pad_token: the tokenizer has no pad token")


def test_a_folder_without_a_model():
    Path("base/config.json").unlink()
    assert told(config()) == ["c.yaml: base.path: base has no config.json; name a folder that from_pretrained can load"]


def test_lengths_are_measured_on_a_sample_with_the_files_of_a_local_base(monkeypatch):
    rows = [*ROWS, {"prompt": "p" * 41, "completion": "x"}, {"prompt": "q", "completion": "x" * 31}]
    limits = {"max_prompt_tokens": 40, "max_completion_tokens": 30}
    assert told(config(rows, limits), DataError) == [
        "data.max_prompt_tokens: 1 of 42 rows has a prompt of more than 40 tokens: d.jsonl:41 (41); 41 would fit 99%, "
        "41 all; raise it, or leave them out with data.too_long: drop",
        "data.max_completion_tokens: 1 of 42 rows has an answer of more than 30 tokens: d.jsonl:42 (31); 31 would fit "
        "99%, 31 all; raise it, or leave them out with data.too_long: drop",
    ]
    assert preflight.check(config(rows, limits | {"too_long": "drop"})) == []
    monkeypatch.setattr(preflight, "SAMPLE", 21)
    (line,) = told(config(rows, limits), DataError)  # every second row
    assert line.startswith(
        "data.max_prompt_tokens: 1 of 21 sampled rows has a prompt of more than 40 tokens: d.jsonl:41"
    )


def test_rows_longer_than_a_local_base_can_read():
    save_base(positions=20)
    (line,) = told(config([*ROWS, {"prompt": "p" * 12, "completion": "x" * 8}]), DataError)
    assert line.startswith(
        "base: 1 of 41 rows has more tokens, prompt and answer together, than the model has positions"
    )


def test_mistakes_in_config_and_data_are_reported_together():
    rows = [*ROWS, {"prompt": "", "completion": "x"}]
    lines = told(config(rows, lm_eval={"tasks": ["arc_easy"]}))
    assert [line.split(": ")[0] for line in lines] == ["c.yaml", "d.jsonl:41", "d.jsonl"]


# ----------------------------------------------------------------------------- recorded rankings


def recorded(ranked: list[str], sources: list[dict], **more) -> Config:
    write("ranked.jsonl", [{"prompt": prompt, "completions": ["a", "b"], "ranks": [1, 2]} for prompt in ranked])
    return config(
        data={"demonstrations": sources},
        completions={},
        comparisons={"labeler": "recorded", "path": "ranked.jsonl"} | more,
    )


def test_recorded_rankings_of_other_prompts_are_refused():
    (line,) = told(recorded(["something else"], [write("d.jsonl", ROWS)]), DataError)
    assert line == (
        "comparisons.path: ranked.jsonl ranks no completions of 40 of 40 prompts of data.demonstrations, the first at "
        "d.jsonl:1; add lines for them, or check the prompts and columns of the file"
    )


def test_recorded_rankings_that_may_not_suffice_cause_a_warning():
    (warning,) = preflight.check(recorded([row["prompt"] for row in ROWS[:30]], [write("d.jsonl", ROWS)]))
    assert warning.startswith("comparisons.path: ranked.jsonl ranks no completions of 10 of 40 prompts")
    assert "the first at d.jsonl:31; the run stops at comparisons if one of them falls to reward or heldout" in warning


def test_recorded_rankings_are_needed_only_in_splits_where_prompts_are_pinned():
    others = write("others.jsonl", [{"prompt": f"other {i}", "completion": "no"} for i in range(20)])
    ranked = [row["prompt"] for row in ROWS]
    asked = [write("d.jsonl", ROWS[:20]) | {"split": "reward"}, write("e.jsonl", ROWS[20:]) | {"split": "heldout"}]
    assert preflight.check(recorded(ranked, [*asked, others | {"split": "evaluation"}])) == []
    assert "10 of 40 prompts" in told(recorded(ranked[10:], [*asked, others | {"split": "evaluation"}]), DataError)[0]


def test_recorded_prompts_that_are_already_rendered_are_accepted():
    shown = [f"<|user|>{row['prompt']}<|eos|><|assistant|>" for row in ROWS]
    assert preflight.check(recorded(shown, [write("d.jsonl", ROWS)])) == []


def test_all_bad_lines_of_recorded_rankings_are_counted():
    given = recorded(["question 1"], [write("d.jsonl", ROWS)])
    with Path("ranked.jsonl").open("a") as f:
        f.write('{"prompt": "x", "completions": ["a", "b"], "ranks": [1]}\n' * 2 + "{\n")
    lines = told(given, DataError)
    assert lines[0].endswith("(2 such rows: 2, 3)")
    assert lines[-1] == "ranked.jsonl: 3 of 4 rows are invalid"


def test_config_check_makes_all_these_checks(capsys):
    Path("c.yaml").write_text(
        "run: r\nbase: {source: random}\ndata: {demonstrations: [{source: file, path: d.jsonl}]}\n"
    )
    write("d.jsonl", [{"prompt": "", "completion": "x"}])
    assert main(["config", "check", "c.yaml"]) == 65
    assert capsys.readouterr().err == "d.jsonl:1: 'prompt' is empty; remove the row or fill it\n"
    write("d.jsonl", ROWS)
    assert main(["config", "check", "c.yaml"]) == 0
