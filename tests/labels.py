"""What the tests of the labeling page share: tasks, a served store."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from tunetrail.labeling.app.store import Store
from tunetrail.labeling.app.web import application


def ranking(name: str, k: int = 3, **more) -> dict:
    return {"id": name, "prompt": f"prompt of {name}", "completions": [f"{name}, output {i}" for i in range(k)]} | more


@contextlib.contextmanager
def served(store: Store, prefix: str = "") -> Iterator[str]:
    """The address of the page, served by a thread."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=128)
    server = uvicorn.Server(uvicorn.Config(application(store, prefix), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}{prefix}"
    server.should_exit = True
    thread.join(10)


def postgres_programs() -> Path | None:
    """The folder of Debian's PostgreSQL server, the newest there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL of its own. It refuses to run as root, so root becomes nobody."""
    programs = postgres_programs()
    assert programs, "PostgreSQL is not installed; .ci/run installs it"
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if other:
        shutil.chown(folder, "nobody", "nogroup")
    run = {"cwd": folder, "capture_output": True, "text": True, "check": True, "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}} | other  # fmt: skip
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
