"""Scorers: each against hand-computed values, sums and ranges, and every way in which a user's scorer can fail."""

import pytest

from tunetrail.config.loading import check_files, parse
from tunetrail.config.scorers import SumScorer, needed
from tunetrail.errors import ConfigError, DataError
from tunetrail.scorers.build import Completion, build
from tunetrail.stages.registry import stage_config

from .test_config import GOOD

SOURCE = "def add(a, b):\n    return a + b\n"
RULES = ("period", "imperative", "no_signature", "capital", "one_sentence")


def of(text: str, reference: str | None = "Return the sum.", row_id: str = "r0") -> Completion:
    return Completion(SOURCE, text, reference, {"id": row_id})


@pytest.mark.parametrize(("text", "broken"), [
    ("Return the sum.", ()),
    ("Return the sum", ("period",)),
    ("Returns the sum.", ("imperative",)),
    ("This is the sum.", ("imperative",)),
    ("return the sum.", ("capital",)),
    ("Return the sum. It is fast.", ("one_sentence",)),
    ("Return the sum\nof two numbers.", ("one_sentence", "period")),
    ("Return the sum, e.g. Three for one and two.", ()),
    ("add(a, b) -> int", ("no_signature", "period")),
    ('Return "the sum" \\ or not.', ()),
    ("", RULES),
    (".", RULES),
    ("Return.", RULES),
    ("Return what the U.S. Army counts.", ()),
])  # fmt: skip
def test_the_guideline_reads_like_pydocstyle(text, broken):
    [kept] = build("guideline", {}).parts([of(text)])
    assert {rule for rule in RULES if not kept[rule]} == set(broken)
    assert kept["total"] == len(RULES) - len(broken)
    assert kept["all"] == (not broken)


@pytest.mark.parametrize(("name", "definition", "expected"), [
    ("exact", {"scorer": "exact"}, [1, 1, 0]),
    ("short", {"scorer": "regex", "pattern": r"^\w+ \w+ \w+\W*$"}, [1, 0, 0]),
    ("length", {"scorer": "length"}, [3, 3, 4]),
    ("characters", {"scorer": "length", "unit": "characters"}, [15, 17, 19]),
])  # fmt: skip
def test_scores_by_hand(name, definition, expected):
    texts = ["Return the sum.", " return  THE sum ", "Return the sum now."]
    assert build(name, {name: definition}).scores([of(text) for text in texts]) == expected


def test_a_sum_weighs_its_parts_and_knows_its_range():
    definitions = {
        "quality": {"scorer": "sum", "of": {"chrf": 1, "guideline": 8}},
        "both": {"scorer": "sum", "of": {"quality": 0.5, "exact": -10}},
    }
    quality, both = (build(name, definitions) for name in ("quality", "both"))
    assert (quality.low, quality.high, quality.needs_reference) == (0, 140, True)
    assert (both.low, both.high) == (-10, 70)
    assert quality.scores([of("Return the sum.")]) == pytest.approx([140])
    [parts] = both.parts([of("Return the sum.")])
    assert parts == pytest.approx({"quality": 140, "exact": 1, "total": 60})


def test_rows_without_a_reference_are_refused_if_one_is_needed():
    rows = [of("a"), of("b", None, "r7"), of("c", None, "r8")]
    assert build("length", {}).scores(rows) == [1, 1, 1]
    with pytest.raises(DataError, match=r"scorers.chrf: 2 of 3 completions have no reference text .* row r7"):
        build("chrf", {}).scores(rows)


# ----------------------------------------------------------------------------- the user's own


def own(tmp_path, code: str, **options):
    path = tmp_path / "mine.py"
    path.write_text(code)
    return build("mine", {"mine": {"scorer": "python", "path": str(path), **options}})


