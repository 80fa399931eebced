"""Shadows, snapshots and replay: whoever holds a stage comes to the same bits, by any road."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_swarm import LLAMA, TIED, Step, Swarm, make_manifest

from swarmnode.domain import Generation, PeerId, SlotId
from swarmnode.engine_messages import Base, Export, Exported, Replay
from swarmnode.errors import DataError
from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.messages import (
    Commit,
    Failed,
    Frame,
    Ready,
)
from swarmnode.tensorfiles import read_header
from swarmnode.worker.engine.snapshots import Snapshots
from swarmnode.worker.files import read_state_name, stage_directory, state_path
from swarmnode.worker.training import state as states
from swarmnode.worker.training.log import UpdateLog
from swarmnode.worker.training.state import StageState
from tests.tmpfs import tmpfs

GRID = [["a", "b"], ["c", "b"]]
SHADOWS = [["d"], ["a", "d"]]
"""d only watches, a computes the first stage and shadows the second one."""


def manifest_of(blobs: Path, config: Mapping[str, Any], codec: str) -> Manifest:
    codecs = CodecConfig(activation="int8", activation_gradient="int8", gradient=codec)  # type: ignore[arg-type]
    return make_manifest(blobs, config, codecs=codecs)


def outcome(steps: list[Step]) -> list[object]:
    return [(s.losses, s.hashes, s.updates, s.scale) for s in steps]


def replays(swarm: Swarm, steps: list[Step], peer: str, stage: int, start: int) -> tuple[Any, ...]:
    """The updates since `start` as they lie in a peer's own log."""
    log = UpdateLog(stage_directory(swarm.home / peer, stage))
    return tuple(
        Replay(k, steps[k].scale, str(log.update_path(k))) for k in range(start, len(steps))
    )


def state_of(swarm: Swarm, peer: str, stage: int) -> dict[str, torch.Tensor]:
    tensors = swarm.engines[PeerId(peer)]._held[stage].tensors()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert any("::exp_avg_sq" in name for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_shadows_change_nothing_and_hold_the_same_bits(
    config: Mapping[str, Any], codec: str, tmp_path: Path
) -> None:
    manifest = manifest_of(tmp_path, config, codec)
    results = []
    for shadows in ([], SHADOWS):
        swarm = Swarm(manifest, GRID, tmp_path, shuffle=3, shadows=shadows)
        swarm.configure()
        results.append(outcome([swarm.step(step) for step in range(4)]))
        assert swarm.dropped() == {}
    assert results[0] == results[1]
    for stage, holders in ((0, "abd"), (1, "cbad")):
        states = [state_of(swarm, peer, stage) for peer in holders]
        for state in states[1:]:
            assert_same(states[0], state)


def test_a_shadow_says_ready_without_having_computed(tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, TIED), GRID, tmp_path, shadows=SHADOWS)
    swarm.without_data = frozenset("d")
    swarm.configure()
    assert len(swarm.evaluate(0)) == 4, "and it takes no part in an evaluation"
    swarm.begin(0)
    swarm.pump()
    said = {ready.source: ready for ready in swarm.received_of(Ready)}
    assert set(said) == {SlotId(0, v) for v in range(3)} | {SlotId(1, v) for v in range(4)}
    for shadow, real in ((SlotId(0, 2), SlotId(0, 0)), (SlotId(1, 2), SlotId(1, 1))):
        assert (said[shadow].microbatches, said[shadow].losses) == ((), ())
        assert said[real].microbatches != ()
        assert said[shadow].update == said[real].update
        assert said[shadow].sums_of_squares == said[real].sums_of_squares
    log = UpdateLog(stage_directory(swarm.home / "d", 0))
    assert log.inventory() == {0: said[SlotId(0, 2)].update}


def test_a_step_without_a_shadows_ready_is_not_applied(tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), GRID, tmp_path, shadows=SHADOWS)
    swarm.configure()
    swarm.begin_only(["a", "b", "c"], 0)  # d does not begin
    swarm.pump()
    assert SlotId(0, 2) not in {ready.source for ready in swarm.received_of(Ready)}
    (shadow,) = (e for p, e in swarm.engines.items() if p == "d")
    swarm.tell(PeerId("d"), Commit(swarm.manifest.job, Generation(1), 0, 1.0))
    assert shadow.dropped == {"commit": 1}
    assert shadow._held[0].step == 0
    swarm.begin_only(["d"], 0)
    swarm.pump()
    assert swarm.commit(0).hashes


@pytest.mark.parametrize("kind", ["activation", "activation_gradient", "gradient"])
def test_nothing_but_reduced_gradients_is_addressed_to_a_shadow(kind: Any, tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), GRID, tmp_path, shadows=SHADOWS)
    swarm.configure()
    source = {"activation": SlotId(0, 3), "activation_gradient": SlotId(2, 3)}
    frame = Frame(
        swarm.manifest.job, Generation(1), 0, kind, source.get(kind, SlotId(1, 0)),
        SlotId(1, 3), 3, 0, 0, (2, 16, 32),
    )  # fmt: skip
    if kind == "gradient":
        frame = replace(frame, group=1, microbatch=0)
    swarm.tell(PeerId("d"), frame, bytes(2 * 16 * 32 * 4))
    assert swarm.engines[PeerId("d")].dropped == {"slot": 1}


