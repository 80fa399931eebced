"""Whose record goes next on a node's lines, and how much a slow line is given to queue."""

from collections.abc import Awaitable, Callable

import trio
from trio.testing import MockClock

from swarmnode.p2p.buffered import FAST_BYTES_PER_S, LEAST_BYTES, QUEUE_BYTES, QUEUE_S, Pace
from swarmnode.p2p.ports import Urgency
from swarmnode.p2p.turns import HANGING_S, Turns


def waited_s(scenario: Callable[[Turns], Awaitable[None]]) -> float:
    """Virtual seconds that a scenario takes."""

    async def run() -> float:
        began_s = trio.current_time()
        await scenario(Turns())
        return trio.current_time() - began_s

    return trio.run(run, clock=MockClock(autojump_threshold=0))


async def hold(turns: Turns, urgency: Urgency, seconds: float) -> None:
    with turns.taking(urgency) as turn:
        for _ in range(round(seconds * 10)):
            await trio.sleep(0.1)
            turn.moved()


def test_the_less_urgent_waits_until_the_urgent_is_through() -> None:
    async def scenario(turns: Turns) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, turns, Urgency.FORWARD, 3.0)
            nursery.start_soon(hold, turns, Urgency.BACKWARD, 5.0)
            await trio.testing.wait_all_tasks_blocked()
            with turns.taking(Urgency.REDUCTION) as turn:
                await turn.wait(60.0)
            nursery.cancel_scope.cancel()

    assert 4.9 < waited_s(scenario) < 5.2


def test_a_record_waits_no_longer_than_it_is_told() -> None:
    async def scenario(turns: Turns) -> None:
        with turns.taking(Urgency.CONTROL) as urgent, turns.taking(Urgency.BLOB) as turn:
            urgent.moved()
            await turn.wait(0.5)

    assert 0.49 < waited_s(scenario) < 0.51


def test_equals_and_the_more_urgent_do_not_wait() -> None:
    async def scenario(turns: Turns) -> None:
        with turns.taking(Urgency.BACKWARD), turns.taking(Urgency.BACKWARD) as equal:
            await equal.wait(60.0)
            with turns.taking(Urgency.FORWARD) as urgent:
                await urgent.wait(60.0)

    assert waited_s(scenario) == 0.0


def test_a_hanging_line_holds_nobody_up() -> None:
    async def scenario(turns: Turns) -> None:
        with turns.taking(Urgency.FORWARD), turns.taking(Urgency.REDUCTION) as turn:
            await trio.sleep(HANGING_S + 0.1)
            for _ in range(100):
                await turn.wait(60.0)

    assert HANGING_S < waited_s(scenario) < HANGING_S + 0.2


def test_only_a_slow_line_gets_a_short_queue_and_loses_it_when_it_is_fast_again() -> None:
    pace = Pace()
    assert not pace.observe(0.0)
    assert not pace.observe(10 * FAST_BYTES_PER_S)
    assert pace.queue_bytes == QUEUE_BYTES
    for _ in range(7):
        assert not pace.observe(1e6), "a few slow moments are no slow line"
    assert pace.observe(5e6)
    assert pace.queue_bytes == int(5e6 * QUEUE_S)
    for _ in range(8):
        pace.observe(1.0)
    assert pace.queue_bytes == LEAST_BYTES
    assert pace.observe(FAST_BYTES_PER_S)
    assert pace.queue_bytes == QUEUE_BYTES
