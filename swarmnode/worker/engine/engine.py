"""The worker child's logic: what each message from the daemon means, and what to compute next."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swarmnode.compression.codec import Payload
from swarmnode.domain import Generation, JobId, SlotId
from swarmnode.engine_messages import (
    Alive,
    Busy,
    Coded,
    Configure,
    Configured,
    EngineMessage,
    Export,
    Exported,
    LivenessCheck,
)
from swarmnode.errors import ManifestError, NotFiniteError, SlotError
from swarmnode.manifest import Manifest, check
from swarmnode.messages import (
    Begin,
    Commit,
    Evaluated,
    Failed,
    Frame,
    Message,
    Ready,
)
from swarmnode.session_messages import (
    SessionClose,
    SessionFrame,
)
from swarmnode.traces import Fact, TraceFile
from swarmnode.worker.engine.conversations import Conversations
from swarmnode.worker.engine.pipeline import Pipeline
from swarmnode.worker.engine.ports import Log, Send
from swarmnode.worker.engine.reduction import Reduction
from swarmnode.worker.engine.setup import Setup, make_setup, set_determinism
from swarmnode.worker.engine.snapshots import Snapshots
from swarmnode.worker.engine.stages import committed_update, make_stages
from swarmnode.worker.engine.steps import Steps
from swarmnode.worker.files import state_path
from swarmnode.worker.training.local import LocalSlots
from swarmnode.worker.training.log import UpdateLog
from swarmnode.worker.training.meter import CodingMeter
from swarmnode.worker.training.residuals import Residuals
from swarmnode.worker.training.state import StageState

_MAX_REASON_CHARS = 400


class Engine:
    """One job's stages on one device. Not thread-safe: one thread calls `handle` and `run_once`.

    `send` gives a message and its payload to the daemon; it is also called from the thread that
    writes files. Whatever goes wrong while computing becomes a Failed; the engine then waits
    for a Configure, which may still keep the stages that are whole. `make_log` gives the update
    log in a directory.
    """

    def __init__(self, send: Send, make_log: Callable[[Path], Log] = UpdateLog) -> None:
        self._send = send
        self._make_log = make_log
        self._setup: Setup | None = None
        self._steps: Steps | None = None
        self._conversations: Conversations | None = None
        self._held: dict[int, StageState] = {}
        self._job: JobId | None = None
        self._generation = Generation(-1)
        self._directory = Path()
        self._snapshots = Snapshots()
        self._residuals = Residuals()
        self._meter = CodingMeter(on_span=self._span)
        self._trace: TraceFile | None = None
        self._compute_s = 0.0
        self._sessions_first = True
        self.dropped: Counter[str] = Counter()
        """How many messages were ignored, by reason; and what was remembered in vain."""
        self._local = LocalSlots(self.dropped)

    @property
    def expected_bytes(self) -> int:
        """More than one slot can have on its way here in this generation; 0 without one."""
        return 0 if self._setup is None else self._setup.expected.most_bytes

    def count_overruns(self, num_dropped: int) -> None:
        """Note how many messages were ignored so far because too many waited."""
        if num_dropped:
            self.dropped["overrun"] = num_dropped

    def handle(self, message: Message | EngineMessage, payload: Payload = b"") -> None:
        """Take one message. Frames are only checked and kept; the rest is done at once."""
        if isinstance(message, LivenessCheck):
            self._send(Alive(), b"")
        elif isinstance(message, Configure):
            if message.plan.generation < self._generation:
                self.dropped["generation"] += 1
                return
            self._generation, self._job = message.plan.generation, message.job
            self._guarded(lambda: self._configure(message, payload))
        elif not isinstance(message, Frame | Begin | Commit | Export | SessionFrame | SessionClose):
            self.dropped["type"] += 1
        elif self._setup is None or message.job != self._job:
            self.dropped["job"] += 1
        elif message.generation != self._generation and not isinstance(message, Export):
            self.dropped["generation"] += 1  # an export names the step it wants, that is enough
        else:
            self._guarded(lambda: self._dispatch(message, payload))

    def run_once(self) -> bool:
        """Do one unit of computing: a microbatch one way, or a piece of a conversation.

        Returns whether there was one; if not, only another message changes that. The two kinds
        take turns, so that neither starves the other.
        """
        return self._guarded(self._work)

    def close(self) -> None:
        """Finish the files that are being written."""
        self._snapshots.close()
        if self._trace is not None:
            self._trace.close()

    def _dispatch(
        self,
        message: Frame | Begin | Commit | Export | SessionFrame | SessionClose,
        payload: Payload,
    ) -> bool:
        assert self._setup is not None
        if isinstance(message, SessionFrame | SessionClose):
            self._converse(message, payload)
        elif isinstance(message, Export):
            self._export(message)
        elif self._steps is None:
            self.dropped["job"] += 1
        elif isinstance(message, Frame):
            self._steps.take(message, payload)
        elif isinstance(message, Begin):
            self._steps.begin(message)
        else:
            started_s = time.monotonic()
            self._steps.commit(message)
            self._count_residuals()
            self._span("apply", started_s, time.monotonic(), step=message.step)
            self._count(started_s)
        return True

    def _work(self) -> bool:
        if self._setup is None:
            return False
        started_s = time.monotonic()
        sources = [self._conversations, self._steps]
        if not self._sessions_first:
            sources.reverse()
        for source in sources:
            if source is not None and source.work():
                self._sessions_first = source is self._steps
                self._count(started_s)
                return True
        self._report_busy(0.25)
        return False

    def _configure(self, configure: Configure, payload: Payload) -> bool:
        self._forget()
        manifest = check(Manifest, _json(payload), "manifest")
        if manifest.job != configure.job:
            raise ManifestError(f"manifest of job {manifest.job} for job {configure.job}")
        torch.set_num_threads(configure.num_threads)
        set_determinism(configure.device, trains=manifest.kind == "train")
        kept = {base.stage for base in configure.bases if base.how == "keep"}
        self._held = {stage: self._held[stage] for stage in sorted(kept & set(self._held))}
        self._snapshots.rewind(configure.step)
        self._held = make_stages(configure, manifest, self._held)
        self._directory = Path(configure.log_directory)
        if configure.trace_directory and self._trace is None:
            name = f"worker-{configure.job}-{os.getpid()}.jsonl"
            self._trace = TraceFile(Path(configure.trace_directory) / name)
        plan = configure.plan
        codecs, update_of = manifest.codecs, partial(committed_update, configure)
        layout = (configure.job, codecs.share, plan.layers, plan.num_slots)
        decay = codecs.local.decay if codecs.local is not None else 1.0
        self._residuals.begin(layout, configure.step, update_of, decay=decay)
        self._local.begin(
            layout, configure.step, plan.hosted_by(configure.peer), update_of,
            keeps=not manifest.run.deterministic,
        )  # fmt: skip
        self._count_residuals()
        self._setup = setup = make_setup(
            configure, manifest, self._held, self._make_log, self._residuals, self._local,
            self._meter, self._span,
        )  # fmt: skip
        self._conversations = Conversations(setup, self._send)
        if setup.trains:
            self._steps = Steps(
                setup,
                configure.step,
                self._send_result,
                self.dropped,
                lambda step, evaluate, post: Pipeline(setup, step, post, evaluate=evaluate),
                lambda step, post: Reduction(setup, step, post),
                self._snapshot,
            )
        answer = Configured(configure.job, configure.plan.generation, configure.step)
        self._send(answer, b"")
        return True

    def _converse(self, message: SessionFrame | SessionClose, payload: Payload) -> None:
        assert self._setup is not None
        assert self._conversations is not None
        if message.target not in self._setup.hosted:
            self.dropped["slot"] += 1
            return
        self._conversations.take(message, payload)

    def _export(self, export: Export) -> None:
        """Write a stage while computing goes on; or wait for its snapshot that is being written.

        Behind that of another step it waits, and of those who wait the newest counts.
        """

        def report(path: Path, error: BaseException | None) -> None:
            if isinstance(error, CancelledError):
                self.dropped["export"] += 1
            elif error is not None:
                self._send(Failed(export.job, export.generation, _one_line(error)), b"")
            else:
                self._report_file(export.generation, export.step, export.stage, str(path))

        if self._snapshots.await_existing(export.stage, export.step, report):
            return
        state = self._held.get(export.stage)
        if state is None or state.step != export.step:
            self.dropped["export"] += 1
            return
        self._snapshots.start(export.stage, state, Path(export.path), report)

    def _snapshot(self, step: int) -> None:
        """Write every stage, which is now at `step`; what fails costs the snapshot, no more. Nor
        is there one while the last is not written: the disk is slower, and the log has the rest."""
        generation = self._generation
        for stage, state in self._held.items():
            if self._snapshots.is_writing(stage):
                continue

            def report(path: Path, error: BaseException | None, stage: int = stage) -> None:
                if error is not None:
                    print(f"no snapshot of stage {stage}: {error}", file=sys.stderr)
                name = "" if error is not None else str(path)
                self._report_file(generation, step, stage, name)

            path = state_path(self._directory, stage, step, "snapshot")
            self._snapshots.start(stage, state, path, report)

    def _report_file(self, generation: Generation, step: int, stage: int, path: str) -> None:
        assert self._job is not None
        self._send(Exported(self._job, generation, step, stage, path), b"")

    def _guarded(self, work: Callable[[], bool]) -> bool:
        """Do `work`; turn what goes wrong into a Failed and drop the generation."""
        try:
            return work()
        except OSError as error:
            if isinstance(error, BrokenPipeError | ConnectionResetError):
                raise  # the daemon is gone: nobody to report to
            self._fail(error)
        except Exception as error:  # the daemon decides what follows, whatever it was
            self._fail(error)
        return True

    def _fail(self, error: Exception) -> None:
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            traceback.print_exception(error)  # to the child's log; the daemon gets one line
        traceback.clear_frames(error.__traceback__)  # they hold what is to be freed
        self._forget()
        assert self._job is not None
        failed = Failed(
            self._job, self._generation, _one_line(error),
            is_diverged=isinstance(error, NotFiniteError),
        )  # fmt: skip
        if isinstance(error, SlotError):
            failed = replace(
                failed,
                blames=SlotId(error.stage, error.slot),
                is_diverged=not error.is_finite,
                is_mismatch=error.is_mismatch,
            )
        self._send(failed, b"")

    def _forget(self) -> None:
        """Abandon the generation: the unfinished step, gradients, conversations."""
        if self._steps is not None:
            self._steps.close()
        self._setup = self._steps = self._conversations = None
        for state in self._held.values():
            for parameter in state.module.parameters():
                parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _count_residuals(self) -> None:
        """What a generation's beginning or a Commit has dropped of what was owed."""
        if self._residuals.num_dropped:
            self.dropped["residual"] = self._residuals.num_dropped

    def _span(self, what: str, began_s: float, ended_s: float, /, **facts: Fact) -> None:
        if self._trace is not None:
            self._trace.span(what, began_s, ended_s, **facts)

    def _send_result(self, message: Message | EngineMessage, payload: Payload) -> None:
        """Send what a step gives; reports go behind the time that they cost."""
        if isinstance(message, Ready | Evaluated):
            self._report_busy(0.0)
        self._send(message, payload)

    def _count(self, started_s: float) -> None:
        self._compute_s += time.monotonic() - started_s
        self._report_busy(1.0)

    def _report_busy(self, at_least_s: float) -> None:
        if self._compute_s > at_least_s and self._job is not None:
            if codings := self._meter.take():
                self._send(Coded(self._job, codings), b"")
            self._send(Busy(self._job, self._compute_s), b"")
            self._compute_s = 0.0


def _json(payload: Payload) -> Any:
    try:
        return json.loads(bytes(payload))
    except (ValueError, RecursionError):
        raise ManifestError("manifest: not JSON") from None


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MAX_REASON_CHARS else text[: _MAX_REASON_CHARS - 3] + "..."
