"""The label server over HTTP: what it serves, what it refuses, and that refused requests leave no trace."""

import asyncio
import json
import logging
import re
import socket
import time
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from tests.labels import Scripted, ranking, served, served_alone
from tunetrail.labeling.app import access, queue, requests, serve
from tunetrail.labeling.app.answers import FLAGS
from tunetrail.labeling.app.database import labelers, names, sessions
from tunetrail.labeling.app.requests import LARGEST
from tunetrail.labeling.app.store import Store
from tunetrail.labeling.app.web import COOKIE, application
from tunetrail.reporting.label_quality import page_values

on_both = pytest.mark.parametrize("store", ["lite", "postgresql"], indirect=True)
INJECTION = "'); DROP TABLE events; --"
SCRIPT = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>[a](javascript:alert(1)) "
    "![b](https://c.example/d.png) [e](https://f.example)"
)


@pytest.fixture
def store(request) -> Store:
    store = request.getfixturevalue(getattr(request, "param", "lite"))
    store.publish([ranking("a"), ranking("b", 4), ranking("c", 2)], {"overlap": 2})
    return store


class Labeler:
    """A labeler whose browser runs no scripts."""

    def __init__(self, store: Store, name: str = "Ada", admin: bool = False, prefix: str = ""):
        self.store, self.prefix = store, prefix
        self.client = TestClient(
            application(store, prefix, page_values), base_url="http://labels", follow_redirects=False
        )
        self.pseudonym, self.token = access.add_labeler(store, name, admin)
        reply = self.client.post(f"{prefix}/enter", json={"token": self.token})
        assert reply.json() == {"next": f"{prefix}/"}
        self.csrf = re.search(r'data-csrf="([^"]+)"', self.get("").text)[1]

    def get(self, path: str):
        return self.client.get(f"{self.prefix}/{path}")

    def post(self, path: str, body: object, **headers: str):
        return self.client.post(f"{self.prefix}/{path}", json=body, headers={"x-csrf-token": self.csrf} | headers)

    def open(self) -> tuple[str, int]:
        """The nonce and the number of outputs of the task before them."""
        page = self.before = self.get("task").text
        return re.search(r'data-nonce="([^"]+)"', page)[1], page.count('<article class="output')

    def submit(self, nonce: str, **answer):
        return self.post("submit", {"nonce": nonce, "answer": answer})


@pytest.fixture
def ada(store) -> Labeler:
    return Labeler(store)


def everything(store: Store) -> list:
    """Everything that is stored about answers."""
    with store.reading() as connection:
        return [connection.execute(sa.text(f"SELECT * FROM {name}")).all() for name in ("events", "tasks", "places")]


def test_rankings_arrive_in_the_order_shown_and_are_stored_in_the_tasks_order(store, ada):
    store.publish([ranking("a", 9)])  # of nine no order is its own inverse by chance
    nonce, k = ada.open()
    ranks, ratings = [3, 1, 2, 2, 4, 5, 6, 7, 8], [7, None, 1, 2, 3, 4, 5, 6, 7]
    flags = [[], ["harmful"], [], [], [], [], [], [], ["violent"]]
    reply = ada.submit(nonce, ranks=ranks, ratings=ratings, flags=flags, all_bad=True, comment="x", seconds=1e6)
    assert (k, reply.status_code, reply.json()["next"]) == (9, 200, "/task?stored=3")
    (row,) = store.labels()
    shown = [int(n) for n in re.findall(r"<p>a, output (\d)</p>", ada.before)]
    assert row["shown"] == shown
    assert [shown[i] for i in shown] != list(range(9))
    for key, sent in (("ranks", ranks), ("ratings", ratings), ("flags", flags)):
        assert [row[key][i] for i in shown] == sent
    assert row["all_bad"] is True
    assert row["seconds"] < 60, "nobody can have worked longer than the task was open"
    page = ada.get("task?stored=3").text
    assert "Stored as event 3." in page


def test_the_page_does_not_reveal_which_output_is_which(store, ada):
    store.publish([ranking("a", 9) | {"split": "secret-split"}], {})
    page = ada.get("task").text
    shown = queue.next_task(store, ada.pseudonym).shown
    assert re.findall(r"<p>a, output (\d)</p>", page) == [str(i) for i in shown]
    assert shown != list(range(9))
    for secret in ("secret-split", json.dumps(shown), "split"):
        assert secret not in page
    assert ada.get("task").text == page, "a reload shows the same"


