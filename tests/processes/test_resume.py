"""A checkpoint goes on under any other grid of stages and slots, as if nothing had happened."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarmnode.cli.client import NodeClient
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoint_files import (
    MANIFEST_FILE,
    FolderChunks,
    Shelf,
    audit_folder,
    folder_weights_sha256,
    read_checkpoint,
    write_folder,
)
from swarmnode.p2p.checkpoints import Checkpoint, hash_weights
from swarmnode.p2p.identity import Identity
from swarmnode.p2p.states import MOMENT_SUFFIXES, IndexedTensor
from tests.processes.conftest import TINY_LLAMA, job_file, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.timeout(300)]

EXACT = {"activation": "none", "activation_gradient": "none", "gradient": "none"}
CUT, STEPS = 20, 40


@pytest.fixture(scope="module")
def undisturbed(
    swarm: LocalSwarm, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], Path]:
    """The losses of a run at S=2, V=2, and its checkpoint after CUT steps as a folder."""
    client = swarm.node(0).client
    job = client.submit(a_job(text, "undisturbed", {"stages": 2, "slots": 2}), text)
    wait_for(client, job, serving)
    losses = losses_of(client, job)
    assert [view.step for view in client.checkpoints(job)] == [CUT, STEPS]
    (*_, checked) = client.verify_checkpoints(job)
    assert checked.audits is not None
    assert [found.problems for found in checked.audits] == [(), ()]
    folder = tmp_path_factory.mktemp("resume") / "checkpoint"
    (*_, work) = client.export_checkpoint(job, folder, CUT)
    assert work.step == CUT
    assert audit_folder(folder).problems == ()
    newest = client.checkpoints(job)[-1]
    client.export(job, folder.with_name("plain"))
    assert folder_weights_sha256(folder.with_name("plain")) == newest.weights_sha256
    shelf = Shelf(swarm.node(0).home / "jobs" / job / "checkpoints")
    assert shelf.load(STEPS).manifest.parent == shelf.load(CUT).sha256
    client.stop(job)
    return losses, folder


def a_job(text: Path, name: str, placement: dict[str, int], **model: Any) -> dict[str, Any]:
    job = job_file(text, name, codecs=EXACT, run={"steps": STEPS, "checkpoint_every": CUT})
    return {**job, "placement": placement, "model": model or {"config": TINY_LLAMA}}


def losses_of(client: NodeClient, job: str) -> list[float]:
    losses = client.losses(job)
    assert None not in losses
    return [float(loss) for loss in losses if loss is not None]


def resumed(client: NodeClient, text: Path, folder: Path, stages: int, slots: int) -> list[float]:
    """The losses of a job that goes on from `folder` on another grid."""
    raw = a_job(
        text, f"resumed-{stages}-{slots}", {"stages": stages, "slots": slots}, resume=str(folder)
    )
    job, notes = client.submit_with_notes(raw, text)
    assert notes == ()
    view = wait_for(client, job, serving)
    assert (view.step, len(view.layers), len(view.placement[0])) == (STEPS, stages, slots)
    losses = losses_of(client, job)
    client.stop(job)
    return losses


@pytest.mark.parametrize(("stages", "slots"), [(3, 1), (1, 4)])
def test_a_checkpoint_goes_on_under_another_grid(
    swarm: LocalSwarm, text: Path, undisturbed: tuple[list[float], Path], stages: int, slots: int
) -> None:
    expected, folder = undisturbed
    losses = resumed(swarm.node(0).client, text, folder, stages, slots)
    assert len(losses) == STEPS - CUT
    difference = np.abs(np.array(losses) - np.array(expected[CUT:]))
    print(f"S={stages} V={slots}: largest difference {difference.max():.2e}")
    assert difference.max() <= 1e-4, difference


def test_without_its_moments_it_does_not(
    swarm: LocalSwarm, text: Path, undisturbed: tuple[list[float], Path], tmp_path: Path
) -> None:
    expected, folder = undisturbed
    without = with_zero_moments(folder, tmp_path)
    assert audit_folder(without).problems == ()
    losses = resumed(swarm.node(0).client, text, without, 3, 1)
    difference = np.abs(np.array(losses) - np.array(expected[CUT:]))
    assert difference[0] <= 1e-4, "the first loss depends on the weights alone"
    print(f"without moments: largest difference {difference.max():.2e}")
    assert difference.max() > 1e-4, difference


def test_a_plain_hugging_face_folder_is_trained_on(
    swarm: LocalSwarm, text: Path, undisturbed: tuple[list[float], Path]
) -> None:
    expected, folder = undisturbed
    client = swarm.node(0).client
    raw = a_job(text, "plain", {"stages": 3, "slots": 1}, path=str(folder.with_name("plain")))
    job = client.submit(raw, text)
    view = wait_for(client, job, serving)
    losses = losses_of(client, job)
    client.stop(job)
    assert (view.step, len(losses)) == (STEPS, STEPS), "it begins at step 0, with the weights alone"
    assert losses[0] < expected[0] - 0.5, "from weights that have learned"
    assert losses[-1] < losses[0] - 0.1, "and it learns on"


def test_what_differs_from_the_run_before_is_said(
    swarm: LocalSwarm, text: Path, undisturbed: tuple[list[float], Path]
) -> None:
    client, (_, folder) = swarm.node(0).client, undisturbed
    raw = a_job(text, "other-seed", {"stages": 2, "slots": 1}, resume=str(folder))
    raw["run"]["seed"] = 99
    raw["data"] = {"path": str(text / "ast.py")}
    job, notes = client.submit_with_notes(raw, text)
    client.stop(job)
    assert len(notes) == 1
    assert notes[0].startswith("run.seed, data differ from the run that made the checkpoint")


def with_zero_moments(folder: Path, scratch: Path) -> Path:
    """The same weights at the same step, every moment zero, signed by somebody."""
    signer, store = Identity(b"n" * 32), BlobStore(scratch / "blobs")
    before, chunks = read_checkpoint(folder / MANIFEST_FILE).manifest, FolderChunks(folder)
    atoms: list[IndexedTensor] = []
    for atom in before.atoms:
        pieces = [chunks.read(atom, number) for number in range(len(atom.chunks))]
        if atom.name.endswith(MOMENT_SUFFIXES):
            pieces = [bytes(len(piece)) for piece in pieces]
        refs = tuple(store.put(piece) for piece in pieces)
        atoms.append(IndexedTensor(atom.name, atom.dtype, atom.shape, refs))
    assert hash_weights(atoms, store.read) == before.weights_sha256
    changes = {"atoms": tuple(atoms), "coordinator": signer.peer}
    checkpoint = Checkpoint.signed(before.model_copy(update=changes), signer)
    target = scratch / "without"
    texts = {"tokenizer.json": folder / "tokenizer.json"}
    write_folder(target, checkpoint, store.read, texts)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    assert json.loads((target / "config.json").read_text()) == before.config
    return target
