"""The transaction of a training step on one node: frames in, Ready out, Commit in, Applied out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmnode.domain import SlotId
from swarmnode.failpoints import hit
from swarmnode.messages import (
    Applied,
    Begin,
    Commit,
    Evaluated,
    Frame,
    Ready,
)
from swarmnode.worker.engine.ports import (
    Grid,
    MakePipeline,
    MakeReduction,
    Payload,
    Send,
    StepPipeline,
    StepReduction,
)
from swarmnode.worker.training.expected import FrameKey, frame_key


@dataclass
class _Run:
    """A step, or an evaluation after so many steps; frames may come before its Begin."""

    seen: set[FrameKey] = field(default_factory=set)
    early: list[tuple[Frame, Payload]] = field(default_factory=list)
    pipeline: StepPipeline | None = None
    reduction: StepReduction | None = None
    reported: set[SlotId] = field(default_factory=set)


class Steps:
    """The steps of one generation, from `step` on.

    Bound: frames are kept for this step and the next, each at most once; the plan says how many
    there can be. Nothing durable changes before a Commit.
    """

    def __init__(
        self,
        grid: Grid,
        step: int,
        send: Send,
        dropped: Counter[str],
        make_pipeline: MakePipeline,
        make_reduction: MakeReduction,
        on_snapshot: Callable[[int], None],
    ) -> None:
        """`on_snapshot` is called with the committed steps of a state that is to be written."""
        self._grid = grid
        self._step = step
        self._send = send
        self._dropped = dropped
        self._make_pipeline = make_pipeline
        self._make_reduction = make_reduction
        self._on_snapshot = on_snapshot
        self._runs: dict[tuple[int, bool], _Run] = {}

    def close(self) -> None:
        """Nothing follows: let go of what is under way, gradients, graphs and caches. It refers to
        this too, and nobody collects such circles for hundreds of steps."""
        self._runs.clear()

    def begin(self, begin: Begin) -> None:
        """Start a step or an evaluation, with the frames that came early."""
        if begin.step != self._step:
            self._dropped["begin"] += 1
            return
        run = self._run(begin.step, begin.evaluate)
        if run.pipeline is not None and begin.evaluate and not self._grid.reads_data:
            # Without the data we cannot tell that the evaluation before this one has ended.
            run = self._runs[begin.step, True] = _Run()
        if run.pipeline is not None:
            self._dropped["begin"] += 1
            return
        run.pipeline = self._make_pipeline(begin.step, begin.evaluate, self._post)
        if not begin.evaluate:
            run.reduction = self._make_reduction(begin.step, self._post)
        early, run.early = run.early, []
        for frame, payload in early:
            self._deliver(run, frame, payload)
        for slot in self._grid.hosted:  # an evaluation may have nothing for a slot
            self._advance(run, slot)
        if begin.evaluate and not self._grid.hosted:
            del self._runs[begin.step, True]

    def take(self, frame: Frame, payload: Payload) -> None:
        """Take a frame of another node; what the plan does not expect is dropped and counted."""
        refusal = self._grid.expected.refusal(frame, memoryview(payload).nbytes)
        if refusal is not None:
            self._dropped[refusal] += 1
        elif self._grid.is_hosted(frame.source):
            self._dropped["slot"] += 1  # what stays on this node never comes from outside
        elif frame.step not in (self._step, self._step + 1):
            self._dropped["step"] += 1
        else:
            self._accept(frame, payload)

    def work(self) -> bool:
        """Do one microbatch, one way; an evaluation goes first."""
        for run in (self._runs.get((self._step, True)), self._runs.get((self._step, False))):
            slot = run.pipeline.work() if run is not None and run.pipeline is not None else None
            if run is not None and slot is not None:
                self._advance(run, slot)
                return True
        return False

    def commit(self, commit: Commit) -> None:
        """Apply the optimizer, if all that is held here has said Ready for exactly this step."""
        run = self._runs.get((commit.step, False))
        is_ready = run is not None and len(run.reported) == len(self._grid.held)
        if commit.step != self._step or not is_ready:
            self._dropped["commit"] += 1
            return
        assert run is not None
        assert run.reduction is not None
        hit("after_commit", commit.step)
        run.reduction.apply(commit.scale)
        self._step += 1
        self._runs = {key: kept for key, kept in self._runs.items() if key[0] >= self._step}
        hit("after_apply", commit.step)
        if commit.snapshot:
            self._on_snapshot(self._step)
        for stage in self._grid.stages:
            job, generation = self._grid.job, self._grid.generation
            state_hash = run.reduction.state_hash(stage)
            self._send(Applied(job, generation, commit.step, stage, state_hash), b"")

    def _run(self, step: int, evaluate: bool) -> _Run:
        return self._runs.setdefault((step, evaluate), _Run())

    def _post(self, frame: Frame, payload: Payload) -> None:
        """Hand a frame to the slot it is for; within this node it takes the same coded form."""
        if self._grid.is_hosted(frame.target):
            self._accept(frame, payload)
        else:
            self._send(frame, payload)

    def _accept(self, frame: Frame, payload: Payload) -> None:
        run, key = self._run(frame.step, frame.evaluate), frame_key(frame)
        if key in run.seen:
            self._dropped["repeated"] += 1
            return
        run.seen.add(key)
        if run.pipeline is None:
            run.early.append((frame, payload))
        else:
            self._deliver(run, frame, payload)

    def _deliver(self, run: _Run, frame: Frame, payload: Payload) -> None:
        assert run.pipeline is not None
        if frame.kind in ("activation", "activation_gradient"):
            run.pipeline.take(frame, payload)
            return
        assert run.reduction is not None
        run.reduction.take(frame, payload)
        if frame.kind == "reduced":
            self._report_ready(run)

    def _advance(self, run: _Run, slot: SlotId) -> None:
        """Go on with a slot that may have finished its last microbatch."""
        assert run.pipeline is not None
        if not run.pipeline.is_finished(slot) or slot in run.reported:
            return
        if run.reduction is not None:
            run.reduction.share(slot, run.pipeline.losses(slot))
            self._report_ready(run)
            return
        run.reported.add(slot)
        if self._grid.is_last(slot):
            job, generation = self._grid.job, self._grid.generation
            losses = run.pipeline.losses(slot)
            self._send(Evaluated(job, generation, self._step, slot, losses), b"")
        if len(run.reported) == len(self._grid.hosted):
            del self._runs[self._step, True]

    def _report_ready(self, run: _Run) -> None:
        """Say Ready for what is held of the stages whose whole gradient is now here.

        The update is in the log by then: whatever is committed can be replayed.
        """
        grid, pipeline, reduction = self._grid, run.pipeline, run.reduction
        assert pipeline is not None
        assert reduction is not None
        for stage in grid.stages:
            silent = [s for s in grid.held if s.stage == stage and s not in run.reported]
            computing = [slot for slot in silent if slot in grid.hosted]
            finished = [slot for slot in computing if pipeline.is_finished(slot)]
            slots = [slot for slot in silent if slot not in computing or slot in finished]
            if not slots or not reduction.is_complete(stage):
                continue
            hit("before_log", self._step)
            update, squares = reduction.log(stage), reduction.sums_of_squares(stage)
            hit("after_log", self._step)
            for slot in slots:
                run.reported.add(slot)
                is_shadow = slot not in grid.hosted
                ready = Ready(
                    grid.job, grid.generation, self._step, slot,
                    () if is_shadow else pipeline.microbatches(slot), update, squares,
                    () if is_shadow else pipeline.losses(slot), reduction.losses(stage),
                )  # fmt: skip
                self._send(ready, b"")
