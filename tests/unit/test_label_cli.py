"""The commands around the labeling page."""

import json
import re
import socket
import subprocess
import sys

import pytest

from tests.labels import Scripted, ranking, served_alone
from tunetrail.cli import main
from tunetrail.labeling.app import queue
from tunetrail.labeling.app.store import RUN, Store


@pytest.fixture
def store(tmp_path) -> str:
    return f"{tmp_path}/labels.db"


def test_adding_renewing_listing_and_forgetting(store, capsys):
    def run(*words: str) -> str:
        assert main(["label", *words, "--store", store]) == 0
        return capsys.readouterr().out

    first = run("add", "Ada Lovelace")
    assert re.fullmatch(r"human-1: http://127\.0\.0\.1:8000/enter#[\w-]{32}\n", first)
    assert run("add", "Grace Hopper", "--admin").startswith("human-2: ")
    assert run("renew", "human-1") != first
    listed = run("list").splitlines()
    assert [line.split()[:3] for line in listed] == [["human-1", "labeler", "0"], ["human-2", "admin", "0"]]
    assert "Ada Lovelace" in listed[0]
    run("forget", "human-1")
    assert "(name deleted)" in run("list")
    assert run("verify").endswith(f"the chain is whole, head {'0' * 64}\n")
    assert main(["label", "renew", "human-9", "--store", store]) == 2
    assert capsys.readouterr().err == "tunetrail: error: human-9: no such labeler; tunetrail label list shows them\n"


def test_serving_prints_its_address_and_exits_cleanly(store, tmp_path, capfd):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(ranking("a")) + "\n\n")
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text("# Be fair")
    options = ("--tasks", str(tasks), "--guidelines", str(guidelines), "--prefix", "/labels/", "--overlap", "2")
    with served_alone(store, *options) as (process, address):
        assert process.stdout
        tunnel = process.stdout.readline()
        port = address.split(":")[2].removesuffix("/labels")
        assert re.fullmatch(rf"tunnel +ssh -N -L {port}:127\.0\.0\.1:{port} \S+@\S+\n", tunnel)
        assert main(["label", "add", "Ada", "--store", store]) == 0
        link = capfd.readouterr().out.split()[1]
        assert link.startswith(f"{address}/enter#")
        labeler = Scripted(address, link.partition("#")[2])
        assert "<h1>Be fair</h1>" in labeler.ask("GET", "/guidelines")[1]
        nonce, k = labeler.task()
        labeler.submit(nonce, list(range(1, k + 1)))
    assert process.returncode == 0
    assert capfd.readouterr().err == ""
    assert Store(store).progress()["have"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlap", "2"], "--overlap: settings are published with tasks; add --tasks FILE"),
        (["--tasks", "bad.jsonl"], "bad.jsonl:2: a ranking needs 2 to 9 completions, here are 1"),
        (["--tasks", "none.jsonl"], "none.jsonl: no such file"),
        (["--tasks", "latin.txt"], "latin.txt:2: not UTF-8"),
        (["--tasks", "bad.jsonl", "--guidelines", "latin.txt"], "--guidelines latin.txt: not UTF-8"),
        (["--prefix", "a b"], "--prefix a b: must be a path such as /labels"),
        (["--port", "{taken}"], "--host 127.0.0.1 --port {taken}: cannot listen there (Address already in use); try "
                                "another --port"),
        (["--host", "no.such.host.invalid"], "cannot listen there"),
        (["--store", "mysql://x/y"], "mysql://x/y: labels are kept in SQLite or PostgreSQL, not in mysql"),
        (["--store", "postgresql://127.0.0.1:1/x"], "cannot be opened (connection failed"),
        (["--store", "."], ".: cannot be opened (Is a directory)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    lines = [ranking("a"), ranking("b", 1)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "latin.txt").write_bytes(b"\n\xe9")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [word.format(taken=port) for word in words]
        assert main(["label", "serve", "--store", "labels.db", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(taken=port) in line


@pytest.mark.parametrize(
    "words", [["list"], ["verify"], ["renew", "human-1"], ["forget", "human-1"], ["export", "--format=jsonl"]]
)
def test_only_serving_and_adding_make_a_store(tmp_path, capsys, words):
    assert main(["label", *words, "--store", f"{tmp_path}/mistyped.db"]) == 2
    assert "there is no such file; name the labels with --store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    empty = tmp_path / "empty.db"
    empty.touch()
    assert main(["label", *words, "--store", str(empty)]) == 2
    assert "holds no labels" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lite", "postgresql"])
def test_exporting_and_verifying(kind, request, capsys):
    opened = request.getfixturevalue(kind)
    opened.publish([ranking("a", 2)])
    given = queue.next_task(opened, "human-1")
    queue.submit(opened, "human-1", given.nonce, {"ranks": [1, 1]})
    url = opened.database.url.render_as_string(hide_password=False)
    assert main(["label", "export", "--format", "jsonl", "--store", url]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == [1, 1]
    assert main(["label", "verify", "--store", url]) == 0
    assert capsys.readouterr().out.endswith(f"head {opened.head()}\n")


def test_a_backup_is_a_store(store, tmp_path, capsys):
    Store(store).publish([ranking("a")])
    copy = str(tmp_path / "copy.db")
    assert main(["label", "backup", copy, "--store", store]) == 0
    assert capsys.readouterr().out == f"{copy}: head {Store(store).head()}\n"
    assert main(["label", "verify", "--store", copy]) == 0
    assert main(["label", "backup", copy, "--store", store]) == 2


def test_a_store_of_a_run_takes_no_other_tasks(store, tmp_path, capsys):
    opened = Store(store)
    opened.publish([ranking("a")])
    opened.note(RUN, "demo")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(ranking("b")))
    assert main(["label", "serve", "--store", store, "--tasks", str(tasks)]) == 2
    assert "holds the tasks of the run demo; name another --store" in capsys.readouterr().err
    assert [task["id"] for task in opened.tasks()] == ["a"]


def test_a_broken_chain_is_not_served(store, tmp_path, capsys):
    opened = Store(store)
    opened.publish([ranking("a")])
    with opened.writing() as connection:
        connection.exec_driver_sql("DROP TRIGGER events_no_update")
        connection.exec_driver_sql("UPDATE events SET kind = 'ranking'")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(ranking("b")))
    for words in ([], ["--tasks", str(tasks)]):
        assert main(["label", "serve", "--store", store, *words]) == 2
    assert len(list(opened.events())) == 1, "nothing is chained to it"
    assert "event 1 is not what was written; restore it from a copy" in capsys.readouterr().err
    assert main(["label", "verify", "--store", store]) == 1


def test_the_command_line_loads_without_the_page(store):
    """`tunetrail status` should not wait for a web server's packages."""
    code = "import tunetrail.cli, sys; print([m for m in ('starlette', 'sqlalchemy', 'uvicorn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_wrong_usage_is_reported_and_exits_with_2(capsys):
    assert main(["label", "export"]) == 2
    assert "--format" in capsys.readouterr().err
    assert main(["no-such-area"]) == 2
    assert "no-such-area" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    from tunetrail import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tunetrail {__version__}\n"
