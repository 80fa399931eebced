"""One message of an exchange: parts of a vector, each as its codec writes it, behind a header.

    offset  bytes  what
    0       2      b"SY"
    2       1      version, 1
    3       1      kind: 0 push, to who sums; 1 reply, the mean
    4       2      the sender's slot
    6       2      fragment
    8       4      exchange; that of the fragment alone is the phase of codecs that have one
    12      4      scope: CRC-32 of the sync's text, the tensors' shapes, and the state that the
                   message is a change of (an anchor, a mirror), which both ends hold
    16      4      CRC-32 of everything else

Numbers are little endian. No sizes travel: both ends know the layout, and so the exact length.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmnode.compression.codec import Codec, codec_of
from swarmnode.compression.sync.layout import Layout, Part
from swarmnode.compression.tensors import Payload
from swarmnode.errors import CodecError
from swarmnode.sync_specs import Sync

HEADER_BYTES = 20
_HEADER = struct.Struct("<2sBBHHIII")
_MAGIC, _VERSION = b"SY", 1
PUSH, REPLY = 0, 1


def state_of(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of these tensors' bytes."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, crc)
    return crc


@dataclass(frozen=True)
class Envelope:
    """What a message must be: nothing else is accepted in its place."""

    sync: Sync
    layout: Layout
    exchange: int
    kind: int = PUSH
    state: int = 0
    """CRC-32 of what both ends hold: where it has drifted apart, messages are refused."""

    @property
    def fragment(self) -> int:
        return self.exchange % self.layout.num_fragments

    @property
    def round(self) -> int:
        """Exchanges of this fragment before this one."""
        return self.exchange // self.layout.num_fragments

    @property
    def _scope(self) -> int:
        about = (self.layout.shapes, self.layout.num_slots, self.state)
        return zlib.crc32(f"{self.sync} {about}".encode())

    def _header(self, sender: int, crc: int) -> bytes:
        return _HEADER.pack(
            _MAGIC, _VERSION, self.kind, sender, self.fragment, self.exchange, self._scope, crc
        )

    def part_bytes(self, part: Part) -> int:
        return self._codec(part).wire_bytes(part.shape)

    def num_bytes(self, parts: Sequence[Part]) -> int:
        """The exact length of a message with these parts."""
        return HEADER_BYTES + sum(self.part_bytes(part) for part in parts)

    def _codec(self, part: Part) -> Codec:
        is_reply = self.kind == REPLY
        spec = self.sync.codec_for(self.exchange, is_small=part.is_small, is_reply=is_reply)
        return codec_of(spec).at(self.round)

    def encode(self, part: Part, values: Tensor) -> bytearray:
        """A part's bytes. Raises: CodecError if a value cannot be coded."""
        return self._codec(part).encode(values.view(part.shape))

    def decode(self, part: Part, body: Payload, device: torch.device) -> Tensor:
        """A part's values, in one row. Raises: CodecError."""
        return self._codec(part).decode(body, part.shape, torch.float32, device).view(-1)

    def seal(self, sender: int, bodies: Sequence[bytearray]) -> bytes:
        """The message with these parts' bytes."""
        body = b"".join(bodies)
        crc = zlib.crc32(body, zlib.crc32(self._header(sender, 0)))
        return self._header(sender, crc) + body

    def open(
        self, sender: int, message: Payload, parts: Sequence[Part], device: torch.device
    ) -> Mapping[Part, Tensor]:
        """The values of each part. Raises: CodecError for all that `seal` cannot have written."""
        view = memoryview(message).cast("B")
        if len(view) != self.num_bytes(parts):
            raise CodecError(f"slot {sender}: {len(view)} bytes instead of {self.num_bytes(parts)}")
        header, body = view[:HEADER_BYTES], view[HEADER_BYTES:]
        crc = zlib.crc32(body, zlib.crc32(self._header(sender, 0)))
        if bytes(header) != self._header(sender, crc):
            raise CodecError(f"slot {sender}: not the message of exchange {self.exchange}")
        values, start = {}, 0
        for part in parts:
            stop = start + self.part_bytes(part)
            values[part] = self.decode(part, body[start:stop], device)
            start = stop
        return values
