"""Error feedback in training: residuals last exactly as long as the steps that they come from."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_swarm import PLACEMENTS, WIDE, Step, Swarm, make_manifest

from swarmnode.codec_specs import parse_spec
from swarmnode.compression.codec import codec_of
from swarmnode.domain import BlobRef, Generation, PeerId, SlotId
from swarmnode.engine_messages import Base, Replay
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Commit, Failed, Frame, Ready
from swarmnode.wire import pack, unpack_local
from swarmnode.worker.training.log import UpdateLog
from swarmnode.worker.training.residuals import Residuals, Sent

SPECS = ["cocktail/p0.1/k0.2/int4+ef", "topk64of4096/int4+ef"]
NUM_STEPS = 6


def manifest_of(blobs: Path, gradient: str, **more: Any) -> Manifest:
    codecs = CodecConfig(activation="int8", activation_gradient="int8", gradient=gradient)
    return make_manifest(blobs, WIDE, codecs=codecs, steps=more.pop("steps", NUM_STEPS), **more)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module", params=SPECS)
def manifest(request: pytest.FixtureRequest, blobs: Path) -> Manifest:
    return manifest_of(blobs, request.param)


def run(manifest: Manifest, blobs: Path, slots: str = "four", steps: int = NUM_STEPS) -> Swarm:
    swarm = Swarm(manifest, PLACEMENTS[slots], blobs)
    swarm.configure()
    swarm.history = [swarm.step(step) for step in range(steps)]  # type: ignore[attr-defined]
    return swarm


_undisturbed: dict[str, list[Step]] = {}


@pytest.fixture
def undisturbed(manifest: Manifest, blobs: Path) -> list[Step]:
    if manifest.job not in _undisturbed:
        _undisturbed[manifest.job] = run(manifest, blobs).history  # type: ignore[attr-defined]
    return _undisturbed[manifest.job]


def residuals(swarm: Swarm) -> dict[Sent, torch.Tensor]:
    """Everything that is owed, by what it is owed for."""
    return {
        key: feedback.residual
        for engine in swarm.engines.values()
        for key, feedback in engine._residuals._by_tensor.items()
        if feedback.residual is not None
    }


def test_every_placement_gives_the_same_bits(
    manifest: Manifest, undisturbed: list[Step], blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["three"], blobs, shuffle=3)
    swarm.configure()
    assert [swarm.step(step) for step in range(3)] == undisturbed[:3]
    kinds = {(key.kind, key.slot) for key in residuals(swarm)}
    slots = {SlotId(stage, slot) for stage in range(2) for slot in range(2)}
    assert kinds == {(kind, slot) for kind in ("share", "sum") for slot in slots}


def test_all_that_was_computed_is_what_was_sent_and_what_is_owed(blobs: Path) -> None:
    """Sums of shares, over steps: nothing is lost, and nothing is there twice."""
    swarm = Swarm(manifest_of(blobs, SPECS[1], steps=4), PLACEMENTS["one"], blobs)
    swarm.configure()
    computed: dict[int, torch.Tensor] = {}
    applied: dict[int, torch.Tensor] = {}
    for step in range(4):
        swarm.begin(step)
        swarm.pump()
        setup = swarm.engines[PeerId("a")]._setup
        assert setup is not None
        for index, reduced in setup.reduced.items():
            own = sum(each[index].flat for each in setup.accumulators.values() if index in each)
            computed[index] = computed.get(index, torch.zeros(1)) + own
            applied[index] = applied.get(index, torch.zeros(1)) + reduced.flat
        swarm.commit(step)
    owed = {index: torch.zeros_like(flat) for index, flat in computed.items()}
    for key, residual in residuals(swarm).items():
        start, stop = setup.expected.groups[key.group].shard(key.part)
        owed[key.group][start:stop] += residual
    for index, flat in computed.items():
        size = float(flat.abs().max())
        assert (applied[index] + owed[index] - flat).abs().max() < 1e-5 * size
        if not setup.expected.groups[index].is_small:
            assert (applied[index] - flat).abs().max() > 1e-2 * size


@pytest.mark.parametrize("num_units", [0, 2, 5, 9, 40])
def test_a_step_that_is_computed_again_gives_the_same_bits(
    manifest: Manifest, undisturbed: list[Step], blobs: Path, num_units: int
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs, shuffle=num_units)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    before = residuals(swarm)
    swarm.begin(2)
    swarm.pump(max_units=num_units)
    swarm.take(Ready)
    swarm.network.clear()
    swarm.configure(2, "keep")
    after = residuals(swarm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    steps += [swarm.step(step) for step in range(2, NUM_STEPS)]
    assert steps == undisturbed
    assert all(e._residuals.num_dropped == 0 for e in swarm.engines.values())


def test_who_did_not_hear_of_a_commit_keeps_what_it_owes_behind_it(
    manifest: Manifest, undisturbed: list[Step], blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    swarm.step(0)
    commit_unheard(swarm, 1, ["b", "d"])
    assert [swarm.step(step) for step in range(2, NUM_STEPS)] == undisturbed[2:]
    assert all(e._residuals.num_dropped == 0 for e in swarm.engines.values())


def test_what_is_owed_behind_another_update_is_dropped(manifest: Manifest, blobs: Path) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    swarm.step(0)
    other = {
        stage: UpdateLog(swarm.home / peer / f"stage-{stage}").update_path(0).read_bytes()
        for stage, peer in enumerate("ac")
    }
    swarm.begin(1)
    swarm.pump()
    swarm.take(Ready)

    def base(peer: PeerId, stage: int) -> Base:
        path = swarm.home / peer / "other.update"
        path.write_bytes(other[stage])  # somebody else computed the step, with other residuals
        return Base(stage, "keep", 1, replays=(Replay(1, 1.0, str(path)),))

    swarm.start(2, base)
    assert residuals(swarm) == {}
    assert all(e._residuals.num_dropped > 0 for e in swarm.engines.values())
    assert [swarm.step(step).losses for step in range(2, 4)]


def test_with_a_lost_holder_replicas_agree_and_no_step_is_lost(
    manifest: Manifest, undisturbed: list[Step], blobs: Path
) -> None:
    """`Swarm.commit` checks that every holder of a stage has the same update and weights."""
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    swarm.begin(2)
    swarm.pump(max_units=6)
    swarm.take(Ready)
    swarm.network.clear()
    del swarm.engines[PeerId("b")]
    swarm.slots = [["a", "a"], ["c", "d"]]
    swarm.configure(2, "keep")
    owed = residuals(swarm)
    assert not any(key.slot == SlotId(0, 1) for key in owed), "who takes over owes nothing"
    steps += [swarm.step(step) for step in range(2, NUM_STEPS)]
    assert steps[:2] == undisturbed[:2]
    assert steps[2].losses == undisturbed[2].losses, "the same weights, data and codecs"
    assert steps[2].updates[1] == undisturbed[2].updates[1], "stage 1 lost nobody"
    assert steps[2].updates[0] != undisturbed[2].updates[0]
    assert {state.step for state in swarm.states().values()} == {NUM_STEPS}


def test_a_residual_that_comes_back_late_is_dropped(manifest: Manifest, blobs: Path) -> None:
    swarm = run(manifest, blobs, steps=2)
    swarm.slots = [["a", "a"], ["c", "d"]]
    swarm.configure(2, "keep")
    swarm.step(2)
    number = swarm.engines[PeerId("b")]._residuals.num_held
    assert number > 0
    path = UpdateLog(swarm.home / "a" / "stage-0").update_path(2)
    swarm.slots = [["a", "b"], ["c", "d"]]

    def base(peer: PeerId, stage: int) -> Base:
        if peer != "b":
            return Base(stage, "keep", 3)
        return Base(stage, "keep", 2, replays=(Replay(2, 1.0, str(path)),))

    swarm.start(3, base)
    late = swarm.engines[PeerId("b")]._residuals
    assert (late.num_held, late.num_dropped) == (0, number)
    assert swarm.engines[PeerId("b")].dropped["residual"] == number


def test_what_a_slot_owed_that_went_elsewhere_is_counted_at_the_commit(
    manifest: Manifest, blobs: Path
) -> None:
    swarm = run(manifest, blobs, steps=2)
    held = {peer: engine._residuals.num_held for peer, engine in swarm.engines.items()}
    assert min(held.values()) > 0
    swarm.slots = [["b", "a"], ["c", "d"]]
    swarm.configure(2, "keep")
    assert swarm.dropped() == {}
    swarm.step(2)
    dropped = {peer: engine.dropped["residual"] for peer, engine in swarm.engines.items()}
    assert dropped == {**held, "c": 0, "d": 0}


def test_another_cut_forgets_what_meant_other_values() -> None:
    residuals, codec = Residuals(), codec_of(parse_spec("int2/32"))
    residuals.begin("one", 0, lambda _: None)
    residuals.encode(Sent("share", SlotId(0, 0), 0, 0), torch.linspace(0, 1, 64), codec, 0)
    residuals.committed(0)
    residuals.begin("one", 1, lambda _: None)
    assert residuals.num_held == 1
    residuals.begin("another", 1, lambda _: None)
    assert (residuals.num_held, residuals.num_dropped) == (0, 1)


def test_it_converges_where_the_same_codec_without_feedback_does_worse(blobs: Path) -> None:
    final = {}
    for gradient in (SPECS[0], SPECS[0].removesuffix("+ef"), "none"):
        swarm = run(manifest_of(blobs, gradient, steps=60), blobs, "one", 60)
        final[gradient] = sum(s.loss for s in swarm.history[-5:]) / 5  # type: ignore[attr-defined]
    with_it, without, plain = final.values()
    assert with_it < without - 0.1
    assert plain < with_it


# ---- what peers send -----------------------------------------------------------------------------


POISON: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": ("none", lambda x: x * float("nan"), "is not finite"),
    "one infinity": ("bf16+ef", lambda x: x.index_fill(0, torch.tensor([3]), torch.inf), "is not"),
    "huge": ("none", lambda x: x * 1e6, "the median of the others"),
    "huge, coded": ("int8", lambda x: x * 1e6, "the median of the others"),
    "huge, with feedback": ("int4/32+ef", lambda x: x * 1e6, "the median of the others"),
}


@pytest.mark.parametrize("name", POISON)
def test_an_implausible_share_is_refused_by_name_and_the_next_attempt_is_whole(
    name: str, blobs: Path
) -> None:
    spec, poison, says = POISON[name]
    manifest = manifest_of(blobs, spec, slots=4, stages=1)
    codec = codec_of(parse_spec(spec))
    swarm = Swarm(manifest, [["a", "b", "c", "d"]], blobs, ((0, 4),))
    swarm.configure()
    first = swarm.step(0)
    control = Swarm(manifest, [["a", "b", "c", "d"]], blobs, ((0, 4),))
    control.configure()
    assert control.step(0) == first
    swarm.begin(1)
    while not any(is_share(data, PeerId("b")) for _, data in swarm.network):
        swarm.pump(max_units=1)
    for number, (sender, data) in enumerate(swarm.network):
        message, payload = unpack_local(data)
        if is_share(data, PeerId("b")):
            assert isinstance(message, Frame)
            bad = codec.encode(poison(codec.decode(payload, message.shape)))
            swarm.network[number] = (sender, pack(message) + bytes(bad))
    swarm.pump()
    failed = swarm.take(Failed)
    assert failed
    assert all("gradient of stage 0, slot 1" in each.reason for each in failed), failed
    assert {each.blames for each in failed} == {SlotId(0, 1)}
    assert all(says in each.reason for each in failed)
    assert len(swarm.take(Ready)) == 0
    swarm.network.clear()
    swarm.configure(1, "keep")
    assert swarm.step(1) == control.step(1)


def is_share(data: bytes, sender: PeerId) -> bool:
    message, _ = unpack_local(data)
    if not isinstance(message, Frame) or (message.kind, message.group) != ("gradient", 0):
        return False
    return message.source == SlotId(0, {"a": 0, "b": 1, "c": 2, "d": 3}[sender])


def test_where_no_share_is_finite_the_coordinator_hears_of_it(blobs: Path) -> None:
    swarm = Swarm(manifest_of(blobs, "none", slots=1, stages=1), [["a"]], blobs, ((0, 4),))
    swarm.configure()
    with torch.no_grad():
        next(iter(swarm.weights().values())).fill_(float("nan"))
    swarm.begin(0)
    swarm.pump()
    (ready,) = swarm.take(Ready)
    assert replace(ready).sums_of_squares[0][1] != ready.sums_of_squares[0][1], "NaN"


# ---- many troubles in a row ----------------------------------------------------------------------


HOSTS = [[["a", "b"], ["c", "d"]], [["a", "b"], ["d", "c"]], [["b", "a"], ["c", "d"]]]


@pytest.mark.parametrize("seed", range(4))
def test_no_trouble_changes_a_bit_while_every_slot_stays_where_its_residual_is(
    manifest: Manifest, undisturbed: list[Step], blobs: Path, seed: int
) -> None:
    """Steps are cut anywhere, again and again, or begin behind a Commit that some did not hear."""
    drawn = random.Random(seed)
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs, shuffle=seed + 1)
    swarm.configure()
    for step in range(NUM_STEPS):
        while drawn.random() < 0.5:
            swarm.begin(step)
            swarm.pump(max_units=drawn.randrange(40))
            swarm.take(Ready)
            swarm.network.clear()
            swarm.configure(step, "keep")
        if drawn.random() < 0.3:
            deaf = drawn.sample("abcd", drawn.randint(1, 3))
            assert commit_unheard(swarm, step, deaf) == undisturbed[step].updates
        else:
            assert swarm.step(step) == undisturbed[step]
    assert all(e._residuals.num_dropped == 0 for e in swarm.engines.values())
    assert set(swarm.dropped()) <= {"generation", "commit"}


@pytest.mark.parametrize("seed", range(4))
def test_slots_that_move_lose_what_they_owe_and_nothing_else(
    manifest: Manifest, blobs: Path, seed: int
) -> None:
    """`Swarm.commit` checks that all holders agree; each step is committed once, by all."""
    drawn = random.Random(seed)
    swarm = Swarm(manifest, HOSTS[0], blobs, shuffle=seed + 1)
    swarm.configure()
    for step in range(NUM_STEPS):
        if drawn.random() < 0.6:
            swarm.begin(step)
            swarm.pump(max_units=drawn.randrange(40))
            swarm.take(Ready)
            swarm.network.clear()
            swarm.slots = drawn.choice(HOSTS)
            swarm.configure(step, "keep")
        swarm.step(step)
        assert {state.step for state in swarm.states().values()} == {step + 1}
    for engine in swarm.engines.values():
        held = engine._residuals._by_tensor
        assert {each.step for each in held.values()} <= {NUM_STEPS - 1}
        hosted = engine._setup.hosted if engine._setup is not None else ()
        assert {key.slot for key in held} <= set(hosted)


def commit_unheard(swarm: Swarm, step: int, deaf: list[str]) -> tuple[BlobRef, ...]:
    """Commit `step`, which `deaf` do not hear and replay; the updates by stage."""
    swarm.begin(step)
    swarm.pump()
    readies = {ready.source: ready for ready in swarm.take(Ready)}
    squares = {group: value for r in readies.values() for group, value in r.sums_of_squares}
    clip = swarm.manifest.optimizer.clip_norm
    scale = min(1.0, clip / (math.sqrt(math.fsum(squares.values())) + 1e-6))
    for peer in sorted(set("abcd") - set(deaf)):
        commit = Commit(swarm.manifest.job, Generation(swarm.generation), step, scale)
        swarm.tell(PeerId(peer), commit)
    swarm.pump()
    swarm.received.clear()

    def base(peer: PeerId, stage: int) -> Base:
        if peer not in deaf:
            return Base(stage, "keep", step + 1)
        path = UpdateLog(swarm.home / peer / f"stage-{stage}").update_path(step)
        return Base(stage, "keep", step, replays=(Replay(step, scale, str(path)),))

    swarm.start(step + 1, base)
    return tuple(readies[SlotId(stage, 0)].update for stage in range(2))
