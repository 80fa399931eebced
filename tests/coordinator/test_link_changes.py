"""A slow link in a running job: other codecs with the next generation, on every worker alike."""

import json
import zlib
from dataclasses import replace

from swarmnode.coordinator import events as on
from swarmnode.coordinator.journal import _line, parse_line
from swarmnode.coordinator.link_codecs import COARSER_AFTER_S
from swarmnode.domain import Generation, LinkPreset, PeerId, Plan
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Adopt, Assign, Begin, LinkReport, Traffic
from tests.coordinator.bench import Bench, histories, manifest

STEPS = 60
STEP_S = 2.0


def job(**codecs: object) -> Manifest:
    settings = CodecConfig.model_validate({"preset": "home", **codecs})
    return manifest(stages=2, slots=1, steps=STEPS).model_copy(update={"codecs": settings})


def fast(source: PeerId, target: PeerId) -> float:
    return 1e9


def slow(source: PeerId, target: PeerId) -> float:
    """Two frames of 130 bytes in int8, of 72 in int4/32, beside half a second of computing."""
    return 200.0 if source == "b" else 1e9


def steps(bench: Bench, num_steps: int, rate: object) -> None:
    """So many steps are committed, each with what the workers say of their links at `rate`."""
    assert callable(rate)
    for _ in range(num_steps):
        target = bench.ledger.step + 1
        bench.now_s += STEP_S
        plan = bench.ledger.plan
        assert plan is not None
        for peer in plan.workers():
            others = [other for other in plan.workers() if other != peer]
            links = tuple(LinkReport(other, 0.01, rate(peer, other)) for other in others)
            bench.feed(on.Heard(peer, Traffic(bench.job.job, {}, 0.5, links)))
        while bench.ledger.step < target:
            bench.next() if bench.inbox else bench.tick(0.5)
        while bench.ledger.phase == "placing":
            bench.next() if bench.inbox else bench.tick(0.5)


def running(codecs: Manifest) -> Bench:
    """A job of two machines whose placement nobody wants to change."""
    bench = Bench(codecs, "ab")
    bench.improve = lambda request: None  # type: ignore[method-assign,assignment]
    bench.start()
    bench.run(until="training")
    return bench


def plan_of(bench: Bench) -> Plan:
    assert bench.ledger.plan is not None
    return bench.ledger.plan


def slow_link(plan: Plan) -> LinkPreset:
    return slow_link_to(next(peer for peer in plan.workers() if peer != "b"))


def slow_link_to(target: str) -> LinkPreset:
    return LinkPreset(PeerId("b"), PeerId(target), "slow", "int4/32", "int4/32+hadamard")


def test_a_slow_link_leads_to_a_generation_whose_workers_all_know_its_codecs() -> None:
    bench = running(job())
    steps(bench, 5, fast)
    before = plan_of(bench)
    assert before.links == ()
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 3, slow)
    after = plan_of(bench)
    assert after.generation == before.generation + 1
    assert (after.slots, after.layers, after.shadows) == (
        before.slots, before.layers, before.shadows,
    )  # fmt: skip
    assert after.links == (slow_link(after),)
    told = [
        sent.message.plan
        for sent in bench.sent
        if isinstance(sent.message, Assign | Adopt)
        and sent.message.plan.generation == after.generation
    ]
    assert len(told) >= 2
    assert {plan.links for plan in told} == {after.links}
    assigns = [sent.message for sent in bench.sent if isinstance(sent.message, Assign)]
    kept = [source.how for assign in assigns[-2:] for _, source in assign.sources]
    assert set(kept) == {"keep"}, "nobody fetches anything"
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}
    assert bench.commits() == list(range(STEPS)), "no step is computed twice"


def test_a_job_of_local_steps_follows_its_links_too() -> None:
    """Both what is computed and what crosses is that of a round."""
    bench = running(job(sync="diloco,every=3"))
    assert bench.job.microbatches_per_step == 3 * bench.job.batch.num_microbatches
    steps(bench, 5, fast)
    assert plan_of(bench).links == ()
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 3, slow)
    assert plan_of(bench).links == (slow_link(plan_of(bench)),)
    bench.run()
    assert histories(bench) == {tuple(range(STEPS))}
    assert bench.commits() == list(range(STEPS)), "no round is computed twice"


