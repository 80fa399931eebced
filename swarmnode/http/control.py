"""The control API under /api: what the command line and the page ask of a node, as JSON."""

import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from swarmnode.errors import AuthError, ManifestError, SwarmError, UserError
from swarmnode.http.api import CheckpointView, JobView, NodeApi, NodeView, PeerView, Work
from swarmnode.http.failures import control_failure
from swarmnode.http.stream import EventStream, closing

MAX_BODY_BYTES = 4 << 20
MAX_POINTS = 10_000
Endpoint = Callable[[Request], Awaitable[Response]]

NODE: TypeAdapter[NodeView] = TypeAdapter(NodeView)
PEERS: TypeAdapter[tuple[PeerView, ...]] = TypeAdapter(tuple[PeerView, ...])
JOB: TypeAdapter[JobView] = TypeAdapter(JobView)
JOBS: TypeAdapter[tuple[JobView, ...]] = TypeAdapter(tuple[JobView, ...])
CHECKPOINTS: TypeAdapter[tuple[CheckpointView, ...]] = TypeAdapter(tuple[CheckpointView, ...])
WORK: TypeAdapter[Work] = TypeAdapter(Work)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


BodyT = TypeVar("BodyT", bound=_Body)


class Submission(_Body):
    """POST /api/jobs."""

    job: dict[str, Any]
    """The parsed TOML of a job file."""
    base: Path
    """What its relative paths are relative to; absolute."""


class ExportRequest(_Body):
    """POST /api/jobs/{job}/export."""

    directory: Path
    """A new or empty folder; absolute."""


class CheckpointExportRequest(ExportRequest):
    """POST /api/jobs/{job}/checkpoints/export."""

    step: int | None = None
    """Which checkpoint; the newest unless given."""


def routes(api: NodeApi, token: str) -> list[Route]:
    """The control API of `api`; every request must carry `Authorization: Bearer <token>`."""

    async def node(_request: Request) -> Response:
        return _json(NODE, api.node())

    async def peers(_request: Request) -> Response:
        return _json(PEERS, api.peers())

    async def finish(_request: Request) -> Response:
        api.finish()
        return _json(NODE, api.node())

    async def jobs(_request: Request) -> Response:
        return _json(JOBS, tuple(replace(view, losses=()) for view in api.jobs()))

    async def job(request: Request) -> Response:
        view = api.job(request.path_params["job"])
        points = request.query_params.get("points")
        if points is not None:
            if not points.isdecimal() or not 1 <= int(points) <= MAX_POINTS:
                raise UserError(f"points must be a number from 1 to {MAX_POINTS}")
            view = replace(view, losses=thin(view.losses, int(points)))
        return _json(JOB, view)

    async def watch(request: Request) -> Response:
        name = request.path_params["job"]
        api.job(name)

        async def events() -> AsyncGenerator[bytes, None]:
            async with closing(api.watch(name)) as views:
                async for view in views:
                    yield JOB.dump_json(replace(view, losses=()), warnings=False)

        return EventStream(events(), control_failure)

    async def submit(request: Request) -> Response:
        body = await _body(request, Submission)
        job_id = await api.submit(body.job, body.base)
        answer = {"job": job_id, "notes": api.notes(job_id)}
        return Response(json.dumps(answer), 201, media_type="application/json")

    async def stop(request: Request) -> Response:
        name = request.path_params["job"]
        view = api.job(name)
        await api.stop(view.job)
        return _json(JOB, replace(api.job(view.job), losses=()))

    async def export(request: Request) -> Response:
        body = await _body(request, ExportRequest)
        step = await api.export(request.path_params["job"], body.directory)
        answer = {"step": step, "directory": str(body.directory)}
        return Response(json.dumps(answer), media_type="application/json")

    async def checkpoints(request: Request) -> Response:
        return _json(CHECKPOINTS, await api.checkpoints(_job_of(request)))

    async def verify(request: Request) -> Response:
        return EventStream(_at_work(api.verify_checkpoints(_job_of(request))), control_failure)

    async def export_checkpoint(request: Request) -> Response:
        body = await _body(request, CheckpointExportRequest)
        works = api.export_checkpoint(_job_of(request), body.directory, body.step)
        return EventStream(_at_work(works), control_failure)

    table: list[tuple[str, str, Endpoint]] = [
        ("GET", "/api/node", node),
        ("POST", "/api/node/finish", finish),
        ("GET", "/api/peers", peers),
        ("GET", "/api/jobs", jobs),
        ("POST", "/api/jobs", submit),
        ("GET", "/api/jobs/{job}", job),
        ("GET", "/api/jobs/{job}/watch", watch),
        ("POST", "/api/jobs/{job}/stop", stop),
        ("POST", "/api/jobs/{job}/export", export),
        ("GET", "/api/jobs/{job}/checkpoints", checkpoints),
        ("POST", "/api/jobs/{job}/checkpoints/verify", verify),
        ("POST", "/api/jobs/{job}/checkpoints/export", export_checkpoint),
    ]
    return [
        Route(path, _guarded(endpoint, token), methods=[method]) for method, path, endpoint in table
    ]


def _job_of(request: Request) -> str:
    return str(request.path_params["job"])


async def _at_work(works: AsyncIterator[Work]) -> AsyncGenerator[bytes, None]:
    async with closing(works) as each:
        async for work in each:
            yield WORK.dump_json(work)


def thin(losses: tuple[float, ...], num_points: int) -> tuple[float, ...]:
    """At most `num_points` means of equal parts of `losses`, in order."""
    if len(losses) <= num_points:
        return losses
    edges = [len(losses) * i // num_points for i in range(num_points + 1)]
    return tuple(sum(losses[start:stop]) / (stop - start) for start, stop in pairwise(edges))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of `request`. Raises: UserError as soon as it is longer than `max_bytes`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise UserError(f"the request is longer than {max_bytes} bytes")
    return bytes(body)


def _guarded(endpoint: Endpoint, token: str) -> Endpoint:
    async def guarded(request: Request) -> Response:
        try:
            check_token(request, token)
            return await endpoint(request)
        except SwarmError as error:
            return control_failure(error)

    return guarded


def check_token(request: Request, token: str) -> None:
    """Raises: AuthError unless `request` carries `token`; compares in constant time."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise AuthError("no token given; send the one in the token file of the node's home")
    if not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise AuthError("wrong or stale token; read it again from the node's home")


async def _body(request: Request, kind: type[BodyT]) -> BodyT:
    try:
        return kind.model_validate_json(await read_body(request, MAX_BODY_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise ManifestError(f"{where}: {first['msg']}") from None


def _json(adapter: TypeAdapter[Any], value: object) -> Response:
    # pydantic writes NaN and infinity as null: a browser can read the answer of a diverged job.
    headers = {"cache-control": "no-store"}
    body = adapter.dump_json(value, warnings=False)
    return Response(body, headers=headers, media_type="application/json")