def test_labelers_see_different_orders_and_a_task_goes_to_at_most_overlap_labelers(store, ada):
    store.publish([ranking(f"t{n}", 9) for n in range(4)], {"overlap": 2})
    bob, eve = Labeler(store, "Bob"), Labeler(store, "Eve")
    given = [queue.next_task(store, who.pseudonym) for who in (ada, bob, eve)]
    assert [a.task["id"] for a in given] == ["t0", "t0", "t1"]
    assert given[0].shown != given[1].shown


@on_both
def test_submitting_twice_stores_once_and_a_used_nonce_accepts_nothing_else(store, ada):
    nonce, _ = ada.open()
    first = ada.submit(nonce, ranks=[1, 2, 3], seconds=1)
    before = everything(store)
    again = ada.submit(nonce, ranks=[1, 2, 3], seconds=3)
    assert again.json() == first.json()
    replayed = ada.submit(nonce, ranks=[3, 2, 1], seconds=1)
    assert (replayed.status_code, "answered this task already" in replayed.json()["error"]) == (409, True)
    assert everything(store) == before


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ranks": None},
        {"ranks": [1, 2]},
        {"ranks": [1, 2, 3, 4]},
        {"ranks": [1, 2, 4]},
        {"ranks": [0, 1, 2]},
        {"ranks": [1, 1.0, 2]},
        {"ranks": [True, 2, 3]},
        {"ranks": ["1", "2", "3"]},
        {"ranks": {"0": 1}},
        {"ranks": [1, 2, 10**30]},
        {"ranks": [1, 2, 3], "ratings": [8, 1, 1]},
        {"ranks": [1, 2, 3], "ratings": [1, 1]},
        {"ranks": [1, 2, 3], "flags": [["nonsense"], [], []]},
        {"ranks": [1, 2, 3], "flags": [[[]], [], []]},
        {"ranks": [1, 2, 3], "all_bad": "yes"},
        {"ranks": [1, 2, 3], "comment": "x" * 5000},
        {"ranks": [1, 2, 3], "comment": "\0"},
        {"ranks": [1, 2, 3], "seconds": -1},
        {"ranks": [1, 2, 3], "seconds": "1"},
        {"ranks": [1, 2, 3], "labeler": "human-2"},
        {"text": "an answer to a ranking"},
    ],
)
def test_an_invalid_answer_is_refused_as_a_whole(store, ada, answer):
    nonce, _ = ada.open()
    before = everything(store)
    reply = ada.submit(nonce, **answer)
    assert reply.status_code == 422
    assert everything(store) == before
    assert store.labels() == []


def test_numbers_and_texts_that_only_json_parsers_accept_are_refused(store, ada):
    nonce, _ = ada.open()
    before = everything(store)
    for bad in ('{"ranks": [1, 2, 3], "seconds": NaN}', '{"ranks": [1, 2, 3], "comment": "\\ud800"}'):
        headers = {"x-csrf-token": ada.csrf, "content-type": "application/json"}
        reply = ada.client.post("/submit", content=f'{{"nonce": "{nonce}", "answer": {bad}}}', headers=headers)
        assert reply.status_code in (400, 422)
    assert everything(store) == before


@on_both
def test_somebody_elses_task_cannot_be_answered(store, ada):
    bob = Labeler(store, "Bob")
    nonce, _ = ada.open()
    before = everything(store)
    for path, body in (
        ("submit", {"nonce": nonce, "answer": {"ranks": [1, 2, 3]}}),
        ("draft", {"nonce": nonce, "draft": {}}),
        ("skip", {"nonce": nonce, "skip": {"reason": "broken"}}),
        ("submit", {"nonce": "a", "answer": {"ranks": [1, 2, 3]}}),
        ("submit", {"nonce": INJECTION, "answer": {"ranks": [1, 2, 3]}}),
    ):
        reply = bob.post(path, body)
        assert (reply.status_code, reply.json()["error"]) == (404, "this task was not given to you")
    assert ada.submit(nonce, ranks=[1, 2, 3]).status_code == 200
    assert bob.post("undo", {"event": 2}).status_code == 409
    assert everything(store)[0][:-1] == before[0]


