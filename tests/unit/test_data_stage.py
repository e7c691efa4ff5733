"""The data stage end to end: what splits must not share, what must not get lost, and what it tells the user."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tunetrail.config.data import DataConfig, FileSource
from tunetrail.contract.runner import main
from tunetrail.files import read_jsonl, write_json
from tunetrail.models.tiny import tiny_tokenizer
from tunetrail.provenance.manifest import list_files
from tunetrail.provenance.record import read_record
from tunetrail.stages import data

SHARED = Path(__file__).parents[2].parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data (real human data) is not on this machine")
SPLITS = ("sft", "reward", "rl", "evaluation", "heldout")
EVERY_STAGE = {
    "demonstrations": {"sft": 0.5, "reward": 0.15, "rl": 0.15, "evaluation": 0.1, "heldout": 0.1},
    "preferences": {"reward": 0.4, "rl": 0.4, "evaluation": 0.1, "heldout": 0.1},
    "prompts": {"reward": 0.4, "rl": 0.4, "evaluation": 0.1, "heldout": 0.1},
    "text": {"sft": 0.5 / 0.6, "heldout": 0.1 / 0.6},
}
"""The shares in a run that has every stage."""
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def prompt(i: int) -> str:
    return " ".join(WORDS[int(d)] for d in f"{i:05d}") + f" number {i}"


def file(name: str, rows: list[dict], **more) -> FileSource:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FileSource(source="file", path=name, **more)


class Prepared:
    """A finished or failed run of the stage."""

    def __init__(self, config: DataConfig, seed: int = 0, shares: dict[str, dict[str, float]] | None = None):
        shares = EVERY_STAGE if shares is None else shares
        stage = {"stage": "data", "seed": seed, "shares": shares, "config": config.model_dump(mode="json")}
        Path("data.json").write_text(json.dumps(stage), encoding="utf-8")
        arguments = ["--config=data.json", "--input=base=base/manifest.json", "--output=data/manifest.json"]
        self.code = main(data.run, [*arguments, "--state=state"])

    def __getitem__(self, split: str) -> list[dict]:
        return read_jsonl(Path(f"data/{split}.jsonl"))

    @property
    def card(self) -> dict:
        return json.loads(Path("data/metrics.json").read_text(encoding="utf-8"))


def save_base(template: str | None = None, positions: int = 4096) -> None:
    LlamaConfig(max_position_embeddings=positions).save_pretrained("base/model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if template is None else template
    tokenizer.save_pretrained("base/model")
    manifest = {"schema": 1, "stage": "base", "tokenizer": "t"}
    write_json(Path("base/manifest.json"), manifest | {"files": list_files(Path("base"))})


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base()


# ----------------------------------------------------------------------------- the splits


def test_golden_splits():
    """These rows and this seed have always given these splits, in this order."""
    done = Prepared(
        DataConfig(demonstrations=[file("d.jsonl", [{"prompt": prompt(i), "completion": f"{i}"} for i in range(20)])]),
        seed=17,
    )
    assert done.code == 0
    assert {split: [int(row["completion"]) for row in done[split]] for split in SPLITS} == {
        "sft": [2, 10, 0, 16, 12, 15, 11, 17, 14, 7], "reward": [3, 6, 1], "rl": [4, 18, 9],
        "evaluation": [5, 8], "heldout": [13, 19],
    }  # fmt: skip
    assert done["rl"][0]["id"] == "bacc76accd6e8841"


def test_conversations_do_not_straddle_splits():
    chats = [
        {"messages": [
            {"role": "user", "content": prompt(i)}, {"role": "assistant", "content": f"{i}"},
            {"role": "user", "content": "and what about "
                                        f"{WORDS[i % 10]} {i}?"}, {"role": "assistant", "content": f"{i}"},
        ]} for i in range(60)
    ]  # fmt: skip
    done = Prepared(DataConfig(demonstrations=[file("d.jsonl", chats)]))
    splits_of: dict[str, set[str]] = {}
    rows = Counter(row["completion"] for split in SPLITS for row in done[split])
    for split in SPLITS:
        for row in done[split]:
            splits_of.setdefault(row["completion"], set()).add(split)
    assert set(rows.values()) == {2}
    assert [len(splits) for splits in splits_of.values()] == [1] * 60


def test_a_shared_system_message_does_not_make_near_duplicates():
    system = {"role": "system", "content": " ".join(f"rule{i}" for i in range(200))}
    chats = [
        {"messages": [system, {"role": "user", "content": prompt(i)}, {"role": "assistant", "content": "a"}]}
        for i in range(60)
    ]
    assert Prepared(DataConfig(demonstrations=[file("d.jsonl", chats)], max_prompt_tokens=2000)).code == 0


def test_the_authors_of_demonstrations_are_in_the_rows_and_the_record():
    rows = [
        {"prompt": prompt(i), "completion": "a"} | ({"labeler": f"human-{i % 2}"} if i % 3 else {}) for i in range(60)
    ]
    done = Prepared(DataConfig(demonstrations=[file("d.jsonl", rows)]))
    authors = {row["prompt"]: row.get("labeler") for row in rows}
    read = [(row["prompt"], row.get("labeler")) for split in SPLITS for row in done[split]]
    assert len({labeler for _, labeler in read}) == 3
    assert all(authors[next(p for p in authors if p in text)] == labeler for text, labeler in read)
    by_split = {d["name"]: d["annotations"] for d in read_record(Path("data")).of_role("labels")}
    assert by_split["sft.jsonl"]["labelers"] == ["human-0", "human-1"]
    assert by_split["sft.jsonl"]["demonstrations"] == sum("labeler" in row for row in done["sft"])


def test_raw_text_is_not_lost():
    texts = [{"text": "raw " + prompt(i + 500)} for i in range(60)]
    done = Prepared(
        DataConfig(demonstrations=[file("t.jsonl", texts), file("d.jsonl", [{"prompt": prompt(i),
            "completion": "a"} for i in range(60)])])
    )  # fmt: skip
    assert {split: sum("text" in row for row in done[split]) for split in ("sft", "heldout")} == {
        "sft": 50,
        "heldout": 10,
    }
    assert {split: sum("prompt" in row for row in done[split]) for split in SPLITS} == {
        "sft": 30,
        "reward": 9,
        "rl": 9,
        "evaluation": 6,
        "heldout": 6,
    }


def largely(i: int) -> dict:
    """Fifty prompts with 14 words of their own, and an ending of 24 words that the last 9 share with the others."""
    own = " ".join(f"{WORDS[k]}{i}" for k in range(10)) + f" {i}a {i}b {i}c {i}d"
    ending = " ".join(f"e{k}" for k in range(24)) if i >= 41 else f"{i}e"
    return {"prompt": f"{own} {ending}", "completion": f"{i}", "group": f"{i}"}


def test_evaluation_prompts_that_training_texts_contain_are_reported_and_left_out(capfd):
    rows = [largely(i) for i in range(50)]

    def prepared(**options):
        source = file("d.jsonl", rows, group="group")
        return Prepared(DataConfig(demonstrations=[source], near_duplicate=1.0, overlap_words=8, **options))

    kept = prepared(max_overlap=1.0)
    shared = [row["id"] for row in kept["evaluation"] if int(row["completion"]) >= 41]
    assert shared, "the seed gives evaluation none of the nine; take another"
    found = kept.card["contamination"]
    assert [row["id"] for row in found["worst"]] == sorted(shared)
    assert found["max"] == pytest.approx(17 / 31)  # of 38 words: 31 sequences of eight, 17 of them within the ending
    assert found["mean"] == pytest.approx(len(shared) * 17 / 31 / found["prompts"])
    assert sum(found["histogram"]["counts"]) == found["prompts"] == len(kept["evaluation"])
    assert {row["id"]: row["overlap"] for row in read_jsonl(Path("data/contamination.jsonl"))}.keys() == {
        row["id"] for row in kept["evaluation"]
    }

    heldout = sum(int(row["completion"]) >= 41 for row in kept["heldout"])
    assert heldout, "the seed gives heldout none of the nine; take another"

    dropped = prepared(max_overlap=0.5, duplicates="drop")
    assert dropped.card["contamination"]["dropped"] == len(shared)
    assert dropped.card["contamination"]["heldout"]["dropped"] == heldout
    assert dropped.card["dropped"]["contaminated"] == len(shared) + heldout
    assert not any(int(row["completion"]) >= 41 for row in dropped["heldout"])
    assert {row["id"] for row in dropped["evaluation"]} == {row["id"] for row in kept["evaluation"]} - set(shared)
    assert dropped.card["contamination"]["max"] == 0

    capfd.readouterr()
    assert prepared(max_overlap=0.5).code == 65
    assert (
        f"{len(shared) + heldout} evaluation and held-out prompts are largely in the training texts, such as d.jsonl:"
        in capfd.readouterr().err
    )


def test_a_contaminated_prompt_counts_once():
    """Although it has three answers; rows are counted separately."""
    rows = [largely(i) | {"completion": f"{i} {k}"} for i in range(50) for k in range(3)]
    source = file("d.jsonl", rows, group="group")
    done = Prepared(DataConfig(demonstrations=[source], near_duplicate=1.0, overlap_words=8, duplicates="drop"))
    found = done.card["contamination"]
    prompts = found["dropped"] + found["heldout"]["dropped"]
    assert found["dropped"] > 0
    assert done.card["dropped"]["contaminated"] == 3 * prompts
    assert found["heldout"]["prompts"] == len({row["prompt"] for row in done["heldout"]})


# ----------------------------------------------------------------------------- preferences


def ranked(i: int, labeler: str, ranks: list[int]) -> dict:
    return {"prompt": prompt(i), "completions": ["x", "y"], "ranks": ranks, "labeler": labeler}


def test_one_file_per_labeler():
    done = Prepared(DataConfig(preferences=[
        file("ann.jsonl", [ranked(i, "ann", [1, 2]) for i in range(60)]),
        file("bob.jsonl", [ranked(i, "bob", [2, 1]) for i in range(60)]),
    ]))  # fmt: skip
    assert done.card["comparisons"] == {"prompts": 30, "completions": 60, "rankings": 60, "labelers": ["ann", "bob"]}
    assert all(
        [(r["labeler"], r["ranks"]) for r in row["rankings"]] == [("ann", [1, 2]), ("bob", [2, 1])]
        for row in done["comparisons"]
    )


def test_each_prompt_is_evaluated_once():
    """Otherwise intervals over prompts would be too narrow. A demonstration is the better reference."""
    pairs = [{"prompt": prompt(i), "chosen": f"good {n}", "rejected": "bad"} for i in range(60) for n in range(4)]
    demonstrations = [{"prompt": prompt(i), "completion": "expert"} for i in range(0, 60, 2)]
    done = Prepared(
        DataConfig(
            preferences=[file("p.jsonl", pairs)],
            demonstrations=[file("d.jsonl", demonstrations)],
            sft_on_chosen=True,
        ),
        shares={"preferences": {"reward": 0.3, "rl": 0.3, "evaluation": 0.3, "heldout": 0.1}},
    )
    for split in ("rl", "evaluation"):
        assert max(Counter(row["prompt"] for row in done[split]).values()) == 1
        assert {row["completion"] for row in done[split]} >= {"expert"}
        for row in done[split]:
            number = int(row["prompt"].split("number ")[1].split("<")[0])
            assert (row["completion"] == "expert") == (number % 2 == 0)
    assert max(Counter(row["prompt"] for row in done["sft"]).values()) >= 4
    kept = sum(split["rows"] for name, split in done.card["splits"].items() if name != "sft")
    assert kept + done.card["dropped"]["same_prompt"] == 60 * 4 + 30


def test_preferences_and_demonstrations_of_a_prompt_go_together():
    pairs = [{"prompt": prompt(i).upper(), "chosen": "good", "rejected": "bad"} for i in range(60)]
    demonstrations = [{"prompt": prompt(i), "completion": "expert"} for i in range(60)]
    done = Prepared(DataConfig(preferences=[file("p.jsonl", pairs)], demonstrations=[file("d.jsonl", demonstrations)]))
    assert done.code == 0
    groups = [{row["group"] for row in done[split]} for split in SPLITS if split != "sft"]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 60
    # sft trains on the demonstrations of the reward split, which nothing else would use.
    assert {row["group"] for row in done["sft"]} == {row["group"] for row in done["reward"]}
    assert {row["completion"] for row in done["sft"]} == {"expert"}
    assert {row["split"] for row in done["comparisons"]} == {"reward", "heldout"}


def test_weights_are_on_training_rows_and_in_the_table_of_uses():
    """Splits and test data are the same as without weights."""

    def prepared(weight: float) -> Prepared:
        return Prepared(
            DataConfig(
                demonstrations=[
                    file("a.jsonl", [{"prompt": prompt(i), "completion": "a"} for i in range(60)], weight=weight),
                    file("b.jsonl", [{"prompt": prompt(i + 500), "completion": "b"} for i in range(60)]),
                ],
                preferences=[
                    file("p.jsonl", [{"prompt": prompt(i + 900), "chosen": "x", "rejected": "y"} for i in range(60)],
                         weight=weight)
                ],
            )
        )  # fmt: skip

    plain = prepared(1.0)
    before = {name: plain[name] for name in (*SPLITS, "comparisons")}
    assert not any("weight" in row for rows in before.values() for row in rows)
    done = prepared(2.5)
    assert done.code == 0
    for name, rows in before.items():
        assert [{k: v for k, v in row.items() if k != "weight"} for row in done[name]] == rows
    for split in ("sft", "reward"):
        assert [row.get("weight") for row in done[split]] == [
            None if row["source"] == "b.jsonl" else 2.5 for row in done[split]
        ]
    for split in ("rl", "evaluation", "heldout"):
        assert not any("weight" in row for row in done[split])
    assert {(row["split"], row.get("weight")) for row in done["comparisons"]} == {("reward", 2.5), ("heldout", None)}
    used = {(use["source"], use["split"]): use["weight"] for use in done.card["uses"]}
    assert used["a.jsonl", "sft"] == used["p.jsonl", "reward"] == 2.5
    assert used["b.jsonl", "sft"] == used["a.jsonl", "evaluation"] == 1
    said = Path(next(Path("state").glob("*/log.txt"))).read_text(encoding="utf-8")
    assert f"{sum(row['source'] == 'a.jsonl' for row in done['sft'])} x 2.5\n" in said


RATED = {"feedback": {"reward": 0.4, "rl": 0.2, "evaluation": 0.2, "heldout": 0.2}}


def test_feedback_is_split_by_prompt_and_used_only_by_kto():
    """A response that may be bad is never a demonstration, a reference or training text."""
    people = ("ann.jsonl", "ann", True), ("bob.jsonl", "bob", False)
    config = DataConfig(
        feedback=[
            file(name, [{"prompt": prompt(i), "completion": f"{i} {k}", "label": label, "labeler": who}
                        for i in range(60) for k in range(2)])
            for name, who, label in people
        ],
        demonstrations=[file("d.jsonl", [{"prompt": prompt(i), "completion": f"{i} 0"} for i in range(40, 60)])],
        near_duplicate=1.0,
    )  # fmt: skip
    done = Prepared(config, shares=RATED | {"demonstrations": {"sft": 1.0}})
    assert done.code == 0
    rated = done["feedback"]
    assert {row["split"] for row in rated} == {"reward", "heldout"}
    assert all([r["label"] for r in row["ratings"]] == [True, False] for row in rated)
    groups = [{row["group"] for row in done[split]} for split in SPLITS if split != "sft"]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 60
    demonstrated = {row["group"] for split in SPLITS for row in done[split] if "completion" in row}
    assert demonstrated == {prompt(i) for i in range(40, 60)}  # the author's, not a rated one
    assert {row["completion"] for row in done["sft"]} <= {f"{i} 0" for i in range(40, 60)}
    for split in ("rl", "evaluation"):
        assert max(Counter(row["prompt"] for row in done[split]).values()) == 1
    card = done.card["feedback"]
    assert (card["liked"], card["disliked"], card["labelers"]) == (len(rated), len(rated), ["ann", "bob"])
    used = {(use["kind"], use["split"]): use["used_by"] for use in done.card["uses"]}
    assert used["feedback", "reward"] == ["kto"]
    assert ("feedback", "sft") not in used
    labels = {d["name"]: d["annotations"] for d in read_record(Path("data")).of_role("labels")}
    assert labels["feedback.jsonl"]["ratings"] == 2 * len(rated)
    total = sum(use["rows"] for use in done.card["uses"] if not use["also_in"]) + sum(
        out["rows"] for out in done.card["left_out"]
    )
    assert total == done.card["rows_read"] == 2 * 120 + 20


def test_a_rated_response_that_repeats_a_test_prompt_is_a_leak(capfd):
    rated = [{"prompt": prompt(i), "completion": "a", "label": i % 2 == 0} for i in range(30)]
    rated[3]["prompt"] = prompt(900)
    test = file("t.jsonl", [{"prompt": prompt(900).upper(), "completion": "a"}], split="evaluation", group="completion")
    config = DataConfig(feedback=[file("f.jsonl", rated)], demonstrations=[test])
    shares = {"feedback": {"reward": 0.8, "heldout": 0.2}}
    assert Prepared(config, shares=shares).code == 65
    assert "1 rows repeat a row of another split, such as f.jsonl:4 (" in capfd.readouterr().err
    done = Prepared(config.model_copy(update={"duplicates": "drop"}), shares=shares)
    assert done.code == 0
    assert done.card["dropped"] == {"duplicates": 1}


def test_too_little_feedback_is_reported(capfd):
    rated = [{"prompt": prompt(i), "completion": "a", "label": True} for i in range(2)]
    demonstrations = [{"prompt": prompt(i + 100), "completion": "a"} for i in range(60)]
    config = DataConfig(feedback=[file("f.jsonl", rated)], demonstrations=[file("d.jsonl", demonstrations)])
    assert Prepared(config, shares=EVERY_STAGE | RATED).code == 65
    said = capfd.readouterr().err
    assert "no feedback is left for this split; 2 feedback rows are too few for these shares and limits: " in said


def test_too_few_comparisons_are_reported(capfd):
    """Although there are enough demonstrations to fill the split."""
    demonstrations = [{"prompt": prompt(i), "completion": "a"} for i in range(60)]
    pairs = [{"prompt": f"one question of {i}", "chosen": "good", "rejected": "bad"} for i in range(2)]
    done = Prepared(DataConfig(preferences=[file("p.jsonl", pairs)], demonstrations=[file("d.jsonl", demonstrations)]))
    assert done.code == 65
    assert capfd.readouterr().err == (
        "data: error: data.shares.heldout: no comparison is left for this split; 2 preference rows are too few for "
        "these shares and limits: add data, use finer groups, pin a source to this split, or set the share to 0 "
        "if no stage needs it\n"
    )


def test_every_row_is_accounted_for():
    """Each row is in the table of its split or left out for one reason, and sft has only demonstrations."""
    pairs = [{"prompt": prompt(i), "chosen": "good", "rejected": "bad"} for i in range(148)]
    answers = [{"prompt": prompt(i + 500), "completion": "a"} for i in range(80)]
    answers += [{"prompt": f"long {i}", "completion": "x" * 90} for i in range(7)] + answers[:3]
    config = DataConfig(
        preferences=[file("p.jsonl", [*pairs, {"prompt": "no pair"}])], demonstrations=[file("d.jsonl", answers)],
        chat=False, max_completion_tokens=80, too_long="drop", invalid="drop", limits={"sft": 40},
    )  # fmt: skip
    shares = {
        "preferences": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1},
        "demonstrations": {"sft": 0.8, "evaluation": 0.1, "heldout": 0.1},
    }
    done = Prepared(config, shares=shares)
    assert done.code == 0
    used = {(use["source"], use["split"]): use for use in done.card["uses"]}
    assert {key: use["rows"] for key, use in used.items()} == {
        ("p.jsonl", "reward"): 118, ("p.jsonl", "evaluation"): 15, ("p.jsonl", "heldout"): 15,
        ("d.jsonl", "sft"): 40, ("d.jsonl", "evaluation"): 8, ("d.jsonl", "heldout"): 8,
    }  # fmt: skip
    assert used["p.jsonl", "reward"]["used_by"] == ["reward", "dpo", "orpo", "simpo"]
    assert used["d.jsonl", "sft"]["used_by"] == ["sft", "methods", "ppo (ptx)"]
    reasons = {(out["source"], out["reason"]): out["rows"] for out in done.card["left_out"]}
    assert reasons.pop(("d.jsonl", "over_limit")) == 80 - 40 - 8 - 8
    assert reasons == {("p.jsonl", "invalid"): 1, ("d.jsonl", "too_long"): 7, ("d.jsonl", "repeated"): 3}
    total = sum(use["rows"] for use in used.values()) + sum(out["rows"] for out in done.card["left_out"])
    assert total == 149 + 90
    said = Path(next(Path("state").glob("*/log.txt"))).read_text(encoding="utf-8")
    assert re.search(r"p\.jsonl  preferences     reward      reward, dpo, orpo, simpo +118\n", said)
    assert re.search(r"d\.jsonl  demonstrations  left out    too long +7\n", said)


def test_sft_trains_on_chosen_responses_only_if_asked():
    pairs = [{"prompt": prompt(i), "chosen": "good", "rejected": "bad"} for i in range(60)]
    config = DataConfig(preferences=[file("p.jsonl", pairs)])
    shares = {"preferences": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1}}
    assert Prepared(config, shares=shares)["sft"] == []
    told = Prepared(config.model_copy(update={"sft_on_chosen": True}), shares=shares)
    assert {row["id"] for row in told["sft"]} == {row["id"] for row in told["reward"]}
    assert {row["completion"] for row in told["sft"]} == {"good"}
    also = [use for use in told.card["uses"] if use["also_in"]]
    assert [(use["split"], use["also_in"], use["rows"]) for use in also] == [("sft", "reward", 48)]


# ----------------------------------------------------------------------------- pinned sources


def test_data_too_small_to_split_can_be_pinned_and_used_completely():
    """One paragraph and two pairs, as in a course; splits that nothing reads may be empty."""
    pairs = [{"prompt": prompt(i), "chosen": "yes", "rejected": "no"} for i in range(2)]
    questions = [{"prompt": prompt(i + 100), "completion": "a"} for i in range(3)]
    config = DataConfig(
        demonstrations=[
            file("t.jsonl", [{"text": "one paragraph"}], split="sft"),
            file("q.jsonl", questions, split="evaluation"),
        ],
        preferences=[file("p.jsonl", pairs, split="reward")],
    )
    done = Prepared(config, shares={})
    assert done.code == 0
    rows = {"sft": 1, "reward": 2, "rl": 0, "evaluation": 3, "heldout": 0}
    assert {split: len(done[split]) for split in SPLITS} == rows
    assert [row["split"] for row in done["comparisons"]] == ["reward", "reward"]
    assert [source["split"] for source in done.card["sources"]] == ["sft", "evaluation", "reward"]


def test_a_pinned_source_keeps_the_checks_for_leaks(capfd):
    config = DataConfig(
        demonstrations=[
            file("s.jsonl", [{"text": prompt(1), "group": "s"}], split="sft", group="group"),
            file("e.jsonl", [{"prompt": prompt(1), "completion": "a", "group": "e"}], split="evaluation",
                 group="group"),
        ],
    )  # fmt: skip
    assert Prepared(config, shares={}).code == 65
    assert "1 rows repeat a row of another split, such as s.jsonl:1 (sft" in capfd.readouterr().err


TRAINED_AND_TESTED = {"demonstrations": {"sft": 0.9, "heldout": 0.1}}
"""The shares of an unpinned source next to a test set."""


@pytest.mark.parametrize("split", ["sft", None])
@pytest.mark.parametrize("duplicate", ["prompt", "text"])
def test_a_duplicate_of_a_test_row_is_removed_from_training(capfd, split, duplicate):
    """Whether it has the same group (here the prompt) or the same text, and whether its source is pinned or not."""
    tests = [{"prompt": prompt(i), "completion": f"test {i}", "user": f"t{i}"} for i in range(12)]
    train = [{"prompt": prompt(i), "completion": f"train {i}", "user": f"u{i}"} for i in range(8, 60)]
    group = "user" if duplicate == "text" else None

    def config(duplicates: str) -> DataConfig:
        return DataConfig(
            demonstrations=[
                file("train.jsonl", train, split=split, group=group),
                file("test.jsonl", tests, split="evaluation", group=group),
            ],
            duplicates=duplicates,
        )

    shares = {} if split else TRAINED_AND_TESTED
    assert Prepared(config("error"), shares=shares).code == 65
    (line,) = capfd.readouterr().err.splitlines()
    reason = "4 rows share their group with" if duplicate == "prompt" else "4 rows repeat a row of another split, such"
    assert reason in line
    assert "train.jsonl:1" in line
    assert "test.jsonl:9 (evaluation" in line

    done = Prepared(config("drop"), shares=shares)
    assert done.code == 0
    assert sorted(row["completion"] for row in done["evaluation"]) == sorted(row["completion"] for row in tests)
    trained = {row["completion"] for name in ("sft", "heldout") for row in done[name]}
    assert trained == {f"train {i}" for i in range(12, 60)}
    (out,) = done.card["left_out"]
    reason = "group_of_a_test_set" if duplicate == "prompt" else "duplicates"
    assert (out["source"], out["reason"], out["rows"]) == ("train.jsonl", reason, 4)


def test_training_texts_that_contain_a_test_prompt_are_dropped_and_the_prompt_stays():
    """Without a given test set the prompt would be dropped instead."""
    tests = [{"prompt": prompt(i) + " " + " ".join(f"own{i}{k}" for k in range(12)), "completion": "a"}
             for i in range(6)]  # fmt: skip
    leak = {"prompt": "recall this", "completion": "once more: " + tests[0]["prompt"]}
    part = {"prompt": "recall that", "completion": " ".join(tests[1]["prompt"].split()[:9])}
    train = [{"prompt": prompt(i), "completion": f"train {i}"} for i in range(100, 140)]
    config = DataConfig(
        demonstrations=[
            file("train.jsonl", [*train, leak, part], split="sft"),
            file("test.jsonl", tests, split="evaluation"),
        ],
        duplicates="drop",
    )
    done = Prepared(config, shares={})
    assert done.code == 0
    assert len(done["evaluation"]) == 6
    assert {row["completion"] for row in done["sft"]} == {row["completion"] for row in [*train, part]}
    assert done.card["left_out"] == [
        {"source": "train.jsonl", "kind": "demonstrations", "reason": "contaminated", "rows": 1}
    ]
    assert done.card["contamination"]["dropped"] == 0
    assert done.card["contamination"]["max"] == pytest.approx(2 / 12)  # nine words are two of its twelve sequences


def test_a_heldout_test_set_has_priority_over_other_evaluation_rows():
    rows = [{"prompt": prompt(i), "completion": "a", "user": f"u{i}"} for i in range(40)]
    tests = [{"prompt": prompt(i), "completion": "b", "user": f"t{i}"} for i in range(40)]
    config = DataConfig(
        demonstrations=[
            file("d.jsonl", rows, group="user"),
            file("test.jsonl", tests[:20], split="heldout", group="user"),
        ],
        duplicates="drop",
    )
    done = Prepared(config, shares={"demonstrations": {"sft": 0.5, "evaluation": 0.5}})
    assert done.code == 0
    assert len(done["heldout"]) == 20
    assert len(done["sft"]) + len(done["evaluation"]) == 20


def test_bare_prompts_go_only_to_splits_that_use_prompts(capfd):
    prompts = [{"prompt": prompt(i)} for i in range(60)]
    answers = [{"prompt": prompt(i + 100), "completion": "a"} for i in range(60)]
    config = DataConfig(
        demonstrations=[file("d.jsonl", answers, split="sft")], prompts=[file("p.jsonl", prompts, licence="MIT")]
    )
    done = Prepared(config, shares={"prompts": {"reward": 0.4, "rl": 0.4, "evaluation": 0.1, "heldout": 0.1}})
    assert done.code == 0
    rows = {split: len(done[split]) for split in SPLITS}
    assert rows == {"sft": 60, "reward": 24, "rl": 24, "evaluation": 6, "heldout": 6}
    assert not any("completion" in row for split in SPLITS[1:] for row in done[split])
    assert done.card["splits"]["rl"]["completion_tokens"] is None
    assert [(s["kind"], s["shape"], s["licence"]) for s in done.card["sources"]][1] == ("prompts", "prompt", "MIT")


def test_a_split_with_a_share_may_not_be_empty(capfd):
    """Here because of a second source with a single row."""
    sources = [
        file("t.jsonl", [{"text": "one paragraph"}], split="sft"),
        file("d.jsonl", [{"prompt": "p", "completion": "a"}]),
    ]
    shares = {"demonstrations": {"sft": 0.9, "evaluation": 0.1}}
    assert Prepared(DataConfig(demonstrations=sources), shares=shares).code == 65
    assert "data.shares.evaluation: no row is left for this split; 2 rows in 2 groups are too few" in (
        capfd.readouterr().err
    )


# ----------------------------------------------------------------------------- messages


def refused(capfd, rows: list[dict], code: int = 65, **config) -> list[str]:
    """The lines of the message."""
    capfd.readouterr()
    assert Prepared(DataConfig(demonstrations=[file("d.jsonl", rows)], **config)).code == code
    assert not Path("data/manifest.json").exists()
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("data: error: ") for line in lines)
    return [line.removeprefix("data: error: ") for line in lines]


ROWS = [{"prompt": prompt(i), "completion": "a"} for i in range(60)]


LONG = [{"prompt": "p" * n, "completion": "a"} for n in (41, 42, 43, 44)]


def test_all_rows_that_are_too_long_are_counted_and_the_first_three_named(capfd, caplog):
    rows = [*ROWS[:7], {"prompt": "p", "completion": "x" * 90}, *LONG, *ROWS * 3]
    limits = {"max_completion_tokens": 80, "max_prompt_tokens": 40, "chat": False}
    prompts = [f"alpha beta number {i}" for i in range(len(rows))]
    rows = [row if row in LONG else row | {"prompt": text} for row, text in zip(rows, prompts, strict=True)]
    assert refused(capfd, rows, **limits) == [
        "data.max_prompt_tokens: 4 of 192 rows have a prompt of more than 40 tokens: d.jsonl:9 (41), d.jsonl:10 (42), "
        "d.jsonl:11 (43), …; 43 would fit 99%, 44 all; raise it, or leave them out with data.too_long: drop",
        "data.max_completion_tokens: 1 of 192 rows has an answer of more than 80 tokens: d.jsonl:8 (90); 1 would fit "
        "99%, 90 all; raise it, or leave them out with data.too_long: drop",
    ]
    caplog.clear()
    done = Prepared(DataConfig(demonstrations=[file("d.jsonl", rows)], too_long="drop", near_duplicate=1, **limits))
    assert done.code == 0
    assert done.card["dropped"]["too_long"] == 5
    left_out = [message for message in caplog.messages if "left out" in message]
    assert left_out[0].startswith("data: left out: data.max_prompt_tokens: 4 of 192 rows have a prompt of more than 40")
    assert left_out[0].endswith("; 43 would fit 99%, 44 all")


def test_rows_longer_than_the_model_can_read_are_refused_whatever_the_limits(capfd):
    """Beyond its positions a rotary model silently gets worse."""
    save_base(positions=70)
    rows = [*ROWS, {"prompt": "p" * 60, "completion": "x" * 9}, {"prompt": "p" * 60, "completion": "x" * 10}]
    assert refused(capfd, rows, chat=False) == [
        "base: 1 of 62 rows has more tokens, prompt and answer together, than the model has positions (70): d.jsonl:62 "
        "(71); 71 would fit 99%, 71 all; shorten them, take a model that reads more, or leave them out with "
        "data.too_long: drop"
    ]
    done = Prepared(DataConfig(demonstrations=[file("d.jsonl", rows)], too_long="drop", chat=False))
    assert (done.code, done.card["dropped"]["too_long"]) == (0, 1)


def test_both_rows_of_a_leak_are_named(capfd):
    rows = [*ROWS, {"prompt": ROWS[3]["prompt"], "completion": "b", "user": "other"}]
    rows = [{"user": f"u{i}"} | row for i, row in enumerate(rows)]
    source = {"demonstrations": [file("d.jsonl", rows, group="user")]}
    messages = set()
    for seed in range(4):
        if Prepared(DataConfig(**source), seed=seed).code:
            messages.add(capfd.readouterr().err)
    assert messages
    for message in messages:
        assert "1 rows repeat a row of another split, such as d.jsonl:" in message
        assert "d.jsonl:4 (" in message
        assert "d.jsonl:61 (" in message


def test_a_model_without_chat_template(capfd):
    save_base(template="")
    assert refused(capfd, ROWS) == [
        "data.chat: the base model has no chat template; set data.chat to false, or give base.chat_template"
    ]
    assert Prepared(DataConfig(demonstrations=[file("d.jsonl", ROWS)], chat=False)).code == 0


def test_a_conversation_that_the_template_refuses(capfd):
    save_base(
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x{{ "
        "messages[0].content }}"
    )
    assert refused(capfd, ROWS, system="Be brief.") == [
        "d.jsonl:1: the chat template refuses turns of system, user (no system role); change the row or data.system, "
        "or give base.chat_template (60 such rows: 1, 2, 3, …)",
        "data: none of its 60 rows is valid",
    ]
    assert Prepared(DataConfig(demonstrations=[file("d.jsonl", ROWS)])).code == 0


def test_a_system_message_without_chat(capfd):
    assert refused(capfd, ROWS, code=78, system="Be brief.", chat=False) == [
        "data.system: plain prompts have no place for it; set it to null, or data.chat to true"
    ]


def test_a_conversation_without_chat(capfd):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [*ROWS, {"messages": [*turns, {"role": "user", "content": "c"}, turns[1]]}]
    assert refused(capfd, rows, chat=False) == [
        "d.jsonl:61: is a conversation, but data.chat is false; set it to true",
        "data: 1 of 62 rows is invalid; fix them, or leave them out with data.invalid: drop",
    ]
    done = Prepared(DataConfig(demonstrations=[file("d.jsonl", rows)], chat=False, invalid="drop"))
    assert (done.code, done.card["dropped"]["not_rendered"]) == (0, 1)


# ----------------------------------------------------------------------------- real human data


@needs_shared
def test_annotators_and_experts_side_by_side():
    """PandaLM's prompts are from self-instruct: 993 pairs over 170 prompts, and 427 demonstrations."""
    done = Prepared(DataConfig(
        demonstrations=[FileSource(source="file", path=SHARED / "self-instruct/demonstrations.jsonl.gz")],
        preferences=[FileSource(source="file", path=SHARED / "pandalm/pairs.jsonl.gz")],
        invalid="drop", too_long="drop", duplicates="drop", max_prompt_tokens=2000, max_completion_tokens=2000,
    ))  # fmt: skip
    assert done.code == 0
    shares = Counter(row["split"] for row in done["comparisons"])
    assert shares["reward"] > 0.12 * 939
    assert shares["heldout"] > 0.07 * 939
    assert done.card["comparisons"]["labelers"] == ["annotator-0", "annotator-1", "annotator-2"]
    prompts = {split: {row["prompt"] for row in done[split] if "prompt" in row} for split in SPLITS}
    prompts["sft"] -= prompts["reward"]  # demonstrations that are there because of their prompt's preferences
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values()))
    for split in ("rl", "evaluation"):
        assert len(done[split]) == len({row["prompt"] for row in done[split]})
