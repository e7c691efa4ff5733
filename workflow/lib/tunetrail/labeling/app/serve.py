"""The server: one process, which is plenty for twenty labelers."""

import contextlib
import getpass
import ipaddress
import re
import socket
import sys
from collections.abc import Iterable, Sequence

import uvicorn

from tunetrail.errors import ConfigError
from tunetrail.labeling.app.requests import Impatient, Names
from tunetrail.labeling.app.store import Store
from tunetrail.labeling.app.web import QualityValues, application
from tunetrail.terminal import escape

EVERYWHERE = ("0.0.0.0", "::")


def _this_machine() -> str:
    """The name of this machine on the network."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address is not available."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as e:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({e.strerror}); try another --port"
        ) from None
    return sock


def names_of(host: str, proxied: Iterable[str]) -> Names:
    """The names under which the page may be asked for, besides addresses: this machine's, and those of a proxy."""
    own = (host, "localhost", socket.gethostname(), _this_machine())
    return Names(frozenset(map(str.lower, own)), frozenset(map(str.lower, proxied)))


def serve(
    store: Store,
    host: str,
    port: int,
    prefix: str,
    proxy: str | None,
    quality: QualityValues,
    names: Sequence[str] = (),
) -> int:
    """Serves until it is interrupted; the exit code.

    Args:
        proxy: comma-separated addresses whose X-Forwarded-For and X-Forwarded-Proto are trusted; None: no address.
        quality: see `application`.
        names: under which a proxy serves the page.
    """
    prefix = prefix.rstrip("/")
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
        raise ConfigError(f"--prefix {prefix}: must be a path such as /labels")
    sock = listening(host, port)
    port = sock.getsockname()[1]
    local, here = _is_loopback(host), _this_machine()
    address = f"http://{_in_url(here if host in EVERYWHERE else host)}:{port}{prefix}"
    store.note("address", address)
    for warning in store.database.warnings:
        print(f"warning: {escape(warning)}", file=sys.stderr)
    if not local:
        print(
            f"warning: {host} is open to the network, and traffic is not encrypted. Put a proxy with TLS in front of "
            "it, or leave out --host and use the tunnel",
            file=sys.stderr,
        )
    progress = store.progress()
    print(f"labels     {escape(store.database.shown)}")
    print(f"tasks      {progress['tasks']}; {progress['have']} of {progress['wanted']} answers so far")
    print(f"page       {address}/")
    if local:
        print(f"tunnel     ssh -N -L {port}:{_in_url(host)}:{port} {getpass.getuser()}@{here}")
    print(
        "labelers   tunetrail label add NAME prints a link for each; Ctrl-C stops the server, and nothing is lost",
        flush=True,
    )
    config = uvicorn.Config(
        application(store, prefix, quality, names_of(host, names)),
        http=Impatient,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy or "",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])
    return 0
