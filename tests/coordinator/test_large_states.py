"""After a loss nobody waits for a large state that somebody has: it comes while steps go on."""

import dataclasses

import pytest

from swarmnode.coordinator import events as on
from swarmnode.coordinator.forming import AT_ONCE_BYTES
from swarmnode.coordinator.preparing import MAX_FAILURES
from swarmnode.coordinator.recovery import state_bytes
from swarmnode.domain import ModelFacts, PeerId
from swarmnode.messages import Assign, Prepare, Prepared
from tests.coordinator.bench import FACTS, Bench, histories, manifest

STEPS = 60
LARGE = dataclasses.replace(FACTS, layer_weights=2_000_000)


def how(bench: Bench) -> set[str]:
    """How holders come to their states in the generation at hand."""
    assigned = [sent.message for sent in bench.sent if isinstance(sent.message, Assign)]
    newest = [each for each in assigned if each.plan.generation == bench.ledger.generation]
    return {source.how for each in newest for _, source in each.sources}


def until(bench: Bench, step: int) -> None:
    """Events and time go on together, until so many steps are committed."""
    while bench.ledger.step < step or bench.ledger.phase != "training":
        if bench.inbox:
            bench.next()
        if not bench.inbox or bench.now_s % 1.0 < 0.02:
            bench.tick(1.0)


@pytest.mark.parametrize(
    ("names", "slots", "victim"), [("abcd", 2, "d"), ("abc", 1, "b"), ("abc", 1, "c")]
)
@pytest.mark.parametrize("facts", [FACTS, LARGE])
def test_the_job_goes_on_with_those_who_have_the_states(
    names: str, slots: int, victim: str, facts: ModelFacts
) -> None:
    bench = Bench(manifest(steps=STEPS, slots=slots, checkpoint_every=0), names, facts=facts)
    bench.start()
    until(bench, 5)
    plan = bench.ledger.plan
    assert plan is not None
    assert not plan.is_thin
    is_large = state_bytes(facts, plan.layers, 0) > AT_ONCE_BYTES
    assert is_large == (facts is LARGE)
    bench.kill(victim)
    until(bench, 6)
    assert (how(bench) == {"keep"}) == is_large, "or somebody else is waited for"
    assert bench.ledger.plan is not None
    assert bench.ledger.plan.is_thin == is_large
    assert not any(isinstance(sent.message, Prepare) for sent in bench.sent)
    until(bench, 50)
    assert bench.ledger.plan is not None
    assert not bench.ledger.plan.is_thin, "a second holder has come meanwhile"
    assert any(isinstance(sent.message, Prepare) for sent in bench.sent) == is_large
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def test_who_cannot_fetch_a_large_state_meanwhile_is_waited_for_in_the_end() -> None:
    """Or it would be asked for ever: what it cannot do then, bars it."""
    bench = Bench(manifest(steps=STEPS, checkpoint_every=0), "abcd", facts=LARGE).start()
    until(bench, 5)
    bench.kill("d")
    num_prepared = 0
    while how(bench) == {"keep"} or num_prepared == 0:
        event = bench.inbox[0] if bench.inbox else on.Tick()
        if isinstance(event, on.Heard) and isinstance(event.message, Prepared):
            num_prepared += 1
            bench.inbox[0] = on.Heard(event.peer, could_not(bench, event.peer, event.message))
        bench.next() if bench.inbox else bench.tick(1.0)
        if bench.now_s % 1.0 < 0.02:
            bench.tick(1.0)
        assert bench.ledger.step < STEPS - 1, "nobody became the second holder"
    assert num_prepared == MAX_FAILURES
    assert bench.ledger.plan is not None
    assert not bench.ledger.plan.is_thin
    bench.run()
    assert bench.commits() == list(range(STEPS))
    assert histories(bench) == {tuple(range(STEPS))}


def could_not(bench: Bench, peer: PeerId, prepared: Prepared) -> Prepared:
    """It has nothing of what it was to fetch."""
    worker = bench.workers[peer]
    assert bench.ledger.plan is not None
    for stage in set(worker.stages) - set(bench.ledger.plan.stages_of(peer)):
        del worker.stages[stage]
    return dataclasses.replace(prepared, failure="no space left on device")