@pytest.mark.parametrize("codec", ["none", "int8", "stride0.5/int4"])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_a_snapshot_and_replayed_updates_are_the_live_state_bit_for_bit(
    config: Mapping[str, Any], codec: str, tmp_path: Path
) -> None:
    swarm = Swarm(manifest_of(tmp_path, config, codec), GRID, tmp_path, shadows=SHADOWS)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    swarm.begin(2)
    swarm.pump()
    steps.append(swarm.commit(2, snapshot=True))
    steps += [swarm.step(step) for step in range(3, 6)]
    for engine in swarm.engines.values():
        engine.close()
    swarm.pump()
    written = swarm.take(Exported)
    assert sorted((e.stage, e.step) for e in written) == [(0, 3)] * 3 + [(1, 3)] * 4
    live = {(p, s): state_of(swarm, p, s) for p in "abcd" for s in swarm.plan.stages_of(PeerId(p))}
    hashes = swarm.step_hashes()

    fresh = Swarm(swarm.manifest, GRID, tmp_path, shadows=SHADOWS, generation=5)
    fresh.home = swarm.home

    def base(peer: PeerId, stage: int) -> Base:
        """Some from the snapshot, some from the very start."""
        if peer in "ad":
            path = state_path(swarm.home / peer, stage, 3, "snapshot")
            return Base(stage, "load", 3, str(path), replays(swarm, steps, peer, stage, 3))
        return Base(stage, "init", 0, "", replays(swarm, steps, peer, stage, 0))

    fresh.start(6, base)
    for (peer, stage), state in live.items():
        assert_same(state_of(fresh, peer, stage), state)
    assert fresh.step_hashes() == hashes
    assert outcome([fresh.step(6)]) == outcome([follow(swarm)])


def follow(swarm: Swarm) -> Step:
    """One more step of engines whose file writers have ended."""
    return swarm.step(6)


def test_a_holder_that_is_behind_keeps_its_memory_and_replays_the_rest(tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, TIED), GRID, tmp_path, shadows=SHADOWS)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    late = swarm.engines.pop(PeerId("d"))
    swarm.shadows = [[], ["a"]]
    swarm.configure(2, "keep")
    steps += [swarm.step(2), swarm.step(3)]
    swarm.engines[PeerId("d")] = late
    swarm.shadows = SHADOWS

    def base(peer: PeerId, stage: int) -> Base:
        if peer != "d":
            return Base(stage, "keep", 4)
        return Base(stage, "keep", 1, "", replays(swarm, steps, "b", stage, 1))  # 1 is in it

    swarm.start(4, base)
    for stage in (0, 1):
        assert_same(state_of(swarm, "d", stage), state_of(swarm, "b", stage))
    assert swarm.step(4).losses


@pytest.mark.parametrize("damage", ["cut", "gone", "gap"])
def test_an_update_that_cannot_be_replayed_fails_and_leaves_the_former_state(
    damage: str, tmp_path: Path
) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), [["a", "a"], ["a", "a"]], tmp_path)
    swarm.configure()
    steps = [swarm.step(0), swarm.step(1)]
    given = list(replays(swarm, steps, "a", 0, 0))
    whole = Path(given[1].path).read_bytes()
    if damage == "cut":
        Path(given[1].path).write_bytes(whole[:-1])
    elif damage == "gone":
        Path(given[1].path).unlink()
    else:
        del given[0]
    swarm.generation += 1
    bases = (Base(0, "init", 0, "", tuple(given)), Base(1, "keep", 2))
    configure = swarm.configuration(PeerId("a"), 2, bases)
    swarm.tell(PeerId("a"), configure, swarm.manifest.canonical())
    swarm.pump()
    (failed,) = swarm.take(Failed)
    assert "\n" not in failed.reason
    assert "update" in failed.reason or "cannot read" in failed.reason
    Path(given[-1].path).write_bytes(whole)
    good = replays(swarm, steps, "a", 0, 0)
    swarm.start(2, lambda _, s: Base(s, "init", 0, "", good) if s == 0 else Base(s, "keep", 2))
    assert swarm.step(2).losses


