"""Copies of journals that others write: whole lines in order, and never shorter than before."""

import errno
import os
from pathlib import Path

import pytest

from swarmnode.coordinator.events import CheckpointRecord, EndRecord, EvaluationRecord
from swarmnode.coordinator.journal import Journal, read_journal
from swarmnode.coordinator.standby import StandbyJournals
from swarmnode.domain import JobId

JOB = JobId("0123456789abcdef")


def lines_of(path: Path, losses: list[float]) -> list[bytes]:
    journal = Journal(path)
    for step, loss in enumerate(losses):
        journal.append(EvaluationRecord(step, loss))
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def losses_of(standby: StandbyJournals) -> list[float]:
    records, _ = read_journal(standby.path(JOB))
    return [record.loss for record in records if isinstance(record, EvaluationRecord)]


def test_lines_are_taken_in_order_and_survive_a_restart(tmp_path: Path) -> None:
    first, second, third, fourth = lines_of(tmp_path / "journal", [4.0, 3.0, 2.0, 1.0])
    standby = StandbyJournals(tmp_path / "standby")
    assert standby.num_lines(JOB) == 0
    assert [type(r) for r in standby.take(JOB, 0, first)] == [EvaluationRecord]
    assert standby.take(JOB, 2, third) == [], "a line is missing"
    assert len(standby.take(JOB, 1, second + third)) == 2
    assert standby.take(JOB, 1, second) == [], "it is here already"
    with standby.path(JOB).open("ab") as file:
        file.write(fourth[:-5])  # torn by a power cut
    again = StandbyJournals(tmp_path / "standby")
    assert again.num_lines(JOB) == 3
    again.take(JOB, 3, fourth)
    assert losses_of(again) == [4.0, 3.0, 2.0, 1.0]


def test_lines_that_could_not_be_written_leave_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = lines_of(tmp_path / "journal", [3.0, 2.0, 1.0])
    standby, fsync = StandbyJournals(tmp_path / "standby"), os.fsync
    standby.take(JOB, 0, first)

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        standby.take(JOB, 1, second)
    monkeypatch.setattr(os, "fsync", fsync)
    assert standby.path(JOB).read_bytes() == first
    standby.take(JOB, 1, second + third)
    assert losses_of(standby) == [3.0, 2.0, 1.0]


def test_what_an_earlier_life_left_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"".join(lines_of(tmp_path / "journal", [4.0, 3.0]))
    StandbyJournals(tmp_path / "standby").take(JOB, 0, data)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    assert StandbyJournals(tmp_path / "standby").num_lines(JOB) == 2
    assert synced == [len(data)]


def test_a_journal_that_is_told_again_replaces_the_old_one_only_once_it_is_as_long(
    tmp_path: Path,
) -> None:
    standby = StandbyJournals(tmp_path / "standby")
    standby.take(JOB, 0, b"".join(lines_of(tmp_path / "old", [9.0, 8.0, 7.0])))
    new = lines_of(tmp_path / "new", [4.0, 3.0, 2.0, 1.0])
    standby.take(JOB, 0, new[0])
    standby.take(JOB, 1, new[1])
    assert losses_of(standby) == [9.0, 8.0, 7.0]
    assert standby.num_lines(JOB) == 3
    standby.take(JOB, 2, new[2])
    assert losses_of(standby) == [4.0, 3.0, 2.0]
    standby.take(JOB, 3, new[3])
    assert losses_of(standby) == [4.0, 3.0, 2.0, 1.0]


def test_first_lines_that_come_twice_do_not_keep_out_those_that_follow(tmp_path: Path) -> None:
    standby = StandbyJournals(tmp_path / "standby")
    lines = lines_of(tmp_path / "journal", [4.0, 3.0, 2.0, 1.0])
    standby.take(JOB, 0, lines[0])
    standby.take(JOB, 1, lines[1])
    standby.take(JOB, 0, lines[0])
    assert len(standby.take(JOB, 2, lines[2] + lines[3])) == 2
    assert losses_of(standby) == [4.0, 3.0, 2.0, 1.0]


