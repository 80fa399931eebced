"""A job that has ended is over for those too who were away."""

from swarmnode.coordinator import events as on
from swarmnode.domain import Generation, PeerId
from swarmnode.messages import Answer, Inquire, Release
from tests.coordinator.bench import Bench, manifest


def test_who_hears_that_the_job_is_over_lets_everybody_go() -> None:
    """It was away when the job ended; so was somebody, perhaps, who waits for it still."""
    first = Bench(manifest(steps=5), "abcd").start()
    while first.ledger.step < 2:
        first.next()
    second = Bench(manifest(steps=5), "abcd", records=first.journal).start()
    question = next(e.message for e in second.sent if e.peer == "c")
    assert isinstance(question, Inquire)
    second.forget_messages()
    answer = Answer(
        question.job, question.generation, False, Generation(7), PeerId("b"), (), (), is_over=True
    )
    second.feed(on.Heard(PeerId("c"), answer))
    assert second.ledger.phase == "placing", "one voter's word"
    second.feed(on.Heard(PeerId("b"), answer))
    second.feed(on.Heard(PeerId("d"), answer))
    assert (second.ledger.phase, second.ledger.successor) == ("stopped", None)
    assert second.journal[-1] == on.EndRecord("stopped", second.ledger.reason)
    let_go = {e.peer for e in second.sent if isinstance(e.message, Release) and e.message.is_over}
    assert let_go == set("abcd")


def test_whom_a_job_needs_no_more_is_not_told_that_it_is_over() -> None:
    """Others go on with it, and may ask for its vote again."""
    bench = Bench(manifest(slots=1, steps=5), "abcd").start()
    while bench.ledger.step < 1:
        bench.next()
    plan = bench.ledger.plan
    assert plan is not None
    bench.kill(next(peer for peer in plan.workers() if peer != "a"))
    bench.run()
    bench.feed(on.StopAsked("done"))
    released = [effect.message for effect in bench.sent if isinstance(effect.message, Release)]
    assert {message.is_over for message in released} == {True, False}
    assert [message.is_over for message in released if message.reason == "done"]
    for message in released:
        assert message.is_over is (message.reason == "done")
