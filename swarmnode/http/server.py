"""One HTTP server per node, on this machine only: control API, OpenAI API, metrics, page."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator
from importlib.resources import files
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from swarmnode import telemetry
from swarmnode.errors import BusyError, UserError
from swarmnode.http import control, openai
from swarmnode.http.api import NodeApi

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
CLOSE_S = 0.4
"""Open requests get this long to end by themselves, and as long again to end by cancellation."""
_PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_POLICY = "default-src 'self'; style-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


def application(
    api: NodeApi, metrics: telemetry.Metrics, token: str, *, host: str = "127.0.0.1"
) -> Starlette:
    """The node's web application. Setting `state.closing` ends every open stream.

    On this machine /v1 takes any key; when `host` is another address it takes only the token.
    """

    async def metrics_text(_request: Request) -> Response:
        return Response(metrics.text(), media_type=telemetry.CONTENT_TYPE)

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok", "peer": api.node().peer})

    pages = [Route(f"/{name}", _static(name), methods=["GET"]) for name in _PAGE]
    own = [Route("/metrics", metrics_text), Route("/health", health), *pages]
    is_local = host in LOOPBACK
    app = Starlette(
        routes=[
            *control.routes(api, token),
            *openai.routes(api, None if is_local else token),
            *own,
        ],
        middleware=[Middleware(SameSite, hosts=LOOPBACK if is_local else None)],
        exception_handlers={404: _unknown, 405: _unknown},
    )
    app.state.closing = asyncio.Event()
    return app


async def serve(
    api: NodeApi,
    metrics: telemetry.Metrics,
    token: str,
    host: str,
    port: int,
    on_bound: Callable[[int], None],
) -> None:
    """Serve until cancelled, then end within twice CLOSE_S, open streams included.

    Port 0 takes a free one; `on_bound` gets the port once connections are accepted. Signal
    handlers stay as they are. Raises: BusyError if the port is taken, UserError for a bad host.
    """
    listener = _listen(host, port)
    app = application(api, metrics, token, host=host)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    server = _Server(config)
    try:
        on_bound(listener.getsockname()[1])
        await server.serve(sockets=[listener])
    finally:
        app.state.closing.set()
        await server.close()
        listener.close()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone and is ended by cancelling `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def close(self) -> None:
        """Stop listening, let open requests end, cancel those that do not, drop connections."""
        for server in getattr(self, "servers", []):
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks = set(self.server_state.tasks)
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=CLOSE_S)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class SameSite:
    """Refuses requests that a foreign web page could cause: wrong Host, or another Origin.

    /v1 needs no token on this machine, so a page in the user's browser must not reach it, nor
    by rebinding its own name to 127.0.0.1. `hosts` None allows any Host (a public address).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            foreign = self._hosts is not None and _name(f"//{host}") not in self._hosts
            if foreign or (origin is not None and urlsplit(origin).netloc != host):
                message = "requests from other sites are refused"
                body = {"error": {"type": "AuthError", "message": message}}
                await JSONResponse(body, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _unknown(request: Request, _error: Exception) -> Response:
    message = f"no such address: {request.method} {request.url.path}"
    body = {"type": "NotFoundError", "message": message, "param": None, "code": "not_found"}
    return JSONResponse({"error": body}, 404)


def _static(name: str) -> Callable[[Request], Response]:
    data = (files("swarmnode.http") / "page" / (name or "index.html")).read_bytes()
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": _POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(_request: Request) -> Response:
        return Response(data, headers=headers, media_type=_PAGE[name])

    return page  # type: ignore[return-value]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise BusyError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0"
        ) from error
    return listener
