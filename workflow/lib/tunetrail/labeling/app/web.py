"""The pages.

An answer, a draft, a skip and an undo are each a POST of JSON with the session's CSRF token. Entering is a POST without
one, which needs the link's token. A GET of `/task` leases a task; another site cannot send it, since the cookie is
SameSite=Strict.

Pages never contain the name of a model or an output's position in the task: outputs go by the position in which they
are shown, and the nonce of the assignment is all that a page knows about its task.
"""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from tunetrail import __version__
from tunetrail.labeling.app import access, queue
from tunetrail.labeling.app.answers import COMMENT, FLAGS, REASONS, TEXT, Refused
from tunetrail.labeling.app.requests import Names, OwnNames, read_object
from tunetrail.labeling.app.store import Settings, Store

HERE = Path(__file__).parent
COOKIE = "tunetrail_label"
QualityValues = Callable[[Store], dict[str, Any]]
"""Store -> the values of the template of the quality page."""
CHECKPOINT_SECONDS = 300
"""How often what was stored goes from SQLite's write-ahead log into the file, which people copy."""
LETTERS = "ABCDEFGHI"
"""Names of outputs on a page, in the order shown."""
WRONG_SECONDS = 1.0
"""How long an address that sent too many wrong links waits for each answer."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
# Outputs are shown in full: HTML stays text, links show their addresses, and nothing is loaded from elsewhere.
_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_markdown.disable(["image", "link", "autolink", "reference", "html_inline", "html_block"])


def markdown(text: str) -> Markup:
    """A text, which may be Markdown, as safe HTML."""
    return Markup(_markdown.render(text))


ACTIONS = ("leave", "draft", "submit", "skip", "undo")
"""What can be posted, once one has entered."""


class Frame:
    """Middleware around all routes: removes the prefix, if a proxy left it on, and adds the headers."""

    def __init__(self, app: ASGIApp, prefix: str):
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def framed(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = HEADERS | {"cache-control": "no-cache" if "/static/" in scope["path"] else "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), value.encode()) for n, value in added.items()),
                ]
            await send(message)

        if scope["type"] == "http" and self.prefix and (scope["path"] + "/").startswith(self.prefix + "/"):
            scope = {**scope, "path": scope["path"][len(self.prefix) :] or "/", "raw_path": b""}
        await self.app(scope, receive, framed)


def _field(sent: dict, name: str, kind: type, default: Any = None) -> Any:
    value = sent.get(name, default)
    if type(value) is not kind:
        raise Refused(f"{name!r} is missing or not a {kind.__name__}", 400)
    return value


def _not_available(store: Store) -> dict[str, Any]:
    raise Refused("this server has no quality page", 404)


class Pages:
    """The handlers, over a store."""

    def __init__(self, store: Store, prefix: str, quality: QualityValues):
        self.store, self.prefix, self.measure_quality = store, prefix, quality
        self.requests = access.Rate(per_minute=300, burst=120)
        self.wrong = access.Rate(per_minute=30, burst=60)  # through a tunnel everyone has the same address
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters["markdown"] = markdown
        self.templates.globals |= {"base": prefix, "version": __version__}

    def page(self, name: str, request: Request, status: int = 200, **values: Any) -> Response:
        session = getattr(request.state, "session", None)
        html = self.templates.get_template(name).render(who=session, **values)
        return HTMLResponse(html, status)

    # Sessions

    def guarded(
        self, handler: Callable[..., Awaitable[Response]], admin: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler for those who have entered, with rate limits and, for a POST, the CSRF token."""

        async def guarded(request: Request) -> Response:
            session = await run_in_threadpool(access.session, self.store, request.cookies.get(COOKIE))
            if session is None:
                if request.method == "GET":
                    return RedirectResponse(f"{self.prefix}/enter", 303)
                raise Refused("your session has ended; open your link in another tab, then try again here", 401)
            if not self.requests.allows(session.pseudonym):
                raise Refused("too many requests; wait a moment", 429)
            if request.method == "POST" and not hmac.compare_digest(
                request.headers.get("x-csrf-token", "").encode(), session.csrf.encode()
            ):
                raise Refused("this page belongs to another session; reload it", 403)
            if admin and not session.admin:
                raise Refused("for admins only", 403)
            request.state.session = session
            return await handler(request)

        return guarded

    async def entrance(self, request: Request) -> Response:
        return self.page("enter.html.j2", request)

    async def enter(self, request: Request) -> Response:
        token = _field(await read_object(request), "token", str)
        cookie = await run_in_threadpool(access.enter, self.store, token.strip())
        if cookie is None:
            # Only after the look: whoever has a right link gets in, whatever others send from the same address.
            if not self.wrong.allows(request.client.host if request.client else ""):
                await asyncio.sleep(WRONG_SECONDS)
                raise Refused("too many attempts; wait a minute", 429)
            raise Refused("this token is not known; ask for a new link", 401)
        reply = JSONResponse({"next": f"{self.prefix}/"})
        reply.set_cookie(
            COOKIE,
            cookie,
            path=self.prefix or "/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
            max_age=3600 * access.SESSION_HOURS,
        )
        return reply

    async def leave(self, request: Request) -> Response:
        await run_in_threadpool(access.leave, self.store, request.cookies[COOKIE])
        reply = JSONResponse({"next": f"{self.prefix}/enter"})
        reply.delete_cookie(COOKIE, path=self.prefix or "/")
        return reply

    # Pages

    async def _settings(self) -> Settings:
        def read() -> Settings:
            with self.store.reading() as connection:
                return self.store.settings(connection)

        return await run_in_threadpool(read)

    async def home(self, request: Request) -> Response:
        labeler = request.state.session.pseudonym
        progress = await run_in_threadpool(self.store.progress)
        last = await run_in_threadpool(queue.finished, self.store, labeler)
        answered = await run_in_threadpool(queue.answered, self.store, labeler)
        return self.page(
            "home.html.j2", request, progress=progress, last=last, answered=answered, settings=await self._settings()
        )

    async def task(self, request: Request) -> Response:
        given = await run_in_threadpool(queue.next_task, self.store, request.state.session.pseudonym)
        stored = request.query_params.get("stored", "")
        notice = f"Stored as event {int(stored)}." if stored.isascii() and stored.isdigit() and len(stored) < 10 else ""
        if given is None:
            return self.page("done.html.j2", request, notice=notice)
        name = "rank.html.j2" if given.task["kind"] == "ranking" else "write.html.j2"
        return self.page(
            name,
            request,
            given=given,
            letters=LETTERS,
            notice=notice,
            settings=await self._settings(),
            flags=FLAGS,
            reasons=REASONS,
            most={"comment": COMMENT, "text": TEXT},
            draft=json.dumps(given.draft or {}),
        )

    async def feedback(self, request: Request) -> Response:
        event = request.query_params.get("event", "")
        number = int(event) if event.isascii() and event.isdigit() and len(event) < 10 else 0
        feedback = await run_in_threadpool(queue.feedback, self.store, request.state.session.pseudonym, number)
        if feedback is None:
            raise Refused("you have answered no such training task", 404)
        return self.page("feedback.html.j2", request, letters=LETTERS, **feedback)

    async def guidelines(self, request: Request) -> Response:
        return self.page("guidelines.html.j2", request, settings=await self._settings())

    async def quality(self, request: Request) -> Response:
        return self.page("quality.html.j2", request, **await run_in_threadpool(self.measure_quality, self.store))

    # Actions

    async def draft(self, request: Request) -> Response:
        sent = await read_object(request)
        nonce, draft = _field(sent, "nonce", str), _field(sent, "draft", dict)
        expires = await run_in_threadpool(queue.save_draft, self.store, request.state.session.pseudonym, nonce, draft)
        return JSONResponse({"expires": expires})

    async def submit(self, request: Request) -> Response:
        sent = await read_object(request)
        nonce, answer = _field(sent, "nonce", str), _field(sent, "answer", dict)
        stored = await run_in_threadpool(queue.submit, self.store, request.state.session.pseudonym, nonce, answer)
        page = f"feedback?event={stored.event}" if stored.training else f"task?stored={stored.event}"
        return JSONResponse({"event": stored.event, "next": f"{self.prefix}/{page}"})

    async def skip(self, request: Request) -> Response:
        sent = await read_object(request)
        nonce, reason = _field(sent, "nonce", str), _field(sent, "skip", dict)
        event = await run_in_threadpool(queue.skip, self.store, request.state.session.pseudonym, nonce, reason)
        return JSONResponse({"event": event, "next": f"{self.prefix}/task?stored={event}"})

    async def undo(self, request: Request) -> Response:
        event = (await read_object(request)).get("event")
        if event is not None and not (type(event) is int and 0 < event < 2**31):
            raise Refused("'event' is not the number of an event", 400)
        if not await run_in_threadpool(queue.undo, self.store, request.state.session.pseudonym, event):
            raise Refused("there is no answer to undo", 409)
        return JSONResponse({"next": f"{self.prefix}/task"})

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        if request.method == "GET":
            return self.page("refused.html.j2", request, error.status, message=str(error))
        return JSONResponse({"error": str(error)}, error.status)

    async def missing(self, request: Request, error: Exception) -> Response:
        return await self.refused(request, Refused("there is no such page", getattr(error, "status_code", 404)))

    async def fault(self, request: Request, error: Exception) -> Response:
        # Frame is not around this handler, hence the headers.
        message = "the server failed and does not know whether this was stored. Send it again: nothing is stored twice"
        return JSONResponse({"error": message}, 500, HEADERS | {"cache-control": "no-store"})


