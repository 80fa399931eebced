"""A line that cannot be read, with whole lines behind it: nothing is cut off, the line is named."""

import itertools
import json
import zlib
from pathlib import Path

import pytest

from swarmnode.coordinator.journal import Journal, JournalDamagedError, fold_file
from tests.coordinator.test_journal import SOME, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_a_flipped_bit_before_the_last_line_leaves_the_file_alone_and_names_the_line(
    path: Path,
) -> None:
    data = write(path, SOME)
    stops = list(itertools.accumulate(map(len, data.splitlines(keepends=True))))
    for at in range(stops[-2]):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        number = 1 + sum(stop <= at for stop in stops)
        for use in (Journal, fold_file):
            with pytest.raises(JournalDamagedError, match=f"line {number} of {path} is damaged"):
                use(path)
        assert path.read_bytes() == damaged


def test_a_flipped_bit_in_the_last_line_is_a_torn_tail(path: Path) -> None:
    data = write(path, SOME)
    begin = len(data) - len(data.splitlines(keepends=True)[-1])
    for at in range(begin, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        journal = Journal(path)
        journal.close()
        assert journal.found == SOME[:-1]
        assert path.read_bytes() == data[:begin]


@pytest.mark.parametrize("num_behind", [0, 1])
def test_a_line_of_a_newer_version_is_not_cut_off(path: Path, num_behind: int) -> None:
    data = write(path, SOME)
    text = json.dumps({"t": "LaterRecord", "step": 7}).encode()
    lines = data.splitlines(keepends=True)
    lines.insert(len(lines) - num_behind, b"%08x %s\n" % (zlib.crc32(text), text))
    path.write_bytes(b"".join(lines))
    with pytest.raises(
        JournalDamagedError, match=f"line {len(lines) - num_behind} .*newer version"
    ):
        Journal(path)
    assert path.read_bytes() == b"".join(lines)
