"""What a coordinator makes of rounds of local steps: what it counts, prices and refuses."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarmnode.coordinator.cost.needs import token_workload, workload_of
from swarmnode.coordinator.cost.training import tables_of
from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.outlook import Outlook
from swarmnode.coordinator.progress import Progress
from swarmnode.coordinator.recovery import snapshot_every
from swarmnode.coordinator.solver.live import improve
from swarmnode.coordinator.submission import prepare
from swarmnode.coordinator.votes import DisagreementError, Votes
from swarmnode.domain import BlobRef, Generation, ModelFacts, PeerId, Plan, SlotId
from swarmnode.errors import ManifestError
from swarmnode.manifest import CodecConfig, JobFile, Manifest, PlacementConfig, parse_job
from swarmnode.messages import Ready
from swarmnode.p2p.blob_store import BlobStore
from tests.coordinator.bench import FACTS, advert, manifest
from tests.coordinator.training_instances import lan, plain_devices

PLAN = Plan(
    Generation(1),
    ((0, 3), (3, 6)),
    ((PeerId("a"), PeerId("b")), (PeerId("c"), PeerId("d"))),
    PeerId("a"),
)
MICROBATCHES = 4
"""Of a local step, in `manifest()`."""


def job(sync: str | None, slots: int = 2) -> Manifest:
    plain = manifest(slots=slots)
    assert plain.batch.num_microbatches == MICROBATCHES * slots // 2
    return plain.model_copy(update={"codecs": CodecConfig(sync=sync)})


# ---- votes ---------------------------------------------------------------------------------------


def votes_of(num_microbatches: int) -> Votes:
    votes = Votes()
    for stage in range(2):
        for slot in range(2):
            owned = tuple(range(slot, num_microbatches, 2))
            losses = tuple(2.0 + 0.1 * mb for mb in owned) if stage == 1 else ()
            squares = ((stage, 1e6),)  # a norm far over optimizer.clip_norm
            update = BlobRef(f"{stage}" * 64, 1)
            at = SlotId(stage, slot)
            votes.add(Ready(job(None).job, Generation(1), 0, at, owned, update, squares, losses))
    return votes


def test_a_round_is_committed_whole_and_its_differences_are_not_clipped() -> None:
    rounds = job("diloco,every=3")
    record = votes_of(3 * MICROBATCHES).commit(0, PLAN, rounds)
    assert record.scale == 1.0
    assert record.loss == pytest.approx(2.0 + 0.1 * (3 * MICROBATCHES - 1) / 2)
    assert votes_of(MICROBATCHES).commit(0, PLAN, job(None)).scale < 1e-2, "gradients are"


def test_a_slot_that_has_not_counted_all_its_steps_is_not_believed() -> None:
    for count in (MICROBATCHES, 2 * MICROBATCHES, 4 * MICROBATCHES):
        with pytest.raises(DisagreementError, match="counted"):
            votes_of(count).commit(0, PLAN, job("diloco,every=3"))


# ---- price ---------------------------------------------------------------------------------------


def test_a_round_exchanges_once_and_its_slots_hold_weights_and_moments_of_their_own() -> None:
    plain, rounds = workload_of(FACTS, job(None)), workload_of(FACTS, job("diloco,every=30"))
    assert (rounds.num_microbatches, rounds.reduce_every) == (plain.num_microbatches, 30)
    assert rounds.slot_bytes_per_weight == plain.slot_bytes_per_weight + 20
    sparse = workload_of(FACTS, job("sparseloco,every=30"))
    assert sparse.slot_bytes_per_weight == plain.slot_bytes_per_weight + 20 + 16
    assert sparse.gathers


@pytest.mark.parametrize("slots", [2, 4])
def test_what_everyone_sends_to_everyone_is_priced_by_the_number_of_slots(slots: int) -> None:
    """K - 1 whole vectors up, against 2 (K - 1) / K with owners."""
    facts = replace(FACTS, num_layers=1)

    def reduction_s(sync: str) -> float:
        work = workload_of(facts, job(sync, slots))
        devices = plain_devices(*[1.0] * slots)
        tables = tables_of(lan(slots, bytes_per_s=1e3), devices, work, 1, slots)
        return float(tables.reduce_out_s[0, 1])

    owners, everyone = (reduction_s(f"diloco,topology={t}") for t in ("owners", "everyone"))
    assert everyone == pytest.approx(owners * slots / 2)


def test_a_round_should_take_as_long_as_its_steps() -> None:
    peers = [advert(name) for name in "abcd"]
    predicted = {}
    for sync in ("diloco,every=1", "diloco,every=10"):
        outlook = Outlook(FACTS, job(sync), PeerId("a"))
        outlook.predict(PLAN, peers, 0.0)
        predicted[sync] = outlook.predicted_s
    one, ten = predicted.values()
    assert one is not None
    assert ten is not None
    assert 3 * one < ten < 10 * one, "ten times the computing, one exchange"


def test_the_solver_prices_a_round_as_the_ledger_counts_it() -> None:
    """What it says a step takes, and cannot take less than, is of all its local steps."""
    found = []
    for sync in ("diloco,every=1", "diloco,every=10"):
        outlook = Outlook(FACTS, job(sync), PeerId("a"))
        peers = [advert(name) for name in "abcd"]
        request = outlook.request(PLAN, peers, serves=False, calm_s=60.0)
        found.append(improve(request, Effort(moves=50)))
    one, ten = found
    assert one.current_s is not None
    assert ten.current_s is not None
    assert 3 * one.current_s < ten.current_s < 10 * one.current_s
    assert ten.decision.cost_s <= ten.current_s * (1 + 1e-9)
    assert one.decision.bound_s is not None
    assert ten.decision.bound_s is not None
    assert one.decision.bound_s < ten.decision.bound_s <= ten.decision.cost_s * (1 + 1e-9)


def test_serving_is_the_same_work_whatever_trained_the_weights() -> None:
    plain, rounds = (token_workload(FACTS, job(sync)) for sync in (None, "diloco,every=10"))
    assert rounds.reduce_every == plain.reduce_every == 1


def test_what_a_machine_computed_in_a_round_is_that_of_all_its_steps() -> None:
    speeds = []
    for sync in (None, "diloco,every=10"):
        outlook = Outlook(FACTS, job(sync), PeerId("a"))
        outlook.measured.busy(PeerId("c"), 1.0)
        outlook.step_done(PLAN)
        speeds.append(outlook.measured.flops[PeerId("c")])
    assert speeds[1] == pytest.approx(10 * speeds[0])


def test_tokens_of_a_round_are_those_of_all_its_steps() -> None:
    plain, rounds = (Progress(job(sync), 0.0) for sync in (None, "diloco,every=10"))
    assert rounds.tokens_per_step == 10 * plain.tokens_per_step


def test_the_log_is_as_large_as_what_is_logged() -> None:
    owners = snapshot_every(job("diloco,codec=int4/32"))
    everyone = snapshot_every(job("diloco,codec=int4/32,topology=everyone"))
    assert 4 <= everyone < owners <= 64


# ---- submission ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_embeddings_on_two_stages_are_refused(tmp_path: Path, stages: int) -> None:
    (tmp_path / "text.txt").write_text("Slots train on their own. " * 100)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))

    async def facts_of(_: Mapping[str, Any], __: int, ___: tuple[str, ...] | None) -> ModelFacts:
        return replace(FACTS, tied=True, vocab_size=300)

    async def decide_grid(job: JobFile, _: ModelFacts) -> PlacementConfig:
        return PlacementConfig(**job.placement.model_dump(exclude_none=True))

    raw = {
        "name": "job",
        "model": {"config": "config.json"},
        "data": {"path": "text.txt"},
        "batch": {"sequence_length": 16},
        "placement": {"stages": stages},
        "codecs": {"sync": "diloco"},
    }
    asked = parse_job(raw, base=tmp_path, source="job")
    store = BlobStore(tmp_path / "blobs")

    def submit() -> Manifest:
        made = prepare(asked, PeerId("me"), store, tmp_path / "scratch", facts_of, decide_grid)
        return asyncio.run(made).manifest

    (tmp_path / "scratch").mkdir()
    if stages == 1:
        assert submit().codecs.num_local_steps == 30
        return
    with pytest.raises(ManifestError, match=r"set placement.stages = 1") as caught:
        submit()
    assert len(str(caught.value).splitlines()) == 1
