"""The config: what it refuses and with which messages, sweeps, and what each stage gets to see."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from tunetrail.cli import main
from tunetrail.config.loading import check_files, expand_sweeps, load, parse, read_yaml
from tunetrail.errors import ConfigError
from tunetrail.files import canonical_json
from tunetrail.stages.registry import stage_config

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text(encoding="utf-8"))
EXAMPLES = [ROOT / "config/config.yaml", *sorted((ROOT / "config/examples").glob("*.yaml"))]

GOOD = {
    "run": "x",
    "base": {"source": "random"},
    "data": {"demonstrations": [{"source": "docstrings"}]},
    "sft": {},
    "completions": {},
    "comparisons": {"labeler": "simulated"},
    "reward": {},
    "policies": {
        "ppo": {"method": "ppo", "steps": 2},
        "dpo": {"method": "dpo"},
        "bon": {"method": "best_of_n"},
    },
}


def changed(key: str | int, value) -> dict:
    """GOOD with one key (a dotted path; numbers index lists) set, or removed if the value is `...`."""
    content = copy.deepcopy(GOOD)
    if isinstance(key, int):
        return content | {key: value}
    place, (*path, last) = content, key.split(".")
    for part in path:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def test_the_valid_config_is_valid():
    parse(GOOD)


PYPI = {"source": "pypi", "package": "p", "version": "1", "gguf": "g", "sha256": "0" * 64}
NAME = "must be lower-case letters, digits, '.', '_' and '-', the first a letter or digit"
UNKNOWN = "unknown key; see config/README.md for the keys of this block"
BAD = [
    # unknown keys, at every level
    ("sede", 1, "sede: unknown key; did you mean seed?"),
    ("base.modell", "x", "base.modell: " + UNKNOWN),
    ("base.layer", 3, "base.layer: unknown key; did you mean layers?"),
    ("data.sytem", "x", "data.sytem: unknown key; did you mean system?"),
    ("data.demonstrations.0.licence", "x", "data.demonstrations[0].licence: " + UNKNOWN),
    ("data.limits.test", 5, "data.limits.test: " + UNKNOWN),
    ("data.shares.train", 0.5, "data.shares.train: " + UNKNOWN),
    ("completions.temprature", 1.0, "completions.temprature: unknown key; did you mean temperature?"),
    ("comparisons.judge", "x", "comparisons.judge: " + UNKNOWN),
    ("retention.prompt", 5, "retention.prompt: unknown key; did you mean prompts?"),
    ("report.heading", "x", "report.heading: " + UNKNOWN),
    (7, "x", "7: " + UNKNOWN),
    ("sft.lr", 0.1, "sft.lr: " + UNKNOWN),
    ("sft.lora", {"rank": 8}, "sft.lora.rank: " + UNKNOWN),
    ("policies.dpo.betta", 0.1, "policies.dpo.betta: unknown key; did you mean beta?"),
    ("policies.dpo.critic", "shared", "policies.dpo.critic: " + UNKNOWN),
    ("evaluation.preferences", [{"prompt": "a", "preferred": "b", "dispreferred": "c", "d": 1}],
        "evaluation.preferences[0].d: " + UNKNOWN),
    # missing and of the wrong type
    ("run", ..., "run: is required"),
    ("base", ..., "base: is required"),
    ("data", ..., "data: is required"),
    ("base.source", ..., "base.source: is required"),
    ("base.source", "gguf", "base.source: must be one of 'pypi', 'hub', 'local', 'random', got 'gguf'"),
    ("base", {"source": "pypi", "package": "p", "version": "1", "gguf": "g"}, "base.sha256: is required"),
    ("base", {"source": "pypi", "package": "p", "version": "1", "gguf": "g", "sha256": "abc"},
        "base.sha256: must be 64 hexadecimal digits in lower case, got 'abc'"),
    ("base", {"source": "hub", "repo": "no-owner", "revision": "main"}, "base.repo: must be owner/name, got "
        "'no-owner'"),
    ("base", {"source": "hub", "repo": "a/b"}, "base.revision: is required"),
    ("policies.ppo.steps", ..., "policies.ppo.steps: is required"),
    ("policies.dpo.method", ..., "policies.dpo.method: is required"),
    ("policies.dpo.method", "grpo", "policies.dpo.method: must be one of 'ppo', 'dpo', 'orpo', 'simpo', "
        "'kto', 'best_of_n', got 'grpo'"),
    ("sft.patience", 2, "sft: patience counts measurements of the held-out loss; set evaluate_every too"),
    ("sft.evaluate_every", 0, "sft.evaluate_every: must be greater than or equal to 1, got 0"),
    ("policies.d", {"method": "dpo", "evaluate_every": 5, "patience": 2, "checkpoints": 3}, "policies.d: checkpoints "
        "are spread over all steps, and patience keeps the best alone; remove either of them"),
    ("policies.o", {"method": "orpo", "beta": 0.1}, "policies.o.beta: " + UNKNOWN),
    ("policies.o", {"method": "orpo", "start": None}, "policies.o.start: must be 'sft' or 'base', got None"),
    ("policies.s", {"method": "simpo", "gamma": -1}, "policies.s.gamma: must be greater than or equal to 0, got -1"),
    ("policies.kto", {"method": "kto"}, "policies.kto: kto needs data.feedback: responses that were liked or disliked"),
    ("policies.kto", {"method": "kto", "batch_size": 1}, "policies.kto.batch_size: must be greater than or equal to 2, "
        "got 1"),
    ("policies.kto", {"method": "kto", "micro_batch_size": 1}, "policies.kto: micro_batch_size must be at least 2 with "
        "kto"),
    ("data.demonstrations.0.weight", 0, "data.demonstrations[0].weight: must be greater than 0, got 0"),
    ("data.demonstrations", [{"source": "file", "path": "f.jsonl", "split": "heldout", "weight": 2}],
        "data.demonstrations[0]: weight has no effect with split: heldout, whose rows count once; remove it"),
    ("data.feedback", [{"source": "file", "path": "f.jsonl", "split": "sft"}], "data.feedback[0].split: responses that "
        "may be bad are of no use in sft; choose another split"),
    ("comparisons.labeler", "crowd", "comparisons.labeler: must be one of 'simulated', 'recorded', "
                                     "'llm', 'human', got 'crowd'"),
    ("sft", 5, "sft: must be a block of keys, got 5"),
    ("policies.dpo", "yes", "policies.dpo: must be a block of keys, got 'yes'"),
    ("seed", "one", "seed: must be a whole number, got 'one'"),
    ("precision", "fp16", "precision: must be 'auto', 'fp32' or 'bf16', got 'fp16'"),
    ("run", 2024, "run: must be a text, got 2024; put it in quotes"),
    ("base", {"source": "pypi", "package": "p", "version": 1.1, "gguf": "g", "sha256": "0" * 64},
        "base.version: must be a text, got 1.1; put it in quotes"),
    ("seed", True, "seed: must be a whole number, got True"),
    ("sft.learning_rate", True, "sft.learning_rate: must be a number, got True"),
    ("sft.learning_rate", "fast", "sft.learning_rate: must be a number, got 'fast'"),
    ("data.chat", "no", "data.chat: must be true or false, got 'no'"),
    ("data.demonstrations", {"source": "docstrings"}, "data.demonstrations: must be a list, got {'source': "
                                                      "'docstrings'}"),
    ("data.demonstrations", ["docstrings"], "data.demonstrations[0]: must be a block of keys, got 'docstrings'"),
    ("base", {"source": "local", "path": 5}, "base.path: must be a path, got 5"),
    ("policies", None, "policies: is empty; give it keys, or remove it if it is optional"),
    ("data", None, "data: is empty; give it keys, or remove it if it is optional"),
    ("evaluation.sentence", "", "evaluation.sentence: must not be empty, got ''"),
    ("head_to_head.judge", {"model": "m"}, "head_to_head.judge: give either endpoint (with model) or path (a local "
                                           "model)"),
    ("lm_eval", {"tasks": []}, "lm_eval.tasks: should have at least 1 item after validation, not 0, got []"),
    ("sft.lora", {"target_modules": 5}, "sft.lora.target_modules: must be all-linear or a list of layer names, got 5"),
    ("sft.lora", {"target_modules": []}, "sft.lora.target_modules: must be all-linear or a list of layer names, "
                                         "got []"),
    ("comparisons", {"labeler": "llm", "endpoint": "localhost:8000", "model": "m"}, "comparisons.endpoint: must "
        "start with http:// or https://, got 'localhost:8000'"),
    ("sft.epochs", 1.5, "sft.epochs: must be a whole number, got 1.5"),
    # out of range
    ("seed", -1, "seed: must be greater than or equal to 0, got -1"),
    ("run", "My Run", f"run: {NAME}, got 'My Run'"),
    ("run", "../up", f"run: {NAME}, got '../up'"),
    ("sft.learning_rate", 0, "sft.learning_rate: must be greater than 0, got 0"),
    ("sft.learning_rate", float("nan"), "sft.learning_rate: must be a finite number, got nan"),
    ("policies.dpo.beta", float("inf"), "policies.dpo.beta: must be a finite number, got inf"),
    ("policies.ppo.kl_target", float("nan"), "policies.ppo.kl_target: must be a finite number, got nan"),
    ("policies.ppo.missing_eos_score", float("-inf"), "policies.ppo.missing_eos_score: must be a finite number, got "
                                                      "-inf"),
    ("data.shares.sft", float("nan"), "data.shares.sft: must be a finite number, got nan"),
    ("comparisons.noise", float("inf"), "comparisons.noise: must be a finite number, got inf"),
    ("base.hidden_size", 12, "base.hidden_size: must be a multiple of 8, got 12"),
    ("tournament", {}, "tournament: was renamed to head_to_head"),
    ("sft.lora", {"dropout": 0.1}, "sft.lora.dropout: is always off: log-probs must be functions of the text alone; "
                                   "remove the key"),
    ("policies.ppo.kl_estimator", "k3", "policies.ppo.kl_estimator: is always k1: k2 and k3 in the reward do not have "
                                        "the gradient of the KL; remove the key"),
    ("policies.dpo.label_smoothing", 0.5, "policies.dpo.label_smoothing: must be less than 0.5, got 0.5"),
    ("completions.shards", 10000, "completions.shards: must be less than or equal to 9999, got 10000"),
    ("run", "x" * 81, f"run: should have at most 80 characters, got '{'x' * 79}…"),
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
    ("data.demonstrations", [], "data: give at least one source under demonstrations, preferences, feedback or "
        "prompts"),
    ("data.shares", {"sft": 0.9, "rl": 0.5}, "data.shares: the shares of the splits must add up to 1, got 1.4"),
    ("data.shares", {"sft": 0.4, "rl": 0.1, "reward": 0.1, "evaluation": 0.1, "heldout": 0.1},
        "data.shares: the shares of the splits must add up to 1, got 0.8"),
    ("data.sft_on_chosen", True, "data.sft_on_chosen: needs data.preferences and an sft that is trained here; "
        "give them or remove the key"),
    ("data.prompts", [{"source": "file", "path": "p.jsonl", "split": "sft"}], "data.prompts[0].split: prompts without "
        "answers are of no use in sft; choose another split"),
    ("base", {"source": "random", "hidden_size": 40, "heads": 3}, "base: hidden_size (40) must be a multiple of 2 x "
        "heads (3)"),
    ("sft.micro_batch_size", 3, "sft: batch_size (16) must be a multiple of micro_batch_size (3)"),
    ("policies.ppo.minibatch_size", 7, "policies.ppo: batch_size (64) must be a multiple of minibatch_size (7)"),
    ("policies.ppo.micro_batch_size", 48, "policies.ppo: batch_size (64) must be a multiple of micro_batch_size (48)"),
    ("policies.ppo", {"method": "ppo", "steps": 1, "minibatch_size": 8, "micro_batch_size": 16},
        "policies.ppo: minibatch_size (8) must be a multiple of micro_batch_size (16)"),
    ("policies.dpo.micro_batch_size", 5, "policies.dpo: batch_size (16) must be a multiple of micro_batch_size (5)"),
    ("completions", ..., "comparisons: needs completions to rank; comparisons read from a file go under "
                         "data.preferences"),
    ("comparisons", ..., "comparisons: needed, to rank what completions samples"),
    ("policies.sft", {"method": "dpo"}, "policies: 'sft' names something else in a run; choose another name for the "
        "policy"),
    ("policies.dpo.loss", "kto", "policies.dpo.loss: must be 'sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'exo_pair', "
                                 "'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero', "
                                 "'apo_down', 'discopop' or 'sft', or a list of them, got 'kto'"),
    ("policies.dpo.loss", ["sigmoid", 3], "policies.dpo.loss: must be 'sigmoid', 'sigmoid_norm', 'hinge', 'ipo', "
                                          "'exo_pair', 'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', "
                                          "'aot_unpaired', 'apo_zero', 'apo_down', 'discopop' or 'sft', or a list of "
                                          "them, got 3"),
    ("policies.dpo", {"method": "dpo", "loss": ["sigmoid", "sft"], "loss_weights": [1.0]}, "policies.dpo: loss_weights "
        "must have one weight for each loss, here are 1 for 2 (sigmoid, sft)"),
    ("policies.dpo", {"method": "dpo", "loss_weights": [0]}, "policies.dpo: loss_weights must not all be 0"),
    ("policies.dpo.loss", "exo_pair", "policies.dpo: loss exo_pair needs label_smoothing above 0"),
    ("policies.dpo", {"method": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "policies.dpo: label_smoothing has no "
        "effect with loss ipo; remove it"),
    ("comparisons", {"labeler": "human", "store": "postgresql://ann:secret@db/labels"}, "comparisons: store holds a "
        "password, which would get into records; put it into ~/.pgpass or $PGPASSWORD"),
    ("comparisons", {"labeler": "human", "training": 2}, "comparisons: training needs gold: a file of tasks with "
                                                         "known ranks"),
    ("comparisons", {"labeler": "llm", "endpoint": "http://x/v1"}, "comparisons: model is needed with endpoint"),
    ("comparisons", {"labeler": "llm"}, "comparisons: give either endpoint (with model) or path (a local model)"),
    ("retention", {"source": "file"}, "retention: path goes with source: file, and only with it"),
    ("data.limits", {"sft": 8}, "data.limits.sft: 8 rows are fewer than one batch (sft.batch_size: 16)"),
    ("data.limits", {"reward": 4}, "data.limits.reward: 4 rows are fewer than one batch (reward.batch_size: 8)"),
    ("reward", ..., "policies.ppo: ppo needs a reward model: add a reward block, "
     "or name scorers under its reward\nx.yaml: policies.bon: best_of_n "
                    "needs a reward model: add a reward block"),
    ("data.shares", {"sft": 0, "reward": 0.4, "rl": 0.4}, "data.shares.sft: is 0, but sft is to be trained"),
    ("data.shares", {"sft": 0.65, "reward": 0}, "data.shares.reward: is 0, but comparisons are to be collected from "
                                                "that split"),
    ("data.shares", {"sft": 0.65, "rl": 0}, "policies.ppo: ppo needs prompts, but data.shares.rl is 0"),
    ("data.shares", {"sft": 0.6, "evaluation": 0}, "data.shares.evaluation: is 0, but every run is evaluated; give "
                                                   "it a share"),
    ("data.shares", {"sft": 0.6, "heldout": 0}, "data.shares.heldout: is 0, but the reward model is tested on that "
                                                "split"),
    ("data.demonstrations", [{"source": "hub", "repo": "a/b", "revision": "c", "split": "train"}],
        "data.demonstrations[0].split: must be one of this run's splits, sft, reward, rl, evaluation, heldout, got "
        "'train'; the key for the data set's own split was renamed to hub_split"),
    ("data.demonstrations", [{"source": "docstrings"}, {"source": "hub", "repo": "a/b", "revision": "c",
        "split": "heldout"}], "data.demonstrations[1]: split: heldout sends all rows to this run's split of that name; "
        "it used to name the data set's own split, which is hub_split now: give hub_split too (its default is train)"),
    ("data.demonstrations", [{"source": "docstrings", "split": "sft"}, {"source": "topics", "split": "heldout"}],
        "data: every source is pinned to another split, but the run needs rows in reward; pin a source to it (split) "
        "or leave one unpinned\nx.yaml: data: every source is pinned to another split, but the run needs rows in "
        "evaluation; pin a source to it (split) or leave one unpinned\nx.yaml: data: every source is pinned to "
        "another split, but the run needs rows in heldout; pin a source to it (split) or leave one unpinned\nx.yaml: "
        "data: every source is pinned to another split, but the run needs rows in rl; pin a source to it (split) or "
        "leave one unpinned"),
    ("policies.ppo.advantage", "rloo", "policies.ppo: advantage rloo compares episodes of a prompt: set "
                                       "completions_per_prompt to 2 or more"),
    ("policies.ppo.completions_per_prompt", 3, "policies.ppo: batch_size (64) must be a multiple of "
                                               "completions_per_prompt (3)"),
    ("policies.ppo.missing_eos_penalty", 1.0, "policies.ppo: missing_eos_penalty has no effect with "
                                              "missing_eos_score; set missing_eos_score to null"),
    ("data.limits", {"rl": 32}, "data.limits.rl: 32 rows are fewer than one batch (policies.ppo.batch_size: 64)"),
    ("data.demonstrations", [{"source": "topics"}], "data.demonstrations: topics is raw text; add a source of "
                                                    "prompts, which evaluation needs"),
    ("retention", {"path": "x.txt"}, "retention: path goes with source: file, and only with it"),
    *(
        ("policies", {name: {"method": "dpo"}}, f"policies: '{name}' names something else in a run; choose another "
            "name for the policy")
        for name in ("base", "report", "ledger.jsonl", "config", "manifest.json")
    ),
    ("base", PYPI | {"package": "--index-url=x"}, "base.package: must be the name of a package: letters, digits, '.', "
        "'_' and '-', a letter or digit at both ends, got '--index-url=x'"),
    ("base", PYPI | {"package": "x @ file:///x"}, "base.package: must be the name of a package: letters, digits, '.', "
        "'_' and '-', a letter or digit at both ends, got 'x @ file:///x'"),
    ("base", PYPI | {"version": "1; x"}, "base.version: must be an exact version, such as 0.1.2, got '1; x'"),
    # sweeps
    ("policies.dpo.beta", [], "policies.dpo.beta: a sweep needs at least one value, got an empty list"),
    ("policies.dpo.beta", [0.1, 0.1], "policies.dpo: two policies would be named dpo-beta-0.1; remove one or "
                                      "rename it"),
    ("policies.dpo.beta", [0.1, -1], "policies.dpo-beta--1.beta: must be greater than 0, got -1"),
    ("policies.dpo.beta", [0.1, float("nan")], "policies.dpo-beta-nan.beta: must be a finite number, got nan"),
    ("policies.dpo.beta", [[0.1], [0.2]], "policies.dpo.beta: cannot be swept; give each policy a name and a block "
                                          "of its own"),
    ("policies.dpo.lora", [None, {"r": 8}], "policies.dpo.lora: cannot be swept; give each policy a name and a block "
                                            "of its own"),
    ("policies.dpo.method", ["dpo", "ppo"], "policies.dpo.method: cannot be swept; give each policy a name and a "
                                            "block of its own"),
    # names that look like pydantic's own words
    ("policies.ppo.ppo", 1, "policies.ppo.ppo: " + UNKNOWN),
    ("policies.policies", {"method": "dpo", "beta": 0}, "policies.policies.beta: must be greater than 0, got 0"),
    ("policies.file", {"method": "dpo", "beta": 0}, "policies.file.beta: must be greater than 0, got 0"),
    ("policies.Big Name", {"method": "dpo"}, f"policies.Big Name: {NAME}, got 'Big Name'"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{i}-{key}" for i, (key, _, _) in enumerate(BAD)])
def test_bad_configs_get_one_clear_line(key, value, message):
    with pytest.raises(ConfigError) as error:
        parse(changed(key, value), "x.yaml")
    assert str(error.value) == f"x.yaml: {message}"
    assert error.value.exit_code == 78


# A run without completions is different: its preferences come with the data.
FROM_FILE = {
    "run": "x",
    "base": {"source": "random"},
    "data": {"preferences": [{"source": "file", "path": "p.jsonl"}]},
    "reward": {},
    "policies": {"dpo": {"method": "dpo"}},
}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        (
            {"sft": {}},
            [
                "sft: needs data.demonstrations; set sft to null to start from the base model, or data.sft_on_chosen "
                "to true to train on the best responses of data.preferences"
            ],
        ),
        (
            {"completions": {}, "comparisons": {"labeler": "simulated"}},
            [
                "completions: needs prompts from data.demonstrations or data.prompts",
            ],
        ),
        (
            {"data": {"demonstrations": [{"source": "docstrings"}]}},
            [
                "reward: needs comparisons: give completions and comparisons, or data.preferences; or import a reward "
                "model (path or repo)",
                "policies.dpo: dpo needs comparisons: give completions and comparisons, or data.preferences",
            ],
        ),
        (
            {"reward": None, "policies": {"p": {"method": "ppo", "steps": 1}, "b": {"method": "best_of_n"}}},
            [
                "policies.p: ppo needs a reward model: add a reward block, or name scorers under its reward",
                "policies.b: best_of_n needs a reward model: add a reward block",
            ],
        ),
    ],
)
def test_blocks_must_be_consistent(changes, lines):
    content = FROM_FILE | changes
    if not lines:
        assert parse(content).completions is None
        return
    with pytest.raises(ConfigError) as error:
        parse(content, "x.yaml")
    assert str(error.value).split("\n") == [f"x.yaml: {line}" for line in lines]


def test_all_mistakes_are_reported_together():
    content = changed("sft.lr", 1) | {"seed": -1}
    with pytest.raises(ConfigError) as error:
        parse(content, "x.yaml")
    assert str(error.value).split("\n") == [
        "x.yaml: seed: must be greater than or equal to 0, got -1",
        f"x.yaml: sft.lr: {UNKNOWN}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nseed: 1\nseed: 2\n", ":3: key 'seed' is given twice"),
        ("base:\n  source: random\n  source: hub\n", ":3: key 'source' is given twice"),
        ("run: [a\nseed: 1\n", ":2: not valid YAML: expected ',' or ']', but got ':'"),
        ("- a\n- b\n", ": must hold keys and values at its top level"),
        ("", ": must hold keys and values at its top level"),
        ("base:\n  ? [a, b]\n  : 1\n", ":2: a key must be a word, not a list or block"),
        ("base: *other\n", ":1: not valid YAML: found undefined alias 'other'"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        (
            "a: !!python/name:os.system\n",
            ":1: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("revision: 2024-13-45\n", ": not valid YAML: month must be in 1..12"),
        ("a: \x01\n", ": not valid YAML: unacceptable character #x0001: special characters are not allowed"),
        ("run: a\n\tseed: 1\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
    ],
)
def test_bad_yaml_names_the_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(error.value) == f"{path}{message}"


def test_the_error_for_a_binary_file_says_so(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xe9"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path)
    assert str(error.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_a_block_may_be_merged_into_another(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {lr: 1, epochs: 2}\nb:\n  <<: *a\n  lr: 3\n")
    assert read_yaml(path)["b"] == {"lr": 3, "epochs": 2}


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


def test_folders_and_files_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    content = changed("base", {"source": "local", "path": str(tmp_path / "file")})
    content["retention"] = {"source": "file", "path": str(tmp_path)}
    content["scorers"] = {"rm": {"scorer": "reward_model", "path": str(tmp_path)}}  # a model is a folder
    content["sft"] = content["reward"] = {"path": str(tmp_path / "file")}
    content["policies"] = {}
    with pytest.raises(ConfigError) as error:
        check_files(parse(content), "x.yaml")
    assert str(error.value).split("\n") == [
        f"x.yaml: base.path: must be a folder, not a file: {tmp_path / 'file'}",
        f"x.yaml: sft.path: must be a folder, not a file: {tmp_path / 'file'}",
        f"x.yaml: reward.path: must be a folder, not a file: {tmp_path / 'file'}",
        f"x.yaml: retention.path: must be a file, not a folder: {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (changed("seed", -1), ["seed: must be greater than or equal to 0, got -1"]),
        (changed("sft.learning_rate", float("nan")), ["sft.learning_rate: must be a finite number, got nan"]),
        (GOOD, []),
    ],
)
def test_the_command_exits_with_78_and_no_traceback(tmp_path, content, lines):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    reply = subprocess.run(
        [sys.executable, "-m", "tunetrail", "config", "check", str(path)], capture_output=True, text=True, check=False
    )
    assert (reply.returncode, bool(reply.stdout)) == (78 if lines else 0, not lines)
    assert reply.stderr == "".join(f"{path}: {line}\n" for line in lines)


def test_resolve_fills_in_every_default(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("run: x\nbase: {source: random}\ndata: {demonstrations: [{source: docstrings}]}\n")
    assert main(["config", "resolve", str(path)]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["data"]["max_prompt_tokens"] == 512
    assert resolved["retention"]["source"] == "chatterbot"
    assert parse(resolved) == load(path)
    assert main(["config", "explain"]) == 2
    assert "No such command 'explain'" in capsys.readouterr().err


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-5\nb: 2.5E+3\nc: e5\n")
    assert read_yaml(path) == {"a": 1e-5, "b": 2500.0, "c": "e5"}


def test_a_sweep_is_every_combination():
    policies = expand_sweeps(
        {"d": {"method": "dpo", "beta": [0.1, 0.5], "schedule": ["linear", "cosine"]}, "p": {"method": "ppo"}}
    )
    assert list(policies) == [
        "d-beta-0.1-schedule-linear",
        "d-beta-0.1-schedule-cosine",
        "d-beta-0.5-schedule-linear",
        "d-beta-0.5-schedule-cosine",
        "p",
    ]
    assert policies["d-beta-0.5-schedule-linear"] == {"method": "dpo", "beta": 0.5, "schedule": "linear"}


def test_a_list_of_losses_is_one_policy():
    block = {"method": "dpo", "beta": [0.1, 0.5], "loss": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}
    policies = parse(changed("policies.dpo", block)).policies
    for name in ("dpo-beta-0.1", "dpo-beta-0.5"):
        assert (policies[name].losses, policies[name].loss_weights) == (["sigmoid", "sft"], [1, 0.5])
    assert parse(changed("policies.dpo.loss", "ipo")).policies["dpo"].losses == ["ipo"]


def test_policies_of_a_sweep_have_the_same_names_however_numbers_were_parsed():
    """Snakemake's YAML parser reads 1e-2 as a string, ours as a number."""
    as_text = expand_sweeps({"d": {"method": "dpo", "beta": ["1e-2", 0.1]}})
    assert (
        list(as_text)
        == list(expand_sweeps({"d": {"method": "dpo", "beta": [1e-2, 0.1]}}))
        == ["d-beta-0.01", "d-beta-0.1"]
    )