@on_both
@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(
            (path, {"nonce": nonce, "answer": {"ranks": [1, 2, 3]}, "draft": {}, "skip": {"reason": "broken"}})
            for path in ("submit", "draft", "skip")
            for nonce in ("\0", "\ud800", "é" * 10_000, 1, None, ["x"])
        ),
        *(("undo", {"event": event}) for event in (10**30, -1, "1", 1.5, True, [])),
        *(
            ("skip", {"skip": why})
            for why in (
                {},
                {"reason": ["broken"]},
                {"reason": "broken", "comment": "\ud800"},
                {"reason": "broken", "comment": "\0"},
                {"reason": "broken", "seconds": -1},
            )
        ),
    ],
)
def test_invalid_identifiers_change_nothing(store, ada, path, body):
    nonce, _ = ada.open()
    before = everything(store)
    headers = {"x-csrf-token": ada.csrf, "content-type": "application/json"}
    reply = ada.client.post(f"/{path}", content=json.dumps({"nonce": nonce} | body), headers=headers)
    assert reply.status_code in (400, 404, 422)
    assert everything(store) == before


@on_both
def test_sql_in_any_field_is_stored_as_text(store):
    ada = Labeler(store, INJECTION)
    store.publish(
        [
            ranking(INJECTION, prompt=INJECTION, completions=[INJECTION, "x"]),
            {"id": "d", "kind": "demonstration", "prompt": "p"},
        ],
        {"guidelines": INJECTION},
    )
    nonce, _ = ada.open()
    assert ada.post("draft", {"nonce": nonce, "draft": {"comment": INJECTION, INJECTION: INJECTION}}).status_code == 200
    assert ada.post("skip", {"nonce": nonce, "skip": {"reason": INJECTION, "comment": INJECTION}}).status_code == 422
    assert ada.submit(nonce, ranks=[1, 2], flags=[[INJECTION], []]).status_code == 422
    assert ada.submit(nonce, ranks=[1, 2], comment=INJECTION).status_code == 200
    nonce, _ = ada.open()
    assert ada.submit(nonce, text=INJECTION).status_code == 200
    assert ada.post("enter", {"token": INJECTION}).status_code == 401
    ada.client.cookies.set(COOKIE, "x")
    assert ada.client.get("/", headers={"cookie": f"{COOKIE}={INJECTION}"}).status_code == 303
    assert [row["comment"] for row in store.labels()] == [INJECTION, ""]
    assert store.labels()[1]["text"] == INJECTION
    assert store.fault() is None
    assert access.roster(store)[0]["name"] == INJECTION


def test_scripts_in_prompts_outputs_and_guidelines_stay_text(store, ada):
    fenced = f"```{SCRIPT}\n{SCRIPT}\n```\n<a href='javascript:x'>"
    store.publish([ranking(SCRIPT, prompt=fenced, completions=[SCRIPT, fenced])], {"guidelines": SCRIPT})
    nonce, _ = ada.open()
    ada.post("draft", {"nonce": nonce, "draft": {"comment": f"\"'>{SCRIPT}"}})
    for path in ("", "task", "guidelines"):
        reply = ada.get(path)
        assert reply.status_code == 200
        tags = re.findall(r"<(script|img|a|iframe|svg)\b([^>]*)>", reply.text)
        for tag, attributes in tags:
            assert tag in ("script", "a")
            assert re.search(r'(src|href)="(/|#)[^"]*"', attributes), (tag, attributes)
            assert "onerror" not in attributes
        policy = reply.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?![^>]*src=)", reply.text)
        assert not re.search(r"""\s(style|on\w+)=["']""", re.sub(r"&lt;.*?&gt;", "", reply.text))


@pytest.mark.parametrize("chunked", [True, False])
def test_a_request_that_is_too_large_is_refused(store, ada, chunked):
    nonce, _ = ada.open()
    before = everything(store)
    body = json.dumps({"nonce": nonce, "answer": {"ranks": [1, 2, 3], "comment": "x" * LARGEST}}).encode()
    content = (body[i : i + 10_000] for i in range(0, len(body), 10_000)) if chunked else body
    for path in ("submit", "draft", "enter"):
        reply = ada.client.post(
            f"/{path}", content=content, headers={"x-csrf-token": ada.csrf, "content-type": "application/json"}
        )
        assert reply.status_code == 413
        content = body
    assert everything(store) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'"x"'])
def test_a_request_that_is_not_a_json_object_is_refused(ada, content):
    headers = {"x-csrf-token": ada.csrf, "content-type": "application/json"}
    assert ada.client.post("/submit", content=content, headers=headers).status_code == 400
    assert (
        ada.client.post("/submit", content=b"{}", headers=headers | {"content-type": "text/plain"}).status_code == 400
    )