def test_it_is_in_the_journal_before_anybody_is_told_and_is_replayed_from_it() -> None:
    bench = running(job())
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 5, slow)
    links = plan_of(bench).links
    assert links
    records = [parse_line(_line(record)) for record in bench.journal]
    assert None not in records
    again = Bench(job(), "ab", records=[record for record in records if record is not None])
    assert plan_of(again).links == links
    again.workers, again.published = bench.workers, bench.published
    again.improve = lambda request: None  # type: ignore[method-assign,assignment]
    again.forget_messages()
    again.start()
    again.run(until="training")
    assert plan_of(again).generation > plan_of(bench).generation
    assert plan_of(again).links == links, "whoever takes over goes on with it"


def test_a_started_generation_is_read_from_versions_that_knew_no_links() -> None:
    plan = Plan(Generation(1), ((0, 6),), ((PeerId("a"),),), PeerId("a"))
    started = on.StartedRecord.of(replace(plan, links=(slow_link_to("a"),)), 3)
    body = json.loads(_line(started).partition(b" ")[2])
    assert body["links"] == [["b", "a", "slow", "int4/32", "int4/32+hadamard"]]
    del body["links"]
    older = json.dumps(body).encode()
    assert parse_line(b"%08x " % zlib.crc32(older) + older + b"\n") == on.StartedRecord.of(plan, 3)


def test_a_link_that_is_fast_again_goes_back_with_another_generation() -> None:
    bench = running(job())
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 5, slow)
    assert plan_of(bench).links
    steps(bench, 40, fast)
    assert plan_of(bench).links == ()
    started = [record.links for record in bench.journal if isinstance(record, on.StartedRecord)]
    assert [len(links) for links in started] == [0, 1, 0]


def test_a_job_that_does_not_follow_its_links_keeps_its_generation_however_slow_they_are() -> None:
    bench = running(job(follow_links=False))
    generation = plan_of(bench).generation
    steps(bench, 40, slow)
    assert plan_of(bench).generation == generation
    assert plan_of(bench).links == ()


def test_an_evaluation_on_a_coarser_link_says_so() -> None:
    def slow_forward(source: PeerId, target: PeerId) -> float:
        return 200.0 if source == plan_of(bench).slots[0][0] else 1e9

    bench = running(job())
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 5, slow_forward)
    assert plan_of(bench).links
    bench.run()
    codecs = [record.codec for record in bench.journal if isinstance(record, on.EvaluationRecord)]
    assert codecs[-1] == "int8, int4/32 on 1 of 1 links"
    assert bench.ledger.progress.val_codec == codecs[-1]


def test_the_prediction_of_a_step_counts_with_the_codecs_of_the_links() -> None:
    bench = running(job())
    steps(bench, 5, slow)
    outlook, plan = bench.ledger.outlook, plan_of(bench)
    peers = tuple(bench.adverts.values())
    outlook.predict(plan, peers, bench.now_s + 100)
    with_int8 = outlook.predicted_s
    bench.ledger.link_codecs.restore([slow_link(plan)])
    coarser = bench.ledger.link_codecs.links_of(plan)
    outlook.predict(Plan(**{**vars(plan), "links": coarser}), peers, bench.now_s + 200)
    assert outlook.predicted_s is not None
    assert with_int8 is not None
    assert outlook.predicted_s < 0.8 * with_int8


def test_each_step_is_begun_in_one_generation_alone_also_where_links_change() -> None:
    bench = running(job())
    steps(bench, round(COARSER_AFTER_S / STEP_S) + 8, slow)
    plan = plan_of(bench)
    begun = [
        sent.message
        for sent in bench.sent
        if isinstance(sent.message, Begin) and not sent.message.evaluate
    ]
    by_step = {
        step: {each.generation for each in begun if each.step == step} for step in range(5, 20)
    }
    assert all(len(generations) <= 1 for generations in by_step.values()), by_step
    assert plan.generation in by_step[bench.ledger.step]