def test_a_sweep_may_turn_something_off():
    policies = parse(changed("policies.ppo.kl_target", [None, 6.0])).policies
    assert [policies[name].kl_target for name in ("ppo-kl-target-none", "ppo-kl-target-6.0")] == [None, 6.0]
    assert list(parse(changed("policies.ppo.whiten_rewards", [True, False])).policies)[:2] == [
        "ppo-whiten-rewards-true",
        "ppo-whiten-rewards-false",
    ]


STAGES = ["base", "data", "sft", "completions", "comparisons", "reward", "retention", "report"]
STAGES += [f"policies.{name}" for name in GOOD["policies"]]
STAGES += [f"evaluation.{name}" for name in ("base", "sft", *GOOD["policies"])]
STAGES += ["head_to_head"]
RUN_A_MODEL = [stage for stage in STAGES if stage not in ("base", "data", "report")]
EVALUATIONS = [stage for stage in STAGES if stage.startswith("evaluation")]


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("policies.dpo.beta", 0.5, ["policies.dpo"]),
        ("sft.epochs", 2, ["sft"]),
        ("reward.learning_rate", 1e-6, ["reward"]),
        ("completions.shards", 3, ["completions"]),
        ("comparisons.noise", 1.0, ["comparisons"]),
        ("data.limits", {"sft": 100}, ["data"]),
        ("data.chat", False, ["data", *EVALUATIONS]),
        ("data.system", "Be brief.", ["data", *EVALUATIONS]),
        ("evaluation.bootstrap", 100, [*EVALUATIONS, "head_to_head"]),
        ("evaluation.frontier_prompts", 8, EVALUATIONS),
        ("head_to_head", {"judge": {"endpoint": "http://localhost/v1", "model": "m"}}, ["head_to_head"]),
        ("retention", {"prompts": 8}, ["retention"]),
        ("report", {"title": "t"}, ["report"]),
        ("precision", "fp32", RUN_A_MODEL),
        ("seed", 1, STAGES),
        ("run", "y", []),
        ("policies.new", {"method": "dpo"}, []),
    ],
)
def test_a_changed_key_reaches_only_the_stages_that_read_it(key, value, stages):
    before, after = parse(GOOD), parse(changed(key, value))
    assert [s for s in STAGES if stage_config(before, s) != stage_config(after, s)] == stages


