"""Errors on their way through HTTP: to a status and one line, and back to the same class."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from swarmnode import errors
from swarmnode.errors import SwarmError

STATUS: Mapping[type[SwarmError], int] = {
    errors.ManifestError: 400,
    errors.DataError: 400,
    errors.AuthError: 401,
    errors.NotFoundError: 404,
    errors.BusyError: 409,
    errors.CapacityError: 503,
    errors.UserError: 400,
    errors.PeerError: 503,
    errors.ChildError: 503,
}
_REVIVED: Mapping[str, type[SwarmError]] = {
    kind.__name__: kind for kind in STATUS if issubclass(kind, errors.UserError)
}


def status_of(error: SwarmError) -> int:
    """The HTTP status of `error`: of its own class or of the nearest one above it."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def one_line(error: BaseException) -> str:
    """The text of `error` on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def control_failure(error: SwarmError) -> Response:
    """The control API's answer to `error`; `raise_failure` turns it back."""
    body = {"error": {"type": type(error).__name__, "message": one_line(error)}}
    return JSONResponse(body, status_of(error))


def raise_failure(status: int, body: Any) -> None:
    """Raise what a node's control API answered; nothing happens below status 400.

    User errors come back as their own class, everything else as a SwarmError with the same text.
    """
    if status < 400:
        return
    fault = body.get("error") if isinstance(body, dict) else None
    if not isinstance(fault, dict):
        raise SwarmError(f"the node answered with status {status}")
    kind = _REVIVED.get(str(fault.get("type")), SwarmError)
    raise kind(str(fault.get("message") or f"the node answered with status {status}"))


class ApiError(Exception):
    """A request that the OpenAI-compatible API refuses, in OpenAI's words."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def openai_failure(error: SwarmError) -> ApiError:
    """`error` in OpenAI's form. Busy is 429 with a delay; a broken route is 503.

    A client must not repeat a request that already cost work: only 429 invites it to.
    """
    message = one_line(error)
    if isinstance(error, errors.NotFoundError):
        return ApiError(message, status=404, param="model", code="model_not_found")
    if isinstance(error, errors.CapacityError | errors.BusyError):
        return ApiError(
            message, status=429, kind="rate_limit_error", code="rate_limit_exceeded",
            headers={"retry-after": "1"},
        )  # fmt: skip
    if isinstance(error, errors.UserError):
        return ApiError(message)
    return ApiError(
        message, status=503, kind="server_error", code="route_broken",
        headers={"x-should-retry": "false"},
    )  # fmt: skip