def test_a_users_function_sees_everything_and_keeps_the_order(tmp_path):
    code = "def score(prompt, text, reference, row):\n    print('hello')\n    return len(text) + row['id'] / 100\n"
    rows = [Completion("p", "x" * n, None, {"id": n}) for n in range(7)]
    assert own(tmp_path, code).scores(rows) == [n + n / 100 for n in range(7)]
    named = own(tmp_path, "def score(*_):\n    return {'total': 2, 'polite': 1}\n")
    assert named.parts([of("a")]) == [{"total": 2.0, "polite": 1.0}]


@pytest.mark.parametrize(("code", "message"), [
    ("def points(*_):\n    return 1\n", r"mine.py has no function score; it has points"),
    ("import nowhere\n", r"mine.py cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("def score(p, c, r, row):\n    return 1 / (row['id'] - 17)\n",
     r"mine.py: score: row 17 raised ZeroDivisionError: division by zero"),
    ("def score(p, c, r, row):\n    assert row['id'] not in (8, 17), 'two\\nlines'\n    return 1\n",
     r"row 8 raised AssertionError: two lines"),
    ("def score(*_):\n    return float('nan')\n", r"score: row \d+ gave nan; it must give a finite number"),
    ("def score(*_):\n    return 'good'\n", r"score: row \d+ gave 'good'; it must give a finite number"),
    ("def score(*_):\n    return {'polite': 1}\n", r"row \d+ gave a dict without 'total'"),
    ("import time\ndef score(p, c, r, row):\n    time.sleep(60 if row['id'] == 17 else 0.15)\n    return 1\n",
     r"score: took longer than 1 s on row 17; speed it up or raise timeout_seconds"),
    ("import os\ndef score(*_):\n    os._exit(3)\n", r"its process ended on row \d+, exit code 3"),
])  # fmt: skip
def test_every_error_is_one_line(tmp_path, code, message):
    with pytest.raises(DataError, match=message) as error:
        own(tmp_path, code, timeout_seconds=1).scores([Completion("p", "x", None, {"id": n}) for n in range(20)])
    assert "\n" not in str(error.value)


def test_a_signature_starts_with_the_outer_functions_name():
    nested = "def outer(a):\n    def inner(b):\n        return b\n    return inner(a)\n"
    [kept] = build("guideline", {}).parts([Completion(nested, "outer(a) gives a.", None, {})])
    assert not kept["no_signature"]


# ----------------------------------------------------------------------------- in the config


