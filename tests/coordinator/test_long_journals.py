"""Journals of long jobs: what is folded says the same, in lines that fit a message each."""

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swarmnode.coordinator.events import (
    BegunRecord,
    CheckpointRecord,
    CommitRecord,
    EvaluationRecord,
    HistoryRecord,
    Record,
    StartedRecord,
    SubmittedRecord,
)
from swarmnode.coordinator.job_state import JobState
from swarmnode.coordinator.journal import (
    MAX_TOLD,
    Journal,
    _line,
    count_lines,
    fold,
    read_journal,
)
from swarmnode.coordinator.standby import StandbyJournals
from swarmnode.domain import Generation, JobId, PeerId
from swarmnode.messages import (
    MAX_COMMITTED,
    MAX_ENTRY_BYTES,
    Entry,
)
from swarmnode.wire import pack, unpack
from tests.coordinator.bench import FACTS, manifest

A = PeerId("a")
STARTED = StartedRecord(
    Generation(1), 0, A, ((0, 2),), ((A,),), ((),), (A,), (A,), {A: ("/ip4/127.0.0.1/tcp/1",)}
)
LONGEST = -2.2250738585072014e-308
"""No float takes more characters."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def long_job(num_steps: int, loss: Callable[[int], float], evaluate_every: int) -> list[Record]:
    """What a job writes that is never disturbed."""
    written: list[Record] = [SubmittedRecord(FACTS), STARTED]
    for step in range(num_steps):
        written.append(CommitRecord(Generation(1), step, 1.0, loss(step), ()))
        if (step + 1) % evaluate_every == 0:
            written.append(EvaluationRecord(step + 1, loss(step), "int8"))
    return written


def told(job: JobId, source: Journal, standby: StandbyJournals) -> list[Record]:
    """What a standby has once it was told the whole journal, as the coordinator sends it."""
    for number, lines in source.lines(0):
        assert len(lines) <= MAX_ENTRY_BYTES
        entry, _ = unpack(pack(Entry(job, Generation(1), number, lines)))
        assert isinstance(entry, Entry)
        assert standby.take(job, entry.number, entry.lines)
    assert standby.num_lines(job) == source.num_lines
    return read_journal(standby.path(job))[0]


def outcome(some: list[Record]) -> tuple[object, ...]:
    """What a coordinator knows after it has read these lines."""
    state = JobState(manifest(steps=100_000), FACTS, A, 0.0)
    state.restore(some)
    progress = state.progress
    return (
        state.step, state.plan, state.generation, state.is_begun, state.checkpoint,
        list(map(repr, progress.losses)), progress.validation, progress.val_codec,
    )  # fmt: skip


def test_the_journal_of_a_job_of_60_000_steps_is_told_in_pieces_that_a_standby_takes(
    path: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    losses = [chance.random() if step % 1000 else math.nan for step in range(60_000)]
    written = long_job(60_000, losses.__getitem__, evaluate_every=50)
    folded = fold(written)
    path.write_bytes(b"".join(map(_line, folded)))
    journal = Journal(path)
    assert journal.num_lines == count_lines(folded) == len(written)
    heard = told(JobId("0" * 16), journal, StandbyJournals(tmp_path / "standby"))
    assert outcome(heard) == outcome(written)
    journal.close()


@pytest.mark.parametrize("place", ["before_rename", "after_fold"])
def test_a_process_that_dies_while_it_folds_a_journal_leaves_it_whole(
    path: Path, place: str
) -> None:
    written = long_job(5000, float, evaluate_every=50)
    path.write_bytes(b"".join(map(_line, written)))
    lines = (
        "from pathlib import Path",
        "from swarmnode.coordinator.journal import Journal",
        f"Journal(Path({str(path)!r})).fold_if_long()",
    )
    env = {**os.environ, "SWARMNODE_FAILPOINT": place}
    life = subprocess.run([sys.executable, "-c", "; ".join(lines)], env=env, check=False)
    assert life.returncode == -signal.SIGKILL
    journal = Journal(path)
    assert (len(journal.found) < len(written)) is (place == "after_fold")
    assert journal.num_lines == len(written)
    assert outcome(journal.found) == outcome(written)
    journal.fold_if_long()
    journal.append(EvaluationRecord(5000, 1.0))
    journal.close()
    assert count_lines(read_journal(path)[0]) == len(written) + 1


@pytest.mark.parametrize("evaluate_every", [1, 1 << 62])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_no_folded_line_is_too_long_whatever_the_losses_are(
    path: Path, tmp_path: Path, more: int, pieces: int, evaluate_every: int
) -> None:
    num_steps = pieces * MAX_TOLD + more
    written = long_job(num_steps, lambda _: LONGEST, evaluate_every)
    rest = [EvaluationRecord(num_steps, 0.0)] * MAX_COMMITTED
    folded = fold([*written, *rest])
    assert count_lines(folded) == len(written) + len(rest)
    path.write_bytes(b"".join(map(_line, folded)))
    journal = Journal(path)
    assert len(set(journal._numbers)) == len(folded), "each line has a number of its own"
    heard = told(JobId("0" * 16), journal, StandbyJournals(tmp_path / "standby"))
    assert outcome(heard) == outcome([*written, *rest])
    journal.close()


def test_a_journal_that_an_older_version_folded_into_one_line_is_told_in_pieces(
    path: Path, tmp_path: Path
) -> None:
    losses = tuple(1.0 / (step + 3) for step in range(50_000))
    validation = tuple((step, 0.5) for step in range(0, 50_001, 10))
    checkpoint = CheckpointRecord(49_000, ())
    old = HistoryRecord(60_000, 0, losses, validation, "int8")
    commits = [CommitRecord(Generation(1), 50_000 + n, 1.0, 0.25, ()) for n in range(9)]
    written: list[Record] = [SubmittedRecord(FACTS), STARTED, checkpoint, old, *commits]
    path.write_bytes(b"".join(map(_line, written)))
    for _ in range(2):
        journal = Journal(path)
        assert journal.num_lines == count_lines(written)
        assert journal.checkpoints == [checkpoint]
        assert outcome(journal.found) == outcome(written)
        heard = told(JobId("0" * 16), journal, StandbyJournals(tmp_path / "standby"))
        assert outcome(heard) == outcome(written)
        again = fold([*journal.found, *([EvaluationRecord(50_009, 1.0)] * MAX_COMMITTED)])
        assert max(len(_line(record)) for record in again) <= MAX_ENTRY_BYTES
        journal.close()


happenings = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.integers(1, 9)),
        st.tuples(st.just("evaluate"), st.just(0)),
        st.tuples(st.just("checkpoint"), st.just(0)),
        st.tuples(st.just("start"), st.integers(0, 12)),
        st.tuples(st.just("begun"), st.just(0)),
        st.tuples(st.just("fold"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(happenings, st.integers(1, 5))
@example([("commit", 1), ("evaluate", 0), ("start", 1), ("commit", 4), ("fold", 0)], 1)
def test_a_journal_says_the_same_however_often_it_is_folded(
    happened: list[tuple[str, int]], size: int
) -> None:
    whole: list[Record] = [SubmittedRecord(FACTS), STARTED, BegunRecord(Generation(1))]
    folded = list(whole)
    step, generation = 0, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swarmnode.coordinator.journal.MAX_TOLD", size)
        patch.setattr("swarmnode.coordinator.journal.MAX_COMMITTED", 3)
        for what, number in happened:
            more: list[Record] = []
            match what:
                case "commit":
                    at, step = step, step + number
                    more += [
                        CommitRecord(Generation(generation), s, 1.0, s + generation / 8, ())
                        for s in range(at, step)
                    ]
                case "evaluate":
                    more.append(EvaluationRecord(step, step / 2, f"codec {generation}"))
                case "checkpoint":
                    more.append(CheckpointRecord(step, ()))
                case "start":
                    step, generation = max(0, step - number), generation + 1
                    more.append(replace(STARTED, generation=Generation(generation), step=step))
                case "begun":
                    more.append(BegunRecord(Generation(generation)))
                case _:
                    folded = fold(folded)
            whole += more
            folded += more
        assert outcome(folded) == outcome(whole)
        assert count_lines(folded) == len(whole)
        assert all(
            max(len(record.losses), len(record.validation)) <= size
            for record in folded
            if isinstance(record, HistoryRecord)
        )
