"""The journal: what was acknowledged is read back; a torn, damaged or failed tail is not."""

import errno
import json
import math
import os
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.coordinator.events import (
    CheckpointRecord,
    CommitRecord,
    EndRecord,
    EvaluationRecord,
    Record,
    StartedRecord,
    SubmittedRecord,
)
from swarmnode.coordinator.job_state import JobState
from swarmnode.coordinator.journal import (
    FOLD_AT_LINES,
    Journal,
    _line,
    count_lines,
    fold,
    parse_line,
    read_journal,
)
from swarmnode.coordinator.standby import StandbyJournals
from swarmnode.domain import MAX_BLOB_BYTES, BlobRef, Generation, JobId, LinkPreset, PeerId
from swarmnode.messages import (
    MAX_ENTRY_BYTES,
)
from tests.coordinator.bench import FACTS, manifest

counts = st.integers(0, 1 << 62)
generations = counts.map(Generation)
numbers = st.floats(allow_nan=False)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
blobs = st.builds(BlobRef, hashes, st.integers(0, MAX_BLOB_BYTES))
peers = st.text(max_size=9).map(PeerId)
grids = st.lists(st.lists(peers, max_size=2).map(tuple), max_size=2).map(tuple)
records = st.one_of(
    st.builds(
        StartedRecord,
        generations,
        counts,
        peers,
        st.lists(st.tuples(counts, counts), max_size=2).map(tuple),
        grids,
        grids,
        st.lists(peers, max_size=3).map(tuple),
        st.lists(peers, max_size=3).map(tuple),
        st.dictionaries(peers, st.tuples(st.text(max_size=9)), max_size=2),
        st.lists(
            st.builds(LinkPreset, peers, peers, st.text(), st.text(), st.text()),
            max_size=2,
        ).map(tuple),
    ),
    st.builds(CommitRecord, generations, counts, numbers, numbers, st.tuples(blobs)),
    st.builds(CheckpointRecord, counts, st.lists(blobs, max_size=2).map(tuple)),
    st.builds(EvaluationRecord, counts, numbers),
    st.builds(EndRecord, st.sampled_from(["stopped", "failed"]), st.text(max_size=30)),
)
SOME: list[Record] = [
    StartedRecord(
        Generation(1),
        0,
        PeerId("a"),
        ((0, 2),),
        ((PeerId("a"),),),
        ((PeerId("b"),),),
        (PeerId("a"), PeerId("b")),
        (PeerId("a"),),
        {PeerId("a"): ("/ip4/127.0.0.1/tcp/1",)},
        (LinkPreset(PeerId("a"), PeerId("b"), "slow", "int4/32", "int4/32+hadamard"),),
    ),
    CommitRecord(Generation(1), 0, 0.5, 5.25, (BlobRef("ab" * 32, 9), BlobRef("cd" * 32, 8))),
    CheckpointRecord(1, (BlobRef("0" * 64, 7),)),
    EvaluationRecord(1, 5.0, "int8"),
    EndRecord("stopped", "two words\nand a line"),
]


def write(path: Path, some: list[Record]) -> bytes:
    """A new journal of these records; returns the file's bytes."""
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for record in some:
        journal.append(record)
    journal.close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture(scope="module")
def one_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For properties: written anew in each example."""
    return tmp_path_factory.mktemp("journal") / "journal"


@settings(max_examples=60, deadline=None)
@given(some=st.lists(records, max_size=6))
def test_what_is_appended_is_read_back(one_path: Path, some: list[Record]) -> None:
    data = write(one_path, some)
    assert read_journal(one_path) == (some, len(data))
    again = Journal(one_path)
    again.append(SOME[0])
    again.close()
    assert again.found == some
    assert read_journal(one_path)[0] == [*some, SOME[0]]


def test_checkpoints_are_at_hand_with_those_of_earlier_lives(path: Path) -> None:
    write(path, SOME)
    journal = Journal(path)
    assert journal.checkpoints == [SOME[2]]
    later = CheckpointRecord(2, ())
    for record in (SOME[3], later):
        journal.append(record)
    with failing_fsync(), pytest.raises(OSError, match="No space"):
        journal.append(CheckpointRecord(3, ()))
    assert journal.checkpoints == [SOME[2], later]
    journal.close()


def test_there_is_nothing_in_a_journal_that_does_not_exist(path: Path) -> None:
    assert read_journal(path) == ([], 0)


def test_a_record_is_on_the_disk_before_append_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal = Journal(path)
    synced.clear()
    for number, record in enumerate(SOME, 1):
        journal.append(record)
        assert len(synced) == number
        assert synced[-1] == path.stat().st_size
    journal.close()


def test_what_an_earlier_life_left_is_on_the_disk_before_anything_follows_from_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been killed between a line and its fsync; then only the kernel has the line."""
    data = write(path, SOME)
    path.write_bytes(data + b"torn")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal = Journal(path)
    assert journal.found == SOME
    assert synced == [len(data)]
    journal.close()


