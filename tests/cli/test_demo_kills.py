"""The plan of kills and the machine that follows it, on a simulated swarm."""

import random
from dataclasses import replace

import pytest

from swarmnode.cli.demo_kills import (
    MOST_DEAD,
    Killing,
    PlannedKill,
    Recovered,
    Restart,
    Scene,
    Strike,
    draw_kills,
    single_kill,
)

NODES, STEPS, TICK_S = 4, 60, 0.05
EVERYBODY = frozenset(range(NODES))


class Swarm:
    """Commits a step every half second; a death of anybody who matters begins a generation."""

    def __init__(self, killing: Killing, seed: int) -> None:
        self.killing = killing
        self.chance = random.Random(seed)
        self.now_s = 0.0
        self.scene = Scene(
            "training", 0, 0.5, 1, 0, (frozenset({0, 1}), frozenset({2, 3})), EVERYBODY
        )
        self.strikes: list[tuple[Strike, Scene]] = []
        self.recovered: list[int] = []
        self.most_dead = 0
        self._back_s: dict[int, float] = {}
        self._goes_on_s = 0.0
        self._next_s = 0.5

    def run(self, limit_s: float = 600.0) -> None:
        while not (self.killing.is_over and self.scene.phase == "serving"):
            assert self.now_s < limit_s, self.scene
            for effect in self.killing.handle(self.scene, self.now_s):
                self._perform(effect)
            self.most_dead = max(self.most_dead, NODES - len(self.scene.ready))
            self._advance()

    def _perform(self, effect: Strike | Restart | Recovered) -> None:
        match effect:
            case Strike(node=node, part=part, coordinates=coordinates):
                self.strikes.append((effect, self.scene))
                if part == "node":
                    self._change(ready=self.scene.ready - {node})
                if part != "directory":
                    self._change(phase="placing")
                    self._goes_on_s = self.now_s + self.chance.uniform(0.3, 6.0)
                if coordinates:
                    self._change(coordinator=None)
            case Restart(node=node):
                self._back_s[node] = self.now_s + self.chance.uniform(2.0, 5.0)
            case Recovered(kill=kill):
                self.recovered.append(kill)

    def _advance(self) -> None:
        self.now_s += TICK_S
        for node, at_s in list(self._back_s.items()):
            if at_s <= self.now_s:
                del self._back_s[node]
                self._change(ready=self.scene.ready | {node})
        if self.scene.coordinator is None and 0 in self.scene.ready:
            self._change(coordinator=0)
        if self.scene.phase == "placing":
            if self.now_s >= self._goes_on_s and self.scene.coordinator is not None:
                self._change(phase="training", generation=self.scene.generation + 1)
                self._next_s = self.now_s + 0.5
        elif self.now_s >= self._next_s:
            step = min(STEPS, self.scene.step + 1)
            self._change(step=step, phase="serving" if step == STEPS else "training")
            self._next_s = self.now_s + 0.5

    def _change(self, **fields: object) -> None:
        self.scene = replace(self.scene, **fields)  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_kills_and_another_one_others() -> None:
    assert draw_kills(5, 7, NODES) == draw_kills(5, 7, NODES)
    assert len({draw_kills(5, seed, NODES) for seed in range(20)}) == 20


@pytest.mark.parametrize("seed", range(50))
def test_drawn_kills_cover_the_run_and_aim_at_the_coordinator(seed: int) -> None:
    for num_kills in (3, 5):
        kills = draw_kills(num_kills, seed, NODES)
        assert len(kills) == num_kills
        assert any((kill.aim, kill.part) == ("coordinator", "node") for kill in kills)
        assert all(0 <= kill.at <= 1 for kill in kills)
        assert sorted(kills, key=lambda kill: kill.at) == list(kills)
        assert all(kill.down_s is not None and 0.5 <= kill.down_s <= 4 for kill in kills)


def test_drawn_kills_are_of_every_kind() -> None:
    kills = [kill for seed in range(50) for kill in draw_kills(5, seed, NODES)]
    assert {kill.part for kill in kills} == {"node", "worker", "directory"}
    assert {kill.node for kill in kills} == set(EVERYBODY)
    assert any(kill.at == 1.0 for kill in kills), "some fall behind the last step"
    assert min(kill.at for kill in kills) * STEPS < 1, "some before the first"
    quarters = {int(4 * min(kill.at, 0.99)) for kill in kills}
    assert quarters == {0, 1, 2, 3}
    assert draw_kills(0, 1, NODES) == ()


