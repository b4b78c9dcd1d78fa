"""The local server of ``sae-core explore``: a page, the latents behind it, and the model.

It listens on 127.0.0.1 and answers only under a random token in the path, only to requests whose Host is its own address, and
to posts only from its own pages: another site can neither read nor send. What fails becomes a message; the server goes on.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields
from typing import Any, cast, final

from sae_core.errors import SaeCoreError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sae_explorer.comparison import compared
from sae_explorer.dashboard import PAGE_FILES, linked_page, page_file
from sae_explorer.index import Query, fires_on, search
from sae_explorer.playing import Change, Model, counted
from sae_explorer.reading import Studied

__all__ = ["application", "listen", "new_token", "serve"]

log = logging.getLogger(__name__)

_LARGEST_BODY = 200_000
_GENERATIONS = 2
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store",
}  # fmt: skip

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(16)


@final
class _Guard:
    """Lets through what the own page asks, and gives every answer its headers."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str, port: int) -> None:
        self._app, self._path = app, f"/{token}/".encode()
        self._hosts = {f"{host}:{port}".encode() for host in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = cast("dict[bytes, bytes]", dict(scope["headers"]))
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            return await JSONResponse({"error": refusal}, 403, headers=_HEADERS)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
        if headers.get(b"host", b"") not in self._hosts:
            return "this host is not served"
        if not secrets.compare_digest(scope["path"].encode()[: len(self._path)], self._path):
            return "the address lacks the token; open the one that the command printed"
        origin = headers.get(b"origin")
        own = {b"http://" + host for host in self._hosts}
        if (origin is not None and origin not in own) or (scope["method"] not in ("GET", "HEAD") and origin is None):
            return "requests from other pages are not served"
        return None


@final
class _Explorer:
    """Answers to the page's requests."""

    def __init__(self, studied: Mapping[str, Studied], model: Model | None) -> None:
        self.studied, self.model = dict(studied), model
        self._slots, self._stops = threading.Semaphore(_GENERATIONS), dict[str, threading.Event]()

    def one(self, name: Any) -> Studied:
        if not isinstance(name, str) or name not in self.studied:
            raise SaeCoreError(f"there is no dictionary {str(name)[:100]!r} here")
        return self.studied[name]

    async def dictionaries(self, request: Request) -> Response:
        return _json([studied.facts() for studied in self.studied.values()])

    async def latents(self, request: Request) -> Response:
        query, studied = _query(request.query_params), self.one(request.query_params.get("dictionary"))
        total, rows = await run_in_threadpool(search, studied.index, query, studied.labels_path)
        return _json({"total": total, "rows": rows})

    async def latent(self, request: Request) -> Response:
        studied, latent = self.one(request.query_params.get("dictionary")), _whole(request.query_params.get("latent"))
        found = await run_in_threadpool(studied.latent, latent)
        return _json({**found, **await run_in_threadpool(studied.labels.get, latent)})

    async def label(self, request: Request) -> Response:
        body = await _body(request)
        label, note = (str(body.get(key, "")).strip() for key in ("label", "note"))
        await run_in_threadpool(self.one(body.get("dictionary")).labels.put, _whole(body.get("latent")), label, note)
        return _json({})

    async def labels(self, request: Request) -> Response:
        studied = self.one(request.query_params.get("dictionary"))
        found = {**studied.facts(), "labels": await run_in_threadpool(studied.labels.all)}
        return Response(
            json.dumps(found, indent=2, ensure_ascii=False), media_type="application/json",
            headers={"Content-Disposition": 'attachment; filename="labels.json"', **_HEADERS},
        )  # fmt: skip

    async def text(self, request: Request) -> Response:
        body = await _body(request)
        studied = self.one(body.get("dictionary"))
        found = await run_in_threadpool(self._model().fires, studied.name, str(body.get("text", "")))
        latents = sorted({latent for fired in found["fired"] for latent, *_ in fired})
        words = await run_in_threadpool(fires_on, studied.index, latents)
        return _json({**found, "dictionary": studied.name, "words": words})

    async def compare(self, request: Request) -> Response:
        a, b = (self.one(request.query_params.get(key)) for key in ("a", "b"))
        found = await run_in_threadpool(compared, a, b, lambda studied, latents: fires_on(studied.index, latents))
        return _json(found)

    async def stop(self, request: Request) -> Response:
        event = self._stops.get(str((await _body(request)).get("job")))
        if event is not None:
            event.set()
        return _json({"stopped": event is not None})

    async def generate(self, request: Request) -> Response:
        body = await _body(request)
        model, studied, job = self._model(), self.one(body.get("dictionary")), str(body.get("job"))[:100]
        change = Change(
            latent=_whole(body.get("latent")), how=body.get("how", "add"), amount=_number(body.get("amount", 0.0))
        )
        tokens, temperature = _whole(body.get("tokens", 40)), _number(body.get("temperature", 0.0))
        text, event = str(body.get("text", "")), threading.Event()

        def parts() -> Iterator[str]:
            with counted(self._slots) as free:
                if not free:
                    yield _line({"error": f"{_GENERATIONS} generations are running already; stop one, or wait"})
                    return
                self._stops[job] = event
                try:
                    for part in model.generate(
                        studied.name, text, change, tokens=tokens, temperature=temperature, stop=event
                    ):
                        yield _line(part)
                except Exception as error:  # noqa: BLE001 - whatever fails is shown where it was asked for
                    yield _line({"error": _said(error)})
                finally:
                    event.set()
                    self._stops.pop(job, None)

        return StreamingResponse(parts(), media_type="application/x-ndjson", headers=_HEADERS)

    def _model(self) -> Model:
        if self.model is None:
            raise SaeCoreError("there is no model behind this page")
        return self.model


def application(
    studied: Mapping[str, Studied], model: Model | None, *, token: str, port: int
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The server as an ASGI application that lives under ``/TOKEN/`` on `port`."""
    explorer = _Explorer(studied, model)

    async def page(request: Request) -> Response:
        return HTMLResponse(linked_page('<meta name="explorer" content="live">'), headers=_HEADERS)

    async def file(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response(page_file(name), media_type=kind, headers=_HEADERS)

    async def failed(request: Request, error: Exception) -> Response:
        known = isinstance(error, SaeCoreError)
        if not known:
            log.error("a request failed", exc_info=error)
        return JSONResponse({"error": _said(error)}, 400 if known else 500, headers=_HEADERS)

    base = f"/{token}"
    routes = [
        Route(f"{base}/", page), *(Route(f"{base}/{name}", file) for name in PAGE_FILES),
        Route(f"{base}/api/dictionaries", _safe(explorer.dictionaries, failed)),
        Route(f"{base}/api/latents", _safe(explorer.latents, failed)),
        Route(f"{base}/api/latent", _safe(explorer.latent, failed)),
        Route(f"{base}/api/label", _safe(explorer.label, failed), methods=["POST"]),
        Route(f"{base}/api/labels.json", _safe(explorer.labels, failed)),
        Route(f"{base}/api/text", _safe(explorer.text, failed), methods=["POST"]),
        Route(f"{base}/api/compare", _safe(explorer.compare, failed)),
        Route(f"{base}/api/generate", _safe(explorer.generate, failed), methods=["POST"]),
        Route(f"{base}/api/stop", _safe(explorer.stop, failed), methods=["POST"]),
    ]  # fmt: skip
    return _Guard(Starlette(routes=routes), token, port)


def listen(port: int = 0) -> socket.socket:
    """A socket that has a port of 127.0.0.1, a free one where `port` is 0. Raises SaeCoreError when it cannot be had."""
    # With the protocol named, asyncio sends small answers at once; without it each would wait 40 ms for an acknowledgement.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()  # only then does nobody else get the port
    except (OSError, OverflowError) as error:
        listening.close()
        raise SaeCoreError(f"explore: port {port} cannot be had: {error}; name another with --port") from None
    return listening


def serve(
    studied: Mapping[str, Studied],
    model: Model | None,
    listening: socket.socket,
    *,
    say: Callable[[str], object] = print,
) -> None:
    """Serve on what `listen` gave until interrupted; `say` gets the address."""
    import uvicorn

    port, token = int(listening.getsockname()[1]), new_token()
    app = cast("Any", application(studied, model, token=token, port=port))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="off")
    say(f"open http://127.0.0.1:{port}/{token}/  (Ctrl-C ends it)")
    uvicorn.Server(config).run(sockets=[listening])


def _safe(
    answer: Callable[[Request], Awaitable[Response]], failed: Callable[[Request, Exception], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except Exception as error:  # noqa: BLE001 - whatever fails becomes a message in the page
            return await failed(request, error)

    return answered


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, SaeCoreError) else f"{type(error).__name__}: {text}"


def _json(value: Any) -> Response:
    return JSONResponse(value, headers=_HEADERS)


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


async def _body(request: Request) -> Mapping[str, Any]:
    """The JSON object of a post, read no further than it may be long."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise SaeCoreError("a post has to be JSON")
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _LARGEST_BODY:
            raise SaeCoreError(f"what was sent is larger than {_LARGEST_BODY:,} bytes")
    try:
        body = json.loads(content)
    except ValueError:
        raise SaeCoreError("a post has to be JSON") from None
    if not isinstance(body, dict):
        raise SaeCoreError("a post has to be a JSON object")
    return cast("Mapping[str, Any]", body)


def _query(given: Mapping[str, str]) -> Query:
    values: dict[str, Any] = {}
    for field in fields(Query):
        if (text := given.get(field.name)) is not None:
            default = field.default
            if isinstance(default, bool):
                values[field.name] = text == "true"
            elif isinstance(default, int):
                values[field.name] = _whole(text)
            elif isinstance(default, float):
                values[field.name] = _number(text)
            else:
                values[field.name] = text
    return Query(**values)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise SaeCoreError(f"{value!r} is no whole number")
    return int(number)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SaeCoreError(f"{str(value)[:50]!r} is no number") from None
    if not abs(number) < 1e15:
        raise SaeCoreError(f"{number} is out of range")
    return number
