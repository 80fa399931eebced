"""The journal: what was acknowledged is read back; a torn, damaged or failed tail is not."""

import errno
import json
import os
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
)
from swarmnode.coordinator.journal import Journal, read_journal
from swarmnode.domain import BlobRef, Generation

counts = st.integers(0, 1 << 62)
generations = counts.map(Generation)
numbers = st.floats(allow_nan=False)
blobs = st.builds(BlobRef, st.text("0123456789abcdef", min_size=64, max_size=64), counts)
records = st.one_of(
    st.builds(StartedRecord, generations, counts),
    st.builds(CommitRecord, generations, counts, numbers, numbers, st.tuples(st.text(max_size=9))),
    st.builds(CheckpointRecord, counts, st.lists(blobs, max_size=2).map(tuple)),
    st.builds(EvaluationRecord, counts, numbers),
    st.builds(EndRecord, st.sampled_from(["stopped", "failed"]), st.text(max_size=30)),
)
SOME: list[Record] = [
    StartedRecord(Generation(1), 0),
    CommitRecord(Generation(1), 0, 0.5, 5.25, ("ab" * 8, "cd" * 8)),
    CheckpointRecord(1, (BlobRef("0" * 64, 7),)),
    EvaluationRecord(1, 5.0),
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
    for number, record in enumerate(SOME, 1):
        journal.append(record)
        assert len(synced) == number
        assert synced[-1] == path.stat().st_size
    journal.close()


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
