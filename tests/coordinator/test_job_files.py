"""A job as its files tell it: from the newest checkpoint that is whole, byte for byte."""

from pathlib import Path

import pytest

from swarmnode.coordinator.events import SubmittedRecord
from swarmnode.coordinator.job_files import JobFiles
from swarmnode.coordinator.journal import Journal
from swarmnode.p2p.blob_store import BlobStore, blob_path
from swarmnode.p2p.identity import Identity
from tests.coordinator.bench import FACTS, manifest
from tests.coordinator.test_succession import put_checkpoint


@pytest.mark.parametrize("damaged", [(), (2,), (2, 1)])
def test_a_checkpoint_with_a_damaged_chunk_of_the_right_size_does_not_count(
    damaged: tuple[int, ...], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(SubmittedRecord(FACTS))
    store = BlobStore(tmp_path / "blobs")
    records = []
    for step in range(3):
        record, chunks = put_checkpoint(store, step)
        journal.append(record)
        records.append(record)
        if step in damaged:
            (only_its_own,) = (ref for ref in chunks if store.read(ref) == b"%d" % step)
            blob_path(store.root, only_its_own).write_bytes(b"x")
    journal.close()
    files = JobFiles(tmp_path, manifest(), b"", FACTS)
    ledger, opened, _ = files.open(Identity(bytes(32)), BlobStore(tmp_path / "blobs"))
    opened.close()
    assert ledger.checkpoint == records[2 - len(damaged)]