def test_a_stages_config_has_only_the_scorers_that_it_uses(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(*_):\n    return 1\n")
    scorers = {
        "quality": {"scorer": "sum", "of": {"chrf": 1, "mine": 2}},
        "mine": {"scorer": "python", "path": str(mine)},
        "other": {"scorer": "regex", "pattern": "x"},
    }
    raw = GOOD | {"scorers": scorers, "comparisons": {"labeler": "simulated", "scorer": "quality"}}
    before = stage_config(parse(raw, "c.yaml"), "comparisons")
    assert list(before["scorers"]) == ["chrf", "mine", "quality"]
    mine.write_text("def score(*_):\n    return 2\n")
    after = stage_config(parse(raw, "c.yaml"), "comparisons")
    assert before["scorers"]["mine"].pop("sha256") != after["scorers"]["mine"].pop("sha256")
    assert before == after


@pytest.mark.parametrize(("changes", "message"), [
    ({"comparisons": {"labeler": "simulated", "scorer": "chfr"}},
     r"comparisons.scorer: there is no scorer 'chfr', only chrf, exact, guideline, length; did you mean chrf\?"),
    ({"evaluation": {"gold": "mine"}}, r"evaluation.gold: there is no scorer 'mine'"),
    ({"evaluation": {"gold": ["chrf", "mine"]}}, r"evaluation.gold\[1\]: there is no scorer 'mine'"),
    ({"evaluation": {"gold": ["chrf", "chrf"]}}, r"evaluation.gold: names a scorer twice: chrf, chrf"),
    ({"evaluation": {"gold": 3}}, r"evaluation.gold: must be the name of a scorer or a list of names, got 3"),
    ({"scorers": {"a": {"scorer": "sum", "of": {"b": 1}}}}, r"scorers.a.of.b: there is no scorer 'b', only a, "),
    ({"scorers": {"a": {"scorer": "sum", "of": {"chfr": 1}}}},
     r"scorers.a.of.chfr: there is no scorer 'chfr', only a, chrf, exact, guideline, length; did you mean chrf\?"),
    ({"scorers": {"a": {"scorer": "sum", "of": {"b": 1}}, "b": {"scorer": "sum", "of": {"a": 1}}}},
     r"scorers.a.of: the sum contains itself"),
    ({"scorers": {"reward_model": {"scorer": "exact"}}}, r"'reward_model' names the run's own reward model"),
    ({"scorers": {"a": {"scorer": "regex", "pattern": "("}}}, r"scorers.a.pattern: is no regular expression"),
    ({"comparisons": {"labeler": "reference"}}, r"comparisons.labeler: reference was renamed to simulated"),
    ({"scorers": {"a": {"scorer": "chrf", "betta": 2}}}, r"scorers.a.betta: unknown key; did you mean beta\?"),
])  # fmt: skip
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(GOOD | changes, "c.yaml")


def test_a_sum_names_all_its_parts():
    defined = {"a": SumScorer(scorer="sum", of={"b": 1, "chrf": 2}), "b": SumScorer(scorer="sum", of={"exact": 1})}
    assert list(needed(["a"], defined)) == ["a", "b", "chrf", "exact"]


def test_a_missing_file_is_named_before_any_job(tmp_path):
    scorers = {"mine": {"scorer": "python", "path": str(tmp_path / "none.py")}}
    config = parse(GOOD | {"scorers": scorers}, "c.yaml")
    with pytest.raises(ConfigError, match=r"c.yaml: scorers.mine.path: no such file or folder"):
        check_files(config, "c.yaml")


# ----------------------------------------------------------------------------- responses that are cut off


def ppo(reward: dict, **more) -> dict:
    broken = {"scorer": "sum", "of": {"guideline": 1.0, "exact": -4.0}}
    mine = {"scorer": "python", "path": "mine.py"}
    policy = {"method": "ppo", "steps": 1, "reward": reward} | more
    return GOOD | {"scorers": {"broken": broken, "mine": mine}, "policies": {"p": policy}}


@pytest.mark.parametrize(
    ("reward", "more", "least"),
    [
        ({"broken": 1.0}, {}, "-4"),
        ({"guideline": -1.0}, {}, "-5"),
        ({"length": -0.05}, {}, "any number"),
        ({"mine": 1.0}, {}, "any number"),
        ({"mine": 1.0}, {"score_clip": 3.0}, "-3"),
        ({"exact": 1.0}, {"normalize_scores": True}, "any number"),
        ({"exact": 1.0}, {"length_penalty": 0.1, "max_new_tokens": 20}, "-2"),
    ],
)
def test_a_default_that_would_reward_responses_for_being_cut_off_is_refused(reward, more, least):
    with pytest.raises(ConfigError) as error:
        parse(ppo(reward, **more), "c.yaml")
    assert str(error.value) == (
        "c.yaml: policies.p.missing_eos_score: its default (-1) could reward a response for being cut off, since its "
        f"reward gives whole ones {least} and more: set it below what whole responses get, or to null with a "
        "missing_eos_penalty"
    )
    for chosen in (-9, None, 0):
        parse(ppo(reward, missing_eos_score=chosen, **more), "c.yaml")


@pytest.mark.parametrize(
    ("reward", "more"),
    [
        ({"guideline": 1.0, "chrf": 0.1}, {}),
        ({"exact": 2.0, "length": 0.0, "guideline": -0.2}, {}),
        ({"mine": 1.0}, {"score_clip": 1.0}),
    ],
)
def test_scorers_that_never_go_below_the_default_keep_it(reward, more):
    assert parse(ppo(reward, **more)).policies["p"].missing_eos_score == -1
