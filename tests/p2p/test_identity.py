"""One key file, one peer id, signatures that only its owner can make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.errors import UserError
from swarmnode.p2p.identity import Identity, load_or_create, peer_of, public_key_of, verify

SEED = bytes(range(32))
PEER = "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
"""What py-libp2p and p2pd make of SEED."""


def test_a_known_seed_has_the_peer_id_that_libp2p_gives_it() -> None:
    assert Identity(SEED).peer == PEER


def test_libp2p_itself_derives_the_same_peer_id() -> None:
    code = (
        "import sys, libp2p.crypto.ed25519 as e, libp2p.peer.id as p\n"
        "pair = e.create_new_key_pair(bytes.fromhex(sys.argv[1]))\n"
        "print(p.ID.from_pubkey(pair.public_key).to_base58())"
    )
    for seed in (SEED, bytes(32), os.urandom(32)):
        done = subprocess.run(
            [sys.executable, "-c", code, seed.hex()], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == Identity(seed).peer


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_holds_its_public_key(public_key: bytes) -> None:
    assert public_key_of(peer_of(public_key)) == public_key


@given(st.text(max_size=80))
def test_no_text_breaks_the_reading_of_a_peer_id(text: str) -> None:
    assert public_key_of(text) is None or text.startswith("12D3KooW")


@pytest.mark.parametrize("peer", ["", "1" + PEER, PEER[:-1], PEER + "1", "Qm" + PEER, "0OIl"])
def test_other_ids_have_no_key(peer: str) -> None:
    assert public_key_of(peer) is None
    assert not verify(peer, b"m", Identity(SEED).sign(b"m"))


def test_a_signature_holds_for_its_message_and_its_signer_only() -> None:
    mine, other = Identity(SEED), Identity(bytes(32))
    signature = mine.sign(b"message")
    assert verify(mine.peer, b"message", signature)
    assert not verify(mine.peer, b"Message", signature)
    assert not verify(other.peer, b"message", signature)
    assert not verify(mine.peer, b"message", signature[:-1])
    assert not verify(mine.peer, b"message", b"")


def test_the_form_for_p2pd_is_seed_and_public_key_in_a_protobuf() -> None:
    mine = Identity(SEED)
    assert mine.protobuf[:4] == b"\x08\x01\x12\x40"
    assert mine.protobuf[4:36] == SEED
    assert mine.protobuf[36:] == public_key_of(mine.peer)


def test_the_key_is_not_in_the_repr() -> None:
    assert repr(Identity(SEED)) == f"Identity({PEER})"


def test_the_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "home" / "key"
    made = load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == made.seed
    assert load_or_create(path).peer == made.peer
    assert [p.name for p in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_or_create(path)
    path.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33, b"x" * 100_000])
def test_a_key_file_of_another_size_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match="exactly 32 bytes"):
        load_or_create(path)
    assert path.read_bytes() == content


def test_a_folder_in_place_of_the_key_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the key file"):
        load_or_create(tmp_path)
