"""Adverts: exact round trips, and every kind of lie refused by name."""

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from advert_makers import advert, identity, record
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.domain import Advert, Coordinate, Reach
from swarmnode.errors import ProtocolError
from swarmnode.p2p.adverts import MAX_LEASE_S, BadAdvertError, decode, encode

NOW_S = 1_700_000_000.0
ME, OTHER = identity(1), identity(2)
GOOD = advert(ME, NOW_S + 30)


def forged(body: Any) -> bytes:
    """A record with a valid signature of ME over any body."""
    raw = msgpack.packb(body)
    return bytes(msgpack.packb([raw, ME.sign(b"swarmnode advert\0" + raw)]))


def fields() -> list[Any]:
    body: list[Any] = msgpack.unpackb(msgpack.unpackb(encode(GOOD, ME.sign))[0])
    return body


def reason(raw: bytes, now_s: float = NOW_S, owner: str | None = None) -> str:
    with pytest.raises(BadAdvertError) as caught:
        decode(raw, now_s, owner=owner)
    assert isinstance(caught.value, ProtocolError)
    return caught.value.reason


@given(
    incarnation=st.integers(0, 2**63 - 1),
    flops=st.floats(1e6, 1e17),
    ahead_s=st.floats(0.001, MAX_LEASE_S),
    num_addresses=st.integers(1, 16),
)
def test_an_advert_survives_the_round_trip(
    incarnation: int, flops: float, ahead_s: float, num_addresses: int
) -> None:
    addresses = tuple(f"/dns4/h{n}.example/tcp/{n}/p2p/{ME.peer}" for n in range(num_addresses))
    device = replace(GOOD.device, flops={"float32": flops, "bfloat16": flops})
    before = replace(
        GOOD,
        incarnation=incarnation,
        addresses=addresses,
        device=device,
        expires_at_s=NOW_S + ahead_s,
    )
    assert decode(encode(before, ME.sign), NOW_S, owner=ME.peer) == before


def test_how_a_peer_is_connected_survives_the_round_trip() -> None:
    place = Coordinate(-0.01, 0.2, 0.0, 0.003, 0.25)
    before = replace(GOOD, reach=Reach(place, 12.5e6, 1e8))
    assert decode(encode(before, ME.sign), NOW_S) == before != GOOD
    with pytest.raises(BadAdvertError, match="uplink"):
        encode(replace(GOOD, reach=Reach(uplink_bytes_per_s=float("inf"))), ME.sign)


def test_equal_adverts_have_equal_records() -> None:
    turned = replace(GOOD.device, flops=dict(reversed(list(GOOD.device.flops.items()))))
    assert encode(replace(GOOD, device=turned), ME.sign) == encode(GOOD, ME.sign)


def test_a_signature_by_another_key_is_refused() -> None:
    assert reason(encode(GOOD, OTHER.sign)) == "signature"


def test_every_flipped_byte_is_refused() -> None:
    good = encode(GOOD, ME.sign)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1
        assert reason(bytes(bad)) in ("schema", "signature")


def test_a_record_under_another_name_is_foreign() -> None:
    assert reason(record(OTHER, NOW_S + 30), owner=ME.peer) == "foreign"


def test_an_oversized_record_is_refused_unread() -> None:
    assert reason(b"\xdd\xff\xff\xff\xff" + bytes(4092)) == "size"
    name = "x" * 128
    many = tuple(f"/dns4/{name}/tcp/{n:05}/dns4/h/p2p/{ME.peer}" for n in range(16))
    assert len(encode(replace(GOOD, addresses=many), ME.sign)) <= 4096
    too_much = tuple(f"/dns4/{name}/dns4/{'y' * 50}/p{n}/p2p/{ME.peer}" for n in range(16))
    with pytest.raises(BadAdvertError, match="size"):
        encode(replace(GOOD, addresses=too_much), ME.sign)


def test_time_is_checked_at_both_ends() -> None:
    assert reason(record(ME, NOW_S)) == "expired"
    assert reason(record(ME, NOW_S + MAX_LEASE_S + 11)) == "lease"
    assert decode(record(ME, NOW_S + MAX_LEASE_S), NOW_S).peer == ME.peer


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((0,), 1),
        ((1,), "12D3KooWnobody"),
        ((2,), []),
        ((2,), [f"/ip4/10.0.0.1/tcp/1/p2p/{OTHER.peer}"]),
        ((2,), [f"/ip4/10.0.0.1/tcp/{n}/p2p/{ME.peer}" for n in range(17)]),
        ((2,), [f"/ip4/10.0.0.1/tcp/1/p2p/{ME.peer}"] * 2),
        ((2,), [f"/ip4/10.0.0.1\n/tcp/1/p2p/{ME.peer}"]),
        ((2, 0), 7),
        ((3, 0), "tpu"),
        ((3, 1), ""),
        ((3, 1), "x" * 129),
        ((3, 1), "\x1b[31m"),
        ((3, 2), [1e11]),
        ((3, 2, 0), float("nan")),
        ((3, 2, 0), float("inf")),
        ((3, 2, 1), -1.0),
        ((3, 2, 1), 1e30),
        ((3, 2, 1), 100_000_000_000),
        ((3, 3), 0.0),
        ((3, 4), 1 << 60),
        ((3, 5), 1 << 35),
        ((3, 5), -1),
        ((3, 6), 0),
        ((3, 6), True),
        ((4,), [1, 1, 1]),
        ((4, 0), -1),
        ((4, 1), 10**6),
        ((5,), "0.1.0; rm"),
        ((6,), -1),
        ((6,), 1.0),
        ((7,), float("inf")),
        ((7,), None),
        ((8,), []),
        ((8,), [0.0] * 8),
        ((8, 0), 0),
        ((8, 0), float("nan")),
        ((8, 1), 11.0),
        ((8, 2), float("-inf")),
        ((8, 3), -0.1),
        ((8, 4), 1.5),
        ((8, 4), float("nan")),
        ((8, 5), -1.0),
        ((8, 5), float("nan")),
        ((8, 6), 1e13),
    ],
)
def test_a_signed_absurdity_breaks_the_schema(where: tuple[int, ...], value: Any) -> None:
    body = fields()
    assert decode(forged(body), NOW_S) == GOOD
    target = body
    for index in where[:-1]:
        target = target[index]
    target[where[-1]] = value
    assert reason(forged(body)) == "schema"


@pytest.mark.parametrize("body", [None, {}, [], "text", 7, [[[[]]]], {"a": 1}])
def test_another_shape_breaks_the_schema(body: Any) -> None:
    assert reason(forged(body)) == "schema"
    assert reason(bytes(msgpack.packb(body))) == "schema"


def test_one_advert_has_one_record_only() -> None:
    raw = msgpack.packb(fields()).replace(b"\x02\xd9", b"\xcc\x02\xd9", 1)
    longer = msgpack.packb([raw, ME.sign(b"swarmnode advert\0" + raw)])
    assert msgpack.unpackb(raw) == fields()
    assert reason(longer) == "schema"


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    assert reason(raw) == "schema"


def test_deep_nesting_is_refused() -> None:
    assert reason(b"\x91" * 4000 + b"\xc0") == "schema"


def test_an_impossible_advert_is_refused_at_home() -> None:
    def peerless(changed: Advert) -> None:
        with pytest.raises(BadAdvertError, match="impossible"):
            encode(changed, ME.sign)

    peerless(replace(GOOD, addresses=()))
    peerless(replace(GOOD, expires_at_s=float("nan")))
    peerless(replace(GOOD, device=replace(GOOD.device, flops={"float32": 1e9})))
