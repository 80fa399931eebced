"""Whom the demo kills and when: drawn from a seed alone, and carried out by a small machine."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Part = Literal["node", "worker", "directory"]
"""A daemon with all that it started, or one child process of it."""
Aim = Literal["any", "worker", "coordinator"]
MOST_DEAD = 2
"""Nodes that may be dead at once."""
MAX_KILLS = 100
_DEFAULT_STEP_S = 0.5
_MAX_STEP_S = 2.0
"""A step that took longer had a recovery in it, and says nothing about the next one."""


@dataclass(frozen=True)
class PlannedKill:
    """One kill, before anybody knows what the swarm will look like then."""

    part: Part
    aim: Aim
    node: int
    """The victim, or where the search for one begins: aims and survivors decide."""
    at: float
    """Share of the run's steps that are committed first, 0..1."""
    delay_steps: float
    """How much longer it waits from then on, or from the kill before it, in steps."""
    down_s: float | None
    """Seconds until a killed node is started again; None for never."""


def single_kill(num_nodes: int) -> tuple[PlannedKill, ...]:
    """One worker at a third of the run, for good."""
    return (PlannedKill("node", "worker", num_nodes - 1, 1 / 3, 0.0, None),)


def draw_kills(num_kills: int, seed: int, num_nodes: int) -> tuple[PlannedKill, ...]:
    """Draw kills over the whole run; the coordinator's node is among three or more.

    Each has its own part of the run. Some follow on the heels of the one before, while the swarm
    still recovers; sometimes the last one waits until all steps are done, while it evaluates or
    saves.
    """
    chance = random.Random(seed)  # noqa: S311 - a plan of kills is no secret
    kills: list[PlannedKill] = []
    for number in range(num_kills):
        part: Part = chance.choices(("node", "worker", "directory"), (6, 3, 1))[0]
        aim: Aim = "coordinator" if part == "node" and chance.random() < 0.3 else "any"
        at, delay_steps = (number + chance.random()) / num_kills, chance.random()
        on_heels, to_the_end = chance.random() < 0.25, chance.random() < 0.4
        soon_steps = chance.uniform(0.0, 6.0)
        if kills and on_heels:
            at, delay_steps = kills[-1].at, soon_steps
        elif number == num_kills - 1 and to_the_end:
            at, delay_steps = 1.0, soon_steps / 4
        node, down_s = chance.randrange(num_nodes), chance.uniform(0.5, 4.0)
        kills.append(PlannedKill(part, aim, node, at, delay_steps, down_s))
    chosen = chance.randrange(num_kills) if kills else 0
    if num_kills >= 3 and not any(kill.aim == "coordinator" for kill in kills):
        kills[chosen] = replace(kills[chosen], part="node", aim="coordinator")
    return tuple(kills)


@dataclass(frozen=True)
class Scene:
    """The swarm and its job as they are seen now. Nodes are numbers."""

    phase: str
    step: int
    """Committed steps."""
    step_s: float | None
    generation: int
    coordinator: int | None
    """None while nobody answers for the job."""
    stages: tuple[frozenset[int], ...]
    """Who hosts a slot of each stage."""
    ready: frozenset[int]
    """Who answers."""


@dataclass(frozen=True)
class Strike:
    """Effect: SIGKILL `part` of `node`, now."""

    node: int
    part: Part
    coordinates: bool
    """Whether the job is without its coordinator then."""


@dataclass(frozen=True)
class Restart:
    """Effect: start `node` on its old home."""

    node: int


@dataclass(frozen=True)
class Recovered:
    """Effect: the swarm committed a step after kill number `kill`, or serves again."""

    kill: int
    recovery_s: float


@dataclass
class _Wound:
    """A kill from which the swarm has not recovered yet."""

    kill: int
    at_s: float
    step: int
    generation: int | None
    """The generation that it ended; None if the job can go on in the same one."""
    base: int | None = None
    """Fewest committed steps seen since then, in a generation that counts."""


