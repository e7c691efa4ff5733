"""The config: what it refuses and in which words, sweeps, and what each stage gets to see."""

import copy
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tunetrail.config import Config, canonical_json, document, expand_sweeps, load, parse, read_yaml, schema, stage_config
from tunetrail.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = [ROOT / "config/config.yaml", *sorted((ROOT / "config/examples").glob("*.yaml"))]

GOOD = {
    "run": "x",
    "base": {"source": "random"},
    "data": {"demonstrations": [{"source": "docstrings"}]},
    "sft": {},
    "completions": {},
    "comparisons": {"labeler": "reference"},
    "reward": {},
    "policies": {
        "ppo": {"method": "ppo", "steps": 2},
        "dpo": {"method": "dpo"},
        "bon": {"method": "best_of_n"},
    },
}


def changed(key: str, value) -> dict:
    """GOOD with one key (a dotted path; a number is a place in a list) set, or removed where value is `...`."""
    content = copy.deepcopy(GOOD)
    place, (*path, last) = content, key.split(".")
    for part in path:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    last = int(last) if last.isdigit() else last
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def test_the_good_one_is_good():
    parse(GOOD)


UNKNOWN = "unknown key; see config/README.md for the keys of this block"
BAD = [
    # unknown keys, at every level
    ("sede", 1, "sede: " + UNKNOWN),
    ("base.modell", "x", "base.modell: " + UNKNOWN),
    ("data.sytem", "x", "data.sytem: " + UNKNOWN),
    ("data.demonstrations.0.licence", "x", "data.demonstrations[0].licence: " + UNKNOWN),
    ("data.limits.test", 5, "data.limits.test: " + UNKNOWN),
    ("data.shares.train", 0.5, "data.shares.train: " + UNKNOWN),
    ("sft.lr", 0.1, "sft.lr: " + UNKNOWN),
    ("sft.lora", {"rank": 8}, "sft.lora.rank: " + UNKNOWN),
    ("policies.dpo.betta", 0.1, "policies.dpo.betta: " + UNKNOWN),
    ("evaluation.preferences", [{"prompt": "a", "preferred": "b", "dispreferred": "c", "d": 1}], "evaluation.preferences[0].d: " + UNKNOWN),
    # missing and of the wrong type
    ("run", ..., "run: is required"),
    ("base", ..., "base: is required"),
    ("data", ..., "data: is required"),
    ("base.source", ..., "base.source: is required"),
    ("base.source", "gguf", "base.source: must be one of 'pypi', 'hub', 'local', 'random', got 'gguf'"),
    ("base", {"source": "pypi", "package": "p", "version": "1", "gguf": "g"}, "base.sha256: is required"),
    ("base", {"source": "pypi", "package": "p", "version": "1", "gguf": "g", "sha256": "abc"}, "base.sha256: should match pattern '^[0-9a-f]{64}$', got 'abc'"),
    ("base", {"source": "hub", "repo": "no-owner", "revision": "main"}, "base.repo: should match pattern '^[\\w.-]+/[\\w.-]+$', got 'no-owner'"),
    ("base", {"source": "hub", "repo": "a/b"}, "base.revision: is required"),
    ("policies.ppo.steps", ..., "policies.ppo.steps: is required"),
    ("policies.dpo.method", ..., "policies.dpo.method: is required"),
    ("policies.dpo.method", "kto", "policies.dpo.method: must be one of 'ppo', 'dpo', 'best_of_n', got 'kto'"),
    ("comparisons.labeler", "crowd", "comparisons.labeler: must be one of 'reference', 'recorded', 'reward_model', 'llm', 'human', got 'crowd'"),
    ("sft", 5, "sft: must be a block of keys, got 5"),
    ("policies.dpo", "yes", "policies.dpo: must be a block of keys, got 'yes'"),
    ("seed", "one", "seed: must be a valid integer, unable to parse string as an integer, got 'one'"),
    ("precision", "fp16", "precision: must be 'auto', 'fp32' or 'bf16', got 'fp16'"),
    ("sft.epochs", 1.5, "sft.epochs: must be a valid integer, got a number with a fractional part, got 1.5"),
    # out of range
    ("seed", -1, "seed: must be greater than or equal to 0, got -1"),
    ("run", "My Run", "run: should match pattern '^[a-z0-9][a-z0-9._-]*$', got 'My Run'"),
    ("run", "../up", "run: should match pattern '^[a-z0-9][a-z0-9._-]*$', got '../up'"),
    ("sft.learning_rate", 0, "sft.learning_rate: must be greater than 0, got 0"),
    ("sft.learning_rate", float("nan"), "sft.learning_rate: must be a finite number, got nan"),
    ("policies.dpo.beta", float("inf"), "policies.dpo.beta: must be a finite number, got inf"),
    ("sft.warmup", 1.0, "sft.warmup: must be less than 1, got 1.0"),
    ("sft.batch_size", 0, "sft.batch_size: must be greater than or equal to 1, got 0"),
    ("completions.per_prompt", 10, "completions.per_prompt: must be less than or equal to 9, got 10"),
    ("completions.per_prompt", 1, "completions.per_prompt: must be greater than or equal to 2, got 1"),
    ("policies.bon.n", 1, "policies.bon.n: must be greater than or equal to 2, got 1"),
    ("policies.ppo.lam", 1.2, "policies.ppo.lam: must be less than or equal to 1, got 1.2"),
    ("evaluation.bootstrap", 10, "evaluation.bootstrap: must be greater than or equal to 100, got 10"),
    ("data.near_duplicate", 1.5, "data.near_duplicate: must be less than or equal to 1, got 1.5"),
    ("data.limits.sft", 0, "data.limits.sft: must be greater than or equal to 1, got 0"),
    # impossible combinations
    ("data.demonstrations", [], "data: give at least one source under demonstrations or preferences"),
    ("data.shares.sft", 0.9, "data.shares: the shares of the splits must add up to 1, got 1.4"),
    ("base", {"source": "random", "hidden_size": 40, "heads": 3}, "base: hidden_size (40) must be a multiple of 2 x heads (3)"),
    ("sft.micro_batch_size", 3, "sft: batch_size (16) must be a multiple of micro_batch_size (3)"),
    ("policies.ppo.minibatch_size", 7, "policies.ppo: batch_size (64) must be a multiple of minibatch_size (7)"),
    ("completions", ..., "comparisons: needs completions to rank; comparisons read from a file go under data.preferences"),
    ("comparisons", ..., "comparisons: needed, to rank what completions samples"),
    ("policies.sft", {"method": "dpo"}, "policies: 'sft' names a stage; choose another name for the policy"),
    ("policies.dpo.loss", "kto", "policies.dpo.loss: must be 'sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'exo_pair', 'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero', 'apo_down', 'discopop' or 'sft', got 'kto'"),
    ("policies.dpo.loss", "exo_pair", "policies.dpo: loss exo_pair needs label_smoothing above 0"),
    ("policies.dpo", {"method": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "policies.dpo: label_smoothing has no effect with loss ipo; remove it"),
    ("comparisons", {"labeler": "human"}, "comparisons.labeler: human is not available yet; choose reference, recorded, reward_model or llm"),
    ("comparisons", {"labeler": "llm", "endpoint": "http://x/v1"}, "comparisons: model is needed with endpoint"),
    ("comparisons", {"labeler": "llm"}, "comparisons: give either endpoint (with model) or path (a local model)"),
    ("comparisons", {"labeler": "reward_model"}, "comparisons: give either path (a local folder) or repo (a hub repository with its revision)"),
    ("comparisons", {"labeler": "reward_model", "repo": "a/b"}, "comparisons: revision is needed with repo, so that a rerun gets the same model"),
    ("retention", {"source": "file"}, "retention: path goes with source: file, and only with it"),
    ("data.limits", {"sft": 8}, "data.limits.sft: 8 rows are fewer than one batch (sft.batch_size: 16)"),
    ("data.limits", {"reward": 4}, "data.limits.reward: 4 rows are fewer than one batch (reward.batch_size: 8)"),
    ("data.preferences", [{"source": "file", "path": "p.jsonl"}], "completions: drop it or data.preferences; comparisons come from one of them"),
    ("reward", ..., "policies.ppo: ppo needs a reward model: add a reward block\nx.yaml: policies.bon: best_of_n needs a reward model: add a reward block"),
    ("data.shares", {"sft": 0, "reward": 0.4, "rl": 0.4}, "data.shares.sft: is 0, but sft is to be trained"),
    ("data.shares", {"sft": 0.65, "reward": 0}, "data.shares.reward: is 0, but comparisons are to be collected from that split"),
    ("data.shares", {"sft": 0.65, "rl": 0}, "policies.ppo: ppo needs prompts, but data.shares.rl is 0"),
    # sweeps
    ("policies.dpo.beta", [], "policies.dpo: a sweep needs at least one value, got an empty list"),
    ("policies.dpo.beta", [0.1, 0.1], "policies.dpo: two policies of the sweep would be named dpo-beta-0.1"),
    ("policies.dpo.beta", [0.1, -1], "policies.dpo-beta--1.beta: must be greater than 0, got -1"),
    ("policies.Big Name", {"method": "dpo"}, "policies.Big Name: should match pattern '^[a-z0-9][a-z0-9._-]*$', got 'Big Name'"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{i}-{key}" for i, (key, _, _) in enumerate(BAD)])
def test_bad_configs_get_one_clear_line(key, value, message):
    with pytest.raises(ConfigError) as error:
        parse(changed(key, value), "x.yaml")
    assert str(error.value) == f"x.yaml: {message}"
    assert error.value.exit_code == 78


def test_every_mistake_is_told_at_once():
    content = changed("sft.lr", 1) | {"seed": -1}
    with pytest.raises(ConfigError) as error:
        parse(content, "x.yaml")
    assert str(error.value).split("\n") == ["x.yaml: seed: must be greater than or equal to 0, got -1", f"x.yaml: sft.lr: {UNKNOWN}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nseed: 1\nseed: 2\n", ":3: key 'seed' is given twice"),
        ("base:\n  source: random\n  source: hub\n", ":3: key 'source' is given twice"),
        ("run: [a\nseed: 1\n", ":2: not valid YAML: expected ',' or ']', but got ':'"),
        ("- a\n- b\n", ": must hold keys and values at its top level"),
        ("", ": must hold keys and values at its top level"),
        ("run: a\n\tseed: 1\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
    ],
)
def test_bad_yaml_names_the_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(error.value) == f"{path}{message}"


def test_missing_files_are_named_by_key(tmp_path):
    content = changed("base", {"source": "local", "path": str(tmp_path / "model")})
    content["data"]["demonstrations"].append({"source": "file", "path": "no.jsonl"})
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).split("\n") == [
        f"{path}: base.path: no such file or folder: {tmp_path / 'model'}",
        f"{path}: data.demonstrations[1].path: no such file or folder: no.jsonl",
    ]
    with pytest.raises(ConfigError, match="no such config file"):
        load(tmp_path / "y.yaml")


def test_the_command_exits_with_78_and_no_traceback(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(changed("seed", -1)))
    reply = subprocess.run([sys.executable, "-m", "tunetrail.config", "check", str(path)], capture_output=True, text=True, check=False)
    assert (reply.returncode, reply.stderr) == (78, f"{path}: seed: must be greater than or equal to 0, got -1\n")


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-5\nb: 2.5E+3\nc: e5\n")
    assert read_yaml(path) == {"a": 1e-5, "b": 2500.0, "c": "e5"}


def test_a_sweep_is_every_combination():
    policies = expand_sweeps({"d": {"method": "dpo", "beta": [0.1, 0.5], "loss": ["ipo", "hinge"]}, "p": {"method": "ppo"}})
    assert list(policies) == ["d-beta-0.1-loss-ipo", "d-beta-0.1-loss-hinge", "d-beta-0.5-loss-ipo", "d-beta-0.5-loss-hinge", "p"]
    assert policies["d-beta-0.5-loss-ipo"] == {"method": "dpo", "beta": 0.5, "loss": "ipo"}


def test_a_stage_sees_its_own_block_and_no_other():
    before, after = parse(GOOD), parse(changed("policies.dpo.beta", 0.5))
    stages = ["base", "data", "sft", "completions", "comparisons", "reward", "retention", "report"]
    stages += [f"policies.{name}" for name in GOOD["policies"]] + [f"evaluation.{name}" for name in ("base", "sft", *GOOD["policies"])]
    differing = [s for s in stages if stage_config(before, s) != stage_config(after, s)]
    assert differing == ["policies.dpo"]
    assert stage_config(before, "policies.dpo")["stage"] == "dpo"
    assert stage_config(before, "evaluation.bon")["subject"] == {"name": "bon", "method": "best_of_n"}
    assert "precision" not in stage_config(before, "data")


def test_canonical_json_by_hand():
    assert canonical_json({"b": [1, 0.5], "a": "é"}) == '{"a":"é","b":[1,0.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid_by_code_and_by_schema(path):
    content = read_yaml(path)
    parse(content, str(path))
    jsonschema.validate(content, schema())


def test_schema_refuses_what_the_code_refuses():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed("sft.lr", 1), schema())


def test_generated_files_are_fresh():
    """`make schema` writes both."""
    import json

    assert json.loads((ROOT / "workflow/schemas/config.schema.json").read_text()) == schema()
    assert document() in (ROOT / "config/README.md").read_text()
    assert "No description" not in document()


def test_every_key_has_a_meaning():
    def blocks(model, seen):
        for name, field in model.model_fields.items():
            if name not in ("source", "labeler", "method"):
                assert field.description, f"{model.__name__}.{name} has no description"
        for sub in type(model).__subclasses__(model):
            if sub not in seen:
                seen.add(sub)
                blocks(sub, seen)

    blocks(Config, set())
    from tunetrail.config import Block

    blocks(Block, set())
