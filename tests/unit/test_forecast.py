"""The forecast of a run before it starts: its splits, its rows, its steps, and rows that would move."""

import json
from pathlib import Path

import pytest

from tunetrail.cli import main
from tunetrail.config.loading import parse
from tunetrail.data import docstrings
from tunetrail.files import write_jsonl
from tunetrail.monitor.forecast import expected_tables, forecast, made_tables, steps_of

from .test_data_stage import prompt

DPO = {"method": "dpo", "batch_size": 16}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """148 pairs, as in a group's run whose DPO was a single step at a learning rate of 0."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": prompt(i), "chosen": "good", "rejected": "bad"} for i in range(148)]
    Path("p.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    Path("t.jsonl").write_text(json.dumps({"text": "x" * 2500}) + "\n" + json.dumps({"text": "y"}), encoding="utf-8")


def config(data: dict | None = None, **blocks):
    content = {
        "run": "x",
        "base": {"source": "random"},
        "data": {"preferences": [{"source": "file", "path": "p.jsonl"}]} | (data or {}),
        "policies": {"d": DPO},
    }
    return parse(content | blocks)


def test_steps_are_counted_before_the_run():
    found = config(reward={"batch_size": 8}, data={"limits": {"reward": 100}})
    assert steps_of(found, expected_tables(found)) == {"policies.d": 6, "reward": 12}
    k_wise = config(
        data={"demonstrations": [{"source": "file", "path": "t.jsonl"}, {"source": "docstrings"}],
              "limits": {"reward": 48, "sft": 64}},
        sft={"max_length": 1000}, completions={"per_prompt": 4}, comparisons={"labeler": "simulated"},
        policies={"all": DPO, "one": DPO | {"pairs_per_prompt": 1},
                  "p": {"method": "ppo", "steps": 3, "batch_size": 8, "minibatch_size": 4, "epochs": 2,
                        "reward": {"length": 1}}},
    )  # fmt: skip
    tables = expected_tables(k_wise)
    own = sum("rankings" in row for row in tables["reward"])
    assert 0 < own < 48
    blocks = sum(3 if row.get("text", "").startswith("x") else 1 for row in tables["sft"])
    assert steps_of(k_wise, tables) == {
        "sft": blocks // 16,
        "policies.all": (own + 6 * (48 - own)) // 16,
        "policies.one": 48 // 16,
        "policies.p": 3 * 2 * 2,
    }


def test_the_standard_library_is_counted_without_being_parsed(monkeypatch):
    monkeypatch.setattr(docstrings, "functions", None)
    data = {"preferences": [], "demonstrations": [{"source": "docstrings"}], "limits": {"sft": 64}}
    tables = expected_tables(config(data=data, sft={}, policies={}))
    assert len(tables["sft"]) == 64
    assert len(tables["evaluation"]) > 300


def test_steps_of_kto_are_counted_in_ratings():
    rated = [{"prompt": prompt(i), "completion": "a", "label": n == 0} for i in range(150) for n in range(2)]
    write_jsonl(Path("f.jsonl"), rated)
    data = {"preferences": [], "feedback": [{"source": "file", "path": "f.jsonl"}]}
    found = config(data, policies={"k": {"method": "kto", "epochs": 2}})
    assert steps_of(found, expected_tables(found)) == {"policies.k": 2 * (2 * 120 // 16)}
    write_jsonl(Path("q.jsonl"), [{"prompt": prompt(i)} for i in range(500, 560)])
    collected = config(
        data | {"prompts": [{"source": "file", "path": "q.jsonl"}]}, completions={"per_prompt": 2},
        comparisons={"labeler": "simulated", "scorer": "length"}, reward={},
        policies={"k": {"method": "kto"}},
    )  # fmt: skip
    tables = expected_tables(collected)
    sampled = sum(row["kind"] == "prompts" for row in tables["reward"])
    assert 0 < sampled < len(tables["reward"])
    assert steps_of(collected, tables)["reward"] == sampled // 8  # nothing is sampled for rated prompts


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_methods_without_a_reference_take_the_steps_of_dpo(method):
    dpo, other = config(), config(policies={"d": DPO | {"method": method}})
    tables = expected_tables(dpo)
    assert expected_tables(other) == tables
    assert steps_of(other, tables) == steps_of(dpo, tables)


def test_weights_add_steps():
    weighted = {"preferences": [{"source": "file", "path": "p.jsonl", "weight": 2.5}]}
    found = config(weighted)
    assert steps_of(found, expected_tables(found)) == {"policies.d": int(118 * 2.5) // 16}


def test_only_too_few_steps_are_noted():
    few = forecast(config(policies={"d": DPO}), Path("none"), is_made=False)
    assert few.notes == [
        "policies.d: at most 7 optimizer steps, fewer than 10: next to nothing can be learnt; raise epochs, lower "
        "batch_size, or add data"
    ]
    assert few.table == [
        "split       preferences  rows         read by",
        "sft         -            0            -",
        "reward      80%          at most 118  policies.d",
        "rl          -            0            -",
        "evaluation  10%          at most 15   evaluation",
        "heldout     10%          at most 15   evaluation",
    ]
    assert forecast(config(policies={"d": DPO | {"epochs": 2}}), Path("none"), is_made=False).notes == []
    methods = {"compare": {"full": {"learning_rate": 1}}, "steps": 9}
    assert steps_of(config(methods=methods), {"reward": [], "sft": []}) == {"policies.d": 0, "methods": 9}
    assert steps_of(config(methods=methods | {"steps": 10}), {"reward": [], "sft": []})["methods"] == 10


def test_rows_that_no_stage_reads_are_noted():
    notes = forecast(config({"shares": {"rl": 0.2}}), Path("none"), is_made=False).notes
    assert notes[0] == "rl: 20% of the preferences go there, but no stage reads them"
    pinned = config({"demonstrations": [{"source": "file", "path": "t.jsonl", "split": "heldout"}]})
    notes = forecast(pinned, Path("none"), is_made=False).notes
    assert notes[0] == "heldout: demonstrations are pinned there, but no stage reads them"


def test_finished_data_is_counted_exactly_and_moved_rows_are_reported():
    folder = Path("data")
    folder.mkdir()
    rankings = [{"labeler": "a", "ranks": [1, 2]}]
    for split, n in (("sft", 0), ("reward", 40), ("rl", 0), ("evaluation", 5), ("heldout", 5)):
        write_jsonl(folder / f"{split}.jsonl", [{"id": f"{split}{i}"} for i in range(n)])
    write_jsonl(folder / "comparisons.jsonl", [{"id": f"reward{i}", "rankings": rankings} for i in range(40)])
    found = config()
    (folder / "metrics.json").write_text(json.dumps({"shares": found.shares}))
    assert steps_of(found, made_tables(folder)) == {"policies.d": 2}
    known = forecast(found, folder, is_made=True)
    assert "policies.d: 2 optimizer steps, fewer than 10" in known.notes[0]
    assert known.table[2] == "reward      80%          40    policies.d"

    ppo = {"method": "ppo", "steps": 9, "reward": {"length": 1}}
    moved = forecast(config(policies={"d": DPO, "p": ppo}), folder, is_made=False).notes
    assert moved[0] == (
        "data.shares: preferences reward 0.8 -> 0.4, preferences rl 0 -> 0.4: rows move between splits, so data and "
        "all that follows is made again; to keep the splits, give data.shares the earlier numbers, and a new stage a "
        "source pinned to its split"
    )


def test_scorers_that_prompts_cannot_serve_are_named():
    ppo = {"method": "ppo", "steps": 99, "reward": {"exact": 1, "length": 1}, "gold": None}
    found = config(
        {"preferences": [], "prompts": [{"source": "file", "path": "p.jsonl"}]},
        completions={}, comparisons={"labeler": "simulated"}, evaluation={"gold": ["chrf", "length"]},
        policies={"p": ppo},
    )  # fmt: skip
    lines = forecast(found, Path("none"), is_made=False).notes[:3]
    assert [line.partition(":")[0] for line in lines] == [
        "evaluation.gold[0]", "comparisons.scorer", "policies.p.reward.exact"
    ]  # fmt: skip
    assert lines[0].endswith("chrf compares with the author's text, which data.prompts has not: it is not measured")
    assert lines[1].endswith("the stage will stop; take another")


def test_hub_sources_are_not_fetched():
    hub = {"source": "hub", "repo": "a/b", "revision": "c"}
    found = config({"preferences": [hub]})
    assert expected_tables(found) is None
    assert forecast(found, Path("none"), is_made=False).table[2] == "reward      80%          policies.d"


def test_check_prints_the_shares(capsys):
    Path("x.yaml").write_text(json.dumps(config().model_dump(mode="json", exclude_unset=True)))
    assert main(["config", "check", "x.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "reward      80%          policies.d"