async def _checkpoint_regularly(store: Store) -> None:
    while True:
        await asyncio.sleep(CHECKPOINT_SECONDS)
        await run_in_threadpool(store.database.checkpoint)


def application(
    store: Store, prefix: str = "", quality: QualityValues = _not_available, names: Names | None = None
) -> Starlette:
    """The pages as an ASGI application.

    Args:
        prefix: the path under which they are served, such as /labels; '' for none.
        quality: computes what the quality page shows, each time an admin asks for it.
        names: host names under which the page may be asked for; None: any.
    """
    pages = Pages(store, prefix, quality)
    guarded = pages.guarded
    routes = [
        Route("/enter", pages.entrance),
        Route("/enter", pages.enter, methods=["POST"]),
        Route("/", guarded(pages.home)),
        Route("/task", guarded(pages.task)),
        Route("/feedback", guarded(pages.feedback)),
        Route("/guidelines", guarded(pages.guidelines)),
        Route("/quality", guarded(pages.quality, admin=True)),
        *(Route(f"/{name}", guarded(getattr(pages, name)), methods=["POST"]) for name in ACTIONS),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    handlers: Any = {Refused: pages.refused, 404: pages.missing, 405: pages.missing, 500: pages.fault}

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        checkpoints = asyncio.create_task(_checkpoint_regularly(store))
        yield
        checkpoints.cancel()
        await run_in_threadpool(store.database.checkpoint)

    return Starlette(
        routes=routes,
        middleware=[Middleware(Frame, prefix=prefix), Middleware(OwnNames, names=names)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