def test_without_a_session_nothing_is_shown_and_nothing_stored(store, ada):
    nonce, _ = ada.open()
    before = everything(store)
    stranger = TestClient(application(store), base_url="http://labels", follow_redirects=False)
    for path in ("", "task", "guidelines", "quality", "feedback?event=1"):
        reply = stranger.get(f"/{path}")
        assert (reply.status_code, reply.headers["location"], reply.text) == (303, "/enter", "")
    assert stranger.post("/submit", json={"nonce": nonce, "answer": {"ranks": [1, 2, 3]}}).status_code == 401
    wrong = stranger.post("/enter", json={"token": "x" + ada.token})
    assert (wrong.status_code, wrong.cookies.get(COOKIE)) == (401, None)
    assert everything(store) == before


def test_a_request_from_another_site_is_refused(store, ada):
    nonce, _ = ada.open()
    before = everything(store)
    bob = Labeler(store, "Bob")
    for csrf in ("", "x", bob.csrf):
        reply = ada.post("submit", {"nonce": nonce, "answer": {"ranks": [1, 2, 3]}}, **{"x-csrf-token": csrf})
        assert reply.status_code == 403
    assert everything(store) == before


@on_both
def test_expired_cookies_and_those_of_forgotten_labelers_are_refused(store, ada):
    nonce, _ = ada.open()
    before = everything(store)
    with store.writing() as connection:
        connection.execute(sessions.update().values(expires=1.0))
    reply = ada.submit(nonce, ranks=[1, 2, 3])
    assert (reply.status_code, "session has ended" in reply.json()["error"]) == (401, True)
    assert ada.get("task").status_code == 303
    bob = Labeler(store, "Bob")
    access.forget(store, bob.pseudonym)
    assert bob.get("task").status_code == 303
    assert bob.client.post("/enter", json={"token": bob.token}).status_code == 401
    assert [one["name"] for one in access.roster(store)] == ["Ada", None]
    assert everything(store) == before


def test_tokens_and_cookies_are_not_stored_and_a_deleted_name_is_gone_from_the_files(store, tmp_path):
    ada = Labeler(store, "Ada Countess Lovelace")
    files = lambda: b"".join(path.read_bytes() for path in tmp_path.glob("labels.db*"))  # noqa: E731
    assert b"Ada Countess" in files()
    for secret in (ada.token, ada.client.cookies[COOKIE]):
        assert secret.encode() not in files()
    access.forget(store, ada.pseudonym)
    assert b"Ada Countess" not in files()
    with store.reading() as connection:
        assert connection.execute(sa.select(labelers.c.pseudonym)).scalars().all() == [ada.pseudonym]
        assert connection.execute(sa.select(names)).all() == []
    assert access.add_labeler(store, "Bob")[0] == "human-2", "a pseudonym is never reused"


def test_the_cookie_is_limited_to_this_page(store):
    client = TestClient(application(store, "/lab/x"), base_url="https://labels")
    reply = client.post("/lab/x/enter", json={"token": access.add_labeler(store, "Ada")[1]})
    cookie = reply.headers["set-cookie"].lower()
    for part in ("httponly", "samesite=strict", "path=/lab/x", "secure"):
        assert part in cookie


@pytest.mark.parametrize("stripped", [True, False])
def test_pages_work_under_a_prefix_whether_or_not_the_proxy_removes_it(store, stripped):
    ada = Labeler(store, prefix="/lab/x")
    front = "" if stripped else "/lab/x"
    cookie = {"cookie": f"{COOKIE}={ada.client.cookies[COOKIE]}"}
    page = ada.client.get(f"{front}/task", headers=cookie)
    assert page.status_code == 200
    linked = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert len(linked) > 4
    for path in linked:
        assert path.startswith("/lab/x/")
        assert ada.client.get(front + path.removeprefix("/lab/x"), headers=cookie).status_code == 200


