"""The head of a conversation: tokens in order, whatever the route does; what it opens it closes."""

import asyncio
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import async_solipsism
import pytest

from swarmnode.coordinator.head import LOOK_S, MAX_ATTEMPTS, TOKEN_TIMEOUT_S, Head
from swarmnode.domain import Generation, JobId, PeerId, Plan
from swarmnode.errors import CapacityError, PeerLostError
from swarmnode.p2p.memory import MemoryNetwork
from swarmnode.p2p.switch import Switch, TensorMessage
from swarmnode.session_messages import (
    Sampling,
    SessionClose,
    SessionFailed,
    SessionFrame,
    SessionToken,
)

ResultT = TypeVar("ResultT")
JOB = JobId("0123456789abcdef")
ME, WORKER = PeerId("me"), PeerId("worker")
GREEDY = Sampling()
PROMPT = [3, 17, 42]


def virtual(scenario: Coroutine[Any, Any, ResultT]) -> ResultT:
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        return runner.run(scenario)


def after(tokens: list[int]) -> int:
    """The model of these tests: the next token depends on every one before."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % 997


def continued(prompt: list[int], num_tokens: int) -> list[int]:
    """What an undisturbed worker would answer."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(after(tokens))
    return tokens[len(prompt) :]


def plan(generation: int = 1) -> Plan:
    return Plan(Generation(generation), ((0, 1),), ((WORKER,),), ME)