@pytest.mark.parametrize("stage", ["comparisons", "head_to_head"])
def test_new_weights_of_a_local_judge_reach_the_stage_that_asks_it(stage, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    judge = {"path": str(tmp_path)}
    value = {"judge": judge} if stage == "head_to_head" else {"labeler": "llm"} | judge
    config = parse(GOOD | {stage: value})
    before = stage_config(config, stage)
    assert stage_config(config, stage) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert stage_config(config, stage) != before


def test_comments_and_the_order_of_keys_change_nothing(tmp_path):
    plain, other = tmp_path / "plain.yaml", tmp_path / "other.yaml"
    plain.write_text(yaml.safe_dump(GOOD))
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in reversed(GOOD.items())
    }
    other.write_text("# a comment\n" + yaml.safe_dump(turned, sort_keys=False).replace("\n", "  # another\n"))
    for stage in STAGES:
        assert canonical_json(stage_config(load(plain), stage)) == canonical_json(stage_config(load(other), stage))


def test_the_resolved_config_names_its_subject():
    config = parse(GOOD)
    assert stage_config(config, "policies.dpo")["stage"] == "dpo"
    assert stage_config(config, "evaluation.bon")["subject"] == {"name": "bon", "method": "best_of_n"}
    assert stage_config(config, "evaluation.base")["subject"] == {"name": "base", "method": "base"}
    tested = parse(changed("lm_eval", {"tasks": ["arc_easy"]}))
    assert stage_config(tested, "lm_eval.dpo")["subject"] == "dpo"
    assert canonical_json(stage_config(config, "policies.bon")) == (
        '{"config":{"method":"best_of_n","n":4},"precision":"auto","seed":0,"stage":"best_of_n"}'
    )
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2


