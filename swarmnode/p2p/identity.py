"""Who we are: one Ed25519 key file, from which libp2p and the directory derive the same peer id.

A peer id is base58 of the identity multihash of the protobuf-coded public key; it contains the
key, so a signature can be checked with nothing but the id.
"""

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarmnode.domain import PeerId
from swarmnode.errors import UserError

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES = {character: value for value, character in enumerate(_ALPHABET)}
_KEY_BYTES = 32
_PEER_PREFIX = bytes.fromhex("002408011220")
"""Multihash: identity, 36 bytes; protobuf: key type 1 (Ed25519), data of 32 bytes."""
_PRIVATE_PREFIX = bytes.fromhex("08011240")
"""Protobuf: key type 1 (Ed25519), data of 64 bytes."""
_MAX_PEER_CHARACTERS = 64


class Identity:
    """An Ed25519 key and the peer id that follows from it."""

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == _KEY_BYTES, "a seed has 32 bytes"
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.seed = seed
        """The 32-byte form: what py-libp2p wants."""
        self.peer = peer_of(self._key.public_key().public_bytes_raw())

    @property
    def protobuf(self) -> bytes:
        """The 64-byte form (seed, then public key) in a PrivateKey message: what p2pd wants."""
        return _PRIVATE_PREFIX + self.seed + self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`; callers prefix it with what it is."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer})"


def peer_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte Ed25519 public key."""
    return PeerId(_base58_encode(_PEER_PREFIX + public_key))


def public_key_of(peer: str) -> bytes | None:
    """The 32-byte Ed25519 public key inside a peer id; None if it is not such an id."""
    raw = _base58_decode(peer) if len(peer) <= _MAX_PEER_CHARACTERS else None
    if raw is None or len(raw) != len(_PEER_PREFIX) + _KEY_BYTES:
        return None
    if not raw.startswith(_PEER_PREFIX) or _base58_encode(raw) != peer:
        return None
    return raw[len(_PEER_PREFIX) :]


def verify(peer: str, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` was made with the key of `peer`. Never raises."""
    public_key = public_key_of(peer)
    if public_key is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_or_create(path: Path) -> Identity:
    """Read the key file, or make one: 32 bytes, mode 0600, complete or absent.

    Raises: UserError if others may read it, or if it is not a key.
    """
    try:
        return load(path)
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):  # somebody was faster: theirs counts
            os.link(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write the key file {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return load(path)


def load(path: Path) -> Identity:
    """Read an existing key file. Raises: UserError as above, FileNotFoundError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            seed = file.read(_KEY_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the key file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise UserError(f"key file {path} is open to others (mode {mode:04o}): chmod 600 it")
    if len(seed) != _KEY_BYTES:
        raise UserError(f"{path} is not a key file: it must hold exactly {_KEY_BYTES} bytes")
    return Identity(seed)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _base58_encode(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_ALPHABET[digit])
    num_zeros = len(raw) - len(raw.lstrip(b"\0"))
    return "1" * num_zeros + "".join(reversed(digits))


def _base58_decode(text: str) -> bytes | None:
    number = 0
    for character in text:
        value = _VALUES.get(character)
        if value is None:
            return None
        number = number * 58 + value
    num_zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * num_zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