@pytest.mark.parametrize(("host", "origin", "status"), [
    ("labels", None, 200), ("LABELS:8000", "http://labels:8000", 200), ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
    ("[::1]:8000", "http://[::1]:8000", 200), ("10.0.0.1", "https://labels", 200),
    ("evil.example", None, 421), ("evil.example:8000", "http://evil.example:8000", 421), ("", None, 421),
    ("labels.evil.example", None, 421), ("labels", "http://evil.example", 403), ("labels", "null", 403),
    ("127.0.0.1:8000", "http://127.0.0.1:8001", 403), ("localhost:8000", "http://localhost:8001", 403),
    ("127.0.0.1", "http://10.0.0.1", 403),
])  # fmt: skip
def test_the_page_answers_to_its_own_names_and_to_its_own_pages(store, host, origin, status):
    app = application(store, names=serve.names_of("127.0.0.1", ["Labels"]))
    headers = {"host": host} | ({"origin": origin} if origin else {})
    client = TestClient(app, base_url="http://labels")
    _, token = access.add_labeler(store, "Ada")
    reply = client.post("/enter", json={"token": token}, headers=headers)
    assert reply.status_code == status
    assert ("--name" in reply.text) == (status != 200)
    if status == 421:
        assert client.get("/enter", headers=headers).status_code == 421


def test_a_key_given_twice_is_refused(store):
    """Proxies and parsers disagree on which of the two counts."""
    _, token = access.add_labeler(store, "Ada")
    client = TestClient(application(store), base_url="http://labels")
    reply = client.post(
        "/enter",
        content=f'{{"token": "x", "token": "{token}"}}',
        headers={"content-type": "application/json"},
    )
    assert (reply.status_code, "given twice" in reply.json()["error"]) == (400, True)


HEAD = b"POST /enter HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"


@pytest.mark.parametrize(("sent", "then", "answer"), [
    (b"", "wait", b""), (HEAD, "wait", b""), (HEAD + b"\r\n{", "wait", b"HTTP/1.1 408"),
    (HEAD + b"\r\n{", "leave", None), (HEAD, "leave", None),
])  # fmt: skip
def test_slow_and_aborted_requests_end_without_a_traceback(store, monkeypatch, caplog, sent, then, answer):
    monkeypatch.setattr(requests, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.3)
    with served(store) as address, caplog.at_level(logging.WARNING):
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port), 30) as client:
            client.sendall(sent)
            if then == "wait":
                try:
                    found = client.recv(4096)
                except ConnectionResetError:
                    found = b""
                assert found.startswith(answer)
                assert bool(found) == bool(answer)
        time.sleep(0.1)
        _, token = access.add_labeler(store, "Ada")
        assert Scripted(address, token).task(), "it serves others"
    assert caplog.text == ""


def test_wrong_links_slow_down_their_own_address_and_a_right_one_always_gets_in(store, monkeypatch):
    monkeypatch.setattr("tunetrail.labeling.app.web.WRONG_SECONDS", 0.0)
    app = application(store)
    flood, other = (TestClient(app, base_url="http://labels", client=(name, 1)) for name in ("10.0.0.1", "10.0.0.2"))
    replies = [flood.post("/enter", json={"token": "wrong"}).status_code for _ in range(70)]
    assert (replies[0], replies[-1]) == (401, 429)
    assert other.post("/enter", json={"token": "wrong"}).status_code == 401
    _, token = access.add_labeler(store, "Ada")
    assert flood.post("/enter", json={"token": token}).status_code == 200


def test_too_many_requests_are_refused(store, ada):
    replies = {ada.get("guidelines").status_code for _ in range(150)}
    assert replies == {200, 429}


