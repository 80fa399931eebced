"""Generations, exports, evaluation and hostile frames: what must not change a single bit."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_swarm import PLACEMENTS, TIED, Step, Swarm, make_manifest

from swarmnode.domain import BlobRef, Generation, JobId, PeerId, SlotId
from swarmnode.engine_messages import Base, Configured, Export, Exported
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import (
    Applied,
    Commit,
    Evaluated,
    Failed,
    Frame,
    Ready,
)
from swarmnode.tensorfiles import read_header
from swarmnode.wire import unpack_local

Results = list[tuple[dict[int, float], dict[int, str]]]


def results(steps: list[Step]) -> Results:
    return [(s.losses, s.hashes) for s in steps]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def manifest(blobs: Path) -> Manifest:
    return make_manifest(blobs, TIED)


@pytest.fixture(scope="module")
def undisturbed(manifest: Manifest, blobs: Path) -> Results:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    return results([swarm.step(step) for step in range(6)])


@pytest.mark.parametrize("num_units", [0, 1, 3, 6, 30])
def test_a_generation_change_within_a_step_leaves_no_trace(
    manifest: Manifest, undisturbed: Results, blobs: Path, num_units: int
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs, shuffle=num_units)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    swarm.begin(2)
    swarm.pump(max_units=num_units)
    swarm.take(Ready)
    late = [item for item in swarm.network if isinstance(unpack_local(item[1])[0], Frame)]
    swarm.network.clear()
    swarm.configure(2, "keep")
    swarm.network.extend(late)  # frames of the old generation, on a slow road
    steps += [swarm.step(step) for step in range(2, 6)]
    assert results(steps) == undisturbed
    assert swarm.dropped() == ({"generation": len(late)} if late else {})
    assert late or num_units not in (1, 3), "the step was cut in the middle"


@pytest.mark.parametrize("num_units", [1, 5, 12, 40])
@pytest.mark.parametrize("activation", ["none", "aq/int8"])
def test_what_a_step_had_under_way_is_freed_when_the_generation_ends(
    blobs: Path, activation: str, num_units: int
) -> None:
    """Gradients, graphs and caches refer to each other, and a child collects no rubbish for
    hundreds of steps: they would be there twice just when others are lost."""
    codecs = CodecConfig(activation=activation, activation_gradient="int8")
    swarm = Swarm(make_manifest(blobs, codecs=codecs), PLACEMENTS["one"], blobs)
    swarm.configure()
    swarm.begin(0)
    swarm.pump(max_units=num_units)
    (engine,) = swarm.engines.values()
    setup = weakref.ref(engine._setup)
    swarm.received.clear()
    gc.disable()
    try:
        swarm.configure(0, "keep")
        assert setup() is None
    finally:
        gc.enable()


def test_slots_of_a_stage_may_change_hosts_that_hold_it(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, [["a", "b"], ["c", "d"]], blobs)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    swarm.slots = [["b", "b"], ["d", "c"]]
    swarm.configure(2, "keep")
    steps += [swarm.step(step) for step in range(2, 6)]
    assert results(steps) == undisturbed


def test_export_and_load_into_fresh_engines_goes_on_bit_for_bit(
    manifest: Manifest, undisturbed: Results, blobs: Path, tmp_path: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1), swarm.step(2)]
    paths = [tmp_path / "stage0.safetensors", tmp_path / "stage1.safetensors"]
    for stage, peer in enumerate(("b", "c")):
        export = Export(manifest.job, Generation(1), 3, stage, str(paths[stage]))
        swarm.tell(PeerId(peer), export)
    swarm.begin(3)  # training goes on while the files are written
    swarm.pump()
    for engine in swarm.engines.values():
        engine.close()
    swarm.pump()
    assert sorted(e.stage for e in swarm.take(Exported)) == [0, 1]
    assert "model.norm.weight::exp_avg_sq" in read_header(paths[1])

    fresh = Swarm(manifest, PLACEMENTS["three"], blobs, generation=7)
    fresh.configure(3, "load", [str(path) for path in paths])
    steps += [fresh.step(step) for step in range(3, 6)]
    assert results(steps) == undisturbed


def test_evaluation_leaves_training_untouched(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["three"], blobs)
    swarm.configure()
    steps, held_out = [], [swarm.evaluate(0)]
    for step in range(6):
        steps.append(swarm.step(step))
        held_out.append(swarm.evaluate(step + 1))
        assert held_out[-1] == swarm.evaluate(step + 1)
    assert results(steps) == undisturbed
    assert [len(losses) for losses in held_out] == [4] * 7, "5 wanted, 2 slots"
    assert sum(held_out[-1]) < sum(held_out[0])
    assert swarm.dropped() == {}


def test_frames_may_come_before_their_begin(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    steps = [swarm.step(0)]
    swarm.begin_only(["a", "b"], 1)
    swarm.pump()
    assert swarm.take(Ready) == []
    swarm.begin_only(["c", "d"], 1)
    swarm.pump()
    steps.append(swarm.commit(1))
    assert results(steps) == undisturbed[:2]


def test_a_node_may_begin_the_next_step_before_another_has_committed(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    swarm.begin(0)
    swarm.pump()
    steps = [swarm.commit(0, eager=True)]
    swarm.begin_only(["b", "c", "d"], 1)
    swarm.pump()
    steps.append(swarm.commit(1))
    assert results(steps) == undisturbed[:2]
    assert swarm.dropped() == {}


@pytest.mark.parametrize("seed", range(1, 9))
def test_no_timing_changes_a_bit(
    manifest: Manifest, undisturbed: Results, blobs: Path, seed: int
) -> None:
    swarm = Swarm(manifest, [["a", "b"], ["c", "a"]], blobs, shuffle=seed)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    swarm.evaluate(2)
    assert results([*steps, swarm.step(2)]) == undisturbed[:3]


def test_an_evaluation_with_less_data_than_slots_leaves_some_empty(blobs: Path) -> None:
    manifest = make_manifest(blobs, TIED, evaluate_microbatches=1)
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    swarm.begin(0, evaluate=True)
    swarm.pump()
    answers = {e.source: len(e.losses) for e in swarm.take(Evaluated)}
    assert answers == {SlotId(1, 0): 1, SlotId(1, 1): 0}


def test_keep_of_another_step_fails_and_the_stage_survives(manifest: Manifest, blobs: Path) -> None:
    swarm = Swarm(manifest, [["a", "a"], ["a", "a"]], blobs)
    swarm.configure()
    swarm.step(0)
    swarm.generation += 1
    bases = (Base(0, "keep", 2), Base(1, "keep", 2))
    wrong = swarm.configuration(PeerId("a"), 2, bases)
    swarm.tell(PeerId("a"), wrong, manifest.canonical())
    swarm.pump()
    (failed,) = swarm.take(Failed)
    assert failed.generation == 2
    assert "held at step 1, not 2" in failed.reason
    swarm.configure(1, "keep")
    assert swarm.step(1).losses


def test_a_configure_that_cannot_work_fails_in_one_line(manifest: Manifest, blobs: Path) -> None:
    swarm = Swarm(manifest, [["a", "a"], ["a", "a"]], blobs)
    swarm.configure()
    bad_data = manifest.model_copy(
        update={"data": manifest.data.model_copy(update={"train": BlobRef("1" * 64, 5)})}
    )
    long = manifest.batch.model_copy(update={"sequence_length": 65})
    bad_length = manifest.model_copy(update={"batch": long})
    for bad, word in ((bad_data, "token index"), (bad_length, "sequence_length = 65")):
        swarm.generation += 1
        configure = swarm.configuration(PeerId("a"), 0, (Base(0, "init", 0), Base(1, "init", 0)))
        swarm.tell(PeerId("a"), replace(configure, job=bad.job), bad.canonical())
        swarm.pump()
        (failed,) = swarm.take(Failed)
        assert word in failed.reason
        assert "\n" not in failed.reason
    swarm.configure()
    assert swarm.step(0).losses


def test_a_commit_without_ready_or_of_an_old_generation_changes_nothing(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["one"], blobs)
    swarm.configure()
    engine, peer = swarm.engines[PeerId("a")], PeerId("a")
    swarm.begin(0)
    swarm.tell(peer, Commit(manifest.job, Generation(1), 0, 1.0))
    swarm.tell(peer, Commit(manifest.job, Generation(0), 0, 1.0))
    swarm.tell(peer, Commit(manifest.job, Generation(1), 5, 1.0))
    assert engine.dropped == {"commit": 2, "generation": 1}
    swarm.pump()
    assert swarm.take(Applied) == []
    first = swarm.commit(0)
    swarm.tell(peer, Commit(manifest.job, Generation(1), 0, 1.0))  # the same one again
    assert engine.dropped["commit"] == 3
    assert results([first, swarm.step(1)]) == undisturbed[:2]


SOURCE, TARGET = SlotId(0, 0), SlotId(1, 0)
GOOD_SHAPE = (2, 16, 32)
HOSTILE: dict[str, tuple[str, Callable[[Frame], Frame], int]] = {
    "an old generation": ("generation", lambda f: replace(f, generation=Generation(0)), 0),
    "another job": ("job", lambda f: replace(f, job=JobId("f" * 16)), 0),
    "a step far ahead": ("step", lambda f: replace(f, step=9), 0),
    "a slot elsewhere": ("slot", lambda f: replace(f, target=SlotId(0, 0)), 0),
    "a slot that does not exist": ("slot", lambda f: replace(f, target=SlotId(7, -3)), 0),
    "the wrong source": ("slot", lambda f: replace(f, source=SlotId(0, 1)), 0),
    "a transposed shape": ("shape", lambda f: replace(f, shape=(16, 2, 32)), 0),
    "a huge shape": ("shape", lambda f: replace(f, shape=(1 << 40,)), 0),
    "a short payload": ("length", lambda f: f, -1),
    "a long payload": ("length", lambda f: f, 4),
    "another pipeline's microbatch": ("microbatch", lambda f: replace(f, microbatch=1), 0),
    "a microbatch too many": ("microbatch", lambda f: replace(f, microbatch=4), 0),
    "a part of an activation": ("part", lambda f: replace(f, part=1), 0),
    "a gradient for a shard of none": ("part", lambda f: replace(f, kind="gradient", group=9), 0),
    "a shard that is not owned": (
        "slot", lambda f: replace(f, kind="gradient", source=TARGET, group=1, part=1), 0
    ),
    "a reduced shard by another owner": (
        "slot", lambda f: replace(f, kind="reduced", source=SlotId(1, 0), group=1, part=1), 0
    ),
    "a gradient while evaluating": (
        "part", lambda f: replace(f, kind="gradient", group=1, evaluate=True), 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_is_dropped_counted_and_harmless(
    name: str, manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    reason, change, extra_bytes = HOSTILE[name]
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs)
    swarm.configure()
    good = Frame(
        manifest.job, Generation(1), 0, "activation", SOURCE, TARGET, 0, 0, 0, GOOD_SHAPE
    )  # fmt: skip
    payload = bytes(2 * 16 * 32 * 4 + extra_bytes)
    victim = PeerId("c")
    engine = swarm.engines[victim]
    if change(good).target == SlotId(7, -3):  # msgpack would refuse nothing here: direct
        engine.handle(change(good), payload)
    else:
        swarm.tell(victim, change(good), payload)
    assert engine.dropped == {reason: 1}
    assert results([swarm.step(0)]) == undisturbed[:1]


def test_a_repeated_frame_counts_once(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["four"], blobs, echo=True)
    swarm.configure()
    assert results([swarm.step(0), swarm.step(1)]) == undisturbed[:2]
    assert all(e.dropped["repeated"] + e.dropped["step"] > 0 for e in swarm.engines.values())


def test_a_failure_while_computing_is_reported_and_survived(
    manifest: Manifest, undisturbed: Results, blobs: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["one"], blobs)
    swarm.configure()
    steps = [swarm.step(0)]
    weight = swarm.states()[1].module.parameters_by_name()["model.norm.weight"]

    def explode(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    hook = weight.register_hook(explode)
    swarm.begin(1)
    swarm.pump()
    hook.remove()
    (failed,) = swarm.take(Failed)
    assert failed.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert swarm.take(Configured) == []
    swarm.configure(1, "keep")
    steps.append(swarm.step(1))
    assert results(steps) == undisturbed[:2]


def test_an_export_of_another_step_is_ignored_and_a_bad_path_reported(
    manifest: Manifest, blobs: Path, tmp_path: Path
) -> None:
    swarm = Swarm(manifest, PLACEMENTS["one"], blobs)
    swarm.configure()
    peer = PeerId("a")
    swarm.tell(peer, Export(manifest.job, Generation(1), 4, 0, str(tmp_path / "x.safetensors")))
    assert swarm.engines[peer].dropped == {"export": 1}
    (tmp_path / "no").touch()  # a file where a folder is needed
    swarm.tell(peer, Export(manifest.job, Generation(1), 0, 0, str(tmp_path / "no/x.safetensors")))
    swarm.engines[peer].close()
    swarm.pump()
    (failed,) = swarm.take(Failed)
    assert "Error" in failed.reason
    assert swarm.step(0).losses
