"""Labelers: their arithmetic against hand-computed and brute-force values, and what they must refuse."""

import itertools
import json
import math
import signal
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tunetrail.config.comparisons import LlmLabeler, RecordedLabeler, SimulatedLabeler
from tunetrail.contract.stage import Attempt, Request, Stage
from tunetrail.contract.stop import Stop
from tunetrail.data.chat import shown_prompt
from tunetrail.errors import ConfigError, DataError, Interrupted
from tunetrail.labeling import llm, recorded, simulated
from tunetrail.models.tiny import tiny_model, tiny_tokenizer
from tunetrail.preferences.ranks import dense, pair_outcomes, pairwise_agreement, ranks_from_scores
from tunetrail.scorers.chrf import chrf


@pytest.fixture
def stage(tmp_path):
    """A stage with the tiny model as its base."""
    handler = signal.getsignal(signal.SIGTERM)
    base, state, work = (tmp_path / name for name in ("base", "state", "work"))
    state.mkdir()
    work.mkdir()
    tiny_tokenizer().save_pretrained(base / "model")
    request = Request("comparisons", {}, {"seed": 0, "precision": "fp32"}, tmp_path / "out")
    yield Stage(request, {}, Attempt(work, state, Stop()))
    signal.signal(signal.SIGTERM, handler)


def make_row(row_id="r0", prompt="Q", completions=("a", "b"), ref="a", split="reward"):
    return {
        "id": row_id, "group": row_id, "split": split, "prompt": prompt,
        "messages": [{"role": "user", "content": prompt}], "reference": ref,
        "completions": list(completions), "finished": [True] * len(completions),
    }  # fmt: skip


# ----------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("scores", "tie", "ranks"),
    [
        ([1.0, 3.0, 2.0], 0, [3, 1, 2]),
        ([2.0, 2.0, 1.0], 0, [1, 1, 2]),
        ([10, 40, 38, 36], 3, [3, 1, 1, 2]),  # 36 is within 3 of 38, but not of 40, the first of the tie
        ([0, 2, 4, 6], 2, [2, 2, 1, 1]),  # a gap of exactly tie still ties
        ([0, 2, 4, 6], 1.99, [4, 3, 2, 1]),
        ([5, 5, 5], 0, [1, 1, 1]),
        ([-1, -3], 100, [1, 1]),
        ([], 0, []),
    ],
)
def test_ranks_from_scores_by_hand(scores, tie, ranks):
    assert ranks_from_scores(scores, tie) == ranks


def test_ranks_from_scores_properties():
    random = np.random.default_rng(0)
    for _ in range(200):
        scores, tie = random.integers(0, 20, size=random.integers(1, 8)).tolist(), int(random.integers(0, 5))
        ranks = ranks_from_scores(scores, tie)
        assert set(ranks) == set(range(1, max(ranks) + 1))
        for (a, rank_a), (b, rank_b) in itertools.combinations(zip(scores, ranks, strict=True), 2):
            assert not (a > b and rank_a > rank_b)
            assert rank_a != rank_b or abs(a - b) <= tie


def test_dense_closes_gaps_and_keeps_ties():
    assert dense([7, 2, 2, 9]) == [2, 1, 1, 3]


def test_pair_outcomes_equal_brute_force():
    ranks = [2, 1, 3, 1, 2]
    expected = [(b > a) - (b < a) for a, b in itertools.combinations(ranks, 2)]
    assert pair_outcomes(ranks).tolist() == expected
    assert pair_outcomes([1, 2]).tolist() == [1]  # rank 1 is the best


@pytest.mark.parametrize(
    ("a", "b", "agreement"),
    [
        ([1, 2], [1, 2], 1),
        ([1, 2], [2, 1], 0),
        ([1, 2], [1, 1], 0.5),
        ([1, 1], [1, 1], 1),
        ([1, 2, 3], [1, 3, 2], 2 / 3),
        ([1, 2, 3], [1, 1, 2], (0.5 + 1 + 1) / 3),
    ],
)
def test_pairwise_agreement_by_hand(a, b, agreement):
    assert pairwise_agreement([[a, b]]) == pytest.approx(agreement)


