"""AQ-SGD in training: both ends of a boundary hold the same bits, for as long as a generation."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_swarm import TIED, Swarm, make_manifest
from torch import Tensor

from swarmnode.compression.delta_cache import DeltaCache
from swarmnode.domain import PeerId, SlotId
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import Failed, Frame, Ready
from swarmnode.wire import pack, unpack_local
from swarmnode.worker.training.deltas import Deltas

NUM_WINDOWS = 24
"""Three steps of four microbatches of two rows."""
LAYERS = ((0, 1), (1, 3), (3, 4))
THREE = [["a", "b"], ["c", "d"], ["e", "f"]]


def manifest_of(blobs: Path, activation: str = "aq/int4/32", **more: Any) -> Manifest:
    codecs = CodecConfig(activation=activation, gradient="int8", **more.pop("codecs", {}))
    settings = {"steps": 12, "stages": 3, "num_tokens": 16 * NUM_WINDOWS + 1, **more}
    return make_manifest(blobs, TIED, codecs=codecs, **settings)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def manifest(blobs: Path) -> Manifest:
    return manifest_of(blobs)


def started(manifest: Manifest, blobs: Path, slots: list[list[str]] = THREE, **more: Any) -> Swarm:
    swarm = Swarm(manifest, slots, blobs, LAYERS, **more)
    swarm.configure()
    return swarm


def deltas_of(swarm: Swarm) -> list[Deltas]:
    setups = [swarm.engines[peer]._setup for peer in swarm.plan.workers()]
    return [setup.deltas for setup in setups if setup is not None and setup.deltas is not None]


def caches(swarm: Swarm) -> dict[tuple[int, int], tuple[DeltaCache, DeltaCache]]:
    """(sender's, receiver's) by cut and slot."""
    senders, receivers = {}, {}
    for each in deltas_of(swarm):
        senders.update({(at.stage, at.slot): end._cache for at, end in each._senders.items()})
        receivers.update(
            {(at.stage - 1, at.slot): end._cache for at, end in each._receivers.items()}
        )
    assert senders.keys() == receivers.keys()
    return {at: (senders[at], receivers[at]) for at in senders}


def check_mirrored(swarm: Swarm, num_samples: int) -> None:
    """Both ends have the same entries, bit for bit, and nothing is left open."""
    for sender, receiver in caches(swarm).values():
        assert sender._aside == receiver._aside == {}
        assert sender._entries == receiver._entries
        assert len(sender._entries) == num_samples
        for slot in sender._entries:
            assert torch.equal(sender.values(slot), receiver.values(slot))


def counts(swarm: Swarm) -> tuple[int, int]:
    """Samples that were sent in full, and as a change."""
    found = [end.counts for each in deltas_of(swarm) for end in each._senders.values()]
    num_full = sum(each.num_full + each.num_unkept + each.num_cold for each in found)
    return num_full, sum(each.num_deltas for each in found)


def test_both_ends_are_equal_after_every_step_and_only_the_first_visit_is_in_full(
    manifest: Manifest, blobs: Path
) -> None:
    swarm = started(manifest, blobs, shuffle=2)
    for step in range(9):
        swarm.step(step)
        check_mirrored(swarm, min(4 * (step + 1), NUM_WINDOWS // 2))
    assert counts(swarm) == (2 * NUM_WINDOWS, 2 * 2 * NUM_WINDOWS), "two cuts, three epochs"
    assert swarm.dropped() == {}


def test_every_placement_gives_the_same_bits(manifest: Manifest, blobs: Path) -> None:
    found = []
    for slots in (THREE, [["a", "b"], ["b", "a"], ["a", "a"]], [["a", "a"]] * 3):
        swarm = started(manifest, blobs, slots, shuffle=len(found))
        found.append([(s.losses, s.hashes) for s in map(swarm.step, range(6))])
        check_mirrored(swarm, NUM_WINDOWS // 2)
    assert found[0] == found[1] == found[2]


def test_it_stays_near_training_without_codecs_where_as_few_bits_alone_do_not(blobs: Path) -> None:
    final = {}
    for activation in ("none", "aq/int2/32", "int2/32"):
        manifest = manifest_of(blobs, activation, steps=24, slots=1, num_microbatches=4)
        swarm = started(manifest, blobs, [["a"]] * 3)
        final[activation] = sum(swarm.step(step).loss for step in range(24)) / 24
    plain, with_it, without = final.values()
    assert abs(with_it - plain) < abs(without - plain) / 2, final


@pytest.mark.parametrize("num_units", [0, 4, 9, 60])
def test_a_new_generation_begins_without_history(
    manifest: Manifest, blobs: Path, num_units: int
) -> None:
    swarm = started(manifest, blobs, shuffle=num_units)
    for step in range(4):
        swarm.step(step)
    swarm.begin(4)
    swarm.pump(max_units=num_units)
    swarm.take(Ready)
    late = [item for item in swarm.network if isinstance(unpack_local(item[1])[0], Frame)]
    swarm.network.clear()
    swarm.slots = [["a", "a"], ["c", "d"], ["e", "f"]]
    swarm.configure(4, "keep")
    swarm.network.extend(late)
    check_mirrored(swarm, 0)
    swarm.step(4)
    check_mirrored(swarm, 4)
    assert counts(swarm) == (16, 0)
    for step in range(5, 8):
        swarm.step(step)
    full, changes = counts(swarm)
    assert full + changes == 2 * 4 * 8
    assert changes > 0, "samples of the steps since then come again"
    assert set(swarm.dropped()) <= {"generation"}
    assert swarm.dropped().get("generation", 0) >= len(late)


def test_evaluation_has_no_history_and_leaves_none(manifest: Manifest, blobs: Path) -> None:
    swarm, control = started(manifest, blobs), started(manifest, blobs)
    steps = []
    for step in range(4):
        swarm.evaluate(step)
        steps.append(swarm.step(step))
    assert steps == [control.step(step) for step in range(4)]
    assert swarm.evaluate(4) == swarm.evaluate(4) == control.evaluate(4)
    assert swarm.dropped() == {}


def test_between_the_ends_the_index_of_the_samples_is_enough(
    manifest: Manifest, blobs: Path
) -> None:
    assert manifest.data is not None
    name = manifest.data.train.sha256
    index = blobs / "empty" / name[:2] / name
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_bytes((blobs / name[:2] / name).read_bytes())
    swarm = started(manifest, blobs, without_data=frozenset("cd"))
    control = started(manifest, blobs)
    assert [swarm.step(step) for step in range(4)] == [control.step(step) for step in range(4)]


def test_samples_beyond_the_budget_travel_in_full_every_time(blobs: Path) -> None:
    room = 5 * 16 * 32 * 2
    swarm = started(manifest_of(blobs, codecs={"delta_cache_bytes": room}), blobs)
    for step in range(6):
        swarm.step(step)
    check_mirrored(swarm, 5)
    assert counts(swarm) == (2 * NUM_WINDOWS + 2 * (NUM_WINDOWS - 10), 2 * 10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cache_on_disk_is_a_file_in_the_jobs_folder_and_changes_no_bit(blobs: Path) -> None:
    room, found = 5 * 16 * 32 * 2, {}
    for on_disk in (False, True):
        codecs = {"delta_cache_bytes": room, "delta_cache_on_disk": on_disk}
        swarm = started(manifest_of(blobs, codecs=codecs), blobs)
        found[on_disk] = [swarm.step(step) for step in range(6)]
        check_mirrored(swarm, 5)
        assert counts(swarm)[1] == 2 * 10
        sizes = {peer: mapped_sizes(swarm.home / peer) for peer in "abcdef"}
        rooms = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 1, "f": 1} if on_disk else {}
        assert sizes == {peer: [room] * rooms.get(peer, 0) for peer in "abcdef"}
        assert all(not list((swarm.home / peer).glob("#*")) for peer in "abcdef"), "no name"
        swarm.configure(6, "keep")
        assert sizes == {peer: mapped_sizes(swarm.home / peer) for peer in "abcdef"}, "none is left"
    steps, same = found.values()
    assert [(s.losses, s.hashes) for s in steps] == [(s.losses, s.hashes) for s in same]


def mapped_sizes(folder: Path) -> list[int]:
    """Of the files without a name in `folder` that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().parent == folder.resolve():
                found.append(link.stat().st_size)
    return found


