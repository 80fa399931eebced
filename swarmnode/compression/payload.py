"""A coded tensor that says what it is: a header, then the codec's bytes.

    offset  bytes  what
    0       2      b"SP"
    2       1      version, 1
    3       1      dtype: 0 float32, 1 bfloat16
    4       1      number of dimensions, D: 0 .. 8
    5       1      length of the codec's name, L: 1 .. 48
    6       4      state version: a step or visit counter; the phase of codecs that have one
    10      4      CRC-32 of everything else, header and body
    14      4 D    sizes
    14+4D   L      the codec's name, ASCII, in its one spelling, without a memory

Numbers are little endian. The CRC finds damage and states that drifted apart, not forgery.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmnode.codec_specs import MAX_SPEC_CHARS
from swarmnode.compression.codec import get_codec
from swarmnode.compression.protocol import Codec
from swarmnode.compression.tensors import MAX_DIMENSIONS, Payload, num_elements
from swarmnode.errors import CodecError, ManifestError

MAGIC = b"SP"
VERSION = 1
MAX_STATE_VERSION = (1 << 32) - 1
UNPACK_BYTES_PER_ELEMENT = 40
"""Besides the data, which its caller holds, `unpack` on a CPU allocates at most this for each of
the elements that it was allowed, and 1 MiB."""

_HEADER = struct.Struct("<2sBBBBII")
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Unpacked:
    """What a payload holds."""

    tensor: Tensor
    state_version: int
    spec: str


def header_bytes(codec: Codec, shape: Sequence[int]) -> int:
    """The exact length of the header; the body has `codec.wire_bytes(shape, dtype)`."""
    return _HEADER.size + 4 * len(shape) + len(codec.spec)


def pack(codec: Codec, tensor: Tensor, state_version: int = 0) -> bytearray:
    """Code `tensor` under a header; the state version is also the codec's phase.

    Raises: CodecError if it cannot be coded, has a dimension of 2^32 or more, or the state
    version is not below 2^32.
    """
    num_elements(tensor.shape)
    if not 0 <= state_version <= MAX_STATE_VERSION or any(s >> 32 for s in tensor.shape):
        raise CodecError(f"no header for shape {tuple(tensor.shape)}, version {state_version}")
    body = codec.at(state_version).encode(tensor)
    name, sizes = codec.spec.encode("ascii"), struct.pack(f"<{tensor.dim()}I", *tensor.shape)
    fields = (
        MAGIC, VERSION, _DTYPES.index(tensor.dtype), tensor.dim(), len(name), state_version
    )  # fmt: skip
    crc = _crc(_HEADER.pack(*fields, 0), sizes + name, body)
    return bytearray(_HEADER.pack(*fields, crc)) + sizes + name + body


@dataclass(frozen=True, eq=False)
class Opened:
    """A payload whose header and checksum are right; nothing is decoded yet."""

    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    state_version: int
    body: memoryview

    def decode(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor. Raises: CodecError if the codec cannot have written this body."""
        codec = self.codec.at(self.state_version)
        return codec.decode(self.body, self.shape, self.dtype, device)


def unpack(data: Payload, max_elements: int, device: torch.device | str = "cpu") -> Unpacked:
    """The tensor of a payload from a stranger, with at most `max_elements` elements.

    Raises: CodecError for anything that `pack` cannot have written, an unknown codec
    included. All sizes are checked before anything is allocated for them.
    """
    opened = open_payload(data, max_elements)
    return Unpacked(opened.decode(device), opened.state_version, opened.codec.spec)


def open_payload(data: Payload, max_elements: int) -> Opened:
    """What a payload says it holds, its checksum and all sizes checked. Raises: CodecError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEADER.size:
        raise CodecError(f"payload of {len(view)} bytes has no header")
    magic, version, dtype, num_dims, num_chars, state, crc = _HEADER.unpack_from(view)
    if (magic, version) != (MAGIC, VERSION):
        raise CodecError(f"payload begins with {bytes(view[:3])!r}, not {MAGIC!r} and {VERSION}")
    start = _HEADER.size + 4 * num_dims + num_chars
    if dtype >= len(_DTYPES) or num_dims > MAX_DIMENSIONS or num_chars > MAX_SPEC_CHARS:
        raise CodecError("payload's header has an impossible field")
    if start > len(view):
        raise CodecError("payload ends in its header")
    shape = struct.unpack_from(f"<{num_dims}I", view, _HEADER.size)
    codec = _codec(bytes(view[start - num_chars : start]))
    if num_elements(shape) > max_elements:
        raise CodecError(f"payload announces {shape}, more than {max_elements} elements")
    body = view[start:]
    if len(body) != codec.wire_bytes(shape, _DTYPES[dtype]):
        raise CodecError(f"payload has a body of {len(body)} bytes, not those of {shape}")
    zeroed = _HEADER.pack(magic, version, dtype, num_dims, num_chars, state, 0)
    if crc != _crc(zeroed, view[_HEADER.size : start], body):
        raise CodecError("payload does not have its checksum")
    return Opened(codec, shape, _DTYPES[dtype], state, body)


def _codec(name: bytes) -> Codec:
    try:
        codec = get_codec(name.decode("ascii"))
    except (ManifestError, UnicodeDecodeError) as error:
        raise CodecError(f"payload names no codec: {error}") from None
    if codec.spec.encode() != name:
        raise CodecError(f"payload names its codec {name!r}, not {codec.spec!r}")
    return codec


def _crc(*parts: Payload) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
