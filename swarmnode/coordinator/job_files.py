"""What a coordinator has of a job on its disk, in one folder: written, read and opened."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from swarmnode.coordinator import events as on
from swarmnode.coordinator.journal import Journal
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.retention import chunks_of
from swarmnode.coordinator.standby import JOURNAL_FILE
from swarmnode.coordinator.submission import unpack_folder
from swarmnode.coordinator.tenure import Tenure
from swarmnode.domain import ModelFacts
from swarmnode.errors import SwarmError
from swarmnode.home import remove_partials, write_durably
from swarmnode.manifest import Manifest, check
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.identity import Identity
from swarmnode.tokenizer import TextTokenizer, load_tokenizer

JOB_FILE, LEASE_FILE, TOKENIZER_FOLDER = "job.json", "lease", "tokenizer"
OpenFiles = tuple[Ledger, Journal, Tenure]


@dataclass(frozen=True)
class JobFiles:
    """The folder of one job, and what `job.json` in it says. Its methods wait for the disk."""

    directory: Path
    manifest: Manifest
    signature: bytes
    facts: ModelFacts
    weights_path: str | None = None
    """The folder whose weights the job starts from; None where a checkpoint must do."""

    @staticmethod
    def read(directory: Path) -> "JobFiles":
        """What `write` wrote. Raises: SwarmError, OSError, ValueError, KeyError, TypeError."""
        path = directory / JOB_FILE
        saved = json.loads(path.read_text(encoding="utf-8"))
        manifest = check(Manifest, saved["manifest"], str(path))
        signature, facts = bytes.fromhex(saved["signature"]), ModelFacts(**saved["facts"])
        return JobFiles(directory, manifest, signature, facts, saved["weights_path"])

    def write(self) -> None:
        """Raises: OSError."""
        saved = {
            "manifest": json.loads(self.manifest.canonical()),
            "signature": self.signature.hex(),
            "facts": asdict(self.facts),
            "weights_path": self.weights_path,
        }
        write_durably(self.directory / JOB_FILE, json.dumps(saved, indent=1).encode())

    def tokenizer(self, store: BlobStore) -> TextTokenizer:
        """The job's tokenizer, unpacked into the folder. Raises: SwarmError, OSError."""
        folder = self.directory / TOKENIZER_FOLDER
        unpack_folder(store.read(self.manifest.tokenizer), folder)
        return load_tokenizer(folder)

    def open(self, identity: Identity, store: BlobStore) -> OpenFiles:
        """The job as its files tell it. Raises: SwarmError, OSError."""
        manifest, me = self.manifest, identity.peer
        tenure = Tenure(
            self.directory / LEASE_FILE, manifest.job, manifest.submitter, me, identity.sign
        )
        remove_partials(self.directory)
        journal = Journal(self.directory / JOURNAL_FILE)
        try:
            if not journal.found:
                journal.append(on.SubmittedRecord(self.facts))
            ledger = Ledger(manifest, self.facts, me, self.signature, time.monotonic())
            ledger.restore(_readable(store, journal.found))
        except BaseException:
            journal.close()
            raise
        return ledger, journal, tenure


def _readable(store: BlobStore, records: Sequence[on.Record]) -> list[on.Record]:
    """The journal without checkpoints of which a chunk is gone or damaged.

    What so far is a piece of our own worker's files, or only borrowed, is kept from here on. Every
    byte is read of the newest whole one, from which a job may have to go on, but not of those
    before it, nor where the job has ended.
    """
    kept: list[on.Record] = []
    has_whole = any(isinstance(record, on.EndRecord) for record in records)
    for record in reversed(records):
        if isinstance(record, on.CheckpointRecord):
            chunks = chunks_of(store, [record])
            if not has_whole and not all(map(store.is_sound, chunks)):
                continue
            try:
                store.own(chunks)
            except SwarmError:
                continue
            has_whole = True
        kept.append(record)
    return kept[::-1]