def test_a_loss_that_nobody_knows_is_read_back_as_such(path: Path) -> None:
    write(path, [CommitRecord(Generation(1), 0, 1.0, math.nan, ())])
    ((record,), _) = read_journal(path)
    assert isinstance(record, CommitRecord)
    assert math.isnan(record.loss)


def test_a_tail_torn_at_any_byte_leaves_exactly_the_whole_records(path: Path) -> None:
    data = write(path, SOME)
    ends = [0]
    for line in data.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        num_whole = sum(end <= length for end in ends) - 1
        assert read_journal(path) == (SOME[:num_whole], ends[num_whole])


def test_after_a_torn_tail_the_journal_goes_on(path: Path) -> None:
    data = write(path, SOME)
    for length in range(len(data) - 30, len(data)):
        path.write_bytes(data[:length])
        journal = Journal(path)
        assert journal.found == SOME[:-1]
        journal.append(SOME[0])
        journal.close()
        assert read_journal(path)[0] == [*SOME[:-1], SOME[0]]


def test_a_flipped_bit_anywhere_ends_the_journal_before_its_record(path: Path) -> None:
    data = write(path, SOME)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        num_before = sum(start <= at for start in starts) - 1
        assert read_journal(path) == (SOME[:num_before], starts[num_before])


@settings(max_examples=100, deadline=None)
@given(tail=st.binary(max_size=100))
def test_any_tail_leaves_the_earlier_records_readable(one_path: Path, tail: bytes) -> None:
    data = write(one_path, SOME)
    one_path.write_bytes(data + tail)
    assert read_journal(one_path) == (SOME, len(data))


def test_each_line_is_a_checksum_and_json(path: Path) -> None:
    for line in write(path, SOME).splitlines():
        crc, _, text = line.partition(b" ")
        assert int(crc, 16) == zlib.crc32(text)
        assert json.loads(text)["t"].endswith("Record")


def test_an_evaluation_is_read_by_versions_that_knew_no_codec_and_by_those_that_know_more() -> None:
    def line(**fields: object) -> bytes:
        text = json.dumps({"t": "EvaluationRecord", **fields}).encode()
        return b"%08x " % zlib.crc32(text) + text + b"\n"

    assert parse_line(line(step=1, loss=5.0)) == EvaluationRecord(1, 5.0)
    said = parse_line(line(step=1, loss=5.0, codec="int8", later=3))
    assert said == EvaluationRecord(1, 5.0, "int8")


# ---- a full disk -------------------------------------------------------------------------------