def test_pairwise_agreement_pools_pairs_of_labelers_and_needs_two():
    assert pairwise_agreement([[[1, 2]], [[2, 1]]]) is None
    assert pairwise_agreement([[[1, 2], [1, 2], [2, 1]], [[1, 2]]]) == pytest.approx(1 / 3)


# ----------------------------------------------------------------------------- chrF


def _chrf_by_hand(hypothesis, ref, order=6, beta=1):
    """Popović 2015: mean n-gram precision and recall over the orders both texts have, then F-beta."""
    hypothesis, ref = hypothesis.replace(" ", ""), ref.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, order + 1):
        h, r = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (hypothesis, ref))
        if h and r:
            common = sum((h & r).values())
            precisions.append(common / sum(h.values()))
            recalls.append(common / sum(r.values()))
    p, r = (np.mean(x) if x else 0.0 for x in (precisions, recalls))
    return 100 * (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


@pytest.mark.parametrize(
    ("completion", "ref"),
    [
        ("Return the sum of two numbers.", "Return the sum of a list."),
        ("Open a file", "Close the file and flush it."),
        ("abc", "abcdefghij"),
        ("xyz", "abc"),
    ],
)
def test_chrf_equals_its_formula(completion, ref):
    assert chrf(completion, ref) == pytest.approx(_chrf_by_hand(completion, ref))


def test_chrf_golden_and_limits():
    assert chrf("Return the sum.", "Return the sum.") == pytest.approx(100)
    assert chrf("", "Return the sum.") == 0
    short, long = "Return", "Return the sum."
    assert chrf(short, long) == pytest.approx(chrf(long, short))  # beta 1: what is missing counts as what is too much
    assert chrf(short, long, 2) < chrf(long, short, 2)


# ----------------------------------------------------------------------------- reference


REF = "Return the absolute value of the argument."
GOOD, MIDDLE, BAD = "Return the absolute value of the number.", "Return a value.", "Open the window"


def test_reference_ranks_by_chrf(stage):
    row = make_row(completions=[BAD, GOOD, MIDDLE], ref=REF)
    (rankings,) = simulated.rank([row], SimulatedLabeler(labeler="simulated"), stage).rankings
    (ranking,) = rankings
    assert ranking["ranks"] == [3, 1, 2]
    assert ranking["scores"] == [chrf(c, REF) for c in row["completions"]]
    assert (ranking["labeler"], ranking["time"]) == ("simulated-0", None)
    assert sorted(ranking["order"]) == [0, 1, 2]


def test_reference_tie_is_in_chrf_points(stage):
    row = make_row(completions=[BAD, GOOD, MIDDLE], ref=REF)
    gap = chrf(MIDDLE, REF) - chrf(BAD, REF)
    for tie, ranks in ((gap + 0.01, [2, 1, 2]), (gap - 0.01, [3, 1, 2])):
        config = SimulatedLabeler(labeler="simulated", tie=tie)
        assert simulated.rank([row], config, stage).rankings[0][0]["ranks"] == ranks


def test_reference_noise_has_the_standard_deviation_asked_for_and_labelers_are_independent(stage):
    rows = [make_row(f"r{i}", completions=[BAD, GOOD, MIDDLE], ref=REF) for i in range(400)]
    config = SimulatedLabeler(labeler="simulated", labelers=3, noise=12.0)
    labels = simulated.rank(rows, config, stage)
    true = [chrf(c, REF) for c in rows[0]["completions"]]
    errors = np.array([[np.subtract(r["scores"], true) for r in row] for row in labels.rankings])  # [rows, labelers, K]
    assert errors.std() == pytest.approx(12.0, rel=0.05)
    assert abs(errors.mean()) < 1
    correlation = np.corrcoef(errors.transpose(1, 0, 2).reshape(3, -1))
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.1
    assert [r["labeler"] for r in labels.rankings[0]] == ["simulated-0", "simulated-1", "simulated-2"]
    for row in labels.rankings:
        for ranking in row:
            assert ranking["ranks"] == ranks_from_scores(ranking["scores"])


def test_reference_errs_less_the_wider_the_gap(stage):
    rows = [make_row(f"r{i}", completions=[GOOD, MIDDLE, BAD], ref=REF) for i in range(500)]
    config = SimulatedLabeler(labeler="simulated", noise=20.0)
    ranks = np.array([r[0]["ranks"] for r in simulated.rank(rows, config, stage).rankings])
    scores = [chrf(c, REF) for c in (GOOD, MIDDLE, BAD)]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        wrong = np.mean(ranks[:, i] > ranks[:, j])
        z = (scores[i] - scores[j]) / (20 * math.sqrt(2))  # the difference of two noises
        assert wrong == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), abs=0.05)
    assert np.mean(ranks[:, 1] > ranks[:, 2]) > 0.05