@pytest.mark.parametrize("seed", range(60))
def test_all_kills_happen_and_never_more_than_two_are_dead(seed: int) -> None:
    swarm = Swarm(Killing(draw_kills(6, seed, NODES), NODES, STEPS), seed)
    swarm.run()
    assert len(swarm.strikes) == 6
    assert sorted(swarm.recovered) == list(range(6))
    assert any(strike.coordinates for strike, _ in swarm.strikes)
    assert swarm.most_dead <= MOST_DEAD
    assert swarm.scene.ready == EVERYBODY
    for strike, scene in swarm.strikes:
        assert strike.node in scene.ready, "nobody is killed twice"
        others = scene.ready - {strike.node}
        if strike.part == "node" and scene.ready != EVERYBODY:
            assert all(stage & others for stage in scene.stages), "a stage keeps a host"


def test_two_are_dead_at_once_in_some_run() -> None:
    worlds = [Swarm(Killing(draw_kills(6, s, NODES), NODES, STEPS), s) for s in range(60)]
    for world in worlds:
        world.run()
    assert max(world.most_dead for world in worlds) == MOST_DEAD


def test_a_third_waits_until_one_is_back() -> None:
    kill = PlannedKill("node", "any", 0, 0.0, 0.0, 1.0)
    killing = Killing([kill, kill, kill], 4, STEPS)
    scene = Scene("training", 0, 0.5, 1, 0, (EVERYBODY,), EVERYBODY)
    assert killing.handle(scene, 0.0) == [Strike(0, "node", True)]
    assert killing.handle(replace(scene, ready=frozenset({1, 2, 3})), 0.1)[-1] == Strike(
        1, "node", False
    )
    two = replace(scene, ready=frozenset({2, 3}))
    assert killing.handle(two, 0.9) == []
    assert killing.handle(two, 1.2) == [Restart(0), Restart(1)]
    assert killing.handle(two, 5.0) == []
    assert killing.handle(replace(scene, ready=frozenset({0, 2, 3})), 6.0) == [
        Strike(0, "node", True)
    ]


def test_the_single_kill_hits_a_worker_at_a_third_and_for_good() -> None:
    killing = Killing(single_kill(NODES), NODES, STEPS)
    scene = Scene("training", 19, 0.5, 1, 3, (frozenset({0, 1}), frozenset({2, 3})), EVERYBODY)
    assert killing.handle(scene, 0.0) == []
    scene = replace(scene, step=20)
    (strike,) = killing.handle(scene, 1.0)
    assert strike == Strike(0, "node", False), "node 3 coordinates"
    scene = replace(scene, ready=EVERYBODY - {0})
    assert killing.handle(replace(scene, step=21), 2.0) == [], "a commit of the old generation"
    assert not killing.is_over
    assert killing.handle(replace(scene, step=21, generation=2), 3.0) == []
    assert killing.handle(replace(scene, step=22, generation=2), 4.0) == [Recovered(0, 3.0)]
    assert killing.is_over


def test_a_job_that_goes_back_has_recovered_with_its_first_step() -> None:
    killing = Killing([PlannedKill("node", "any", 2, 0.5, 0.0, 1.0)], NODES, STEPS)
    scene = Scene("training", 30, 0.5, 1, 0, (frozenset({2}),), EVERYBODY)
    assert killing.handle(scene, 0.0) == [Strike(2, "node", False)]
    back = replace(scene, generation=2, ready=EVERYBODY - {2})
    assert killing.handle(back, 0.5) == []
    assert killing.handle(replace(back, step=10), 1.5) == [Restart(2)]
    assert killing.handle(replace(back, step=11), 2.0) == [Recovered(0, 2.0)]


def test_a_strike_at_a_child_that_is_not_there_is_still_to_come() -> None:
    killing = Killing([PlannedKill("worker", "any", 1, 0.0, 0.0, None)], NODES, STEPS)
    scene = Scene("placing", 0, None, 1, 0, (frozenset({1}),), EVERYBODY)
    assert killing.handle(scene, 0.0) == [Strike(1, "worker", False)]
    killing.missed()
    assert not killing.is_over
    assert killing.handle(scene, 0.1) == [Strike(1, "worker", False)]