class Killing:
    """Follows a plan of kills: waits for each moment, finds the victim, brings it back.

    A victim is spared while `MOST_DEAD` nodes are dead, and while other dead nodes leave it the
    last host of a stage: the kill waits then.
    """

    def __init__(self, plan: Sequence[PlannedKill], num_nodes: int, num_steps: int) -> None:
        self._planned = deque(plan)
        self._num_nodes = num_nodes
        self._num_steps = num_steps
        self._due_s: float | None = None
        self._down: dict[int, float | None] = {}
        """Dead nodes, and when to start each."""
        self._starting: set[int] = set()
        self._wounds: list[_Wound] = []
        self._num_kills = 0
        self._struck: PlannedKill | None = None

    @property
    def dead(self) -> frozenset[int]:
        """Who does not work: dead, or on the way back."""
        return frozenset(self._down) | self._starting

    @property
    def next_aim(self) -> Aim | None:
        """At whom the next kill is aimed; None if there is none to come."""
        return self._planned[0].aim if self._planned else None

    @property
    def is_over(self) -> bool:
        """All kills are done, everybody who comes back is back, and the job has recovered."""
        waiting = any(at_s is not None for at_s in self._down.values())
        return not (self._planned or waiting or self._starting or self._wounds)

    def handle(self, scene: Scene, now_s: float) -> list[Strike | Restart | Recovered]:
        """See the swarm as it is at `now_s`, and say what to do, in this order."""
        self._starting -= scene.ready
        effects: list[Strike | Restart | Recovered] = [*self._heal(scene, now_s)]
        for node, at_s in sorted(self._down.items()):
            if at_s is not None and at_s <= now_s:
                del self._down[node]
                self._starting.add(node)
                effects.append(Restart(node))
        strike = self._next(scene, now_s)
        return effects if strike is None else [*effects, strike]

    def missed(self) -> None:
        """The last strike at a child process found none there: it is still to come."""
        assert self._struck is not None
        self._planned.appendleft(self._struck)
        self._wounds.pop()
        self._num_kills -= 1

    # ---- who is next -----------------------------------------------------------------------

    def _next(self, scene: Scene, now_s: float) -> Strike | None:
        if not self._planned or scene.step < round(self._planned[0].at * self._num_steps):
            return None
        kill = self._planned[0]
        if self._due_s is None:
            step_s = min(scene.step_s or _DEFAULT_STEP_S, _MAX_STEP_S)
            self._due_s = now_s + kill.delay_steps * step_s
        node = self._victim(kill, scene) if now_s >= self._due_s else None
        if node is None:
            return None
        strike = Strike(node, kill.part, node == scene.coordinator and kill.part == "node")
        hosts = any(node in stage for stage in scene.stages)
        ends = strike.coordinates or (hosts and kill.part != "directory")
        generation = scene.generation if ends else None
        self._wounds.append(_Wound(self._num_kills, now_s, scene.step, generation))
        self._num_kills += 1
        if kill.part == "node":
            self._down[node] = None if kill.down_s is None else now_s + kill.down_s
        self._struck = self._planned.popleft()
        self._due_s = None
        return strike

    def _victim(self, kill: PlannedKill, scene: Scene) -> int | None:
        hosts = frozenset().union(*scene.stages)
        order = [(kill.node + n) % self._num_nodes for n in range(self._num_nodes)]
        for node in order:
            if node not in scene.ready or not self._may_go(node, kill.part, scene):
                continue
            if kill.aim == "coordinator" and node != scene.coordinator:
                continue
            if kill.aim == "worker" and (node == scene.coordinator or node not in hosts):
                continue
            if kill.part == "worker" and node not in hosts:
                continue
            return node
        return None

    def _may_go(self, node: int, part: Part, scene: Scene) -> bool:
        if node in self.dead:
            return False
        if part == "directory" or not self.dead:
            return True
        if part == "node" and len(self.dead) >= MOST_DEAD:
            return False
        return all(stage - self.dead - {node} for stage in scene.stages)

    # ---- what became of it -----------------------------------------------------------------

    def _heal(self, scene: Scene, now_s: float) -> list[Recovered]:
        healed = []
        for wound in list(self._wounds):
            if wound.generation is not None and scene.generation <= wound.generation:
                continue
            if wound.base is None:
                wound.base = scene.step if wound.generation is not None else wound.step
            wound.base = min(wound.base, scene.step)
            serves = scene.phase == "serving"
            if serves or scene.step > wound.base:
                self._wounds.remove(wound)
                healed.append(Recovered(wound.kill, now_s - wound.at_s))
        return healed
