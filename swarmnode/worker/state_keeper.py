"""One job's state on one node: the files of its stages, what the child holds, what was promised.

Files only change through here and through the child, which writes snapshots and updates. Calls
that read or write them block; call them in a thread.
"""

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from swarmnode.domain import BlobRef, PeerId, Plan
from swarmnode.engine_messages import Base, Replay
from swarmnode.errors import DataError, ProtocolError, SwarmError
from swarmnode.home import make_folder, remove_partials, sync_folder, write_durably
from swarmnode.messages import (
    Held,
    Ready,
)
from swarmnode.p2p.blob_store import BlobStore, Range
from swarmnode.p2p.states import index_tensors
from swarmnode.tensorfiles import check_data, read_header
from swarmnode.wire import pack, unpack
from swarmnode.worker import handoff
from swarmnode.worker.files import FileKind, read_state_name, stage_directory
from swarmnode.worker.handoff import Handoff, Holding
from swarmnode.worker.tenancy import Tenancy
from swarmnode.worker.training.log import UpdateLog, newest_run

_BEST_FIRST: tuple[FileKind, ...] = ("snapshot", "export", "fetched")
_FOLDER = "stage-"
KEPT_EXPORTS = 2
RESERVED_SHARE = 4
"""Updates are kept for who fetches a state as long as they have at most so many times its bytes."""


