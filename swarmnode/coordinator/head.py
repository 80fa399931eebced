"""The head of a conversation: sends tokens into the pipeline, gets the next token back.

The KV cache on the stages is a function of the tokens so far: when the route changes or a stage
has lost its cache, the head sends all tokens again under the current plan and goes on.
"""

import array
import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator, Callable

from swarmnode.domain import JobId, Plan, SlotId
from swarmnode.errors import CapacityError, PeerLostError
from swarmnode.p2p.switch import Switch, TensorMessage
from swarmnode.session_messages import (
    Sampling,
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)

TOKEN_TIMEOUT_S = 30.0
"""A token that takes longer than this is asked for again, from the start."""
LOOK_S = 0.1
MAX_ATTEMPTS = 4


class Head:
    """Conversations with one served job; one at a time, the others wait their turn."""

    def __init__(self, job: JobId, switch: Switch, plan: Callable[[], Plan | None]) -> None:
        self._job = job
        self._switch = switch
        self._plan = plan
        self._turn = asyncio.Lock()
        self._inbox: dict[str, asyncio.Queue[SessionToken | SessionFailed]] = {}

    async def generate(
        self, prompt: list[int], max_tokens: int, max_positions: int, sampling: Sampling
    ) -> AsyncGenerator[SessionToken, None]:
        """Yield tokens until the caller stops, or `max_tokens`, or the model's positions end.

        Raises: CapacityError if the prompt is empty or too long, or nothing serves the job now;
        PeerLostError if no route worked in MAX_ATTEMPTS attempts.
        """
        if not prompt or len(prompt) >= max_positions:
            raise CapacityError(
                f"a prompt of {len(prompt)} tokens does not fit; the model takes 1 to "
                f"{max_positions - 1}"
            )
        room = min(max_tokens, max_positions - len(prompt))
        tokens = list(prompt)
        async with self._turn:
            session, plan, cached = "", await self._current(), 0
            try:
                for _ in range(room):
                    answer = None
                    for attempt in range(MAX_ATTEMPTS):
                        now = await self._current()
                        if not session or now.generation != plan.generation:
                            await self._close(plan, session)
                            session, plan, cached = self._open(now), now, 0
                        try:
                            answer = await self._ask(
                                plan, session, tokens, cached, sampling, max_positions
                            )
                            break
                        except PeerLostError:
                            await self._close(plan, session)
                            session = ""
                            if attempt + 1 == MAX_ATTEMPTS:
                                raise
                    assert answer is not None
                    cached = len(tokens)
                    tokens.append(answer.token)
                    yield answer
            finally:
                await self._close(plan, session)

    async def _current(self) -> Plan:
        """The plan; waits a while for one when the job is just being placed anew."""
        deadline_s = asyncio.get_running_loop().time() + TOKEN_TIMEOUT_S
        while (plan := self._plan()) is None:
            if asyncio.get_running_loop().time() > deadline_s:
                raise CapacityError("the job has no workers now; see `swarmnode jobs`")
            await asyncio.sleep(LOOK_S)
        return plan

    def _open(self, plan: Plan) -> str:
        session = secrets.token_hex(8)
        self._inbox[session] = asyncio.Queue(16)
        self._switch.join(self._job, plan, to_head=self._take)
        return session

    async def _ask(
        self,
        plan: Plan,
        session: str,
        tokens: list[int],
        cached: int,
        sampling: Sampling,
        max_positions: int,
    ) -> SessionToken:
        """The next token after `tokens`. Raises: PeerLostError if none comes."""
        fresh = tokens[cached:]
        frame = SessionFrame(
            job=self._job,
            generation=plan.generation,
            session=session,
            target=SlotId(0, 0),
            start=cached,
            stop=len(tokens),
            shape=(1, len(fresh)),
            sampling=sampling,
            max_positions=max_positions,
        )
        await self._switch.send(frame, _little_endian(fresh))
        inbox = self._inbox[session]
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                while True:
                    try:
                        answer = await asyncio.wait_for(inbox.get(), LOOK_S)
                    except TimeoutError:
                        now = self._plan()
                        if now is not None and now.generation == plan.generation:
                            continue
                        raise PeerLostError(plan.host(SlotId(0, 0)), "placed anew") from None
                    if isinstance(answer, SessionFailed):
                        raise PeerLostError(plan.host(SlotId(0, 0)), answer.reason)
                    if answer.position == len(tokens):
                        return answer
        except TimeoutError:
            reason = f"no token within {TOKEN_TIMEOUT_S:.0f} s"
            raise PeerLostError(plan.host(SlotId(0, 0)), reason) from None

    async def _close(self, plan: Plan, session: str) -> None:
        if session and self._inbox.pop(session, None) is not None:
            close = SessionClose(self._job, plan.generation, session, SlotId(0, 0))
            await self._switch.send(close)

    async def _take(self, message: TensorMessage, _payload: bytes | bytearray | memoryview) -> None:
        if isinstance(message, SessionToken | SessionFailed):
            inbox = self._inbox.get(message.session)
            if inbox is not None and not inbox.full():
                inbox.put_nowait(message)


def _little_endian(tokens: list[int]) -> bytes:
    packed = array.array("q", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
