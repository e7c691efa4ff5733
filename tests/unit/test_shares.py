"""Shares follow the configured stages, a key given by the user wins, and no policy moves rows unasked."""

import copy

import pytest

from tunetrail.config.data import SPLITS
from tunetrail.config.loading import parse
from tunetrail.config.shares import readers
from tunetrail.errors import ConfigError
from tunetrail.stages.registry import stage_config

FILE = {"source": "file", "path": "d.jsonl"}
DPO, PPO = {"method": "dpo"}, {"method": "ppo", "steps": 1, "reward": {"length": 1.0}, "gold": None}
SAMPLED = {"completions": {}, "comparisons": {"labeler": "simulated"}}


def config(data: dict, **blocks):
    return parse({"run": "x", "base": {"source": "random"}, "data": data} | blocks, "x.yaml")


def shares(data: dict, **blocks) -> dict:
    return config(data, **blocks).shares


OWN_PAIRS = {"preferences": [FILE]}


@pytest.mark.parametrize(
    ("data", "blocks", "expected"),
    [
        # 148 pairs for DPO: 118 are trained on, not 22.
        (OWN_PAIRS, {"policies": {"d": DPO}}, {"preferences": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1}}),
        (
            OWN_PAIRS,
            {"reward": {}, "policies": {"d": DPO, "p": PPO}},
            {"preferences": {"reward": 0.4, "rl": 0.4, "evaluation": 0.1, "heldout": 0.1}},
        ),
        (
            {"demonstrations": [{"source": "docstrings"}]},
            {"sft": {}},
            {"demonstrations": {"sft": 0.8, "evaluation": 0.1, "heldout": 0.1}},
        ),
        (
            {"demonstrations": [{"source": "docstrings"}]},
            {"sft": {}, "reward": {}, "policies": {"d": DPO, "p": PPO}} | SAMPLED,
            {"demonstrations": {"sft": 0.5, "reward": 0.15, "rl": 0.15, "evaluation": 0.1, "heldout": 0.1}},
        ),
        # Both kinds: neither gives rows to splits that only the other is for.
        (
            OWN_PAIRS | {"demonstrations": [{"source": "docstrings"}, {"source": "topics"}]},
            {"sft": {}, "policies": {"d": DPO}},
            {
                "preferences": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1},
                "demonstrations": {"sft": 0.8, "evaluation": 0.1, "heldout": 0.1},
                "text": {"sft": 8 / 9, "heldout": 1 / 9},
            },
        ),
        *(
            (OWN_PAIRS, {"policies": {"p": {"method": method}}},
             {"preferences": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1}})
            for method in ("orpo", "simpo")
        ),
        # Ratings are only for kto, and their prompts for all stages that read prompts.
        (
            {"feedback": [FILE]},
            {"policies": {"k": {"method": "kto"}}},
            {"feedback": {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1}},
        ),
        ({"feedback": [FILE]}, {}, {"feedback": {"evaluation": 0.5, "heldout": 0.5}}),
        # No stage trains: all rows are for evaluation.
        ({"demonstrations": [{"source": "docstrings"}]}, {}, {"demonstrations": {"evaluation": 1.0}}),
        # A test set and training prompts are given: other rows go elsewhere.
        (
            {"demonstrations": [{"source": "docstrings"}, FILE | {"split": "evaluation"}],
             "prompts": [FILE | {"split": "rl"}]},
            {"sft": {}, "policies": {"p": PPO}},
            {"demonstrations": {"sft": 0.9, "heldout": 0.1}},
        ),
        # A kind whose sources are all pinned has nothing to distribute.
        (
            OWN_PAIRS | {"demonstrations": [FILE | {"split": "evaluation"}]},
            {"policies": {"d": DPO}},
            {"preferences": {"reward": 0.9, "heldout": 0.1}},
        ),
    ],
)  # fmt: skip
def test_default_shares_follow_the_stages(data, blocks, expected):
    found = shares(data, **blocks)
    assert found.keys() == expected.keys()
    for kind, spread in expected.items():
        assert found[kind] == pytest.approx(spread, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"evaluation": 0.2}, {"reward": 0.72, "evaluation": 0.2, "heldout": 0.08}),
        ({"rl": 0.15}, {"reward": 0.68, "rl": 0.15, "evaluation": 0.085, "heldout": 0.085}),
        ({"sft": 0.5}, {"reward": 0.8, "evaluation": 0.1, "heldout": 0.1}),  # rows of this kind never go there
        ({"heldout": 0}, {"reward": 0.9, "evaluation": 0.1}),
        (
            {"sft": 0.5, "reward": 0.25, "rl": 0, "evaluation": 0.125, "heldout": 0.125},
            {"reward": 0.5, "evaluation": 0.25, "heldout": 0.25},
        ),
    ],
)
def test_a_given_share_wins_and_the_rest_is_distributed(given, expected):
    found = shares(OWN_PAIRS | {"shares": given}, policies={"d": DPO})["preferences"]
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1)


