"""Adverts for tests."""

from dataclasses import replace
from typing import Any

from swarmnode.domain import Advert, DeviceSpec, Limits
from swarmnode.p2p import adverts
from swarmnode.p2p.identity import Identity


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def advert(who: Identity, expires_at_s: float, **changes: Any) -> Advert:
    device = DeviceSpec(
        kind="cpu",
        name="Test CPU",
        flops={"float32": 1e11, "bfloat16": 2e11},
        memory_bytes_per_s=2e10,
        memory_total_bytes=1 << 34,
        memory_free_bytes=1 << 33,
        num_cores=8,
    )
    plain = Advert(
        peer=who.peer,
        addresses=(f"/ip4/10.0.0.1/tcp/4001/p2p/{who.peer}",),
        device=device,
        limits=Limits(memory_bytes=1 << 32, num_threads=4),
        version="0.1.0",
        incarnation=1,
        expires_at_s=expires_at_s,
    )
    return replace(plain, **changes)


def record(who: Identity, expires_at_s: float, **changes: Any) -> bytes:
    return adverts.encode(advert(who, expires_at_s, **changes), who.sign)
