"""Atoms fit every cut: stages saved under one cut are loaded, moments included, under another."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from engine_swarm import LLAMA, TIED, make_manifest

from swarmnode.manifest import CodecConfig, Manifest
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoints import merge
from swarmnode.p2p.states import index_tensors, write_safetensors
from swarmnode.tensorfiles import read_header
from swarmnode.worker.models import save_tensors
from swarmnode.worker.training.state import StageState, initial_state, loaded_state

STEP = 7


def trained(manifest: Manifest, layers: tuple[int, int]) -> StageState:
    """A stage as after STEP steps: moments that follow from their names."""
    state = initial_state(manifest, layers, "cpu")
    assert state.optimizer is not None
    moments = {}
    for name, moment in state.optimizer.moments().items():
        known_as = name
        for copy, original in state.module.tied.items():
            known_as = known_as.replace(copy, original)
        seed = int.from_bytes(known_as.encode()[-20:-12], "big") % (1 << 62)
        generator = torch.Generator().manual_seed(seed)
        moments[name] = torch.rand(moment.shape, generator=generator)
    state.optimizer.set_state(STEP, moments)
    state.step = STEP
    return state


@pytest.mark.parametrize("sync", [None, "diloco"], ids=["adamw", "outer"])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_a_state_cut_in_two_is_the_same_state_cut_otherwise(
    config: object, sync: str | None, tmp_path: Path
) -> None:
    is_tied = config is TIED
    manifest = make_manifest(tmp_path, TIED if is_tied else LLAMA, codecs=CodecConfig(sync=sync))
    store, indexes = BlobStore(tmp_path / "blobs"), []
    for stage, layers in enumerate(pairwise((0, 2, 4))):
        path = tmp_path / f"stage-{stage}.safetensors"
        state = trained(manifest, layers)
        tensors = dict(state.module.tensors_by_name())
        assert state.optimizer is not None
        save_tensors(path, {**tensors, **state.optimizer.moments()})
        index, ranges = index_tensors(dict(sorted(read_header(path).items())), STEP)
        store.add_ranges(ranges)
        indexes.append(index)
    atoms = merge(indexes, tied=is_tied)
    assert ("lm_head.weight" in {atom.name for atom in atoms}) == (not is_tied)
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, atoms, store.read)
    for cut in ((0, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4)):
        for layers in pairwise(cut):
            loaded = loaded_state(manifest, layers, "cpu", path=whole, step=STEP)
            expected = trained(manifest, layers)
            assert loaded.step == STEP
            assert loaded.state_hash() == expected.state_hash()
            assert loaded.optimizer is not None
            assert expected.optimizer is not None
            wanted = expected.optimizer.moments()
            assert all(torch.equal(v, wanted[n]) for n, v in loaded.optimizer.moments().items())
            assert any(bool(moment.any()) for moment in wanted.values())
