"""Shared by the tests of the label server: tasks, a served store, scripted labelers, a PostgreSQL server."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import uvicorn

from tunetrail.labeling.app import access
from tunetrail.labeling.app.requests import Impatient
from tunetrail.labeling.app.store import Store
from tunetrail.labeling.app.web import application
from tunetrail.reporting.label_quality import page_values


def ranking(name: str, k: int = 3, **more) -> dict:
    return {"id": name, "prompt": f"prompt of {name}", "completions": [f"{name}, output {i}" for i in range(k)]} | more


@contextlib.contextmanager
def served(store: Store, prefix: str = "") -> Iterator[str]:
    """The address of the page, served by a thread."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = uvicorn.Server(uvicorn.Config(application(store, prefix, page_values), http=Impatient, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}{prefix}"
    server.should_exit = True
    thread.join(10)


@contextlib.contextmanager
def served_alone(store: str, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`tunetrail label serve` as a separate process, with its address."""
    command = [sys.executable, "-m", "tunetrail", "label", "serve", "--store", store, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        address = next(line.split()[1] for line in process.stdout if line.startswith("page"))
        Scripted.wait(address)
        yield process, address.rstrip("/")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()


@dataclass
class Scripted:
    """A labeler that ranks over HTTP and remembers what the server replied."""

    address: str
    token: str
    latencies: list[float] = field(default_factory=list)
    """The seconds that each submit took."""
    stored: list[int] = field(default_factory=list)
    """The events that the server reported as stored."""

    @staticmethod
    def wait(address: str) -> None:
        """Waits until the server accepts connections."""
        parts = urlsplit(address)
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection((parts.hostname or "", parts.port or 80), 1).close()
                return
            time.sleep(0.05)
        raise TimeoutError(address)

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        self.headers = {"content-type": "application/json"}
        reply, _ = self.ask("POST", "/enter", {"token": self.token})
        self.headers["cookie"] = (reply.getheader("set-cookie") or "").partition(";")[0]
        _, page = self.ask("GET", "/guidelines")
        self.headers["x-csrf-token"] = re.findall(r'data-csrf="([^"]+)"', page)[0]

    def ask(self, method: str, path: str, body: dict | None = None) -> tuple[http.client.HTTPResponse, str]:
        self.connection.request(method, path, json.dumps(body) if body else None, self.headers)
        reply = self.connection.getresponse()
        return reply, reply.read().decode()

    def task(self) -> tuple[str, int] | None:
        """The nonce and the number of outputs of the next task; None if there is none."""
        _, page = self.ask("GET", "/task")
        found = re.search(r'data-nonce="([^"]+)"', page)
        return (found[1], page.count('<article class="output')) if found else None

    def submit(self, nonce: str, ranks: list[int]) -> None:
        start = time.perf_counter()
        reply, text = self.ask("POST", "/submit", {"nonce": nonce, "answer": {"ranks": ranks, "seconds": 1}})
        self.latencies.append(time.perf_counter() - start)
        assert reply.status == 200, text
        self.stored.append(json.loads(text)["event"])

    def work(self, most: int, pause: float = 0.0) -> None:
        """Ranks at most this many tasks, resting about `pause` seconds before and after each page."""
        random = Random(self.token)
        for n in range(most):
            time.sleep(pause * 2 * random.random())
            if (given := self.task()) is None:
                return
            nonce, k = given
            time.sleep(pause * 2 * random.random())
            self.submit(nonce, [(i + n) % k + 1 for i in range(k)])


def at_once(store: Store, address: str, labelers: int, rankings: int, pause: float = 0.0) -> list[Scripted]:
    """`labelers` labelers who each rank `rankings` tasks, all at the same time."""
    tokens = [access.add_labeler(store, f"labeler {n}")[1] for n in range(labelers)]
    all_ = [Scripted(address, token) for token in tokens]
    with ThreadPoolExecutor(labelers) as pool:
        list(pool.map(lambda labeler: labeler.work(rankings, pause), all_))
    return all_


def postgres_programs() -> Path | None:
    """The folder of the newest PostgreSQL server that Debian installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database on a new PostgreSQL server, which runs as nobody since it refuses to run as root."""
    programs = postgres_programs()
    assert programs, "PostgreSQL is not installed; .ci/run installs it"
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if other:
        shutil.chown(folder, "nobody", "nogroup")
    run = {
        "cwd": folder,
        "capture_output": True,
        "text": True,
        "check": True,
        "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    } | other
    data = str(folder / "data")
    control = [str(programs / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log")]
    options = f"-k {folder} -c listen_addresses='' -c max_connections=100"
    try:
        subprocess.run([programs / "initdb", "-D", data, "-U", "labels", "-A", "trust", "--no-sync"], **run)
        subprocess.run([*control, "-o", options, "start"], **run)
        yield f"postgresql://labels@/postgres?host={folder}"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run([*control, "-m", "immediate", "stop"], **run)
        shutil.rmtree(folder, ignore_errors=True)
