"""What a checkpoint manifest says, who said it, and what is refused of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import checkpoint_makers as make
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import BlobRef, LinkPreset, PeerId
from swarmnode.errors import DataError
from swarmnode.p2p.blob_store import BlobStore
from swarmnode.p2p.checkpoints import Checkpoint, OptimizerState, hash_weights, merge
from swarmnode.p2p.states import IndexedTensor, TensorIndex


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_a_manifest_is_read_back_as_it_was_and_its_signature_holds(store: BlobStore) -> None:
    made = make.checkpoint(store)
    read = Checkpoint.parse(made.to_bytes())
    assert (read.manifest, read.signature) == (made.manifest, made.signature)
    assert read.is_authentic
    assert read.sha256 == hashlib.sha256(made.to_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("loss",), 1.0),
        (("generation",), 3),
        (("parent",), "c" * 64),
        (("weights_sha256",), "c" * 64),
        (("created_at_s",), 0.0),
        (("random", "seed"), 4),
        (("atoms", 0, 3, 0, 0), "c" * 64),
        (("coordinator",), make.Identity(b"x" * 32).peer),
        (("signature",), "00" * 64),
    ],
)
def test_a_changed_manifest_is_read_but_not_authentic(
    store: BlobStore, path: Any, value: Any
) -> None:
    made = make.checkpoint(store)
    read = Checkpoint.parse(make.recoded(made, path, value))
    assert not read.is_authentic
    assert made.is_authentic


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "swarmnode.checkpoint/2"),
        (("extra",), 1),
        (("job",), "0" * 16),
        (("job_manifest", "name"), "other"),
        (("job_manifest", "model"), []),
        (("step",), 21),
        (("step",), -1),
        (("step",), 1 << 60),
        (("step",), True),
        (("data", "next_step"), 19),
        (("optimizer", "step"), 0),
        (("loss",), "low"),
        (("software",), {str(number): "1" for number in range(17)}),
        (("software",), {"x": "1" * 1000}),
        (("atoms",), {}),
        (("atoms",), [1]),
        (("atoms", 0, 0), "zzz"),
        (("atoms", 0, 1), "F7"),
        (("atoms", 0, 2), [5, 5]),
        (("atoms", 0, 2), [1 << 50, 1 << 50]),
        (("atoms", 0, 3, 0, 0), "../../etc/passwd"),
        (("atoms", 0, 3, 0, 1), 1 << 40),
        (("atoms", 1, 0), "embed.weight"),
        (("atoms", 1, 0), "embed.weight::exp_other"),
        (("atoms", 1, 0), "nowhere::exp_avg"),
        (("signature",), "00"),
        (("signature",), None),
        (("signature",), "zz" * 64),
    ],
)
def test_an_impossible_manifest_is_refused_in_one_line(
    store: BlobStore, path: Any, value: Any
) -> None:
    with pytest.raises(DataError, match="not a checkpoint manifest") as caught:
        Checkpoint.parse(make.recoded(make.checkpoint(store), path, value))
    assert len(str(caught.value).splitlines()) == 1


def test_other_spellings_of_the_same_manifest_are_refused(store: BlobStore) -> None:
    data = make.checkpoint(store).to_bytes()
    twice = data.replace(b'{"atoms"', b'{"loss":1,"atoms"', 1)
    for other in (data + b"\n", json.dumps(json.loads(data)).encode(), twice):
        with pytest.raises(DataError, match="canonical"):
            Checkpoint.parse(other)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"null", b"[]", b"{}", b"1e999", b'{"signature":"00"}', b"[" * 100_000,
        b'{"atoms":' + b"[" * 100_000 + b'],"signature":"00"}',
    ],
)  # fmt: skip
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        Checkpoint.parse(data)


@given(st.binary(max_size=200), st.integers(0, 1 << 16))
def test_a_file_with_any_damage_is_refused_or_not_authentic(patch: bytes, at: int) -> None:
    # The chunks themselves are not needed here, only their names.
    data = bytearray(_WHOLE)
    start = at % len(data)
    data[start : start + len(patch)] = patch
    if bytes(data) == _WHOLE:
        return
    try:
        read = Checkpoint.parse(bytes(data))
    except DataError:
        return
    assert not read.is_authentic


def test_weights_without_any_moments_are_a_state_too_but_not_half_of_them(
    store: BlobStore,
) -> None:
    atoms = make.state(store, make.WEIGHTS)
    bare = tuple(atom for atom in atoms if "::" not in atom.name)
    assert Checkpoint.parse(make.checkpoint(store, atoms=bare).to_bytes()).is_authentic
    with pytest.raises(ValueError, match="some weights have moments and some have none"):
        make.manifest(store, atoms=atoms[:-1])


def test_an_outer_momentum_is_a_state_too_but_not_beside_other_moments(store: BlobStore) -> None:
    outer = OptimizerState(kind="outer", step=20)
    atoms = make.state(store, make.WEIGHTS, ("", "::outer_momentum"))
    made = make.checkpoint(store, atoms=atoms, optimizer=outer)
    assert Checkpoint.parse(made.to_bytes()).manifest == made.manifest
    plain = make.state(store, make.WEIGHTS)
    for mixed in ({*atoms[:-1]}, {*atoms, *plain}, {*plain[:3], *atoms[2:]}):
        with pytest.raises(ValueError, match="some weights have moments and some have none"):
            make.manifest(store, atoms=tuple(sorted(mixed, key=lambda atom: atom.name)))
    odd = make.tensor(store, "embed.weight::x::exp_avg", (5, 4))
    with pytest.raises(ValueError, match="the moment of no weight"):
        make.manifest(store, atoms=tuple(sorted({*plain, odd}, key=lambda atom: atom.name)))


# ---- merging -----------------------------------------------------------------------------------


def index(*tensors: IndexedTensor) -> TensorIndex:
    return TensorIndex(20, tensors)


def renamed(atoms: tuple[IndexedTensor, ...], old: str, new: str) -> tuple[IndexedTensor, ...]:
    return tuple(IndexedTensor(a.name.replace(old, new), a.dtype, a.shape, a.chunks) for a in atoms)


def test_stages_merge_into_one_set_and_what_two_hold_is_there_once(store: BlobStore) -> None:
    whole = make.state(store, make.WEIGHTS)
    first = index(*(a for a in whole if "layers.1" not in a.name))
    last = index(*(a for a in whole if "layers.0" not in a.name))
    assert merge([first, last], tied=False) == whole
    assert merge([index(*whole)], tied=True) == whole


def test_a_tied_head_is_left_out_and_an_untied_one_is_not(store: BlobStore) -> None:
    embed = make.state(store, {"embed.weight": (5, 4)})
    head = renamed(embed, "embed", "lm_head")
    layer = make.state(store, {"layers.0.w": (4, 4)})
    names = {a.name for a in merge([index(*embed, *layer), index(*head)], tied=True)}
    assert names == {a.name for a in (*embed, *layer)}
    assert len(merge([index(*embed), index(*head)], tied=False)) == 6


def test_equal_layers_and_vectors_are_never_taken_for_a_tied_head(store: BlobStore) -> None:
    layer = make.state(store, {"layers.0.w": (4, 4)})
    norm = make.state(store, {"norm": (4,)})
    twins = (*layer, *renamed(layer, "0", "1"), *norm, *renamed(norm, "norm", "other"))
    assert len(merge([index(*twins)], tied=True)) == len(twins)


def test_stages_that_disagree_are_not_merged(store: BlobStore) -> None:
    one = make.tensor(store, "w", (4, 4))
    other = IndexedTensor("w", "F32", (4, 4), tuple(reversed(one.chunks)))
    with pytest.raises(DataError, match="different values of w"):
        merge([index(one), index(other)], tied=False)


def test_the_hash_over_weights_is_what_its_definition_says(store: BlobStore) -> None:
    digest = hashlib.sha256()
    for name, shape in sorted(make.WEIGHTS.items()):
        digest.update(json.dumps([name, "F32", list(shape)]).encode())
        digest.update(b"".join(store.read(c) for c in make.tensor(store, name, shape).chunks))
    atoms = make.state(store, make.WEIGHTS)
    assert hash_weights(reversed(atoms), store.read) == digest.hexdigest()

    def flipped(ref: BlobRef) -> bytes:
        return bytes([store.read(ref)[0] ^ 1]) + store.read(ref)[1:]

    assert hash_weights(atoms, flipped) != digest.hexdigest()


def _whole() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make.checkpoint(BlobStore(Path(folder))).to_bytes()


_WHOLE = _whole()


def test_links_that_were_coarser_are_signed_and_absent_where_none_was(store: BlobStore) -> None:
    plain = make.checkpoint(store)
    assert b"coarser_links" not in plain.to_bytes()
    link = LinkPreset(PeerId("a"), PeerId("b"), "slow", "int4/32", "int4/32+hadamard")
    found = make.checkpoint(store, coarser_links=(link,))
    again = Checkpoint.parse(found.to_bytes())
    assert again.manifest.coarser_links == (link,)
    assert again.is_authentic
    forged = found.to_bytes().replace(b'"slow"', b'"home"')
    assert not Checkpoint.parse(forged).is_authentic
    with pytest.raises(DataError, match="coarser_links"):
        Checkpoint.parse(found.to_bytes().replace(b'"slow"', b"1"))


def test_the_codecs_of_the_boundaries_are_part_of_what_is_signed(store: BlobStore) -> None:
    job = {**make.JOB, "codecs": {"activation": "aq/int4/32", "gradient": "int8"}}
    found = make.checkpoint(store, job_manifest=job)
    assert found.manifest.codecs == {"activation": "aq/int4/32", "gradient": "int8"}
    assert make.checkpoint(store).manifest.codecs == {}
