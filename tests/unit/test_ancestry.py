"""Models of other runs that were trained on what this run measures on."""

import logging

import pytest

from tunetrail.data.ancestry import check_unseen, trained_on
from tunetrail.errors import DataError
from tunetrail.files import write_jsonl

from ..records import seal_folder


def rows(split: str) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"{split} {i}"}]} for i in range(3)]


@pytest.fixture
def policy(tmp_path):
    """Makes a policy by a method, from a base model and from data with three rows in each split."""
    for name in ("data", "base", "policy"):
        (tmp_path / name).mkdir()
    for split in ("sft", "reward", "rl", "evaluation"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", rows(split))
    seal_folder(tmp_path / "base", "base")
    seal_folder(tmp_path / "data", "data", {"base": tmp_path / "base"})

    def make(method: str, **config):
        parents = {"policy": tmp_path / "base", "data": tmp_path / "data"}
        return seal_folder(tmp_path / "policy", method, parents, config=config)

    return make


@pytest.mark.parametrize(
    ("method", "config", "splits"),
    [
        *((method, {}, ["reward"]) for method in ("reward", "dpo", "orpo", "simpo", "kto")),
        ("sft", {}, ["sft"]),
        ("ppo", {"ptx_coef": 0.0}, ["rl"]),
        ("ppo", {"ptx_coef": 0.5}, ["rl", "sft"]),
        ("best_of_n", {}, []),
    ],
)
def test_each_method_learns_from_its_splits(policy, method, config, splits):
    assert trained_on(policy(method, **config)) == {f"{split} {i}" for split in splits for i in range(3)}


def test_a_row_that_was_trained_on_is_refused_as_a_test(policy):
    folder = policy("orpo")
    check_unseen("base.path", folder, rows("evaluation"))
    with pytest.raises(DataError, match=r"base\.path: the model in .*policy, .* was trained on 3 of the 6 rows"):
        check_unseen("base.path", folder, rows("evaluation") + rows("reward"))


def test_data_that_is_gone_or_of_an_early_version_is_named(policy, tmp_path, caplog):
    folder = policy("dpo")
    for spoil in (lambda path: path.write_text('{"prompt": "reward 0"}\n'), lambda path: path.unlink()):
        spoil(tmp_path / "data/reward.jsonl")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tunetrail"):
            assert trained_on(folder) == set()
        assert "the reward rows that it was trained on cannot be read any more" in caplog.text
