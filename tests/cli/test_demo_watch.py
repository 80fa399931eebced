"""Who coordinates is found among the living, whoever it is."""

from typing import Any, cast

import pytest
from fake_node import a_job

from swarmnode.cli import demo_watch
from swarmnode.cli.demo_watch import JobWatch
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.errors import NotFoundError, SwarmError
from swarmnode.http.api import JobView

EVERYBODY = frozenset({0, 1, 2})


class Node:
    """A node that shows a job, or refuses to."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.was_killed = False
        self.answer: JobView | Exception = NotFoundError("no such job here")
        self.times_asked = 0

    @property
    def client(self) -> "Node":
        return self

    def job(self, _job: str) -> JobView:
        self.times_asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Swarm:
    def __init__(self) -> None:
        self.nodes = tuple(Node(index) for index in range(3))

    def node(self, index: int) -> Node:
        return self.nodes[index]


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Swarm:
    monkeypatch.setattr(demo_watch, "ASK_ALL_S", 0.0)
    return Swarm()


def view(generation: int, **fields: Any) -> JobView:
    return a_job(generation=generation, **fields)


def watch(swarm: Swarm) -> JobWatch:
    return JobWatch(cast(LocalSwarm, swarm), "demo")


def test_the_newest_generation_tells_who_coordinates(swarm: Swarm) -> None:
    looking = watch(swarm)
    assert looking.look(EVERYBODY) is None
    assert looking.node is None
    swarm.node(0).answer = view(1)
    assert looking.look(EVERYBODY) == view(1)
    swarm.node(2).answer = view(2)
    assert looking.look(EVERYBODY) == view(2)
    assert looking.node == 2
    swarm.node(0).answer = view(2, reason="handed over")
    assert looking.look(EVERYBODY) == view(2), "of two that are as new the one we know"


@pytest.mark.parametrize("error", [NotFoundError("refused"), SwarmError("broke off")])
def test_a_coordinator_that_does_not_answer_is_looked_for(swarm: Swarm, error: Exception) -> None:
    looking = watch(swarm)
    swarm.node(0).answer = view(1)
    assert looking.look(EVERYBODY) is not None
    swarm.node(0).answer = error
    assert looking.look(EVERYBODY) is None
    assert looking.node is None
    swarm.node(1).answer = view(2)
    assert looking.look(EVERYBODY) == view(2)
    assert looking.node == 1


def test_the_dead_and_those_on_the_way_back_are_not_asked(swarm: Swarm) -> None:
    looking = watch(swarm)
    swarm.node(0).answer, swarm.node(1).answer = view(3), view(1)
    swarm.node(0).was_killed = True
    assert looking.look(EVERYBODY) == view(1)
    assert looking.look(frozenset({2})) is None
    assert swarm.node(0).times_asked == 0


def test_while_one_coordinates_the_others_are_asked_now_and_then(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_watch, "ASK_ALL_S", 1e6)
    looking = watch(swarm)
    swarm.node(0).answer = view(1)
    for _ in range(10):
        assert looking.look(EVERYBODY) is not None
    assert swarm.node(0).times_asked == 10
    assert swarm.node(1).times_asked == 1