def test_canonical_json_by_hand():
    assert canonical_json({"b": [1, 0.5, 1e-5], "a": "é\n", "c": {"z": None, "y": True}}) == (
        '{"a":"é\\n","b":[1,0.5,1e-05],"c":{"y":true,"z":null}}'
    )
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json({"a": [value]})


# ----------------------------------------------------------------------------- examples and schema


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid_by_code_and_by_schema(path):
    content = read_yaml(path)
    assert parse(content, str(path)).run
    jsonschema.validate(content, SCHEMA)


def test_every_example_has_its_own_run_name():
    runs = [read_yaml(path)["run"] for path in EXAMPLES]
    assert len(set(runs)) == len(runs)


def test_the_hacked_policy_may_be_added_to_the_demo_itself():
    demo, hacked = (
        parse(read_yaml(ROOT / "config" / path)) for path in ("config.yaml", "examples/reward-hacking.yaml")
    )
    for block in ("seed", "base", "data", "sft", "completions", "scorers", "comparisons", "reward"):
        assert getattr(hacked, block) == getattr(demo, block), block
    assert hacked.policies["hacked"].kl_coef == 0


@pytest.mark.parametrize("name", ["demo-lora", "dpo-beta-sweep"])
def test_variants_of_the_demo_differ_only_where_they_say_so(name):
    demo, variant = (parse(read_yaml(ROOT / "config" / path)) for path in ("config.yaml", f"examples/{name}.yaml"))
    for block in ("seed", "base", "data", "completions", "comparisons", "evaluation"):
        assert getattr(variant, block) == getattr(demo, block), (
            f"config/examples/{name}.yaml: {block} differs from the demo's"
        )