def test_reference_does_not_depend_on_order_or_sharding_but_on_seed(stage):
    rows = [make_row(f"r{i}", completions=[GOOD, MIDDLE, BAD], ref=REF) for i in range(20)]
    config = SimulatedLabeler(labeler="simulated", labelers=2, noise=30.0)
    whole = simulated.rank(rows, config, stage).rankings
    assert simulated.rank(rows[::-1], config, stage).rankings == whole[::-1]
    assert simulated.rank(rows[7:9], config, stage).rankings == whole[7:9]
    stage.shared["seed"] = 1
    assert simulated.rank(rows, config, stage).rankings != whole


def test_order_shown_is_shuffled_by_row_and_labeler(stage):
    rows = [make_row(f"r{i}", completions=[GOOD, MIDDLE, BAD], ref=REF) for i in range(60)]
    config = SimulatedLabeler(labeler="simulated", labelers=2)
    orders = [[tuple(r["order"]) for r in row] for row in simulated.rank(rows, config, stage).rankings]
    assert {order for row in orders for order in row} == set(itertools.permutations(range(3)))
    assert any(a != b for a, b in orders)


def test_reference_needs_a_reference(stage):
    with pytest.raises(DataError, match=r"2 of 2 completions have no reference text .* row r0"):
        simulated.rank([make_row(ref=None)], SimulatedLabeler(labeler="simulated"), stage)


# ----------------------------------------------------------------------------- prompts


