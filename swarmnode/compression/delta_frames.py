"""What the two ends of a delta cache send each other: frames forward, refusals back.

A frame is a prefix and a payload (`payload`), whose state version is the entry's new version:

    offset  bytes  what
    0       2      b"SD"
    2       1      version, 1
    3       1      0 the values in full, 1 their change
    4       8      scope: which cache this is about
    12      4      slot; 2^32 - 1: not to be kept
    16      4      version of the entry that this changes; 0 in full
    20      4      CRC-32 of that entry's values; 0 in full
    24      4      CRC-32 of the values that come out
    28      4      CRC-32 of the prefix before

A refusal has 32 bytes as well:

    0       2      b"SE"
    2       1      version, 1
    3       1      0
    4       8      scope
    12      4      slot of the refused frame
    16      4      version in the refused frame
    20      4      version that the receiver has in this slot; 0 for none
    24      4      number of slots that the receiver has
    28      4      CRC-32 of the rest

Numbers are little endian. Versions count from 1.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass

from swarmnode.compression.payload import Opened, open_payload
from swarmnode.compression.tensors import Payload
from swarmnode.errors import CodecError

NO_SLOT = (1 << 32) - 1
SCOPE_BYTES = 8
PREFIX_BYTES = 32
IS_DELTA_AT = 3
"""Where in a frame it says whether it is a change."""

_PREFIX = struct.Struct("<2sBB8sIIII")
_CRC = struct.Struct("<I")
_VERSION = 1


@dataclass(frozen=True)
class Prefix:
    """What a frame says about the entry that it is for."""

    scope: bytes
    is_delta: bool
    slot: int
    base_version: int
    base_crc: int
    crc: int


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame whose checksums are right; its values are not decoded yet."""

    prefix: Prefix
    payload: Opened

    @property
    def version(self) -> int:
        return self.payload.state_version


@dataclass(frozen=True)
class Refusal:
    """The receiver cannot use a frame: send that sample again, in full."""

    scope: bytes
    slot: int
    version: int
    """That of the refused frame."""
    held_version: int
    """What the receiver has in this slot; 0 for nothing."""
    num_slots: int
    """How many the receiver has."""


def scope_of(spec: str, scope: bytes) -> bytes:
    """The 8 bytes on the wire that name one cache of one codec."""
    text = spec.encode() + b"\0" + scope
    return hashlib.blake2b(text, digest_size=SCOPE_BYTES).digest()


def pack_frame(prefix: Prefix, payload: Payload) -> bytearray:
    """A frame around what `payload.pack` has made."""
    fields = (prefix.scope, prefix.slot, prefix.base_version, prefix.base_crc, prefix.crc)
    return _sealed(b"SD", int(prefix.is_delta), *fields) + payload


def unpack_frame(data: Payload, max_elements: int) -> Frame:
    """A frame from a stranger. Raises: CodecError for anything `pack_frame` cannot have written."""
    view = memoryview(data).cast("B")
    kind, scope, slot, base_version, base_crc, crc = _unsealed(b"SD", view[:PREFIX_BYTES])
    payload = open_payload(view[PREFIX_BYTES:], max_elements)
    if kind > 1 or not (payload.state_version or slot == NO_SLOT):
        raise CodecError("frame's prefix has an impossible field")
    is_delta = kind == 1
    if is_delta != bool(base_version) or (is_delta and slot == NO_SLOT):
        raise CodecError("frame is a change of nothing, or no change of something")
    return Frame(Prefix(scope, is_delta, slot, base_version, base_crc, crc), payload)


def slot_of(frame: Payload) -> int:
    """The slot that a frame from a stranger names, unchecked; `NO_SLOT` where there is none."""
    view = memoryview(frame).cast("B")
    return int(_PREFIX.unpack_from(view)[4]) if len(view) >= PREFIX_BYTES else NO_SLOT


def pack_refusal(refusal: Refusal) -> bytes:
    fields = (refusal.slot, refusal.version, refusal.held_version, refusal.num_slots)
    return bytes(_sealed(b"SE", 0, refusal.scope, *fields))


def unpack_refusal(data: Payload) -> Refusal:
    """A refusal from a stranger. Raises: CodecError."""
    kind, scope, slot, version, held, num_slots = _unsealed(b"SE", memoryview(data).cast("B"))
    if kind:
        raise CodecError("refusal has an impossible field")
    return Refusal(scope, slot, version, held, num_slots)


def _sealed(magic: bytes, kind: int, scope: bytes, *fields: int) -> bytearray:
    data = bytearray(_PREFIX.pack(magic, _VERSION, kind, scope, *fields))
    return data + _CRC.pack(zlib.crc32(data))


def _unsealed(magic: bytes, data: memoryview) -> tuple[int, bytes, int, int, int, int]:
    """The fields after magic and version."""
    if len(data) != PREFIX_BYTES:
        raise CodecError(f"{len(data)} bytes where a prefix has {PREFIX_BYTES}")
    found, version, *fields = _PREFIX.unpack_from(data)
    if (found, version) != (magic, _VERSION):
        raise CodecError(f"frame begins with {bytes(data[:3])!r}, not {magic!r} and {_VERSION}")
    if _CRC.unpack_from(data, _PREFIX.size)[0] != zlib.crc32(data[: _PREFIX.size]):
        raise CodecError("frame's prefix does not have its checksum")
    kind, scope, first, second, third, fourth = fields
    return kind, scope, first, second, third, fourth
