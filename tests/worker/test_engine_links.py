"""Boundaries of one generation with several codecs: both ends read them off the same plan."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_swarm import WIDE, Swarm, make_manifest

from swarmnode.compression.codec import get_codec
from swarmnode.domain import LinkPreset, PeerId
from swarmnode.engine_messages import Base
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Failed, Frame
from swarmnode.wire import unpack_local

LAYERS = ((0, 1), (1, 3), (3, 4))
THREE = [["a", "b"], ["c", "d"], ["e", "f"]]
FORWARD, BACKWARD = "int4/32", "int4/32+hadamard"
HIDDEN = (2, 16, 64)


def coarse(source: str, target: str) -> LinkPreset:
    return LinkPreset(PeerId(source), PeerId(target), "slow", FORWARD, BACKWARD)


EVERY = tuple(
    sorted(
        coarse(*pair)
        for one, other in ("ac", "ce", "bd", "df")
        for pair in (one + other, other + one)
    )
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return manifest_of(tmp_path)


def manifest_of(blobs: Path, **codecs: Any) -> Manifest:
    settings = CodecConfig(**{"activation": "int8", **codecs})
    return make_manifest(blobs, WIDE, codecs=settings, stages=3, slots=2)


class WatchedSwarm(Swarm):
    """Notes how long the boundary frames between two peers are."""

    seen: Counter[tuple[str, str, str, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen = Counter()

    def _deliver(self, sender: PeerId, message: Any, payload: memoryview) -> None:
        if isinstance(message, Frame) and message.kind.startswith("activation"):
            receiver = self.plan.host(message.target)
            self.seen[sender, receiver, message.kind, memoryview(payload).nbytes] += 1
        super()._deliver(sender, message, payload)


def started(manifest: Manifest, blobs: Path, **more: Any) -> WatchedSwarm:
    swarm = WatchedSwarm(manifest, more.pop("slots", THREE), blobs, LAYERS, **more)
    swarm.configure()
    return swarm


def results(swarm: Swarm, steps: range = range(4)) -> Iterator[object]:
    for step in steps:
        found = swarm.step(step)
        yield found.losses, found.hashes
    yield swarm.evaluate(steps.stop)


def test_a_coarser_link_has_its_own_codecs_each_way_and_no_other_link_has(
    manifest: Manifest, tmp_path: Path
) -> None:
    swarm = started(manifest, tmp_path, links=(coarse("a", "c"), coarse("d", "b")), shuffle=1)
    for step in range(3):
        swarm.step(step)
    swarm.evaluate(3)
    assert swarm.dropped() == {}
    own = get_codec("int8").wire_bytes(HIDDEN)
    kinds = {key[:3]: key[3] for key in swarm.seen}
    assert len(kinds) == len(swarm.seen) == 8, "one length for each link and kind"
    assert kinds.pop(("a", "c", "activation")) == get_codec(FORWARD).wire_bytes(HIDDEN)
    assert kinds.pop(("d", "b", "activation_gradient")) == get_codec(BACKWARD).wire_bytes(HIDDEN)
    assert set(kinds.values()) == {own}


def test_where_all_links_are_coarser_the_bits_are_those_of_a_job_with_these_codecs(
    manifest: Manifest, tmp_path: Path
) -> None:
    asked = manifest_of(tmp_path, activation=FORWARD, activation_gradient=BACKWARD)
    coarser = list(results(started(manifest, tmp_path, links=EVERY, shuffle=2)))
    assert coarser == list(results(started(asked, tmp_path, shuffle=3)))
    assert coarser != list(results(started(manifest, tmp_path)))


def test_rounds_of_local_steps_cross_coarser_links_with_their_codecs_too(tmp_path: Path) -> None:
    rounds = manifest_of(tmp_path, sync="diloco,every=2")
    asked = {"activation": FORWARD, "activation_gradient": BACKWARD}
    coarse_rounds = manifest_of(tmp_path, sync="diloco,every=2", **asked)
    coarser = list(results(started(rounds, tmp_path, links=EVERY, shuffle=2)))
    assert coarser == list(results(started(coarse_rounds, tmp_path, shuffle=3)))
    assert coarser != list(results(started(rounds, tmp_path)))


def test_what_stays_on_one_machine_keeps_the_job_s_codecs(
    manifest: Manifest, tmp_path: Path
) -> None:
    alone = [["a", "a"]] * 3
    links = (coarse("a", "a"), *EVERY)
    found = list(results(started(manifest, tmp_path, slots=alone, links=links)))
    assert found == list(results(started(manifest, tmp_path, slots=alone)))


def test_a_link_changes_with_a_generation_and_training_goes_on_from_the_same_state(
    manifest: Manifest, tmp_path: Path
) -> None:
    swarm, control = started(manifest, tmp_path), started(manifest, tmp_path)
    before = [step.hashes for step in map(swarm.step, range(3))]
    assert before == [step.hashes for step in map(control.step, range(3))]
    swarm.links = EVERY
    swarm.configure(3, "keep")
    control.configure(3, "keep")
    assert swarm.step_hashes() == control.step_hashes()
    assert swarm.step(3).hashes != control.step(3).hashes
    swarm.links = ()
    swarm.configure(4, "keep")
    swarm.step(4)
    assert swarm.dropped() == {}


def test_two_ends_with_different_plans_do_not_understand_each_other(
    manifest: Manifest, tmp_path: Path
) -> None:
    """The control: if the plan were not what decides, this step would go through."""
    swarm = started(manifest, tmp_path, links=(coarse("a", "c"),))
    swarm.links = ()
    bases = tuple(Base(stage, "keep", 0, "") for stage in swarm.plan.stages_of(PeerId("c")))
    alone = swarm.configuration(PeerId("c"), 0, bases)
    swarm.tell(PeerId("c"), alone, manifest.canonical())
    swarm.begin(0)
    swarm.pump()
    assert swarm.dropped() == {"length": 2}, "both microbatches of the first slot"


@pytest.mark.parametrize(
    ("activation", "link"),
    [
        ("aq/int4/32", ("int4/32", "int4/32")),
        ("int8", ("aq/int4/32", "int8")),
        ("int8", ("int8", "int4/32+ef")),
        ("int8", ("no codec", "int8")),
    ],
)
def test_a_plan_whose_links_have_impossible_codecs_fails_and_says_why(
    activation: str, link: tuple[str, str], tmp_path: Path
) -> None:
    manifest = manifest_of(tmp_path, activation=activation)
    swarm = Swarm(manifest, THREE, tmp_path, LAYERS)
    swarm.configure()
    swarm.links = (LinkPreset(PeerId("a"), PeerId("c"), "slow", *link),)
    swarm.generation += 1
    base = (Base(0, "keep", 0, ""),)
    swarm.tell(PeerId("a"), swarm.configuration(PeerId("a"), 0, base), manifest.canonical())
    (sent,) = swarm.network
    failed, _ = unpack_local(sent[1])
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("ManifestError")