def _render(tokenizer, *contents, system=None):
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_prompt_of_several_turns_shows_the_speakers():
    assert shown_prompt([{"role": "user", "content": "hello\nyou "}]) == "hello\nyou"
    said = [("system", "Be\nbrief"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert shown_prompt(messages) == "System: Be\nbrief\n\nUser: one\n\nAssistant: two\n\nUser: three"


# ----------------------------------------------------------------------------- recorded


def _recorded(tmp_path, *rows, columns=None):
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return RecordedLabeler(labeler="recorded", path=path, columns=columns or {})


def test_recorded_rankings_follow_the_completions_and_not_their_positions(stage, tmp_path):
    line = {
        "prompt": "Q", "completions": ["best", "unseen", "worst", "middle"], "ranks": [1, 2, 4, 3],
        "labeler": "ann", "time": "2024-05-01T10:00:00Z", "order": [2, 0, 1, 3],
    }  # fmt: skip
    row = make_row(completions=["worst", "best", "middle"])
    labels = recorded.rank([row], _recorded(tmp_path, line), stage)
    assert labels.rankings == [
        [{"labeler": "ann", "ranks": [3, 1, 2], "order": [0, 1, 2], "time": "2024-05-01T10:00:00Z", "scores": None}]
    ]
    assert [Path(name).name for name in labels.source["files"]] == ["preferences.jsonl"]


def test_recorded_order_is_mapped_to_the_rows_completions(stage, tmp_path):
    line = {"prompt": "Q", "completions": ["x", "y", "z"], "ranks": [1, 1, 2], "order": [2, 0, 1]}
    (ranking,) = recorded.rank([make_row(completions=["y", "z", "x"])], _recorded(tmp_path, line), stage).rankings[0]
    assert ranking["order"] == [1, 2, 0]  # z, x, y
    assert ranking["ranks"] == [1, 2, 1]
    assert ranking["labeler"] == "recorded"


def test_recorded_reads_all_shapes_and_returns_every_labelers_ranking(stage, tmp_path):
    config = _recorded(
        tmp_path,
        {"prompt": "Q", "chosen": "a", "rejected": "b", "labeler": "ann"},
        {"prompt": "Q", "completions": ["b", "a"], "ranks": [1, 1], "labeler": "bob"},
        {
            "prompt": "Q",
            "completions": ["b", "a"],
            "rankings": [{"labeler": "cem", "ranks": [1, 2]}, {"labeler": "dan", "ranks": [2, 1]}],
        },
        {"prompt": "Q", "completions": ["b", "c"], "ranks": [1, 2], "labeler": "not about a"},
    )
    rankings = recorded.rank([make_row(completions=["a", "b"])], config, stage).rankings[0]
    assert {r["labeler"]: r["ranks"] for r in rankings} == {"ann": [1, 2], "bob": [1, 1], "cem": [2, 1], "dan": [1, 2]}


def test_recorded_finds_raw_prompts_in_rendered_ones_and_does_not_mix_them_up(stage, tmp_path):
    config = _recorded(
        tmp_path,
        {"prompt": "do I sort?", "chosen": "b", "rejected": "a"},
        {"prompt": " How do I sort?\n", "chosen": "a", "rejected": "b"},
    )
    row = make_row(prompt="How do I sort?", completions=["a ", "b"])
    row["prompt"] = _render(tiny_tokenizer(), "How do I sort?", system="Be brief")
    assert recorded.rank([row], config, stage).rankings[0][0]["ranks"] == [1, 2]


def test_recorded_columns_are_renamed(stage, tmp_path):
    config = _recorded(
        tmp_path, {"instruction": "Q", "chosen": "a", "rejected": "b"}, columns={"prompt": "instruction"}
    )
    assert recorded.rank([make_row()], config, stage).rankings[0][0]["ranks"] == [1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"prompt": "other", "chosen": "a", "rejected": "b"}],
            r"preferences.jsonl: no line ranks .* prompt 'Q' \(row r0\)",
        ),
        (
            [{"prompt": "other", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": "c"}],
            r"preferences.jsonl:2: does not rank the completion 'b' of the prompt 'Q' \(row r0\)",
        ),
        (["{"], "preferences.jsonl:1: "),
        (["[1]"], "preferences.jsonl:1: must be a JSON object"),
        ([{"chosen": "a", "rejected": "b"}], "preferences.jsonl:1: 'prompt' must be a text"),
        ([{"prompt": "Q", "completions": ["a", "b"], "rankings": [1]}], "preferences.jsonl:1: "),
        (
            [{"prompt": "Q", "completions": ["a", "b"], "rankings": [{"ranks": [1, 2], "time": 5}]}],
            "preferences.jsonl:1: 'time' must be a text",
        ),
        ([{"prompt": "Q", "chosen": "a"}], "preferences.jsonl:1: must have one of the shapes"),
        (
            [{"prompt": "Q", "completions": ["a", "b"], "ranks": [1]}],
            "preferences.jsonl:1: 'ranks' must be 2 whole numbers",
        ),
        ([{"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}], "preferences.jsonl:1: 'ranks' must be"),
        ([{"prompt": "Q", "completions": ["a", "b"], "ranks": [1.5, 1]}], "preferences.jsonl:1: 'ranks' must be"),
        ([{"prompt": "Q", "completions": ["a", "b"]}], "preferences.jsonl:1: 'ranks' must be"),
        (
            [{"prompt": "Q", "completions": ["a", "a "], "ranks": [1, 2]}],
            "preferences.jsonl:1: two of its responses are the same text",
        ),
        (
            [{"prompt": "Q", "completions": ["a", "b"], "ranks": [1, 2], "order": [0, 2]}],
            "preferences.jsonl:1: 'order' must name",
        ),
    ],
)
def test_recorded_refuses(stage, tmp_path, lines, message):
    with pytest.raises(DataError, match=message) as e:
        recorded.rank([make_row()], _recorded(tmp_path, *lines), stage)
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------- llm


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("tie", "tie"),
        ("Tie", "tie"),
        ("A.", None),
        ("a", None),
        ("Both", None),
        ("", None),
        ("A or B", None),
    ],
)
def test_parse_verdict_is_strict(answer, verdict):
    assert llm.parse_verdict(answer) == verdict


@pytest.mark.parametrize(
    ("forward", "backward", "outcome"),
    [("A", "B", 1), ("B", "A", -1), ("A", "A", 0), ("B", "B", 0), ("tie", "tie", 0), ("A", "tie", 0), ("A", None, 0)],
)
def test_pair_outcome_needs_both_orders_to_agree(forward, backward, outcome):
    assert llm.pair_outcome(forward, backward) == outcome


def test_scores_are_wins_and_half_the_ties():
    assert llm.scores_from_outcomes({(0, 1): 1, (0, 2): 0, (1, 2): -1}, 3) == [1.5, 0.0, 1.5]


class FakeEndpoint:
    """An OpenAI-compatible server on this machine.

    It fails with `statuses` first, then answers with `reply(first, second)`, or always with `body`.
    """

    def __init__(self, reply, statuses=(), body=None):
        self.statuses, self.requests, endpoint = list(statuses), [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({"path": self.path, "body": asked, "key": self.headers.get("Authorization")})
                if endpoint.statuses:
                    self.send_error(endpoint.statuses.pop(0))
                    return
                question = asked["messages"][0]["content"]
                first = question.split("Response A:\n")[1].split("\n\nResponse B:")[0]
                second = question.split("Response B:\n")[1].split("\n\nAnswer with")[0]
                answer = body or {"choices": [{"message": {"content": reply(first, second)}}]}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def config(self, **options):
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return LlmLabeler(labeler="llm", endpoint=url, model="judge-1", api_key_env="TEST_JUDGE_KEY", **options)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(llm, "BACKOFF_SECONDS", (0, 0))
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)


def prefers_longer(first, second):
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def test_a_position_biased_judge_yields_only_ties(stage):
    rows = [make_row(f"r{i}", completions=["x", "yy", "zzz"]) for i in range(2)]
    with FakeEndpoint(lambda first, second: "A") as endpoint:
        labels = llm.rank(rows, endpoint.config(), stage)
    assert [row[0]["ranks"] for row in labels.rankings] == [[1, 1, 1]] * 2
    assert labels.metrics == {"verdicts": 12, "unparsed": 0}
    assert len(endpoint.requests) == 12


def test_a_fair_judge_ranks(stage):
    row = make_row(completions=["x", "zzz", "yy", "vv"], prompt="hello there")
    row["prompt"] = _render(tiny_tokenizer(), "hello there")
    with FakeEndpoint(prefers_longer) as endpoint:
        (ranking,) = llm.rank([row], endpoint.config(guideline="Which is longer?"), stage).rankings[0]
    assert ranking["ranks"] == [3, 1, 2, 2]
    assert ranking["scores"] == [0.0, 3.0, 1.5, 1.5]
    assert ranking["order"] == [0, 1, 2, 3]
    assert ranking["time"].endswith("+00:00")
    sent = endpoint.requests[0]
    assert sent["path"] == "/v1/chat/completions"
    assert (sent["body"]["model"], sent["body"]["temperature"]) == ("judge-1", 0)
    question = sent["body"]["messages"][0]["content"]
    assert question.startswith("Which is longer?")
    assert "\nhello there\n" in question
    assert "<|user|>" not in question
    assert sent["key"] is None


def test_unparsable_answers_are_ties_and_counted(stage):
    with FakeEndpoint(lambda first, second: "I like A") as endpoint:
        labels = llm.rank([make_row()], endpoint.config(), stage)
    assert labels.rankings[0][0]["ranks"] == [1, 1]
    assert labels.metrics["unparsed"] == 2


def test_texts_with_braces_reach_the_judge_unchanged(stage):
    with FakeEndpoint(prefers_longer) as endpoint:
        (ranking,) = llm.rank(
            [make_row(prompt="{x}", completions=["{first}", "{}"])], endpoint.config(), stage
        ).rankings[0]
    assert ranking["ranks"] == [1, 2]
    assert (
        "Response A:\n{first}"
        in endpoint.requests[0]["body"]["messages"][0]["content"]
        + endpoint.requests[1]["body"]["messages"][0]["content"]
    )


def test_the_api_key_is_sent_and_never_shown(stage, monkeypatch, caplog):
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-secret")
    with FakeEndpoint(prefers_longer, statuses=[401] * 8) as endpoint, pytest.raises(ConfigError) as e:
        llm.rank([make_row()], endpoint.config(), stage)
    assert endpoint.requests[0]["key"] == "Bearer sk-secret"
    assert "HTTP 401" in str(e.value)
    assert "$TEST_JUDGE_KEY (set)" in str(e.value)
    assert "sk-secret" not in str(e.value) + caplog.text
    assert not any("sk-secret" in path.read_text() for path in stage.state.iterdir())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_requests_to_busy_endpoints_are_retried(stage, status):
    with FakeEndpoint(prefers_longer, statuses=[status, status]) as endpoint:
        labels = llm.rank([make_row(completions=["a", "bb"])], endpoint.config(), stage)
    assert labels.rankings[0][0]["ranks"] == [2, 1]
    assert len(endpoint.requests) == 4


def test_pauses_grow_until_the_endpoint_is_given_up(monkeypatch):
    pauses = []
    monkeypatch.setattr(llm, "BACKOFF_SECONDS", (1, 2, 4))
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    with FakeEndpoint(prefers_longer, statuses=[503] * 9) as endpoint:
        judge = llm.endpoint_judge(endpoint.config(), "comparisons")
        with pytest.raises(Interrupted, match=r"does not answer \(HTTP 503 "):
            judge(["Is it?"])
    assert pauses == [1, 2, 4]
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refused_request_is_not_repeated(stage, status):
    with FakeEndpoint(prefers_longer, statuses=[status] * 2) as endpoint:
        judge = llm.endpoint_judge(endpoint.config(), "comparisons")
        with pytest.raises(ConfigError, match=rf"^comparisons\.endpoint: .* refused the request \(HTTP {status} "):
            judge(["Is it?"])
    assert len(endpoint.requests) == 1


def test_an_unavailable_endpoint_interrupts_and_finished_rows_are_not_asked_again(stage):
    rows = [make_row(f"r{i}", completions=["x", "yy"]) for i in range(4)]
    with FakeEndpoint(prefers_longer) as endpoint:
        config = endpoint.config()
        first = llm.rank(rows[:2], config, stage)
        endpoint.statuses = [503] * 100
        with pytest.raises(Interrupted, match=r"does not answer \(HTTP 503 .*run the same command again"):
            llm.rank(rows, config, stage)
        endpoint.statuses, endpoint.requests = [], []
        with (stage.state / "verdicts.jsonl").open("a") as f:
            f.write('{"id":"r2","verd')  # killed while writing
        labels = llm.rank(rows, config, stage)
        assert len(endpoint.requests) == 4
    assert labels.rankings[:2] == first.rankings
    assert [row[0]["ranks"] for row in labels.rankings] == [[2, 1]] * 4
    with pytest.raises(Interrupted, match="does not answer"):  # the server is gone
        llm.rank([make_row("new")], config, stage)
    assert llm.rank(rows, config, stage).rankings == labels.rankings  # everything is on disk


def test_a_stop_request_leaves_every_finished_row_saved(stage):
    rows = [make_row(f"r{i}", completions=["x", "yy"]) for i in range(3)]

    def stop_while_answering(first, second):
        stage.stop.reason = "SIGTERM"
        return prefers_longer(first, second)

    with FakeEndpoint(stop_while_answering) as endpoint, pytest.raises(Interrupted, match="after 1 of 3 prompts"):
        llm.rank(rows, endpoint.config(), stage)
    assert len((stage.state / "verdicts.jsonl").read_text().splitlines()) == 1


def test_every_row_is_on_disk_before_the_next_is_asked(stage):
    on_disk = []

    def look(first, second):
        on_disk.append(len((stage.state / "verdicts.jsonl").read_text().splitlines()))
        return "tie"

    with FakeEndpoint(look) as endpoint:
        llm.rank([make_row(f"r{i}") for i in range(3)], endpoint.config(), stage)
    assert on_disk == [0, 0, 1, 1, 2, 2]


def test_an_endpoint_that_is_not_openai_compatible_is_refused(stage):
    with (
        FakeEndpoint(None, body={"error": "?"}) as endpoint,
        pytest.raises(ConfigError, match="is it OpenAI-compatible"),
    ):
        llm.rank([make_row()], endpoint.config(), stage)


def test_llm_noise_is_the_share_of_coin_flips():
    """If a share e of the verdicts is replaced by coin flips, e/2 of them come out wrong."""
    config = LlmLabeler(labeler="llm", endpoint="http://x/v1", model="m", noise=0.4, labelers=2)
    answers = [{"id": f"r{i}", "verdicts": [[0, 1, "A", "B"]], "time": "t"} for i in range(2000)]
    ranks = np.array([[r["ranks"] for r in llm.rankings_of(a, 2, config, seed=0)] for a in answers])
    wrong = (ranks[:, :, 0] == 2).mean(0)
    assert wrong == pytest.approx([0.2, 0.2], abs=0.03)
    assert (ranks[:, 0] != ranks[:, 1]).any()
    silent = config.model_copy(update={"noise": 0.0})
    assert all(r["ranks"] == [1, 2] for a in answers for r in llm.rankings_of(a, 2, silent, seed=0))
    assert llm.rankings_of(answers[5], 2, config, seed=0) == llm.rankings_of(answers[5], 2, config, seed=0)


def test_local_judge_compares_the_next_tokens(stage, tmp_path):
    import torch

    tokenizer, model = tiny_tokenizer(), tiny_model(16, 1, 2, 261, seed=0)
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    question = "Is it this or that?"
    ids = tokenizer(f"<|user|>{question}<|eos|><|assistant|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model.eval()(ids).logits[0, -1].log_softmax(-1)
    likelier, other = ("A", "B") if logprobs[a] > logprobs[b] else ("B", "A")

    def verdict_of(name):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return llm.local_judge(tmp_path / name, "fp32", "comparisons")([question, question])

    assert verdict_of("judge") == [likelier] * 2
    with torch.no_grad():  # the question has neither letter, so exchanging their embeddings exchanges their odds
        model.model.embed_tokens.weight[[a, b]] = model.model.embed_tokens.weight[[b, a]]
    assert verdict_of("exchanged") == [other] * 2

    row = make_row(completions=["x", "yy", "zzz"])
    labels = llm.rank([row], LlmLabeler(labeler="llm", path=tmp_path / "judge"), stage)
    assert labels.metrics == {"verdicts": 6, "unparsed": 0}
    assert len(labels.source["digest"]) == 64


def test_local_judge_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"comparisons.path: .* cannot be loaded as a language model"):
        llm.local_judge(tmp_path, "fp32", "comparisons")


# ----------------------------------------------------------------------------- registry


def test_every_labeler_of_the_config_has_a_module():
    import importlib
    import typing

    from tunetrail.config.comparisons import ComparisonsConfig

    classes = typing.get_args(typing.get_args(ComparisonsConfig)[0])
    names = {typing.get_args(c.model_fields["labeler"].annotation)[0] for c in classes}
    assert all(callable(importlib.import_module(f"tunetrail.labeling.{name}").rank) for name in names)