def test_a_long_copy_is_folded_at_a_checkpoint_and_counts_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmnode.coordinator.standby.FOLD_AT_LINES", 8)
    monkeypatch.setattr("swarmnode.coordinator.journal.MAX_COMMITTED", 4)
    lines_of(tmp_path / "journal", [float(n) for n in range(20)])
    journal = Journal(tmp_path / "journal")
    journal.append(CheckpointRecord(20, ()))
    journal.close()
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    standby = StandbyJournals(tmp_path / "standby")
    standby.take(JOB, 0, b"".join(lines[:20]))
    assert len(losses_of(standby)) == 20, "only a checkpoint makes lines superfluous"
    standby.take(JOB, 20, lines[20])
    assert len(losses_of(standby)) < 8
    assert standby.num_lines(JOB) == 21
    again = StandbyJournals(tmp_path / "standby")
    assert again.num_lines(JOB) == 21
    assert again.take(JOB, 21, lines[0]), "the next line follows on it"


def test_damaged_lines_change_nothing(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path / "journal", [4.0])
    standby = StandbyJournals(tmp_path / "standby")
    for wrong in (b"", line[:-1], line.replace(b"4.0", b"5.0"), b"\xff" * 100, line + b"x"):
        assert standby.take(JOB, 0, wrong) == []
    assert standby.num_lines(JOB) == 0


def test_a_job_that_is_over_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(EndRecord("stopped", "enough"))
    journal.close()
    standby = StandbyJournals(tmp_path / "standby")
    standby.take(JOB, 0, (tmp_path / "journal").read_bytes())
    standby.drop(JOB)
    assert standby.num_lines(JOB) == 0
    assert not standby.path(JOB).parent.exists()


def test_a_damaged_copy_is_kept_aside_and_counts_for_nothing_until_it_is_told_again(
    tmp_path: Path,
) -> None:
    data = b"".join(lines_of(tmp_path / "journal", [4.0, 3.0, 2.0, 1.0]))
    path = StandbyJournals(tmp_path / "standby").path(JOB)
    StandbyJournals(tmp_path / "standby").take(JOB, 0, data)
    damaged = [data.replace(b"3.0", b"3.1"), data.replace(b"2.0", b"2.1")]
    said: list[str] = []
    for copy in damaged:
        path.write_bytes(copy)
        again = StandbyJournals(tmp_path / "standby", lambda _, reason: said.append(reason))
        assert again.num_lines(JOB) == 0
        assert not path.exists()
    assert [path.with_name(f"journal.damaged-{n}").read_bytes() for n in (1, 2)] == damaged
    assert [f"line {n} of {path}" in reason for n, reason in zip((2, 3), said, strict=True)] == [
        True,
        True,
    ]
    assert len(again.take(JOB, 0, data)) == 4
    assert again.num_lines(JOB) == 4
    assert path.read_bytes() == data


def test_what_is_told_again_takes_no_damaged_copys_place_for_good(tmp_path: Path) -> None:
    """It may be less than what the copy had before a bit of it flipped."""
    lines = lines_of(tmp_path / "journal", [4.0, 3.0, 2.0, 1.0])
    standby = StandbyJournals(tmp_path / "standby")
    standby.take(JOB, 0, b"".join(lines))
    path = standby.path(JOB)
    damaged = b"".join(lines).replace(b"3.0", b"3.1")
    path.write_bytes(damaged)
    assert len(standby.take(JOB, 0, b"".join(lines[:2]))) == 2
    assert path.with_name("journal.damaged-1").read_bytes() == damaged
    assert path.read_bytes() == b"".join(lines[:2])
    assert standby.num_lines(JOB) == 2
    standby.take(JOB, 2, b"".join(lines[2:]))
    assert losses_of(standby) == [4.0, 3.0, 2.0, 1.0]
