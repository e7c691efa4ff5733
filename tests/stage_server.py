"""Forks the processes that tests start from one that has imported everything: a stage takes 0.1 s of CPU instead of 6.

`python` on the PATH of `StageServer.path` is a small shell script. It runs the real one, except for `python -m` of one
of the PROGRAMS: then it is `client` below, which asks the server for a child and stands in for it. The child has the
client's arguments, environment, folder, standard streams, ignored signals, namespaces, control groups and, within a
session, process group, so a Slurm job or a terminal holds it as if it had been started there. SIGTERM reaches the child
through the client. If either is killed the other ends too, the client by the same signal.

This file is also the client's program, hence its few imports.
"""

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

STREAMS = (0, 1, 2)
NAMESPACES = ("pid", "uts", "mnt")  # the file system comes last, since it hides /proc/<client>/ns
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PROGRAMS = ("snakemake", "tests.slurm.head", "tunetrail", "tunetrail.*")
PRELOADED = (
    "snakemake.cli", "snakemake.report.html_reporter", "snakemake.storage", "snakemake_executor_plugin_slurm",
    "snakemake_executor_plugin_slurm_jobstep", "tunetrail.launch.submit", "tunetrail.monitor.dag", "tests.preloaded",
)  # fmt: skip
"""The modules that the PROGRAMS import; the stages come last."""
SCRIPT = """#!/bin/sh
case "$1 $2" in
    {patterns}) exec {python} -I -S {program} {address} "$@" ;;
esac
exec {python} "$@"
"""


class StageServer:
    """Starts the server, which ends on `stop` or with this process."""

    def __init__(self, folder):
        self.folder, self.address = folder, f"{folder}/socket"
        script = folder / "bin/python"
        script.parent.mkdir()
        patterns = "|".join(f"-m\\ {name}" for name in PROGRAMS)
        script.write_text(
            SCRIPT.format(patterns=patterns, python=sys.executable, program=__file__, address=self.address)
        )
        script.chmod(0o755)
        self.path = f"{script.parent}{os.pathsep}{os.path.dirname(sys.executable)}"
        """The start of the PATH for commands."""
        # A child's title replaces its arguments and environment in memory; this makes room for a long command.
        command = [sys.executable, "-c", "from tests.stage_server import serve; serve()", self.address, "." * 2000]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not os.path.exists(self.address):
            assert self.process.poll() is None, "the stage server did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ----------------------------------------------------------------------------- the server


def serve() -> None:
    """Forks a guardian for every client, until standard input is closed."""
    import importlib
    import weakref

    from setproctitle import getproctitle

    for name in PRELOADED:
        importlib.import_module(name)
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # children need not collect what was imported
    getproctitle()  # finds our arguments in memory, which a child with a changed environment no longer could
    listener = socket.socket(socket.AF_UNIX)
    address = sys.argv[1]
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that guardians leave no zombies
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            guard(connection)
        connection.close()


def guard(connection: socket.socket) -> None:
    """Forks the child, passes signals on to it, and tells the client how it ended."""
    client, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    message, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(4 * len(STREAMS)))
    streams = array.array("i", ancillary[0][2])
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    groups = control_groups(client)
    process_group = os.getpgid(client) if os.getsid(client) == os.getsid(0) else 0
    enter_namespaces(client)
    child = os.fork()  # only a new child is in the other process namespace
    if not child:
        if process_group:
            os.setpgid(0, process_group)
        else:
            os.setsid()
        become(json.loads(message), streams, groups)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            break
        told = connection.recv(1)
        if process_group and told == bytes([signal.SIGINT]):  # it was sent to the whole group
            continue
        os.kill(child, told[0] if told else signal.SIGKILL)
        if not told:
            break
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # the client has exited
        connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def control_groups(pid: int) -> list[str]:
    """The files that a process writes 0 to in order to join the control groups (version 1) of another."""
    with open(f"/proc/{pid}/cgroup") as lines:
        groups = [line.rstrip("\n").split(":", 2)[1:] for line in lines]
    files = [f"/sys/fs/cgroup/{name.removeprefix('name=')}{path}/cgroup.procs" for name, path in groups if name]
    return [file for file in files if os.path.exists(file)]


def enter_namespaces(pid: int) -> None:
    """Enters the namespaces of another process, unless they are already ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [f"/proc/{pid}/ns/{name}" for name in NAMESPACES]
    others = [os.open(path, os.O_RDONLY) for path in spaces if os.readlink(path) != own_namespace(path)]
    for space in others:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)


def own_namespace(path: str) -> str:
    return os.readlink("/proc/self/ns/" + path.rpartition("/")[2])


def become(request: dict, streams: array.array, groups: list[str]) -> None:
    """Runs the program as the client would have."""
    import atexit
    import runpy
    import threading
    import traceback
    import warnings

    import torch
    from setproctitle import setproctitle

    for group in groups:
        with open(group, "w") as file:
            file.write("0")
    for number, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))  # read at its import
    sys.executable = os.path.join(os.path.dirname(sys.argv[1]), "bin/python")  # its children are forked too
    sys.argv = request["arguments"][1:]
    setproctitle(" ".join(["python", *request["arguments"]]))
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning, "runpy")
    code: object = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has exited, or it is closed
            stream.flush()
    os._exit(code or 0)


# ----------------------------------------------------------------------------- the client


def client(address: str, arguments: list[str]) -> None:
    """Stands in for the child: python -m <program> …"""
    ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "ignored": ignored}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", STREAMS))]
    message = json.dumps(request).encode() + b"\n"
    sent = connection.sendmsg([message], streams)
    connection.sendall(message[sent:])
    for number in set(FORWARDED) - set(ignored):  # until now they killed us, as they kill an interpreter during imports
        signal.signal(number, lambda signum, _: connection.send(bytes([signum])))
    status = connection.recv(4)
    code = struct.unpack("i", status)[0] if len(status) == 4 else -signal.SIGKILL  # when the server or its node ends
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    client(sys.argv[1], sys.argv[2:])