def test_the_next_update_waits_for_the_copy_and_computing_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), [["a", "a"], ["a", "a"]], tmp_path)
    swarm.configure()
    engine = swarm.engines[PeerId("a")]
    swarm.step(0)
    before = state_of(swarm, "a", 0)
    may_copy = threading.Event()
    engine._snapshots._copier.submit(may_copy.wait)
    swarm.begin(1)
    swarm.pump()
    swarm.tell(
        PeerId("a"),
        Export(swarm.manifest.job, Generation(1), 1, 0, str(tmp_path / "x.safetensors")),
    )
    assert not may_copy.is_set()
    state = engine._held[0]
    assert state.copying is not None

    def wait_a_while(copies: list[Future[None]]) -> None:
        """The copy goes on only once the update waits for it."""
        threading.Timer(0.1, may_copy.set).start()
        wait(copies)

    monkeypatch.setattr(states, "wait", wait_a_while)
    swarm.commit(1)
    assert may_copy.is_set()
    assert state.stall_s > 0.05
    engine.close()
    stored = {n: torch.frombuffer(bytearray(b), dtype=torch.float32) for n, b in read(tmp_path)}
    for name, tensor in before.items():
        assert torch.equal(stored[name].reshape(tensor.shape), tensor), (
            "the state before the update"
        )
    assert not torch.equal(before["model.embed_tokens.weight"],
                           state_of(swarm, "a", 0)["model.embed_tokens.weight"])  # fmt: skip


def read(folder: Path) -> list[tuple[str, bytes]]:
    spans = read_header(folder / "x.safetensors")
    data = (folder / "x.safetensors").read_bytes()
    return [(n, data[s.offset : s.offset + s.num_bytes]) for n, s in spans.items()]


def test_a_snapshot_that_fails_costs_only_itself(tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), [["a", "a"], ["a", "a"]], tmp_path)
    swarm.configure()
    swarm.begin(0)
    swarm.pump()
    blocked = state_path(swarm.home / "a", 1, 1, "snapshot")
    blocked.mkdir(parents=True)  # the rename onto it fails
    swarm.commit(0, snapshot=True)
    engine = swarm.engines[PeerId("a")]
    engine._snapshots._copier.submit(int).result()
    engine._snapshots._writer.submit(int).result()
    swarm.pump()
    assert {e.stage: bool(e.path) for e in swarm.take(Exported)} == {0: True, 1: False}
    assert swarm.take(Failed) == []
    assert swarm.step(1).losses


def test_an_export_of_a_state_that_is_being_written_waits_for_that_file(tmp_path: Path) -> None:
    swarm = Swarm(make_manifest(tmp_path, LLAMA), [["a", "a"], ["a", "a"]], tmp_path)
    swarm.configure()
    swarm.begin(0)
    swarm.pump()
    engine = swarm.engines[PeerId("a")]
    may_copy = threading.Event()
    engine._snapshots._copier.submit(may_copy.wait)
    swarm.commit(0, snapshot=True)
    path = str(tmp_path / "never.safetensors")
    swarm.tell(PeerId("a"), Export(swarm.manifest.job, Generation(1), 1, 1, path))
    may_copy.set()
    engine.close()
    swarm.pump()
    written = [e.path for e in swarm.take(Exported) if e.stage == 1]
    assert written == [str(state_path(swarm.home / "a", 1, 1, "snapshot"))] * 2
    assert not Path(path).exists()


KILLED = """
import sys
from pathlib import Path
import torch
from swarmnode.worker.models import save_tensors
save_tensors(Path(sys.argv[1]), {"x": torch.full((1000,), float(sys.argv[2]))})
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_former_file(tmp_path: Path) -> None:
    path, marker = tmp_path / "3.safetensors", tmp_path / "hit"
    environment = {**os.environ, "SWARMNODE_FAILPOINT_ONCE": str(marker)}
    argv = [sys.executable, "-c", KILLED, str(path)]
    subprocess.run([*argv, "1"], check=True, env=environment)
    before = path.read_bytes()
    armed = {**environment, "SWARMNODE_FAILPOINT": "snapshot_write"}
    killed = subprocess.run([*argv, "2"], check=False, env=armed)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert marker.exists()
    assert [p for p in tmp_path.iterdir() if read_state_name(p) is not None] == [path]
    subprocess.run([*argv, "2"], check=True, env=armed)  # once only
    assert path.read_bytes() != before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 256 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with tmpfs(folder, "256k"):
        yield folder


def test_a_full_disk_keeps_the_former_snapshot_and_the_log(tiny_disk: Path) -> None:
    snapshots = Snapshots()
    results: list[BaseException | None] = []
    log = UpdateLog(tiny_disk / "stage-0")
    refs = {0: log.write(0, [b"x" * 1000])}
    for step, num_values in ((1, 20_000), (2, 60_000)):
        state = _State({"x": torch.zeros(num_values)}, step)
        path = state_path(tiny_disk, 0, step, "snapshot")
        snapshots.start(0, state, path, lambda _, error: results.append(error))  # type: ignore[arg-type]
    snapshots.close()
    assert results[0] is None
    assert isinstance(results[1], DataError)
    assert "x" in read_header(state_path(tiny_disk, 0, 1, "snapshot"))
    assert not state_path(tiny_disk, 0, 2, "snapshot").exists()
    with pytest.raises(DataError, match="free some space"):
        log.write(1, [bytes(1 << 20)])
    assert log.inventory() == refs
    assert not list(tiny_disk.rglob("*.partial"))


class _State(StageState):
    """A state of bare tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        self._tensors = tensors
        self.step = step

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors
