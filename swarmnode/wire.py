"""Messages on the wire: a msgpack header with a checked schema, and a raw payload behind it.

Layout of one message: `u32 big-endian header length | msgpack map | payload bytes`. The header's
key `t` names the type; every other key is a field of that type's dataclass. Unknown types,
unknown or missing fields, wrong types and oversized headers raise ProtocolError.
"""

import struct
from dataclasses import fields
from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from swarmnode.domain import MAX_BLOB_BYTES as MAX_BLOB_BYTES
from swarmnode.engine_messages import EngineMessage
from swarmnode.errors import ProtocolError
from swarmnode.messages import (
    Message,
)

MAX_HEADER_BYTES = 1 << 20
MAX_CONTROL_BYTES = 4 << 20
"""Largest message on a control stream."""
MAX_TENSOR_BYTES = 256 << 20
"""Largest message on a tensor stream, whatever the plan says; the plan usually allows less."""
CHUNK_BYTES = 1 << 20

CONTROL_PROTOCOL = "/swarmnode/control/1"
TENSOR_PROTOCOL = "/swarmnode/tensor/1"
BLOB_PROTOCOL = "/swarmnode/blob/1"
PROBE_PROTOCOL = "/swarmnode/probe/1"

_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (*Message.__args__, *EngineMessage.__args__)
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in _TYPES.items()}
_FIELDS = {name: frozenset(f.name for f in fields(kind)) for name, kind in _TYPES.items()}


def pack(message: Message | EngineMessage) -> bytes:
    """The header of `message` with its length in front; the payload follows it on the wire."""
    name = type(message).__name__
    body = _ADAPTERS[name].dump_python(message, mode="python", warnings=False)
    body["t"] = name
    packed: bytes = msgpack.packb(body)
    if len(packed) > MAX_HEADER_BYTES:
        raise ProtocolError(f"{name}: header of {len(packed)} bytes")
    return struct.pack(">I", len(packed)) + packed


def unpack(data: bytes | bytearray | memoryview) -> tuple[Message, memoryview]:
    """Read one message of a peer: its header, checked, and a view of its payload.

    Raises: ProtocolError for anything that `pack` cannot have written, and for messages that
    only a worker child and its daemon exchange.
    """
    message, payload = unpack_local(data)
    if isinstance(message, EngineMessage):
        raise ProtocolError(f"{type(message).__name__} does not come from a peer")
    return message, payload


def unpack_local(
    data: bytes | bytearray | memoryview,
) -> tuple[Message | EngineMessage, memoryview]:
    """The same for the pipe between a daemon and its worker child. Raises: ProtocolError."""
    view = memoryview(data)
    if len(view) < 4:
        raise ProtocolError("message without a header")
    (length,) = struct.unpack_from(">I", view)
    if length > min(MAX_HEADER_BYTES, len(view) - 4):
        raise ProtocolError(f"header of {length} bytes announced in {len(view)}")
    try:
        body = msgpack.unpackb(view[4 : 4 + length], strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"header is not msgpack: {error}") from None
    name = body.pop("t", None) if isinstance(body, dict) else None
    if not isinstance(name, str) or name not in _TYPES:
        raise ProtocolError(f"unknown message type {name!r:.40}")
    if not _FIELDS[name].issuperset(body):
        raise ProtocolError(f"{name}: unknown field")
    try:
        message: Message | EngineMessage = _ADAPTERS[name].validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{name}.{where}: {first['msg']}") from None
    return message, view[4 + length :]
