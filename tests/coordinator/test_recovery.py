"""Where a holder of a stage gets its state, if what it holds may be of another history."""

import pytest

from swarmnode.coordinator.recovery import CommitLog, Finder, Origin, Sources
from swarmnode.domain import BlobRef, Generation, JobId, PeerId
from swarmnode.messages import Answer, Committed, Held, StateSource

A, B = PeerId("a"), PeerId("b")
STEP = 20


def ref(step: int, history: str = "0") -> BlobRef:
    return BlobRef(f"{step:063x}{history}", 10)


def found(held: dict[PeerId, Held], *, first_known: int = 0) -> Sources:
    """With 20 committed steps and a checkpoint that no log reaches back to."""
    commits = CommitLog()
    for step in range(first_known, STEP):
        commits.add(Committed(step, 1.0, (ref(step),)))
    answers = {
        peer: Answer(JobId("j"), Generation(1), True, Generation(1), A, (each,), ())
        for peer, each in held.items()
    }
    origin = Origin(0, (StateSource("init"),))
    return Finder(answers, ((0, 4),), STEP, commits, origin).find([[*held]])


def holder(step: int, log_from: int, *, gone_astray_at: int = STEP) -> Held:
    """What a worker says that has gone another way from some step on."""

    def update(at: int) -> BlobRef:
        return ref(at, "b" if at >= gone_astray_at else "0")

    return Held(0, 0, 4, step, log_from, step + 1, update(log_from), update(step - 1))


def test_who_comes_back_from_a_history_that_was_given_up_does_not_keep_its_state() -> None:
    """The job went back to step 8 while it was away; what it has since then counts no more."""
    sources = found({A: holder(STEP, 14), B: holder(12, 6, gone_astray_at=8)})
    assert sources.by_peer == {A: [(0, StateSource("keep", STEP, None, (A, B)))]}
    assert sources.waiting == [(0, B)], "it fetches the state of the other one"
    assert sources.saves == {0: (A, STEP)}


def test_it_goes_on_from_what_its_log_begins_with_where_the_others_have_the_rest() -> None:
    sources = found({A: holder(STEP, 6), B: holder(12, 6, gone_astray_at=8)})
    how = {peer: each[0][1] for peer, each in sources.by_peer.items()}
    assert (how[B].how, how[B].step) == ("keep", 6)
    assert sources.first_step == 6, "so it is told of the updates that tell the histories apart"


def test_the_log_of_another_history_gives_nobody_what_is_missing() -> None:
    sources = found({B: holder(12, 6, gone_astray_at=8)})
    assert sources.lost == [0]


@pytest.mark.parametrize("first_known", [0, 12])
def test_who_is_only_behind_keeps_what_it_has(first_known: int) -> None:
    """The negative control; also where nobody remembers the update that it ends with."""
    sources = found({A: holder(STEP, 12), B: holder(12, 6)}, first_known=first_known)
    assert sources.by_peer[B] == [(0, StateSource("keep", 12, None, (A, B)))]