@contextmanager
def failing_fsync() -> Iterator[None]:
    def fail(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@contextmanager
def full_after(num_bytes: int) -> Iterator[None]:
    """No file may become longer: writes end in part, then fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_append_leaves_the_earlier_records(path: Path) -> None:
    data = write(path, SOME)
    journal = Journal(path)
    with failing_fsync(), pytest.raises(OSError, match="No space"):
        journal.append(SOME[0])
    assert path.read_bytes() == data
    journal.append(SOME[1])
    journal.close()
    assert read_journal(path)[0] == [*SOME, SOME[1]]


def test_after_two_failed_appends_a_good_one_is_still_read_back(path: Path) -> None:
    journal = Journal(path)
    with failing_fsync():
        for record in (SOME[1], SOME[0]):
            with pytest.raises(OSError, match="No space"):
                journal.append(record)
    journal.append(SOME[3])
    journal.close()
    assert read_journal(path)[0] == [SOME[3]]


def test_a_failed_append_after_a_torn_tail_leaves_nothing_behind(path: Path) -> None:
    data = write(path, SOME)
    path.write_bytes(data[:-5])
    journal = Journal(path)
    whole = path.read_bytes()
    with failing_fsync(), pytest.raises(OSError, match="No space"):
        journal.append(SOME[1])
    assert path.read_bytes() == whole
    journal.append(SOME[0])
    journal.close()
    assert read_journal(path)[0] == [*SOME[:-1], SOME[0]]


@pytest.mark.parametrize("room", [0, 10])
def test_a_record_that_did_not_fit_on_the_disk_never_appears(path: Path, room: int) -> None:
    data = write(path, SOME)
    journal = Journal(path)
    with full_after(len(data) + room), pytest.raises(OSError, match=r"No space|too large"):
        journal.append(SOME[1])
    assert path.read_bytes() == data
    journal.append(SOME[0])
    journal.close()
    assert read_journal(path)[0] == [*SOME, SOME[0]]


def test_the_lines_of_a_journal_come_in_pieces_that_fit_a_message(path: Path) -> None:
    journal = Journal(path)
    long = EndRecord("stopped", "x" * 4000)
    for _ in range(300):
        journal.append(long)
    again = Journal(path)
    data = path.read_bytes()
    for source in (journal, again):
        pieces = list(source.lines(0))
        assert b"".join(lines for _, lines in pieces) == data
        assert len(pieces) > 1
        assert all(len(lines) <= MAX_ENTRY_BYTES for _, lines in pieces)
        assert [n for n, _ in pieces] == [
            sum(lines.count(b"\n") for _, lines in pieces[:i]) for i in range(len(pieces))
        ]
        assert list(source.lines(299)) == [(299, data.splitlines(keepends=True)[-1])]
        assert not list(source.lines(300))
        source.close()


def test_a_long_journal_is_folded_and_says_the_same(path: Path, tmp_path: Path) -> None:
    first = SubmittedRecord(FACTS)
    started = SOME[0]
    updates = (BlobRef("ab" * 32, 9),)
    num_steps = FOLD_AT_LINES + 500
    commits = [
        CommitRecord(Generation(1), step, 1.0, 1.0 / (step + 1), updates)
        for step in range(num_steps)
    ]
    written: list[Record] = [first, started, *commits]
    written[3000:3000] = [
        EvaluationRecord(2998, 4.5, "int8, int4/32 on 1 of 1 links"),
        CheckpointRecord(2998, (updates[0],)),
    ]
    last = CheckpointRecord(num_steps, (updates[0],))
    path.write_bytes(b"".join(_line(record) for record in written))
    journal = Journal(path)
    before = path.stat().st_size
    journal.append(last)
    journal.fold_if_long()
    written.append(last)
    assert path.stat().st_size < before / 2
    assert journal.num_lines == len(written)
    again = Journal(path)
    assert again.num_lines == len(written)
    assert [record.step for record in again.checkpoints] == [2998, num_steps]
    whole, folded = states(written), states(again.found)
    assert folded.progress.losses == whole.progress.losses
    assert folded.progress.validation == whole.progress.validation
    assert folded.progress.val_codec == whole.progress.val_codec == "int8, int4/32 on 1 of 1 links"
    assert (folded.step, folded.plan, folded.generation) == (whole.step, whole.plan, 1)
    assert folded.commits.since(num_steps - 900, num_steps) is not None
    assert folded.commits.since(num_steps - 900, num_steps) == whole.commits.since(
        num_steps - 900, num_steps
    )
    standby = StandbyJournals(tmp_path / "standby")  # is told all of it, and goes on from there
    job = JobId("0" * 16)
    for number, lines in again.lines(0):
        standby.take(job, number, lines)
    assert standby.num_lines(job) == len(written)
    again.append(EvaluationRecord(num_steps, 1.0))
    for number, lines in again.lines(len(written)):
        standby.take(job, number, lines)
    assert standby.num_lines(job) == len(written) + 1
    assert read_journal(standby.path(job))[0] == read_journal(path)[0]
    assert next(iter(again.lines(17)))[0] == 0, "folded away: all of it"
    journal.close()
    again.close()


def test_folding_twice_changes_nothing_more() -> None:
    updates = (BlobRef("ab" * 32, 9),)
    commits = [CommitRecord(Generation(1), s, 1.0, 1.0 / (s + 1), updates) for s in range(5000)]
    once = fold([SubmittedRecord(FACTS), SOME[0], *commits])
    twice = fold([*once, *(replace(commit, step=5000 + commit.step) for commit in commits)])
    assert states(twice).progress.losses == [c.loss for c in commits] * 2
    assert count_lines(twice) == 2 + 2 * len(commits)


def states(some: list[Record]) -> JobState:
    state = JobState(manifest(steps=10_000), FACTS, PeerId("a"), 0.0)
    state.restore(some)
    return state
