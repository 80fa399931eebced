"""Frames and refusals from strangers: a tensor, a refusal, or an error, whatever the bytes."""

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.compression.delta_frames import PREFIX_BYTES
from swarmnode.errors import CodecError
from tests.compression.delta_pair import normal, pair, visit


def sealed(frame: bytes | bytearray) -> bytes:
    """The same bytes under the checksums that make a receiver look at them."""
    prefix = bytes(frame[: PREFIX_BYTES - 4])
    payload = frame[PREFIX_BYTES:]
    if len(payload) >= 14:
        crc = zlib.crc32(payload[14:], zlib.crc32(bytes(payload[:10]) + bytes(4)))
        payload = bytes(payload[:10]) + struct.pack("<I", crc) + bytes(payload[14:])
    return prefix + struct.pack("<I", zlib.crc32(prefix)) + bytes(payload)


def test_every_flipped_bit_and_every_missing_byte_of_a_frame_is_noticed() -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(31, (2, 16)))
    frame = bytes(sender.prepare(b"x", normal(32, (2, 16))))
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            receiver.receive(damaged)
    for length in range(len(frame)):
        with pytest.raises(CodecError):
            receiver.receive(frame[:length])
    assert receiver.receive(frame).tensor is not None


def test_parts_of_two_frames_are_not_a_frame() -> None:
    sender, receiver = pair()
    frames = [bytes(sender.prepare(key, normal(33 + i))) for i, key in enumerate([b"x", b"y"])]
    with pytest.raises(CodecError, match="announces"):
        receiver.receive(frames[0][:PREFIX_BYTES] + frames[1][PREFIX_BYTES:])


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 1),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
    st.integers(0, 200),
)
def test_any_frame_is_a_tensor_a_refusal_or_an_error(
    visits: int, changes: list[tuple[int, int]], length: int
) -> None:
    sender, receiver = pair()
    for seed in range(visits):
        visit(sender, receiver, b"x", normal(seed, (2, 16)))
    frame = sender.prepare(b"x", normal(40, (2, 16)))
    for place, value in changes:
        frame[place % len(frame)] = value
    for candidate in (sealed(frame), sealed(frame)[:length]):
        try:
            found = receiver.receive(candidate)
        except CodecError:
            continue
        assert (found.tensor is None) == (found.refusal is not None)
        receiver.commit()
    if receiver._cache.entry(0) is not None:
        assert bool(receiver._cache.values(0).isfinite().all())


@given(st.binary(max_size=40))
def test_any_refusal_is_read_or_an_error(data: bytes) -> None:
    sender, _ = pair()
    body = b"SE\x01\x00" + sender._scope + data[:16].ljust(16, b"\xff")
    for candidate in (data, body + struct.pack("<I", zlib.crc32(body))):
        try:
            assert sender.refused(candidate) is None
        except CodecError:
            continue
    frame = sender.prepare(b"x", normal(41))  # with no versions left: in full, unkept
    assert pair()[1].receive(frame).tensor is not None
