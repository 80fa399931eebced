"""The pure part of the transport: records, messages, credit."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.errors import FrameTooLargeError, ProtocolError
from swarmnode.p2p import framing
from swarmnode.p2p.framing import Bye, Credit, Decoder, End, Kind, Message, Outgoing, Window

PLENTY_BYTES = 1 << 40


def encode(*parts: bytes, credit_bytes: int = PLENTY_BYTES) -> bytes:
    outgoing = Outgoing(parts)
    wire = b""
    while not outgoing.is_done:
        record, cost_bytes = outgoing.record(credit_bytes)
        assert record
        assert cost_bytes <= credit_bytes
        wire += record
    return wire


@given(
    messages=st.lists(st.lists(st.binary(max_size=40), max_size=3), max_size=6),
    credit_bytes=st.integers(framing.MESSAGE_OVERHEAD_BYTES, 200),
    piece_bytes=st.integers(1, 64),
)
def test_messages_survive_any_cutting(
    messages: list[list[bytes]], credit_bytes: int, piece_bytes: int
) -> None:
    wire = b"".join(encode(*parts, credit_bytes=credit_bytes) for parts in messages)
    credit = framing.LEAST_CREDIT_BYTES
    wire += framing.encode_control(Kind.CREDIT, credit) + framing.encode_control(Kind.END)
    decoder = Decoder(max_message_bytes=200)
    events = []
    for start in range(0, len(wire), piece_bytes):
        events += decoder.feed(wire[start : start + piece_bytes])
    bodies = [b"".join(parts) for parts in messages]
    assert events == [*(Message(bytearray(body)) for body in bodies), Credit(credit), End()]
    assert decoder.spent_bytes == sum(map(framing.cost_bytes, bodies))


def test_sender_and_receiver_agree_on_the_cost() -> None:
    outgoing, cost_bytes, wire = Outgoing([b"x" * 700_000]), 0, b""
    while not outgoing.is_done:
        record, record_cost_bytes = outgoing.record(PLENTY_BYTES)
        wire, cost_bytes = wire + record, cost_bytes + record_cost_bytes
    decoder = Decoder(1 << 20)
    assert len(decoder.feed(wire)) == 1
    assert decoder.spent_bytes == cost_bytes == 700_000 + framing.MESSAGE_OVERHEAD_BYTES


def test_nothing_is_sent_without_credit() -> None:
    outgoing = Outgoing([b"abc"])
    assert outgoing.record(framing.MESSAGE_OVERHEAD_BYTES - 1) == (b"", 0)
    assert not outgoing.is_started
    record, cost_bytes = outgoing.record(framing.MESSAGE_OVERHEAD_BYTES)
    assert cost_bytes == framing.MESSAGE_OVERHEAD_BYTES
    assert outgoing.record(0) == (b"", 0)
    assert not outgoing.is_done
    rest, _ = outgoing.record(1000)
    assert Decoder(3).feed(record + rest) == [Message(bytearray(b"abc"))]


def test_control_records_pass_between_the_parts_of_a_message() -> None:
    outgoing = Outgoing([b"abcdef"])
    first, _ = outgoing.record(framing.MESSAGE_OVERHEAD_BYTES + 2)
    second, _ = outgoing.record(100)
    credit = framing.LEAST_CREDIT_BYTES
    wire = first + framing.encode_control(Kind.CREDIT, credit) + second
    assert Decoder(6).feed(wire) == [Credit(credit), Message(bytearray(b"abcdef"))]


def test_credits_one_after_the_other_are_one() -> None:
    credit = framing.LEAST_CREDIT_BYTES
    wire = framing.encode_control(Kind.CREDIT, credit) * 1000 + encode(b"x")
    assert Decoder(1).feed(wire) == [Credit(1000 * credit), Message(bytearray(b"x"))]


def test_nothing_is_looked_at_once_the_peer_has_left() -> None:
    decoder = Decoder(100)
    bye = framing.encode_control(Kind.BYE)
    assert decoder.feed(bye * 1000) == [Bye()]
    assert decoder.feed(bye + b"GET / HTTP/1.1") == []


def test_an_oversized_message_is_refused_before_anything_is_allocated() -> None:
    length = (1 << 31).to_bytes(4, "big")
    wire = framing.encode_control(Kind.DATA, 4 + 100) + length + b"x" * 100
    decoder = Decoder(max_message_bytes=1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLargeError) as caught:
            decoder.feed(wire)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.num_bytes, caught.value.max_bytes) == (1 << 31, 1 << 20)
    assert peak_bytes < 1 << 16


def test_an_announced_message_takes_no_memory_until_it_comes() -> None:
    wire = framing.encode_control(Kind.DATA, 4) + (1 << 30).to_bytes(4, "big")
    decoder = Decoder(max_message_bytes=1 << 30)
    tracemalloc.start()
    try:
        assert decoder.feed(wire) == []
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 16


@pytest.mark.parametrize(
    "wire",
    [
        framing.encode_control(Kind.DATA, 0),
        framing.encode_control(Kind.DATA, framing.MAX_RECORD_BYTES + 1),
        framing.encode_control(Kind.CREDIT, 0),
        framing.encode_control(Kind.CREDIT, framing.LEAST_CREDIT_BYTES - 1),
        framing.encode_control(Kind.END, 1),
        framing.encode_control(Kind.BYE, 1),
        framing.encode_control(Kind.END) + framing.encode_control(Kind.END),
        framing.encode_control(Kind.END) + framing.encode_control(Kind.DATA, 4),
        framing.encode_control(Kind.DATA, 4)
        + bytes([0, 0, 0, 1])
        + framing.encode_control(Kind.END),
        framing.encode_control(Kind.DATA, 2) + bytes(2) + framing.encode_control(Kind.END),
    ],
)
def test_nonsense_is_a_protocol_error(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(100).feed(wire)


@given(wire=st.binary(max_size=300))
def test_random_bytes_give_events_or_a_protocol_error(wire: bytes) -> None:
    try:
        events = Decoder(64).feed(wire)
    except ProtocolError:
        return
    assert all(isinstance(event, Message | Credit | End | Bye) for event in events)


def test_the_window_holds_back_a_peer_whose_reader_pauses() -> None:
    window = Window(1 << 20)
    assert window.grant(is_reader_waiting=False) == (1 << 20) - framing.INITIAL_CREDIT_BYTES
    window.spend(1 << 20)
    assert window.grant(is_reader_waiting=False) == 0
    with pytest.raises(ProtocolError):
        window.spend((1 << 20) + 1)
    window.deliver(300_000)
    assert window.grant(is_reader_waiting=False) == 300_000
    assert window.grant(is_reader_waiting=False) == 0


def test_a_message_larger_than_the_window_flows_to_a_waiting_reader() -> None:
    window, sent_bytes, granted_bytes = Window(1 << 20), 0, framing.INITIAL_CREDIT_BYTES
    while sent_bytes < 10 << 20:
        granted_bytes += window.grant(is_reader_waiting=True)
        assert granted_bytes > sent_bytes
        assert granted_bytes - sent_bytes <= 1 << 20
        sent_bytes = granted_bytes
        window.spend(sent_bytes)


@given(
    window_bytes=st.sampled_from([framing.INITIAL_CREDIT_BYTES, framing.WINDOW_BYTES]),
    moves=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=60),
)
def test_no_honest_receiver_gives_too_little_or_too_much(
    window_bytes: int, moves: list[tuple[float, float, bool]]
) -> None:
    """Whatever part of its credit a sender uses, and whatever part of that is taken."""
    window, granted_bytes = Window(window_bytes), framing.INITIAL_CREDIT_BYTES
    spent_bytes = delivered_bytes = 0
    for used, taken, is_reader_waiting in moves:
        spent_bytes += int(used * (granted_bytes - spent_bytes))
        window.spend(spent_bytes)
        num_bytes = int(taken * max(0, spent_bytes - delivered_bytes))
        delivered_bytes += num_bytes
        window.deliver(num_bytes)
        credit = window.grant(is_reader_waiting=is_reader_waiting)
        assert credit == 0 or credit >= framing.LEAST_CREDIT_BYTES
        granted_bytes += credit
        assert granted_bytes - spent_bytes <= framing.WINDOW_BYTES