def test_a_rate_refills_with_time():
    rate = access.Rate(per_minute=60, burst=2)
    assert [rate.allows("a", now=100.0) for _ in range(3)] == [True, True, False]
    assert rate.allows("b", now=100.0)
    assert [rate.allows("a", now=101.0) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(("proxy", "believed"), [(None, False), ("10.0.0.7", False), ("127.0.0.1,10.0.0.7", True)])
def test_forwarded_headers_are_trusted_only_from_a_named_proxy(store, monkeypatch, proxy, believed):
    """Tests uvicorn as `serve` configures it: with a made-up address per attempt, the rate limit would be none."""
    asked = []

    def run(server, sockets) -> None:
        sockets[0].close()
        server.config.load()
        headers = [(b"x-forwarded-for", b"192.0.2.1"), (b"x-forwarded-proto", b"https")]
        scope = {"type": "http", "client": ("127.0.0.1", 5), "scheme": "http", "headers": headers}
        asyncio.run(server.config.loaded_app(scope, None, None))

    async def app(scope, receive, send) -> None:
        asked.append((scope["client"][0], scope["scheme"]))

    monkeypatch.setattr(serve, "application", lambda store, prefix, quality, names: app)
    monkeypatch.setattr(serve.uvicorn.Server, "run", run)
    assert serve.serve(store, "127.0.0.1", 0, "", proxy, page_values) == 0
    assert asked == [("192.0.2.1", "https") if believed else ("127.0.0.1", "http")]


def test_a_wrong_token_is_refused_without_taking_the_writers_lock(store):
    with store.writing():
        assert access.enter(store, "wrong") is None


def test_a_server_fault_does_not_claim_that_nothing_was_stored(store, ada, monkeypatch):
    nonce, _ = ada.open()

    def stored_and_lost(*args):
        raise RuntimeError(stored(*args))

    stored = queue.submit
    monkeypatch.setattr(queue, "submit", stored_and_lost)
    client = TestClient(
        ada.client.app, base_url="http://labels", cookies=ada.client.cookies, raise_server_exceptions=False
    )
    reply = client.post(
        "/submit", json={"nonce": nonce, "answer": {"ranks": [1, 2, 3]}}, headers={"x-csrf-token": ada.csrf}
    )
    assert reply.status_code == 500
    assert "Send it again: nothing is stored twice" in reply.json()["error"]
    assert reply.headers["cache-control"] == "no-store"
    assert "script-src 'self'" in reply.headers["content-security-policy"]
    monkeypatch.setattr(queue, "submit", stored)
    assert ada.submit(nonce, ranks=[1, 2, 3]).status_code == 200
    assert len(store.labels()) == 1


def test_what_was_stored_goes_into_the_file_that_people_copy(store, tmp_path, monkeypatch):
    """At the end, and on a timer."""
    log = tmp_path / "labels.db-wal"
    with TestClient(application(store)):
        store.note("address", "x")
        assert log.stat().st_size > 0
    assert log.stat().st_size == 0
    monkeypatch.setattr("tunetrail.labeling.app.web.CHECKPOINT_SECONDS", 0.02)
    with TestClient(application(store)):
        store.note("address", "y")
        deadline = time.monotonic() + 30
        while log.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        assert log.stat().st_size == 0


def test_only_admins_see_the_progress_of_all_labelers(store, ada):
    """Otherwise a task whose answer does not change the number would be known to be gold or a repeat."""
    assert "All answers" not in ada.get("").text
    assert "All answers" in Labeler(store, "Eve", admin=True).get("").text


def test_only_admins_see_the_quality_page(store, ada):
    assert ada.get("quality").status_code == 403
    page = Labeler(store, "Eve", admin=True).get("quality")
    assert page.status_code == 200
    assert page.text.count("<svg") == 4


def test_the_command_serves_the_quality_page(tmp_path):
    url = f"sqlite:///{tmp_path}/labels.db"
    _, token = access.add_labeler(Store(url), "Eve", admin=True)
    with served_alone(url) as (_, address):
        reply, page = Scripted(address, token).ask("GET", "/quality")
    assert (reply.status, "How good are the labels?" in page) == (200, True)


def test_training_comes_first_and_shows_the_solution(store, ada):
    gold = [ranking("g", 3, gold={"ranks": [2, 1, 2]})]
    store.publish([ranking("a"), *gold], {"training": 1})
    given = queue.next_task(store, ada.pseudonym)
    assert (given.task["id"], given.purpose) == ("g", "training")
    reply = ada.submit(given.nonce, ranks=[1, 2, 3])
    page = ada.client.get(reply.json()["next"]).text
    assert re.findall(r"solution (\d), you (\d)", page)[0][0] == "1"
    assert ada.post("undo", {}).status_code == 409, "the solution has been seen"
    assert queue.next_task(store, ada.pseudonym).task["id"] == "a"
    bob = Labeler(store, "Bob")
    assert bob.get(reply.json()["next"].lstrip("/")).status_code == 404
    (row,) = store.labels()
    assert (row["training"], row["gold"]) == (True, True)


def test_every_page_has_what_screen_readers_need(store, ada):
    page = ada.get("task").text
    assert '<html lang="en">' in page
    assert 'role="status" aria-live="polite"' in page
    assert page.count("<h1") == 1
    assert page.count("<fieldset") == page.count("<legend") == 4  # three ratings and the reasons
    assert page.count('type="checkbox"') == 3 * len(FLAGS) + 1
    for control in re.findall(r"<(?:textarea|input)\b[^>]*\bid=\"([^\"]+)\"", page):
        assert f'for="{control}"' in page or f'<label class="choice"><input type="checkbox" id="{control}"' in page