def test_what_a_step_changes_is_prefetched_before_it_is_read(
    blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the receiver all of it; at the sender all but the first microbatch of a step."""
    swarm = started(manifest_of(blobs, codecs={"delta_cache_on_disk": True}), blobs)
    for step in range(3):
        swarm.step(step)
    asked: dict[DeltaCache, set[int]] = {}
    read: dict[DeltaCache, set[int]] = {}
    prefetch, values = DeltaCache.prefetch, DeltaCache.values

    def noted_prefetch(cache: DeltaCache, slot: int) -> None:
        if slot not in read.get(cache, ()):
            asked.setdefault(cache, set()).add(slot)
        prefetch(cache, slot)

    def noted_values(cache: DeltaCache, slot: int) -> Tensor:
        read.setdefault(cache, set()).add(slot)
        return values(cache, slot)

    monkeypatch.setattr(DeltaCache, "prefetch", noted_prefetch)
    monkeypatch.setattr(DeltaCache, "values", noted_values)
    swarm.step(3)
    num_rows = 2
    for sender, receiver in caches(swarm).values():
        assert len(read[sender]) == len(read[receiver]) == 2 * num_rows
        assert asked[receiver] == read[receiver]
        assert asked[sender] < read[sender]
        assert len(asked[sender]) == num_rows


@pytest.mark.parametrize("extra_bytes", [-1, 1, 1 << 20])
def test_a_frame_of_another_size_is_dropped(
    manifest: Manifest, blobs: Path, extra_bytes: int
) -> None:
    swarm = started(manifest, blobs)
    swarm.begin(0)
    while not swarm.network:
        swarm.pump(max_units=1)
    message, payload = unpack_local(swarm.network[0][1])
    assert isinstance(message, Frame)
    size = len(payload) + extra_bytes
    swarm.tell(PeerId("c"), message, bytes(payload)[:size].ljust(size, b"\0"))
    assert swarm.engines[PeerId("c")].dropped == {"length": 1}


def test_a_change_of_something_else_fails_and_the_next_generation_goes_on(
    manifest: Manifest, blobs: Path
) -> None:
    swarm = started(manifest, blobs)
    for step in range(4):
        swarm.step(step)
    receiver = next(d._receivers for d in deltas_of(swarm) if SlotId(1, 0) in d._receivers)
    cache = receiver[SlotId(1, 0)]._cache
    cache._rows.view(torch.int16)[:, 5] ^= 64  # a bit flips in every entry of one end
    swarm.begin(4)
    swarm.pump()
    (failed,) = swarm.take(Failed)
    assert "stage 1, slot 0" in failed.reason
    assert "do not follow" in failed.reason
    assert failed.is_mismatch
    swarm.take(Ready)
    swarm.configure(4, "keep")
    assert swarm.step(4).losses
    check_mirrored(swarm, 4)


def test_a_row_in_place_of_another_is_found_out(manifest: Manifest, blobs: Path) -> None:
    swarm = started(manifest, blobs, [["a"] * 2, ["c"] * 2, ["e"] * 2])
    for step in range(3):
        swarm.step(step)
    swarm.begin(3)
    while not any(is_activation(data) for _, data in swarm.network):
        swarm.pump(max_units=1)
    index = next(i for i, (_, data) in enumerate(swarm.network) if is_activation(data))
    sender, data = swarm.network[index]
    message, payload = unpack_local(data)
    second = bytes(payload[len(payload) // 2 :])
    swarm.network[index] = (sender, pack(message) + second + second)
    swarm.pump()
    (failed,) = swarm.take(Failed)
    assert "do not follow" in failed.reason


def is_activation(data: bytes) -> bool:
    message, _ = unpack_local(data)
    return isinstance(message, Frame) and message.kind == "activation"
