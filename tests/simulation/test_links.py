"""Links whose codecs change again and again, while machines and lines fail."""

from dataclasses import replace
from itertools import pairwise

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.events import Effect
from swarmnode.coordinator.forming import Forming, Head
from swarmnode.coordinator.link_codecs import LinkCodecs
from swarmnode.domain import Plan
from swarmnode.messages import Assign
from swarmnode.simulation.outcome import run_seed
from swarmnode.simulation.scenario import load_scenario
from swarmnode.simulation.swarm import Swarm
from tests.simulation.scenarios import EXAMPLES

LINKS = load_scenario(EXAMPLES / "links.toml")


@pytest.mark.parametrize("seed", range(10))
def test_a_job_whose_links_swing_survives_every_fault(seed: int) -> None:
    outcome = run_seed(LINKS, seed)
    assert outcome.violation == ""
    assert [(job.steps, job.wanted) for job in outcome.jobs] == [(160, 160)]


def links_seen(swarm: Swarm) -> list[int]:
    """How many links were coarser in each generation that somebody began."""
    found: dict[int, int] = {}
    begun = swarm.begun

    def watch(job: object, who: str, assign: Assign) -> None:
        found[assign.plan.generation] = len(assign.plan.links)
        begun(job, who, assign)  # type: ignore[arg-type]

    swarm.begun = watch  # type: ignore[method-assign,assignment]
    swarm.run()
    return [found[generation] for generation in sorted(found)]


def test_links_become_coarser_and_finer_again() -> None:
    seen = [links_seen(Swarm(LINKS, seed)) for seed in range(4)]
    assert any(max(counts) > 1 for counts in seen)
    pairs = [pair for counts in seen for pair in pairwise(counts)]
    assert any(later > earlier for earlier, later in pairs)
    assert any(later < earlier for earlier, later in pairs)


def test_workers_that_are_told_different_codecs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one of them is told nothing of the links."""
    assignments = Forming.assignments

    def forget_one(self: Forming, plan: Plan, head: Head) -> list[Effect]:
        effects = assignments(self, plan, head)
        for number, effect in enumerate(effects):
            if isinstance(effect, on.Send) and isinstance(effect.message, Assign):
                other = replace(effect.message, plan=replace(plan, links=()))
                effects[number] = on.Send(effect.peer, other)
                break
        return effects

    monkeypatch.setattr(Forming, "assignments", forget_one)
    assert any(run_seed(LINKS, seed).violation for seed in range(4))


def test_without_faults_a_change_of_codecs_alone_begins_a_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm = LINKS.model_copy(update={"faults": None})
    assert len(links_seen(Swarm(calm, 0))) > 1
    monkeypatch.setattr(LinkCodecs, "is_due", lambda *_: False)
    assert links_seen(Swarm(calm, 0)) == [0]