class Worker:
    """Hosts the only stage: keeps the tokens of each session, refuses what does not follow."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.generation = 0
        self.caches: dict[str, list[int]] = {}
        self.frames: list[SessionFrame] = []
        self.is_silent = False
        self.is_full = False
        self.repeats = 1

    def assign(self, plan: Plan) -> None:
        """A new generation: the caches of the old one are gone."""
        self.generation = plan.generation
        self.caches.clear()
        self.switch.join(JOB, plan, to_worker=self._take)

    async def _take(self, message: TensorMessage, payload: Any) -> None:
        if isinstance(message, SessionClose):
            self.caches.pop(message.session, None)
            return
        assert isinstance(message, SessionFrame)
        self.frames.append(message)
        tokens = struct.unpack(f"<{len(payload) // 8}q", payload)
        assert message.shape == (1, len(tokens))
        assert message.stop - message.start == len(tokens)
        if self.is_silent:
            return
        cache = self.caches.get(message.session, [])
        if self.is_full or message.start != len(cache):
            failed = SessionFailed(JOB, message.generation, message.session, "cache is gone")
            await self.switch.send(failed)
            return
        cache = self.caches[message.session] = [*cache, *tokens]
        token = SessionToken(
            JOB, message.generation, message.session, len(cache), after(cache), -0.5
        )
        for _ in range(self.repeats):
            await self.switch.send(token)


class Bench:
    """A head and a worker, each with a switch on one network."""

    def __init__(self, network: MemoryNetwork, group: asyncio.TaskGroup) -> None:
        self.dropped: list[str] = []
        switches = [
            Switch(network.transport(peer), group, self.dropped.append, lambda _kind, _bytes: None)
            for peer in (ME, WORKER)
        ]
        self.plan: Plan | None = plan()
        self.worker = Worker(switches[1])
        self.worker.assign(plan())
        self.head = Head(JOB, switches[0], lambda: self.plan)

    def place_anew(self, generation: int) -> None:
        self.plan = plan(generation)
        self.worker.assign(self.plan)

    async def generate(
        self, prompt: list[int] = PROMPT, max_tokens: int = 8, max_positions: int = 100
    ) -> list[int]:
        answers = self.head.generate(prompt, max_tokens, max_positions, GREEDY)
        return [answer.token async for answer in answers]


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with MemoryNetwork() as network, asyncio.TaskGroup() as group:
        yield Bench(network, group)
        await settle()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("tensors to "):
                task.cancel()


async def settle() -> None:
    """Let everything happen that needs no time."""
    await asyncio.sleep(0.001)


def test_tokens_come_in_order_and_each_is_sent_once() -> None:
    async def scenario() -> None:
        async with bench() as b:
            assert await b.generate() == continued(PROMPT, 8)
            ranges = [(frame.start, frame.stop) for frame in b.worker.frames]
            assert ranges == [(0, 3), *[(n, n + 1) for n in range(3, 10)]]
            assert len({frame.session for frame in b.worker.frames}) == 1
            assert {frame.max_positions for frame in b.worker.frames} == {100}
            await settle()
            assert b.worker.caches == {}
            assert b.dropped == []

    virtual(scenario())


@pytest.mark.parametrize(
    ("max_tokens", "max_positions", "num_tokens"), [(0, 100, 0), (1, 100, 1), (50, 8, 5), (9, 4, 1)]
)
def test_it_stops_at_the_tokens_asked_for_or_where_the_model_ends(
    max_tokens: int, max_positions: int, num_tokens: int
) -> None:
    async def scenario() -> list[int]:
        async with bench() as b:
            return await b.generate(max_tokens=max_tokens, max_positions=max_positions)

    assert virtual(scenario()) == continued(PROMPT, num_tokens)


@pytest.mark.parametrize("prompt", [[], [1] * 10, [1] * 11])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent(prompt: list[int]) -> None:
    async def scenario() -> None:
        async with bench() as b:
            with pytest.raises(CapacityError, match=f"{len(prompt)} tokens .* takes 1 to 9"):
                await b.generate(prompt, max_positions=10)
            await settle()
            assert b.worker.frames == []
            assert len(await b.generate(max_positions=10)) == 7  # the turn is free again

    virtual(scenario())


@pytest.mark.parametrize("how", ["cache lost", "new generation"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_after_a_disturbance_all_tokens_are_sent_again(how: str, at: int) -> None:
    async def scenario() -> None:
        async with bench() as b:
            tokens: list[int] = []
            answers = b.head.generate(PROMPT, 8, 100, GREEDY)
            async for answer in answers:
                if len(tokens) == at:
                    if how == "cache lost":
                        b.worker.caches.clear()
                    else:
                        b.place_anew(2)
                tokens.append(answer.token)
            assert tokens == continued(PROMPT, 8)
            sent = b.worker.frames
            again = [frame for frame in sent if frame.start == 0][1:]
            assert [frame.stop for frame in again] == [len(PROMPT) + at + 1]
            assert len({frame.session for frame in sent}) == 2
            assert asyncio.get_running_loop().time() < LOOK_S, "nothing was waited for"
            await settle()
            assert b.worker.caches == {}

    virtual(scenario())


def test_several_disturbances_in_a_row_change_nothing() -> None:
    async def scenario() -> None:
        async with bench() as b:
            tokens: list[int] = []
            async for answer in b.head.generate(PROMPT, 12, 100, GREEDY):
                tokens.append(answer.token)
                if len(tokens) % 2:
                    b.place_anew(len(tokens) + 1)
                else:
                    b.worker.caches.clear()
            assert tokens == continued(PROMPT, 12)

    virtual(scenario())


def test_a_worker_without_room_is_asked_a_few_times_and_no_more() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.worker.is_full = True
            with pytest.raises(PeerLostError, match="cache is gone") as caught:
                await b.generate()
            assert caught.value.peer == WORKER
            assert len({frame.session for frame in b.worker.frames}) == MAX_ATTEMPTS
            assert len(b.worker.frames) == MAX_ATTEMPTS
            b.worker.is_full = False
            assert await b.generate() == continued(PROMPT, 8)

    virtual(scenario())


def test_a_silent_worker_is_given_up_after_every_attempt_has_timed_out() -> None:
    async def scenario() -> float:
        async with bench() as b:
            b.worker.is_silent = True
            with pytest.raises(PeerLostError, match="no token within 30 s"):
                await b.generate()
            return asyncio.get_running_loop().time()

    assert virtual(scenario()) == pytest.approx(MAX_ATTEMPTS * TOKEN_TIMEOUT_S, abs=0.1)


def test_a_worker_that_wakes_up_is_asked_again_from_the_start() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.worker.is_silent = True

            async def wake() -> None:
                await asyncio.sleep(TOKEN_TIMEOUT_S / 2)
                b.worker.is_silent = False

            async with asyncio.TaskGroup() as group:
                group.create_task(wake())
                assert await b.generate() == continued(PROMPT, 8)
            assert [(f.start, f.stop) for f in b.worker.frames[:3]] == [(0, 3), (0, 3), (3, 4)]

    virtual(scenario())


def test_a_new_generation_is_noticed_while_a_token_is_awaited() -> None:
    async def scenario() -> float:
        async with bench() as b:
            b.worker.is_silent = True

            async def place() -> None:
                await asyncio.sleep(1.0)
                b.worker.is_silent = False
                b.place_anew(2)

            async with asyncio.TaskGroup() as group:
                group.create_task(place())
                assert await b.generate() == continued(PROMPT, 8)
            return asyncio.get_running_loop().time()

    assert virtual(scenario()) == pytest.approx(1.0, abs=2 * LOOK_S)


def test_answers_that_come_twice_count_once() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.worker.repeats = 3
            assert await b.generate(max_tokens=40) == continued(PROMPT, 40)

    virtual(scenario())


def test_an_answer_to_an_unknown_session_is_ignored() -> None:
    async def scenario() -> None:
        async with bench() as b:
            answers = b.head.generate(PROMPT, 8, 100, GREEDY)
            tokens = [(await anext(answers)).token]
            stray = SessionToken(JOB, Generation(1), "stray", 4, 0, 0.0)
            await b.worker.switch.send(stray)
            await b.worker.switch.send(SessionFailed(JOB, Generation(1), "stray", "gone"))
            tokens += [answer.token async for answer in answers]
            assert tokens == continued(PROMPT, 8)
            assert len({frame.session for frame in b.worker.frames}) == 1

    virtual(scenario())


def test_closing_the_iterator_closes_the_session_and_frees_the_turn() -> None:
    async def scenario() -> None:
        async with bench() as b:
            async with aclosing(b.head.generate(PROMPT, 8, 100, GREEDY)) as answers:
                await anext(answers)
                await settle()
                assert len(b.worker.caches) == 1
            await settle()
            assert b.worker.caches == {}
            assert await b.generate() == continued(PROMPT, 8)

    virtual(scenario())


def test_a_cancelled_caller_closes_the_session() -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.worker.is_silent = True
            async with asyncio.TaskGroup() as group:
                caller = group.create_task(b.generate())
                await settle()
                assert len(b.worker.frames) == 1
                caller.cancel()
            assert caller.cancelled()
            b.worker.is_silent = False
            assert await b.generate() == continued(PROMPT, 8)

    virtual(scenario())


def test_conversations_take_turns() -> None:
    async def scenario() -> None:
        async with bench() as b:
            prompts = [[1, 2], [9], [5, 6, 7]]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(b.generate(prompt)) for prompt in prompts]
            assert [task.result() for task in tasks] == [continued(p, 8) for p in prompts]
            sessions = [frame.session for frame in b.worker.frames]
            assert sessions == [session for session in dict.fromkeys(sessions) for _ in range(8)]

    virtual(scenario())


def test_without_a_plan_it_waits_a_while_and_then_says_so() -> None:
    async def scenario() -> float:
        async with bench() as b:
            b.plan = None
            with pytest.raises(CapacityError, match="no workers now"):
                await b.generate()
            assert b.worker.frames == []
            return asyncio.get_running_loop().time()

    assert virtual(scenario()) == pytest.approx(TOKEN_TIMEOUT_S, abs=0.3)


def test_a_job_that_is_being_placed_anew_is_waited_for() -> None:
    async def scenario() -> None:
        async with bench() as b:
            answers = b.head.generate(PROMPT, 8, 100, GREEDY)
            tokens = [(await anext(answers)).token]
            b.plan = None

            async def place() -> None:
                await asyncio.sleep(TOKEN_TIMEOUT_S / 2)
                b.place_anew(2)

            async with asyncio.TaskGroup() as group:
                group.create_task(place())
                tokens += [answer.token async for answer in answers]
            assert tokens == continued(PROMPT, 8)

    virtual(scenario())
