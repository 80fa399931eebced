"""The solver in a short-lived child of its own: it takes seconds, and libraries of its own."""

import asyncio
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from swarmnode.children import python_module, spawn_child
from swarmnode.coordinator.solver.request import (
    Answer,
    GridRequest,
    Improvement,
    ImproveRequest,
    Refused,
    Request,
)
from swarmnode.errors import CapacityError, ChildError
from swarmnode.manifest import PlacementConfig

TIMEOUT_S = 300.0
"""Where every core is busy computing steps, it gets a hundredth of one."""
MAX_MESSAGE_BYTES = 64 << 20
REQUESTS: TypeAdapter[Request] = TypeAdapter(Request)
ANSWERS: TypeAdapter[Answer] = TypeAdapter(Answer)
AnswerT = TypeVar("AnswerT")


class Solver:
    """Asks one child at a time, so that planning never takes more than one core."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._turn = asyncio.Lock()

    async def improve(self, request: ImproveRequest) -> Improvement:
        """A better placement than the running one. Raises: CapacityError, ChildError."""
        return await self._ask(request, Improvement)

    async def decide_grid(self, request: GridRequest) -> PlacementConfig:
        """What a job left open of its grid. Raises: CapacityError, ChildError."""
        return await self._ask(request, PlacementConfig)

    async def _ask(self, request: Request, kind: type[AnswerT]) -> AnswerT:
        async with self._turn:
            answer = await _run_child(request, self._log)
        if isinstance(answer, Refused):
            raise CapacityError(answer.reason)
        if not isinstance(answer, kind):
            raise ChildError(f"solver: answered with {type(answer).__name__}")
        return answer


async def _run_child(request: Request, log: Path) -> Answer:
    child = spawn_child(
        python_module("swarmnode.coordinator.solver_child"),
        env={"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        name="solver",
        log=log,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await child.send(REQUESTS.dump_json(request))
            return ANSWERS.validate_json(bytes(await child.receive()))
    except TimeoutError:
        raise ChildError(f"solver: no answer in {TIMEOUT_S:.0f} s") from None
    except ValidationError as error:
        raise ChildError(f"solver: an answer that is none: {error.errors()[0]['msg']}") from None
    finally:
        await child.stop(grace_s=1.0)
