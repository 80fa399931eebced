"""Local steps in the real engine: rounds of H steps, then one exchange of differences."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_swarm import LLAMA, PLACEMENTS, WIDE, Step, Swarm, make_manifest
from plain_rounds import Plain, distance

from swarmnode.domain import Generation, PeerId, SlotId
from swarmnode.engine_messages import Base, Coded, Exported, Replay
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Commit, Failed, Ready
from swarmnode.worker.training.log import UpdateLog
from swarmnode.worker.training.reduce import ShardCodecs

DILOCO = "diloco,every=3"
SPARSE = "sparseloco,every=3,codec=topk64of1024/int4"
NUM_ROUNDS = 5


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


def manifest_of(blobs: Path, sync: str, config: dict[str, Any] = LLAMA, **more: Any) -> Manifest:
    codecs = CodecConfig(activation="none", activation_gradient="none", sync=sync)
    return make_manifest(blobs, config, codecs=codecs, steps=more.pop("steps", 10), **more)


def started(manifest: Manifest, blobs: Path, slots: str = "four", **more: Any) -> Swarm:
    swarm = Swarm(manifest, PLACEMENTS[slots], blobs, **more)
    swarm.configure()
    return swarm


def momentum(swarm: Swarm) -> dict[tuple[PeerId, int], dict[str, torch.Tensor]]:
    """What outer momentum every peer holds of every stage."""
    return {
        (peer, stage): {n: t.clone() for n, t in state.optimizer.moments().items()}
        for peer, engine in swarm.engines.items()
        for stage, state in engine._held.items()
        if state.optimizer is not None
    }


@pytest.mark.parametrize(
    ("sync", "deterministic"),
    [
        ("diloco,every=1,outer=sgd1", False),
        (DILOCO, False),
        (DILOCO, True),
        ("diloco,every=3,topology=everyone", False),
    ],
)
def test_it_is_what_whole_models_do_that_train_alone_and_meet(
    sync: str, deterministic: bool, blobs: Path
) -> None:
    more = {"deterministic": True} if deterministic else {}
    manifest = manifest_of(blobs, sync, **more, **({"layers": (2, 2)} if more else {}))
    swarm = started(manifest, blobs)
    plain, other = Plain(manifest, blobs, not deterministic), Plain(manifest, blobs, deterministic)
    rounds = [swarm.step(number) for number in range(NUM_ROUNDS)]
    for number in range(NUM_ROUNDS):
        plain.round(number)
        other.round(number)
    assert [r.loss for r in rounds] == pytest.approx(plain.losses, abs=2e-4)
    assert distance(swarm.weights(), plain) < (1e-3 if deterministic else 1e-5)
    assert distance(swarm.weights(), other) > 0.1, "the moments outlast rounds, or do not"
    assert rounds[-1].loss < rounds[0].loss - 0.1


def test_a_round_reads_the_samples_of_as_many_steps(blobs: Path) -> None:
    """All are read once, in the order of the same job without local steps."""
    rounds = manifest_of(blobs, DILOCO)
    assert rounds.microbatches_per_step == 12
    swarm = started(rounds, blobs)
    first = swarm.step(0)
    assert sorted(first.losses) == list(range(12))
    plain = make_manifest(blobs, codecs=CodecConfig(activation="none", activation_gradient="none"))
    other = Swarm(plain, PLACEMENTS["four"], blobs)
    other.configure()
    before = other.step(0)
    assert {mb: first.losses[mb] for mb in range(4)} == pytest.approx(before.losses, abs=1e-6)
    assert first.losses[4] != pytest.approx(before.losses[0], abs=1e-6)


# ---- everybody holds the same --------------------------------------------------------------------


@pytest.mark.parametrize("sync", [DILOCO, SPARSE])
def test_all_hold_the_same_anchor_and_momentum_after_each_commit(sync: str, blobs: Path) -> None:
    """`Swarm.commit` checks updates and weights of every holder; shadows hold them too."""
    manifest = manifest_of(blobs, sync, WIDE)
    swarm = started(manifest, blobs, shuffle=3, shadows=[["c"], ["a"]])
    for number in range(3):
        swarm.step(number)
        held = momentum(swarm)
        for stage in range(2):
            first, *others = [found for at, found in held.items() if at[1] == stage]
            assert len(others) == 2
            assert all(found.keys() == first.keys() for found in others)
            assert all(torch.equal(found[n], first[n]) for found in others for n in first)
            assert bool(first) == (sync == DILOCO)
    assert swarm.dropped() == {}


@pytest.mark.parametrize("sync", [DILOCO, SPARSE])
@pytest.mark.parametrize("slots", ["one", "three"])
def test_every_placement_gives_the_same_bits(sync: str, slots: str, blobs: Path) -> None:
    manifest = manifest_of(blobs, sync, WIDE)
    one, other = started(manifest, blobs), started(manifest, blobs, slots, shuffle=5)
    for number in range(3):
        assert one.step(number) == other.step(number)


def test_slots_go_apart_within_a_round(blobs: Path) -> None:
    swarm = started(manifest_of(blobs, DILOCO), blobs)
    swarm.step(0)
    ends = [engine._local._slots for engine in swarm.engines.values()]
    first, second = ends[0][SlotId(0, 0)].state, ends[1][SlotId(0, 1)].state
    assert first.state_hash() != second.state_hash()


# ---- what is lost is computed again --------------------------------------------------------------


def cut(swarm: Swarm, number: int, num_units: int, slots: Sequence[Sequence[str]] = ()) -> None:
    """Begin a round, stop anywhere, and begin the next generation at the same round."""
    swarm.begin(number)
    swarm.pump(max_units=num_units)
    swarm.take(Ready)
    swarm.network.clear()
    swarm.slots = slots or swarm.slots
    swarm.configure(number, "keep")


def undisturbed(manifest: Manifest, blobs: Path) -> list[Step]:
    swarm = started(manifest, blobs)
    return [swarm.step(number) for number in range(NUM_ROUNDS)]


@pytest.mark.parametrize("num_units", [0, 3, 17, 60, 1 << 20])
@pytest.mark.parametrize("sync", [DILOCO, SPARSE])
def test_a_round_that_is_computed_again_gives_the_same_bits(
    sync: str, num_units: int, blobs: Path
) -> None:
    """Moments and what is owed are as they were, however far the round had got."""
    manifest = manifest_of(blobs, sync, WIDE)
    swarm = started(manifest, blobs, shuffle=num_units % 7 + 1)
    rounds = [swarm.step(0), swarm.step(1)]
    cut(swarm, 2, num_units)
    rounds += [swarm.step(number) for number in range(2, NUM_ROUNDS)]
    assert rounds == undisturbed(manifest, blobs)
    assert swarm.dropped() == {}


def test_a_lost_slot_gives_the_same_anchors_in_the_deterministic_profile(blobs: Path) -> None:
    """Killed between READY and COMMIT, its slot goes to another. Otherwise the bits differ."""
    pinned = {"deterministic": True, "layers": (2, 2)}
    for more in ({}, pinned):
        manifest = manifest_of(blobs, DILOCO, **more)
        swarm = started(manifest, blobs)
        rounds = [swarm.step(0), swarm.step(1)]
        swarm.begin(2)
        swarm.pump()
        assert len(swarm.take(Ready)) == 4
        swarm.network.clear()
        del swarm.engines[PeerId("b")]
        swarm.slots = [["a", "a"], ["c", "d"]]
        swarm.configure(2, "keep")
        rounds += [swarm.step(number) for number in range(2, NUM_ROUNDS)]
        same = rounds == undisturbed(manifest, blobs)
        assert same == bool(more)
        assert swarm.dropped() == ({} if more else {"moments": 1})


def test_what_is_owed_goes_back_with_a_round_that_was_not_committed(blobs: Path) -> None:
    swarm = started(manifest_of(blobs, SPARSE, WIDE), blobs)
    swarm.step(0)
    before = owed(swarm)
    assert before
    cut(swarm, 1, 1 << 20)
    after = owed(swarm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    swarm.step(1)
    assert any(not torch.equal(before[key], each) for key, each in owed(swarm).items())


def owed(swarm: Swarm) -> dict[Any, torch.Tensor]:
    return {
        key: feedback.residual
        for engine in swarm.engines.values()
        for key, feedback in engine._residuals._by_tensor.items()
        if feedback.residual is not None
    }


def test_what_is_owed_shrinks_from_round_to_round(blobs: Path) -> None:
    """With decay 0 nothing is left of it, which gives other bits than with 0.95."""
    rounds = []
    for decay in ("0.95", "0"):
        swarm = started(manifest_of(blobs, f"{SPARSE},decay={decay}", WIDE), blobs)
        rounds.append([swarm.step(number) for number in range(2)])
    assert rounds[0][0].hashes == rounds[1][0].hashes
    assert rounds[0][1].hashes != rounds[1][1].hashes


@pytest.mark.parametrize(
    ("sync", "pinned"),
    [(DILOCO, {}), (DILOCO, {"deterministic": True, "layers": (2, 2)}), (SPARSE, {})],
)
def test_who_did_not_hear_of_a_commit_applies_the_logged_update(
    sync: str, pinned: dict[str, Any], blobs: Path
) -> None:
    manifest = manifest_of(blobs, sync, WIDE, **pinned)
    swarm = started(manifest, blobs)
    rounds = [swarm.step(0)]
    swarm.begin(1)
    swarm.pump()
    swarm.take(Ready)
    for peer in "ac":
        generation = Generation(swarm.generation)
        swarm.tell(PeerId(peer), Commit(manifest.job, generation, 1, 1.0))
    swarm.pump()
    swarm.received.clear()

    def base(peer: PeerId, stage: int) -> Base:
        if peer in "ac":
            return Base(stage, "keep", 2)
        path = UpdateLog(swarm.home / peer / f"stage-{stage}").update_path(1)
        return Base(stage, "keep", 1, replays=(Replay(1, 1.0, str(path)),))

    swarm.start(2, base)
    rounds += [swarm.step(number) for number in range(2, NUM_ROUNDS)]
    wanted = undisturbed(manifest, blobs)
    assert rounds == [wanted[0], *wanted[2:]]
    assert swarm.dropped() == {}, "what the unheard round left is gone on from"


@pytest.mark.parametrize("sync", [DILOCO, SPARSE])
def test_a_newcomer_takes_a_slot_over_from_a_snapshot_and_the_log(sync: str, blobs: Path) -> None:
    manifest = manifest_of(blobs, sync, WIDE)
    swarm = started(manifest, blobs)
    swarm.step(0)
    swarm.begin(1)
    swarm.pump()
    swarm.commit(1, snapshot=True)
    for engine in swarm.engines.values():
        engine.close()
    swarm.pump()
    snapshot = next(e.path for e in swarm.take(Exported) if e.stage == 0)
    rounds = [swarm.step(number) for number in (2, 3)]
    before = momentum(swarm)[PeerId("a"), 0]
    swarm.slots = [["a", "e"], ["c", "d"]]

    def base(peer: PeerId, stage: int) -> Base:
        if peer != "e":
            return Base(stage, "keep", 4)
        log = UpdateLog(swarm.home / "a" / "stage-0")
        replays = tuple(
            Replay(number, each.scale, str(log.update_path(number)))
            for number, each in enumerate(rounds, 2)
        )
        return Base(stage, "load", 2, snapshot, replays)

    swarm.start(4, base)
    after = momentum(swarm)[PeerId("e"), 0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert swarm.step_hashes()[PeerId("e"), 0] == swarm.step_hashes()[PeerId("a"), 0]
    assert math.isfinite(swarm.step(4).loss)
    assert swarm.dropped() == {"moments": 1}


# ---- what crosses, and what may not come in ------------------------------------------------------


@pytest.mark.parametrize(
    ("sync", "share"),
    [(DILOCO, 32.0), (SPARSE, None), ("diloco,every=3,codec=int4/32", None)],
)
def test_bytes_of_a_round_are_counted(sync: str, share: float | None, blobs: Path) -> None:
    swarm = started(manifest_of(blobs, sync, WIDE), blobs)
    for number in range(2):
        swarm.step(number)
        swarm.pump()
    expected = 0
    for engine in swarm.engines.values():
        setup = engine._setup
        assert setup is not None
        for group in setup.expected.groups.values():
            for slot in setup.hosted:
                if slot not in group.members:
                    continue
                parts = [*group.parts_of(slot)]
                if not group.is_gathered:
                    parts += [p for p in range(group.num_parts) if group.owner(p) == slot]
                for part in parts:
                    start, stop = group.shard(part)
                    expected += (
                        ShardCodecs(setup.gradient).of(group, part).wire_bytes((stop - start,))
                    )
    for engine in swarm.engines.values():
        engine._report_busy(-1.0)
    swarm.pump()
    codings = [c for message in swarm.take(Coded) for c in message.codings]
    found = sum(c.coded_bytes for c in codings if c.kind in ("gradient", "reduced"))
    assert found == 2 * expected
    assert share is None or found == sum(
        c.raw_bytes for c in codings if c.kind in ("gradient", "reduced")
    )


def test_an_implausible_part_is_refused_by_name_where_everyone_sums(blobs: Path) -> None:
    manifest = manifest_of(blobs, "sparseloco,every=2,codec=topk64of1024/none", slots=4, stages=1)
    swarm = Swarm(manifest, [["a", "b", "c", "d"]], blobs, ((0, 4),))
    swarm.configure()
    swarm.step(0)
    swarm.begin(1)
    swarm.pump(max_units=4)
    own = swarm.engines[PeerId("b")]._local._slots[SlotId(0, 1)].state
    with torch.no_grad():
        for parameter in own.module.parameters():
            parameter.mul_(1e6)
    swarm.pump()
    failed = swarm.take(Failed)
    assert failed
    assert {each.blames for each in failed} == {SlotId(0, 1)}, failed
    assert swarm.take(Ready) == []
