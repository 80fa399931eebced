"""The wire: every message survives the trip; any other bytes are a ProtocolError, nothing else."""

import struct
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.domain import BlobRef, Generation, JobId, SlotId
from swarmnode.errors import ProtocolError
from swarmnode.heartbeats import Ping
from swarmnode.messages import (
    Begin,
    Failed,
    Message,
    Ready,
)
from swarmnode.wire import MAX_HEADER_BYTES, pack, unpack

JOB = JobId("0123456789abcdef")
KINDS = get_args(Message)
SCALARS = {
    bool: st.booleans(),
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=20),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have, by the type and its bounds."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return bounded(args[0], [rule for info in args[1:] for rule in info.metadata])
    if isinstance(kind, NewType):
        return values(kind.__supertype__)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (UnionType, Union):
        return st.one_of([values(arg) for arg in args])
    if origin is tuple:
        return bounded(kind, [])
    if origin in (dict, Mapping):
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})
    return st.none() if kind is type(None) else SCALARS[kind]


def bounded(kind: Any, rules: list[Any]) -> st.SearchStrategy[Any]:
    def bound(name: str, default: int) -> int:
        return next((getattr(rule, name) for rule in rules if hasattr(rule, name)), default)

    kind = kind.__supertype__ if isinstance(kind, NewType) else kind
    if any(getattr(rule, "pattern", None) for rule in rules):
        least, most = bound("min_length", 8), bound("max_length", 64)
        return st.text("0123456789abcdef", min_size=least, max_size=most)
    if kind is int:
        most = min(bound("lt", 1 << 63) - 1, bound("le", 1 << 63))
        return st.integers(bound("ge", -(1 << 63)), most)
    if kind is float:
        least = bound("ge", 0) or bound("gt", 0) or 1e-3
        return st.floats(least, bound("le", 1))
    most = min(bound("max_length", 3), 3)
    if kind is bytes:
        return st.binary(max_size=most)
    if kind is str:
        return st.text(min_size=bound("min_length", 0), max_size=most)
    args = get_args(kind)
    if get_origin(kind) is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=most)
    if args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=most).map(tuple)
    return st.tuples(*[values(arg) for arg in args])


messages = st.one_of([values(kind) for kind in KINDS])


def wire(body: object, payload: bytes = b"") -> bytes:
    return framed(msgpack.packb(body)) + payload


def framed(header: bytes) -> bytes:
    return struct.pack(">I", len(header)) + header


def read_or_refuse(data: bytes) -> Message | None:
    """What `unpack` makes of `data`; any error but ProtocolError fails the test."""
    try:
        message, _ = unpack(data)
    except ProtocolError:
        return None
    assert isinstance(message, KINDS)
    return message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_trip_with_its_payload(kind: Any, data: st.DataObject) -> None:
    message = data.draw(values(kind))
    payload = data.draw(st.binary(max_size=30))
    again, rest = unpack(pack(message) + payload)
    assert again == message
    assert type(again) is kind
    assert rest == payload


def test_the_payload_is_a_view_and_not_a_copy() -> None:
    data = bytearray(pack(Ping(JOB)) + b"payload")
    _, payload = unpack(data)
    data[-1:] = b"D"
    assert payload == b"payloaD"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert read_or_refuse(data) is None
    assert read_or_refuse(framed(data)) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages, st.data())
def test_damaged_bytes_are_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    packed = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= 1 << data.draw(st.integers(0, 7))
    read_or_refuse(bytes(packed))
    cut = data.draw(st.integers(0, len(packed)))
    read_or_refuse(bytes(packed[:cut]))
    read_or_refuse(framed(bytes(packed[4 : 4 + cut])))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(messages, st.data())
def test_a_field_of_any_value_is_a_message_or_refused(
    message: Message, data: st.DataObject
) -> None:
    body = msgpack.unpackb(pack(message)[4:])
    name = data.draw(st.sampled_from(sorted(body)))
    body[name] = data.draw(anything)
    accepted = read_or_refuse(wire(body))
    if accepted is not None:
        assert len(pack(accepted)) > 4, "what was accepted can be sent on"


@settings(max_examples=100, deadline=None)
@given(messages, st.text(max_size=5), anything)
def test_unknown_and_missing_fields_are_refused(message: Message, name: str, value: object) -> None:
    body = msgpack.unpackb(pack(message)[4:])
    if name not in body:
        with pytest.raises(ProtocolError, match="unknown field"):
            unpack(wire({**body, name: value}))
    del body["job"]
    with pytest.raises(ProtocolError, match="job: Field required"):
        unpack(wire(body))


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"t": None},
        {"t": 1, "job": JOB},
        {"t": ["Ping"], "job": JOB},
        {"t": "ping", "job": JOB},
        {"t": "Plan", "job": JOB},
        {"t": "Ping", "job": JOB, 1: 2},
        {"t": "Ping", "job": JOB, None: 2},
        {"t": "Begin", "job": JOB, "generation": 1, "step": -1},
        {"t": "Begin", "job": JOB, "generation": 1, "step": 1 << 62},
        {"t": "Begin", "job": JOB, "generation": 1, "step": 0.5},
        {"t": "Release", "job": JOB, "reason": "x" * 4097},
        {"t": "Applied", "job": JOB, "generation": 1, "step": 1, "stage": 0, "state_hash": "xyz"},
    ],
    ids=repr,
)
def test_a_header_that_is_no_message_is_refused(body: object) -> None:
    with pytest.raises(ProtocolError):
        unpack(wire(body))


def test_a_header_that_is_not_all_there_is_refused_before_it_is_read() -> None:
    for data in (b"", b"\0\0\0", struct.pack(">I", 1), struct.pack(">I", 1 << 31) + b"x"):
        with pytest.raises(ProtocolError):
            unpack(data)


def test_an_oversized_header_is_neither_sent_nor_read() -> None:
    long = Failed(JOB, Generation(1), "x" * MAX_HEADER_BYTES)
    with pytest.raises(ProtocolError, match="header of"):
        pack(long)
    body = {"t": "Failed", "job": JOB, "generation": 1, "reason": long.reason}
    with pytest.raises(ProtocolError, match="announced"):
        unpack(wire(body))


def test_trailing_or_nested_rubbish_in_a_header_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack(framed(pack(Ping(JOB))[4:] + b"\xc0"))
    with pytest.raises(ProtocolError):
        unpack(framed(b"\x91" * 100_000))


@pytest.mark.parametrize("key", [b"\x90", b"\x80"], ids=["list", "map"])
def test_a_map_with_a_key_that_cannot_be_hashed_is_refused(key: bytes) -> None:
    assert read_or_refuse(framed(b"\x81" + key + b"\x01")) is None


def test_a_generation_that_no_message_can_carry_is_refused() -> None:
    body = {"t": "Begin", "job": JOB, "generation": "9" * 30, "step": 1}
    message = read_or_refuse(wire(body))
    assert message is None or isinstance(unpack(pack(message))[0], Begin)


@pytest.mark.parametrize("ref", [BlobRef("x", 1), BlobRef("A" * 64, 1), BlobRef("a" * 64, 1 << 40)])
def test_a_message_that_names_no_content_is_refused(ref: BlobRef) -> None:
    """A coordinator writes what a worker names into its journal, which must be readable again."""
    ready = Ready(JOB, Generation(1), 0, SlotId(0, 0), (), ref, (), ())
    with pytest.raises(ProtocolError, match="update"):
        unpack(pack(ready))