def test_shares_that_add_up_to_1_leave_nothing_for_other_splits():
    """Not even for a kind that none of the given splits can use."""
    given = {"sft": 0.5, "reward": 0.3, "evaluation": 0.1, "heldout": 0.1}
    data = OWN_PAIRS | {"shares": given, "prompts": [FILE | {"split": "rl"}]}
    found = shares(data, policies={"d": DPO, "p": PPO})["preferences"]
    assert found == pytest.approx({"reward": 0.6, "evaluation": 0.2, "heldout": 0.2})
    with pytest.raises(ConfigError, match=r"policies\.p: ppo needs prompts, but data\.shares\.rl is 0"):
        shares(OWN_PAIRS | {"shares": given}, policies={"p": PPO})


def test_every_reader_of_a_split_is_named():
    policies = {"d": DPO, "p": PPO, "t": PPO | {"ptx_coef": 0.5}}
    data = OWN_PAIRS | {"demonstrations": [FILE], "sft_on_chosen": True}
    methods = {"compare": {"full": {"learning_rate": 1}}}
    found = readers(config(data, sft={}, reward={}, methods=methods, policies=policies, **SAMPLED))
    everywhere = {"rl": ["policies.p", "policies.t"], "evaluation": ["evaluation"]}
    trained = ["sft", "methods", "policies.t"]
    assert found == {
        "preferences": {"reward": ["reward", "policies.d", *trained], "heldout": ["reward", "evaluation"]} | everywhere,
        "feedback": {"reward": [], "heldout": ["evaluation"]} | everywhere,
        "demonstrations": {"sft": trained, "reward": ["completions"], "heldout": ["sft", "completions"]} | everywhere,
        "prompts": {"reward": ["completions"], "heldout": ["completions"]} | everywhere,
        "text": {"sft": ["sft", "methods"], "heldout": ["sft"]},
    }
    found = readers(config(data | {"sft_on_chosen": False}, policies={"p": PPO}))
    assert found["preferences"]["reward"] == []
    assert "sft" not in found["preferences"]
    assert found["demonstrations"] == {"sft": [], "rl": ["policies.p"], "evaluation": ["evaluation"], "heldout": []}


def test_a_needed_split_without_rows_is_reported():
    with pytest.raises(ConfigError) as raised:
        shares(OWN_PAIRS | {"shares": {"rl": 0.8, "evaluation": 0.1, "heldout": 0.1}}, policies={"d": DPO})
    assert str(raised.value) == "x.yaml: data.shares.reward: is 0, but comparisons are to be trained on"
    measured = {"evaluate_every": 5}
    for data, blocks, key in (
        (OWN_PAIRS, {"policies": {"d": DPO | measured}}, "policies.d"),
        ({"feedback": [FILE]}, {"policies": {"k": {"method": "kto"} | measured}}, "policies.k"),
        ({"demonstrations": [{"source": "docstrings"}]}, {"sft": measured}, "sft"),
    ):
        with pytest.raises(ConfigError) as raised:
            shares(data | {"shares": {"heldout": 0}}, **blocks)
        assert str(raised.value) == (
            f"x.yaml: data.shares.heldout: is 0, but {key}.evaluate_every measures on that split"
        )
    with pytest.raises(ConfigError) as raised:
        shares({"prompts": [FILE]}, sft={})
    assert str(raised.value).startswith("x.yaml: sft: needs data.demonstrations;")


# ----------------------------------------------------------------------------- what reruns the data


RUN = {
    "run": "x", "base": {"source": "random"}, "data": {"demonstrations": [{"source": "docstrings"}]}, "sft": {},
    "policies": {"d": DPO},
} | SAMPLED  # fmt: skip


def data_config(**changes) -> dict:
    return stage_config(parse(copy.deepcopy(RUN) | changes), "data")


def test_a_policy_or_reward_model_that_reads_splits_with_rows_reruns_nothing():
    assert data_config(policies={"d": DPO, "e": DPO | {"beta": 0.5}}, reward={}) == data_config()
    assert data_config(policies={}) == data_config()


def test_the_first_ppo_reruns_the_data_unless_its_share_was_given():
    ppo = {"d": DPO, "p": PPO}
    assert data_config(policies=ppo)["shares"] != data_config()["shares"]
    given = RUN["data"] | {"shares": {"rl": 0.15}}
    assert data_config(policies=ppo, data=given) == data_config(data=given)


def test_writing_the_default_shares_into_the_config_reruns_nothing():
    found = data_config()["shares"]["demonstrations"]
    assert data_config(data=RUN["data"] | {"shares": found}) == data_config()
    assert set(found) == set(SPLITS) - {"rl"}