class StateKeeper:
    """What one node holds of one job, by stage."""

    def __init__(self, directory: Path, store: BlobStore, *, starts_itself: bool) -> None:
        """`starts_itself`: whether a stage's first state follows from the manifest alone."""
        self.directory = directory
        self._store = store
        self._starts_itself = starts_itself
        self.memory: dict[int, int] = {}
        """Committed steps in each stage that the child holds."""
        self._logs: dict[int, dict[int, BlobRef]] = {}
        self._readies: dict[tuple[int, int], Ready] = {}
        self._expected: frozenset[int] = frozenset()
        self._reserved: dict[int, int] = {}
        """stage -> the step from which on somebody who fetches its state will need updates."""
        self._is_settled = False
        """Whether everybody has the states of the generation at hand."""
        self._tidying = threading.Lock()

    # ---- what is here ----------------------------------------------------------------------

    def load(self) -> None:
        """Look through the folder after a restart: what is torn or damaged goes, all else stays."""
        remove_partials(self.directory)
        for stage in self._stages_on_disk():
            remove_partials(stage_directory(self.directory, stage))
            for path in self._files(stage).values():
                try:
                    check_data(path)
                except DataError:
                    path.unlink(missing_ok=True)
            self._load_log(stage)

    def _load_log(self, stage: int) -> None:
        log = self.log(stage)
        self._logs[stage] = log.inventory()
        for step in self._logs[stage]:
            self._store.add_ranges(log.ranges(step))
        for said in log.readies():
            with contextlib.suppress(ProtocolError):  # of an earlier version
                ready, _ = unpack(said)
                if isinstance(ready, Ready):
                    self._readies[stage, ready.source.slot] = ready

    def log(self, stage: int) -> UpdateLog:
        return UpdateLog(stage_directory(self.directory, stage))

    def holding(self, stage: int) -> Holding:
        """Everything that an assignment of `stage` may start from."""
        entries = self._logs.get(stage, {})
        return Holding(
            memory=self.memory.get(stage),
            snapshots=tuple(sorted({step for step, _ in self._files(stage)})),
            log={step: entries[step] for step in newest_run(entries)},
            starts_itself=self._starts_itself,
        )

    def held(self, plan: Plan) -> tuple[Held, ...]:
        """The answer to a coordinator's question; `plan` is the last one that was adopted."""
        stages = sorted({*self.memory, *self._logs, *self._stages_on_disk()})
        found = (
            handoff.held(stage, plan.layers[stage], self.holding(stage))
            for stage in stages
            if stage < plan.num_stages
        )
        return tuple(answer for answer in found if answer is not None)

    def readies(self) -> tuple[Ready, ...]:
        """What was said last, as far as the log still has it. Also of a step that is applied here:
        whoever asks may not know that it was committed."""
        return tuple(
            ready
            for (stage, _), ready in sorted(self._readies.items())
            if self._logs.get(stage, {}).get(ready.step) == ready.update
        )

    def file(self, stage: int, step: int, kinds: Collection[FileKind] = _BEST_FIRST) -> Path | None:
        """The best file of a stage's state after `step` steps, if there is one."""
        files = self._files(stage)
        return next((files[step, kind] for kind in kinds if (step, kind) in files), None)

    # ---- what happens ----------------------------------------------------------------------

    def keep_ready(self, ready: Ready) -> None:
        """Have on the disk what a slot is about to say: it may be all that is left of a commit.

        Raises: DataError if the disk is full or broken.
        """
        self.log(ready.source.stage).write_ready(ready.source.slot, pack(ready))

    def said(self, ready: Ready) -> None:
        """An update is in the log: from now on anybody of the job may fetch it.

        Raises: DataError if it is not there as the child says.
        """
        stage, step = ready.source.stage, ready.step
        entries = self._logs.setdefault(stage, {})
        if entries.get(step) != ready.update:
            self._serve_update(stage, step)
            if entries.get(step) != ready.update:
                raise DataError(f"the log of stage {stage} has another update of step {step}")
        self._readies[stage, ready.source.slot] = ready

    def logged(self, stage: int, step: int) -> None:
        """An update that was fetched is in the log now."""
        self._serve_update(stage, step)

    def change_layers(self, old: Plan | None, new: Plan) -> None:
        """Forget the stages whose layers are others in the new plan."""
        for stage in self._stages_on_disk() | set(self.memory):
            was = old.layers[stage] if old is not None and stage < old.num_stages else None
            if stage >= new.num_stages or (was is not None and was != new.layers[stage]):
                self._drop_stage(stage)

    def took(self, handoffs: Mapping[int, Handoff], step: int) -> None:
        """All stages of a generation are in memory at `step`: what they made worthless goes."""
        self.memory = dict.fromkeys(handoffs, step)
        self._expected = frozenset()
        self._readies.clear()
        for stage, taken in handoffs.items():
            kept = taken.step if taken.how == "fetch" else None
            for (at, kind), path in self._files(stage).items():
                if at in taken.stale_snapshots and not (at == kept and kind == "fetched"):
                    self._delete(path)
            self._delete_log(stage, taken.stale_log)
            self.log(stage).forget_readies()

    def disprove(self, stage: int, after_step: int) -> None:
        """States of more steps are of another history. The log that tells it is to be overwritten,
        and would no longer: they go before."""
        if self.memory.get(stage, 0) > after_step:
            del self.memory[stage]
        for (at, _), path in self._files(stage).items():
            if at > after_step:
                self._delete(path)

    def expect(self, stages: Iterable[int]) -> frozenset[int]:
        """States of these stages are fetched for a plan to come: `tidy` leaves them alone."""
        self._expected = frozenset(stages)
        return self._expected

    def reserve(self, stage: int, step: int) -> None:
        """Somebody fetches the state after `step` steps for a plan to come, and then needs the
        updates since: they stay until that plan has begun, or are `RESERVED_SHARE` too many."""
        self._reserved[stage] = step

    def unsettle(self) -> None:
        """Another generation is in the making: what is told of states and updates must stay.

        Returns once nothing is being deleted.
        """
        with self._tidying:
            self._is_settled = False

    def begun(self) -> None:
        """A step begins, so all have what they need of others."""
        if not self._is_settled:
            self._is_settled = True
            self._reserved.clear()

    def tidy(self, plan: Plan, peer: PeerId) -> None:
        """Delete what newer snapshots have made superfluous, and stages that are held no more;
        nothing while others may be fetching it."""
        with self._tidying:
            if self._is_settled:
                self._tidy(plan, peer)

    def _tidy(self, plan: Plan, peer: PeerId) -> None:
        mine = set(plan.stages_of(peer))
        for stage in self._stages_on_disk() - mine - self._expected:
            self._drop_stage(stage)
        for stage in mine:
            files = self._files(stage)
            steps = {step for step, kind in files if kind != "export"}
            kept, log_from = handoff.retained(sorted(steps))
            log_from = min(log_from, self._reserved_from(stage, log_from))
            exports = sorted(step for step, kind in files if kind == "export")[-KEPT_EXPORTS:]
            for (step, kind), path in files.items():
                doubled = kind == "fetched" and (step, "snapshot") in files
                if doubled or step not in (exports if kind == "export" else kept):
                    self._delete(path)
            self._delete_log(stage, [s for s in self._logs.get(stage, {}) if s < log_from])

    def publish(self, path: Path, step: int) -> BlobRef:
        """Serve a state file in chunks, as long as it is here; the name of its index, which lies
        beside it. Raises: SwarmError, OSError.
        """
        index, ranges = index_tensors(read_header(path), step)
        data = index.to_json()
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data))
        index_path = _index_path(path)
        index_path.write_bytes(data)
        self._store.add_ranges([*ranges, Range(ref, index_path, 0)])
        return ref

    def remove(self) -> None:
        """Delete everything but the tenancy: promises outlast the work."""
        for stage in self._stages_on_disk():
            self._drop_stage(stage)
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != TENANCY_NAME:
                path.unlink(missing_ok=True)

    # ---- inside ----------------------------------------------------------------------------

    def _stages_on_disk(self) -> set[int]:
        names = (path.name.removeprefix(_FOLDER) for path in self.directory.glob(_FOLDER + "*"))
        return {int(name) for name in names if name.isdecimal()}

    def _files(self, stage: int) -> dict[tuple[int, FileKind], Path]:
        folder = stage_directory(self.directory, stage)
        named = ((read_state_name(path), path) for path in folder.glob("*.safetensors"))
        return {name: path for name, path in named if name is not None}

    def _reserved_from(self, stage: int, log_from: int) -> int:
        """The first update that stays for somebody who fetches; `log_from` if none does."""
        first = self._reserved.get(stage)
        if first is None:
            return log_from
        log, files = self.log(stage), self._files(stage).values()
        reserved = (log.update_path(s) for s in self._logs.get(stage, {}) if first <= s < log_from)
        limit = RESERVED_SHARE * max((path.stat().st_size for path in files), default=0)
        if sum(path.stat().st_size for path in reserved) <= limit:
            return first
        del self._reserved[stage]
        return log_from

    def _serve_update(self, stage: int, step: int) -> None:
        log = self.log(stage)
        self._store.drop_ranges(log.update_path(step))
        self._store.drop_ranges(log.index_path(step))
        ranges = log.ranges(step)
        self._store.add_ranges(ranges)
        self._logs.setdefault(stage, {})[step] = ranges[0].ref

    def _delete_log(self, stage: int, steps: Collection[int]) -> None:
        log, entries = self.log(stage), self._logs.get(stage, {})
        for step in steps:
            self._store.drop_ranges(log.update_path(step))
            self._store.drop_ranges(log.index_path(step))
            entries.pop(step, None)
        log.delete(steps)

    def _delete(self, path: Path) -> None:
        for each in (path, _index_path(path)):
            self._store.drop_ranges(each)
            each.unlink(missing_ok=True)

    def _drop_stage(self, stage: int) -> None:
        for path in self._files(stage).values():
            self._delete(path)
        self._delete_log(stage, tuple(self._logs.get(stage, {})))
        self._logs.pop(stage, None)
        self.memory.pop(stage, None)
        shutil.rmtree(stage_directory(self.directory, stage), ignore_errors=True)


