"""A worker child on hashes: what `engine.Engine` does, with the real `Steps` and `UpdateLog`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from swarmnode.domain import Generation, JobId
from swarmnode.engine_messages import Base, Configure, Configured, EngineMessage, Export, Exported
from swarmnode.errors import DataError, SwarmError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Begin,
    Commit,
    Failed,
    Frame,
    Message,
)
from swarmnode.simulation import history
from swarmnode.simulation.computing import StageState, ToyGrid, ToyPipeline, ToyReduction
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.invariants import Invariants
from swarmnode.simulation.paths import SimPath
from swarmnode.simulation.world import Process, World
from swarmnode.worker.engine.ports import Payload, Post
from swarmnode.worker.engine.steps import Steps
from swarmnode.worker.files import stage_directory, state_path
from swarmnode.worker.training.log import UpdateLog

Tell = Callable[[Message | EngineMessage, bytes], object]


def sim_log(disk: Disk, directory: str) -> UpdateLog:
    """The real log; that what it writes is safe at once is up to the simulated disk."""
    return UpdateLog(cast(Path, SimPath(disk, directory)), durable=False)


def state_bytes(state: StageState) -> bytes:
    """A stage as a file: its steps, its hash, and a hash over both."""
    head = b"%d %s" % (state.step, state.state.hex().encode())
    return head + b" " + history.mix(head).hex().encode()


def read_state(data: bytes) -> StageState:
    """Raises: DataError if the bytes were damaged."""
    head, _, check = data.rpartition(b" ")
    if history.mix(head).hex().encode() != check:
        raise DataError("the file is not a state")
    step, _, state = head.partition(b" ")
    return StageState(bytes.fromhex(state.decode()), int(step))


@dataclass
class _Write:
    """A copy of a state on its way to a file."""

    step: int
    path: str
    data: bytes
    reports: list[Callable[[str], None]]


class Child:
    """One job's stages on one machine, in one life of the child process."""

    def __init__(
        self, world: World, process: Process, name: str, disk: Disk, manifest: Manifest,
        invariants: Invariants, tell: Tell, *, unit_s: float, write_s: float,
    ) -> None:  # fmt: skip
        """`unit_s`: one microbatch, one way; `write_s`: one state file."""
        self._world, self._process, self._name, self._disk = world, process, name, disk
        self._manifest = manifest
        self._invariants = invariants
        self._tell = tell
        self._unit_s, self._write_s = unit_s, write_s
        self._steps: Steps | None = None
        self._held: dict[int, StageState] = {}
        self._generation = Generation(-1)
        self._directory = Path()
        self._works = False
        self._writes: dict[int, list[_Write]] = {}
        """Of each stage the file that is written now, and one that waits for it."""
        self.lives = True
        self.dropped: Counter[str] = Counter()

    @property
    def job(self) -> JobId:
        return self._manifest.job

    def handle(self, message: Message | EngineMessage, payload: Payload = b"") -> None:
        """As `Engine.handle`."""
        if not self.lives:
            return
        if isinstance(message, Configure):
            if message.plan.generation < self._generation:
                self.dropped["generation"] += 1
                return
            self._generation = message.plan.generation
            self._guarded(lambda: self._configure(message))
        elif isinstance(message, Export):
            self._guarded(lambda: self._export(message))
        elif not isinstance(message, Frame | Begin | Commit):
            self.dropped["type"] += 1
        elif message.generation != self._generation:
            self.dropped["generation"] += 1
        else:
            self._guarded(lambda: self._dispatch(message, payload))
        self._go_on()

    def steps_held(self) -> dict[int, int]:
        return {stage: state.step for stage, state in sorted(self._held.items())}

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except SwarmError as error:
            if type(error).__name__ == "Violation":
                raise
            self._steps = None
            self._tell(Failed(self.job, self._generation, str(error)[:300]), b"")

    def _dispatch(self, message: Frame | Begin | Commit, payload: Payload) -> None:
        if self._steps is None:
            self.dropped["job"] += 1
        elif isinstance(message, Frame):
            self._steps.take(message, payload)
        elif isinstance(message, Begin):
            self._steps.begin(message)
        else:
            before = self.steps_held()
            self._steps.commit(message)
            if before != self.steps_held():
                self._applied(message)

    def _applied(self, commit: Commit) -> None:
        self._invariants.applied(self.job, self._name, commit.generation, commit.step)
        self._check_states()

    def _check_states(self) -> None:
        for stage, state in self._held.items():
            self._invariants.state(self.job, self._name, stage, state.step, state.state)

    # ---- a generation ----------------------------------------------------------------------

    def _configure(self, configure: Configure) -> None:
        self._steps = None
        kept = {base.stage for base in configure.bases if base.how == "keep"}
        self._held = {stage: s for stage, s in sorted(self._held.items()) if stage in kept}
        bases = {base.stage: base for base in configure.bases}
        stages: dict[int, StageState] = {}
        for stage in configure.plan.stages_of(configure.peer):
            if stage not in bases:
                raise DataError(f"nothing says where stage {stage} comes from")
            state = stages[stage] = self._based_on(bases[stage])
            self._replay(state, bases[stage])
            if state.step != configure.step:
                raise DataError(f"stage {stage} is held at {state.step}, not {configure.step}")
        self._held = stages
        self._check_states()
        self._directory = Path(configure.log_directory)
        grid = ToyGrid(
            self._manifest, configure.peer, configure.plan, stages,
            {s: sim_log(self._disk, str(stage_directory(self._directory, s))) for s in stages},
            lambda stage, step, counts: self._invariants.counted(self._name, stage, step, counts),
        )  # fmt: skip
        self._steps = self._make_steps(grid, configure.step)
        answer = Configured(self.job, configure.plan.generation, configure.step)
        self._tell(answer, b"")

    def _make_steps(self, grid: ToyGrid, step: int) -> Steps:
        pipelines: dict[int, ToyPipeline] = {}

        def make_pipeline(at: int, evaluate: bool, post: Post) -> ToyPipeline:
            pipeline = ToyPipeline(grid, at, evaluate, post)
            if not evaluate:
                pipelines.clear()
                pipelines[at] = pipeline
            return pipeline

        def make_reduction(at: int, post: Post) -> ToyReduction:
            slots = pipelines[at].slots
            return ToyReduction(grid, at, lambda slot: slots[slot].gradient, post)

        return Steps(
            grid, step, self._send_result, self.dropped,
            make_pipeline, make_reduction, self._snapshot,
        )  # fmt: skip

    def _send_result(self, message: Message | EngineMessage, payload: Payload) -> None:
        self._tell(message, bytes(payload))

    def _based_on(self, base: Base) -> StageState:
        if base.how == "keep":
            held = self._held.get(base.stage)
            if held is None or held.step < base.step:
                raise DataError(f"stage {base.stage} is not held here at step {base.step}")
            return held
        if base.how == "load":
            try:
                state = read_state(self._disk.read(base.path))
            except OSError as error:
                raise DataError(f"{base.path}: {error}") from error
            return StageState(state.state, base.step)
        if base.step != 0:
            raise DataError(f"stage {base.stage} cannot be at step {base.step} from the seed")
        return StageState(history.initial_state(self._manifest.run.seed, base.stage), 0)

    def _replay(self, state: StageState, base: Base) -> None:
        for update in base.replays:
            if update.step < state.step:
                continue
            if update.step > state.step:
                raise DataError(f"the update of step {state.step} is missing")
            try:
                data = self._disk.read(update.path)
            except OSError as error:
                raise DataError(f"cannot read {update.path}") from error
            state.state = history.apply_update(state.state, data, update.scale)
            state.step += 1

    # ---- files -----------------------------------------------------------------------------

    def _export(self, export: Export) -> None:
        def report(path: str) -> None:
            if not path:
                self._tell(Failed(self.job, export.generation, "the disk is full"), b"")
            else:
                self._report_file(export.generation, export.step, export.stage, path)

        for write in self._writes.get(export.stage, ()):
            if write.step == export.step:
                write.reports.append(report)
                return
        state = self._held.get(export.stage)
        if state is None or state.step != export.step:
            self.dropped["export"] += 1
            return
        self._write(export.stage, state, export.path, report)

    def _snapshot(self, step: int) -> None:
        generation = self._generation
        for stage, state in self._held.items():
            if stage in self._writes:
                continue  # as in worker.engine: the log has the rest
            path = str(state_path(self._directory, stage, step, "snapshot"))

            def report(found: str, stage: int = stage) -> None:
                self._report_file(generation, step, stage, found)

            self._write(stage, state, path, report)

    def _write(
        self, stage: int, state: StageState, path: str, report: Callable[[str], None]
    ) -> None:
        """Write a copy aside, behind the one at hand and in place of another one that waits;
        whoever wants the same file meanwhile is told of it too."""
        writes = self._writes.setdefault(stage, [])
        if len(writes) > 1:
            self.dropped["export"] += len(writes.pop().reports)
        writes.append(_Write(state.step, path, state_bytes(state), [report]))
        if len(writes) == 1:
            self._begin_write(stage)

    def _begin_write(self, stage: int) -> None:
        delay_s = self._write_s * (0.5 + self._world.random.random()) + self._disk.sync_s
        self._world.after(delay_s, self._process, self._finish_write, stage)

    def _finish_write(self, stage: int) -> None:
        if not self.lives:
            return
        write = self._writes[stage].pop(0)
        found = write.path
        try:
            self._disk.replace(found, write.data)
        except OSError:
            found = ""
        if self._writes[stage]:
            self._begin_write(stage)
        else:
            del self._writes[stage]
        for each in write.reports:
            each(found)

    def _report_file(self, generation: Generation, step: int, stage: int, path: str) -> None:
        self._tell(Exported(self.job, generation, step, stage, path), b"")

    # ---- computing -------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self._steps is not None and not self._works and self.lives:
            self._works = True
            self._world.after(self._unit_s, self._process, self._work)

    def _work(self) -> None:
        self._works = False
        steps = self._steps
        if steps is None or not self.lives:
            return
        done = False

        def once() -> None:
            nonlocal done
            done = steps.work()

        self._guarded(once)
        if done:
            self._go_on()