def test_the_example_with_people_differs_from_the_demo_only_in_its_labelers():
    demo, people = (parse(read_yaml(ROOT / "config" / p)) for p in ("config.yaml", "examples/human-labels.yaml"))
    differing = {key for key in type(demo).model_fields if getattr(demo, key) != getattr(people, key)}
    assert differing == {"run", "comparisons"}


def test_the_lora_example_trains_only_adapters():
    config = parse(read_yaml(ROOT / "config/examples/demo-lora.yaml"))
    trained = [config.sft, config.reward, *(p for p in config.policies.values() if p.method != "best_of_n")]
    assert len(trained) >= 4
    assert all(block.lora for block in trained)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(GOOD, SCHEMA)


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("policies.dpo.beta", [0.1, 0.5], True),
        ("policies.ppo.kl_target", [None, 2.0], True),
        ("policies.dpo.loss", ["ipo", "hinge"], True),
        ("policies.dpo.loss", [], False),
        ("policies.dpo.loss", ["ipo", ["hinge"]], False),
        ("policies.dpo.beta", [], False),
        ("policies.dpo.beta", [0.1, -1], False),
        ("policies.dpo.method", ["dpo"], False),
        ("policies.dpo.lora", [None, {}], False),
        ("sft.epochs", [1, 2], False),
        ("sft.lr", 1, False),
        ("sft.learning_rate", 0, False),
        ("seed", "one", False),
        ("run", ..., False),
    ],
)
def test_schema_and_code_agree_on_sweeps(key, value, valid):
    content = changed(key, value)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(content) == valid
    if valid:
        parse(content)
    else:
        with pytest.raises(ConfigError):
            parse(content)