def _index_path(path: Path) -> Path:
    """Where the index of a published state file lies."""
    return path.with_name(path.name + ".index")


def base_of(stage: int, taken: Handoff, keeper: StateKeeper) -> Base:
    """A hand-off whose files are all here, as the child is told of it."""
    log = keeper.log(stage)
    replays = tuple(Replay(u.step, u.scale, str(log.update_path(u.step))) for u in taken.updates)
    if taken.how in ("keep", "init"):
        return Base(stage, "keep" if taken.how == "keep" else "init", taken.step, "", replays)
    kinds: tuple[FileKind, ...] = ("fetched",) if taken.how == "fetch" else _BEST_FIRST
    path = keeper.file(stage, taken.step, kinds)
    if path is None:
        raise DataError(f"the state of stage {stage} at step {taken.step} is gone from the disk")
    return Base(stage, "load", taken.step, str(path), replays)


# ---- what was promised --------------------------------------------------------------------------

TENANCY_NAME = "tenancy.json"


def save_tenancy(directory: Path, tenancy: Tenancy, manifest: bytes, signature: bytes) -> None:
    """Write what was promised; it is on the disk when this returns.

    Raises: SwarmError if it cannot be written; the former file is then still there.
    """
    body = {**tenancy.to_json(), "manifest": manifest.decode(), "signature": signature.hex()}
    body["sha256"] = _digest(body)
    try:
        make_folder(directory)
        write_durably(directory / TENANCY_NAME, json.dumps(body).encode())
        sync_folder(directory.parent)
    except OSError as error:
        raise SwarmError(f"cannot write {directory / TENANCY_NAME}: {error.strerror}") from error


def load_tenancy(directory: Path) -> tuple[Tenancy, bytes, bytes] | None:
    """(tenancy, canonical manifest, signature), or None if nothing was promised yet.

    Raises: DataError if the file is damaged: then nothing may be promised.
    """
    path = directory / TENANCY_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        digest = raw.pop("sha256", None)  # older versions wrote none
        if digest not in (None, _digest(raw)):
            raise ValueError("its content does not have its hash")
        return Tenancy.from_json(raw), raw["manifest"].encode(), bytes.fromhex(raw["signature"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
