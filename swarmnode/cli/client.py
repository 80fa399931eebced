"""The verbs of a running node, over its HTTP API on this machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil
from pydantic import TypeAdapter, ValidationError

from swarmnode.config import DEPARTURE_FILE, HTTP_FILE, TOKEN_FILE
from swarmnode.errors import CapacityError, NotFoundError, SwarmError, UserError
from swarmnode.http.api import CheckpointView, Departure, JobView, NodeView, PeerView, Work
from swarmnode.http.failures import raise_failure

ANSWER_S = 30.0
"""Longest wait for an ordinary answer; a stream says something at least every 10 s."""
WORK_S = 3600.0
"""Longest wait for verbs that work on data: submit and export."""
ENDED = frozenset({"serving", "failed", "stopped", "handed over"})
"""Phases after which a watch ends."""

ViewT = TypeVar("ViewT")
_NODE: TypeAdapter[NodeView] = TypeAdapter(NodeView)
_DEPARTURE: TypeAdapter[Departure] = TypeAdapter(Departure)
_PEERS: TypeAdapter[tuple[PeerView, ...]] = TypeAdapter(tuple[PeerView, ...])
_JOB: TypeAdapter[JobView] = TypeAdapter(JobView)
_JOBS: TypeAdapter[tuple[JobView, ...]] = TypeAdapter(tuple[JobView, ...])
_CHECKPOINTS: TypeAdapter[tuple[CheckpointView, ...]] = TypeAdapter(tuple[CheckpointView, ...])
_WORK: TypeAdapter[Work] = TypeAdapter(Work)


class NodeClient:
    """Talks to one node. Every method raises what the node answered, as errors of ours.

    Raises, everywhere: SwarmError if the node does not answer, AuthError for a stale token.
    """

    def __init__(self, home: Path, address: str, token: str) -> None:
        self.address = address
        """Where the HTTP server is, without a slash at the end."""
        self.page = f"{address}/#token={token}"
        """The node's page, for a browser; the token stays in the browser."""
        self._home = home
        self._http = httpx.Client(
            base_url=address,
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(ANSWER_S, connect=5.0),
            trust_env=False,  # a proxy has no business on this machine's loopback
        )

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """The node that runs on `home`. Raises: NotFoundError, with how to start one."""
        try:
            body = json.loads((home / HTTP_FILE).read_text(encoding="utf-8"))
            token = (home / TOKEN_FILE).read_text(encoding="utf-8").strip()
            address = str(body["address"])
        except FileNotFoundError:
            raise _nobody(home) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SwarmError(f"{home / HTTP_FILE} cannot be read: {error}") from error
        return cls(home, address, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ---- what is there ---------------------------------------------------------------------

    def node(self) -> NodeView:
        return _view(_NODE, self._ask("GET", "/api/node"))

    def finish(self) -> NodeView:
        """Ask the node to give its work to others and end; it is still there when this returns."""
        return _view(_NODE, self._ask("POST", "/api/node/finish"))

    def wait_gone(self, view: NodeView) -> None:
        """Wait until the node's process has ended. Raises: SwarmError if that takes an hour."""
        limit_s = time.monotonic() + WORK_S
        while _runs(view.pids["daemon"]):
            if time.monotonic() > limit_s:
                raise SwarmError("the node does not end; see its log")
            time.sleep(0.1)

    def departure(self, view: NodeView) -> Departure:
        """What became of an ended node's work. Raises: SwarmError if it left no word."""
        path = self._home / DEPARTURE_FILE
        try:
            departure = _view(_DEPARTURE, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            departure = None
        if departure is None or departure.pid != view.pids["daemon"]:
            raise SwarmError(
                "the node has ended without a word of what became of its "
                f"{len(view.hosted)} slots; see its log"
            )
        return departure

    def peers(self) -> tuple[PeerView, ...]:
        return _view(_PEERS, self._ask("GET", "/api/peers"))

    def jobs(self) -> tuple[JobView, ...]:
        """Every job of the node, without the losses of each step."""
        return _view(_JOBS, self._ask("GET", "/api/jobs"))

    def job(self, job: str) -> JobView:
        """One job, without the losses of each step."""
        body = self._ask("GET", f"/api/jobs/{_segment(job)}", params={"points": 1})
        return _view(_JOB, body | {"losses": ()})

    def losses(self, job: str, num_points: int = 10_000) -> list[float | None]:
        """The loss of each step, or means of equal parts where there are more steps."""
        body = self._ask("GET", f"/api/jobs/{_segment(job)}", params={"points": num_points})
        return list(body["losses"])

    def watch(self, job: str) -> Iterator[JobView]:
        """The job whenever it changes, and at least every 10 s, until its phase is in ENDED."""
        latest: JobView | None = None
        with self._stream("GET", f"/api/jobs/{_segment(job)}/watch") as answer:
            for event in _events(answer):
                if event is not None:
                    latest = _view(_JOB, event)
                if latest is not None:
                    yield latest
        if latest is None or latest.phase not in ENDED:
            raise SwarmError(f"the node stopped while job {job} was watched")

    # ---- what can be done ------------------------------------------------------------------

    def submit(self, raw: dict[str, Any], base: Path) -> str:
        """Start a job; its id. `base` is what relative paths in `raw` are relative to."""
        return self.submit_with_notes(raw, base)[0]

    def submit_with_notes(self, raw: dict[str, Any], base: Path) -> tuple[str, tuple[str, ...]]:
        """As `submit`; also what its submitter should know, a line each."""
        body = {"job": raw, "base": str(base.absolute())}
        answer = self._ask("POST", "/api/jobs", body, limit_s=WORK_S)
        return str(answer["job"]), tuple(map(str, answer["notes"]))

    def stop(self, job: str) -> JobView:
        return _view(_JOB, self._ask("POST", f"/api/jobs/{_segment(job)}/stop"))

    def export(self, job: str, directory: Path) -> int:
        """Write a Hugging Face folder; the committed steps it holds."""
        body = {"directory": str(directory.absolute())}
        answer = self._ask("POST", f"/api/jobs/{_segment(job)}/export", body, limit_s=WORK_S)
        return int(answer["step"])

    def checkpoints(self, job: str) -> tuple[CheckpointView, ...]:
        """The checkpoints that a job keeps, the oldest first."""
        path = f"/api/jobs/{_segment(job)}/checkpoints"
        return _view(_CHECKPOINTS, self._ask("GET", path, limit_s=WORK_S))

    def verify_checkpoints(self, job: str) -> Iterator[Work]:
        """Check every byte of them; the last one says what was found."""
        return self._work(f"/api/jobs/{_segment(job)}/checkpoints/verify")

    def export_checkpoint(self, job: str, directory: Path, step: int | None) -> Iterator[Work]:
        """Write a folder to resume from; the last one says the committed steps it holds."""
        body = {"directory": str(directory.absolute()), "step": step}
        return self._work(f"/api/jobs/{_segment(job)}/checkpoints/export", body)

    def _work(self, path: str, body: Any = None) -> Iterator[Work]:
        with self._stream("POST", path, body) as answer:
            for event in _events(answer):
                if event is not None:
                    yield _view(_WORK, event)

    def generate(
        self, model: str, prompt: str, *, max_tokens: int, temperature: float, seed: int | None
    ) -> Iterator[str]:
        """The pieces of the answer as the swarm makes them, over the OpenAI API."""
        body = {
            "model": model, "prompt": prompt, "max_tokens": max_tokens,
            "temperature": temperature, "seed": seed, "stream": True,
        }  # fmt: skip
        with self._stream("POST", "/v1/completions", body) as answer:
            for event in _events(answer):
                for choice in event["choices"] if event is not None else ():
                    yield str(choice["text"])

    # ---- how -------------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, body: Any = None, *, params: Any = None,
        limit_s: float = ANSWER_S,
    ) -> Any:  # fmt: skip
        timeout = httpx.Timeout(limit_s, connect=5.0)
        with self._translated():
            answer = self._http.request(method, path, json=body, params=params, timeout=timeout)
            parsed = _parse(answer)
        _raise_for(answer.status_code, parsed)
        return parsed

    @contextmanager
    def _stream(self, method: str, path: str, body: Any = None) -> Iterator[httpx.Response]:
        with self._translated(), self._http.stream(method, path, json=body) as answer:
            if answer.status_code >= 400:
                answer.read()
                _raise_for(answer.status_code, _parse(answer))
            yield answer

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise _nobody(self._home) from None
        except httpx.TimeoutException:
            raise SwarmError(f"the node at {self.address} does not answer in time") from None
        except httpx.HTTPError as error:
            raise SwarmError(f"the node at {self.address} broke off: {error}") from error


def _nobody(home: Path) -> NotFoundError:
    return NotFoundError(
        f"no node runs on {home}; start one with `swarmnode up --home {home}`, or name another home"
    )


def _runs(pid: int) -> bool:
    """Whether a process lives: one that has ended may wait for its parent to notice."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _segment(job: str) -> str:
    """`job` as one part of a path: a name with a slash must not reach another address."""
    if not job or not all(letter.isalnum() or letter in "._-" for letter in job):
        raise NotFoundError(f"{job!r:.80} is no name or id of a job; `swarmnode jobs` lists them")
    return job


def _events(answer: httpx.Response) -> Iterator[Any]:
    """The data of server-sent events; None for a comment, which keeps the connection open."""
    for line in answer.iter_lines():
        if line.startswith(":"):
            yield None
        elif line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if isinstance(event, dict) and "error" in event:
                _raise_for(500, event)
            yield event


def _parse(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise SwarmError(f"the node answered {answer.status_code} without JSON") from None


def _raise_for(status: int, body: Any) -> None:
    """As `raise_failure`, for the OpenAI API's form of errors too."""
    if status < 400:
        return
    fault = body.get("error") if isinstance(body, dict) else None
    code = fault.get("code") if isinstance(fault, dict) else None
    if isinstance(fault, dict) and "code" in fault:
        message = str(fault.get("message"))
        if code == "rate_limit_exceeded":
            raise CapacityError(message)
        raise (
            UserError(message)
            if fault.get("type") == "invalid_request_error"
            else SwarmError(message)
        )
    raise_failure(status, body)


def _view(form: TypeAdapter[ViewT], body: Any) -> ViewT:
    try:
        return form.validate_python(body)
    except ValidationError as error:
        raise SwarmError(f"the node runs another version: {error.errors()[0]['msg']}") from None
