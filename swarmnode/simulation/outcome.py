"""One run, and what came of it, as plain data that crosses to another process."""

from collections.abc import Callable
from dataclasses import dataclass

from swarmnode.simulation.invariants import Violation
from swarmnode.simulation.scenario import Scenario
from swarmnode.simulation.swarm import Swarm


@dataclass(frozen=True)
class JobOutcome:
    """One job of one run."""

    name: str
    steps: int
    """Committed."""
    wanted: int
    generations: int
    takeovers: int
    """How often another node than before began to coordinate."""
    step_s: float | None
    """A step where nothing goes wrong."""
    goodput: float | None
    """Committed steps for each that there was time for."""
    recoveries: tuple[tuple[str, float], ...]
    """(kind of fault, seconds to the next commit)."""
    open_hits: tuple[tuple[str, float], ...]
    """(kind of fault, seconds to the end), of a job that was not done and had not recovered."""


@dataclass(frozen=True)
class Outcome:
    """One run of a scenario."""

    seed: int
    violation: str
    """What never may happen and did, in one line; empty if nothing."""
    virtual_s: float
    events: int
    messages: int
    checks: int
    jobs: tuple[JobOutcome, ...]
    trace: tuple[str, ...] = ()


def run_seed(
    scenario: Scenario,
    seed: int,
    *,
    keep_trace: bool = False,
    make_swarm: Callable[..., Swarm] = Swarm,
    on_time: Callable[[float], None] = lambda _: None,
) -> Outcome:
    """Run one seed. A bug that shows as an exception is a violation too."""
    swarm, violation = make_swarm(scenario, seed, keep_trace=keep_trace), ""
    try:
        swarm.run(on_time)
    except Violation as error:
        violation = str(error)
    except Exception as error:  # whatever the machines raise is theirs, and a find
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_qualname}:{place.tb_lineno}" if place else "?"
        violation = f"{type(error).__name__} in {where}: {error}"
    statistics, now_s = swarm.statistics, swarm.world.now_s
    jobs = tuple(
        JobOutcome(
            name=manifest.name,
            steps=swarm.invariants.num_committed(job),
            wanted=manifest.num_steps,
            generations=known.num_generations,
            takeovers=known.num_takeovers,
            step_s=known.step_s,
            goodput=known.goodput(now_s, is_done=is_done),
            recoveries=tuple(known.recoveries),
            open_hits=() if is_done else tuple(known.open_hits(now_s)),
        )
        for job, manifest in swarm.manifests.items()
        for known in (statistics.of(job),)
        for is_done in (swarm.invariants.num_committed(job) >= manifest.num_steps,)
    )
    return Outcome(
        seed, violation, now_s, swarm.world.num_events,
        swarm.network.num_messages, swarm.invariants.num_checks, jobs, tuple(swarm.world.trace),
    )  # fmt: skip
