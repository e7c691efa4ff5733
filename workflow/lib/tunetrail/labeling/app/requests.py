"""Refuses requests before a page sees them: other host names, other sites, invalid JSON, slow clients."""

import asyncio
import ipaddress
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunetrail.labeling.app.answers import Refused

LARGEST = 256 * 1024
"""The most bytes in a request's body."""
HEAD_SECONDS = BODY_SECONDS = 30.0
"""How long a client may take to send a request's head, and its body."""


def _host_of(address: str) -> str:
    """The host name in a Host header or an origin, without port and brackets; "" if there is none."""
    try:
        return urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Names:
    """Host names under which the page answers, in lower case and without ports."""

    own: frozenset[str]
    """This machine's names. Another port may belong to another user, whose pages the same browser shows."""
    proxied: frozenset[str] = frozenset()
    """Names under which a proxy serves the page, possibly at another port than it uses here."""


class OwnNames:
    """Middleware that answers only under its own names and only to its own pages.

    A site that points its name to this machine (DNS rebinding) sends requests under that name. IP addresses need no
    check: nobody can point them elsewhere.
    """

    def __init__(self, app: ASGIApp, names: Names | None):
        """
        Args:
            names: None allows any name.
        """
        self.app, self.names = app, names

    def refusal(self, host: str, origin: str | None) -> tuple[str, int] | None:
        """What is wrong with these headers, and the HTTP status; None if they are fine."""
        if self.names is None:
            return None
        name = _host_of(host)
        if not (name in self.names.own | self.names.proxied or _is_ip(name)):
            return f"this server does not answer to the name {name!r}; start it with --name {name or 'NAME'}", 421
        if (
            origin is None
            or origin.partition("://")[2].lower() == host.lower()
            or _host_of(origin) in self.names.proxied
        ):
            return None
        return f"a page of {origin!r} sent this; if that is this page's own address, start the server with --name", 403

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            origin = headers.get("origin") if scope["method"] != "GET" else None
            if refusal := self.refusal(headers.get("host", ""), origin):
                await PlainTextResponse(*refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Impatient(H11Protocol):
    """HTTP that closes connections whose request head does not arrive within HEAD_SECONDS."""

    waiting: asyncio.TimerHandle | None = None

    def _wait_for_head(self, waits: bool) -> None:
        if self.waiting and not waits:
            self.waiting.cancel()
            self.waiting = None
        elif waits and not self.waiting:
            self.waiting = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head(self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for_head(False)
        super().connection_lost(exc)


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses duplicate keys: parsers disagree on which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


async def read_object(request: Request) -> dict:
    """The JSON object that was sent. Raises Refused if it is invalid, late or cut short."""
    content = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > LARGEST:
                    raise Refused(f"the request is larger than {LARGEST // 1024} KiB", 413)
    except TimeoutError:
        raise Refused(f"the request did not arrive within {BODY_SECONDS:.0f} s; send it again", 408) from None
    except ClientDisconnect:
        raise Refused("the request was cut short", 400) from None
    try:
        sent = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        sent = None
    if request.headers.get("content-type", "").partition(";")[0] != "application/json" or not isinstance(sent, dict):
        raise Refused("not a JSON object, or one with a key given twice", 400)
    return sent
