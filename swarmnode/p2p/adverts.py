"""Adverts as signed bytes: what a peer says about itself, and why we would not believe it.

A record is msgpack `[body, signature]`; the body is one canonical msgpack encoding of the advert
(fixed order, shortest forms), so an advert has exactly one record. Pure: time is an argument.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from swarmnode.domain import Advert, Coordinate, DeviceSpec, Limits, PeerId, Reach
from swarmnode.errors import ProtocolError
from swarmnode.p2p import coordinates
from swarmnode.p2p.identity import verify as verify_signature
from swarmnode.p2p.links import MAX_BYTES_PER_S

MAX_RECORD_BYTES = 4096
MAX_LEASE_S = 600.0
"""An advert ends at most this far ahead."""
CLOCK_SLACK_S = 10.0
"""How far the clocks of two honest peers may differ."""
_CONTEXT = b"swarmnode advert\0"
_FORMAT = 2
MAX_ADDRESSES = 16
_SIGNATURE_BYTES = 64
_DTYPES = ("bfloat16", "float32")
_ADDRESS = re.compile(r"(?:/[A-Za-z0-9._:%-]{1,128}){2,24}")
_TEXT = re.compile(r"[ -~]{1,128}")
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,32}")

Reason = Literal["size", "schema", "signature", "foreign", "expired", "lease"]


@dataclass(eq=False)
class BadAdvertError(ProtocolError):
    """A record that must not be believed. Drop it and count it by `reason`."""

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"advert refused ({self.reason}): {self.detail}"


def encode(advert: Advert, sign: Callable[[bytes], bytes]) -> bytes:
    """The signed record of `advert`; `sign` holds the key of `advert.peer`.

    Raises: BadAdvertError if no peer would accept it: say so at home, not in the swarm.
    """
    _check(advert)
    body = _pack(advert)
    record = bytes(msgpack.packb([body, sign(_CONTEXT + body)]))
    if len(record) > MAX_RECORD_BYTES:
        raise BadAdvertError("size", f"{len(record)} bytes, at most {MAX_RECORD_BYTES}")
    return record


def decode(record: bytes, now_s: float, *, owner: str | None = None) -> Advert:
    """The advert in `record`, if it is valid at `now_s` and, where given, belongs to `owner`.

    Raises: BadAdvertError, a ProtocolError with the reason: size, schema, signature, foreign
    (signed by another peer than `owner`), expired, lease (too far ahead).
    """
    advert = authenticate(record, owner=owner)
    check_lease(advert, now_s)
    return advert


def check_lease(advert: Advert, now_s: float) -> None:
    """Raises: BadAdvertError if the advert has ended at `now_s`, or ends too far ahead."""
    if advert.expires_at_s <= now_s:
        raise BadAdvertError("expired", f"{now_s - advert.expires_at_s:.1f} s ago")
    if advert.expires_at_s > now_s + MAX_LEASE_S + CLOCK_SLACK_S:
        raise BadAdvertError("lease", f"ends {advert.expires_at_s - now_s:.0f} s ahead")


def authenticate(record: bytes, *, owner: str | None = None) -> Advert:
    """`decode` without the clock: size, schema, owner and signature."""
    if len(record) > MAX_RECORD_BYTES:
        raise BadAdvertError("size", f"{len(record)} bytes, at most {MAX_RECORD_BYTES}")
    outer = _unpack(record)
    if not isinstance(outer, list) or len(outer) != 2 or not _are(outer, bytes):
        raise BadAdvertError("schema", "not [body, signature]")
    body, signature = outer
    advert = _advert(_unpack(body))
    _check(advert)
    if _pack(advert) != body:
        raise BadAdvertError("schema", "not in canonical form")
    if owner is not None and owner != advert.peer:
        raise BadAdvertError("foreign", f"{advert.peer} under the name of another peer")
    if len(signature) != _SIGNATURE_BYTES:
        raise BadAdvertError("schema", f"signature of {len(signature)} bytes")
    if not verify_signature(advert.peer, _CONTEXT + body, signature):
        raise BadAdvertError("signature", f"not signed by {advert.peer}")
    return advert


def _pack(advert: Advert) -> bytes:
    device, limits, reach = advert.device, advert.limits, advert.reach
    speeds = (reach.uplink_bytes_per_s, reach.downlink_bytes_per_s)
    return bytes(
        msgpack.packb(
            [
                _FORMAT,
                advert.peer,
                list(advert.addresses),
                [
                    device.kind,
                    device.name,
                    [float(device.flops[dtype]) for dtype in _DTYPES],
                    float(device.memory_bytes_per_s),
                    device.memory_total_bytes,
                    device.memory_free_bytes,
                    device.num_cores,
                ],
                [limits.memory_bytes, limits.num_threads],
                advert.version,
                advert.incarnation,
                float(advert.expires_at_s),
                [float(value) for value in (*reach.coordinate, *speeds)],
            ]
        )
    )


def _unpack(raw: bytes) -> Any:
    """Any msgpack value that fits; `raw` is at most MAX_RECORD_BYTES long already."""
    try:
        return msgpack.unpackb(raw, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise BadAdvertError("schema", "not msgpack") from error


def _advert(body: Any) -> Advert:
    """The advert that `body` spells; types are exact here, ranges are checked by `_check`."""
    match body:
        case [
            2,
            str(peer),
            [*addresses],
            [
                ("cpu" | "cuda") as kind,
                str(name),
                [float(bfloat16), float(float32)],
                float(memory_bytes_per_s),
                *counts,
            ],
            [*limits],
            str(version),
            incarnation,
            float(expires_at_s),
            [*reach],
        ] if (
            _are(addresses, str)
            and len(counts) == 3
            and len(limits) == 2
            and len(reach) == 7
            and _are(reach, float)
            and _are([*counts, *limits, incarnation], int)
        ):
            return Advert(
                peer=PeerId(peer),
                addresses=tuple(addresses),
                device=DeviceSpec(
                    kind=kind,
                    name=name,
                    flops={"bfloat16": bfloat16, "float32": float32},
                    memory_bytes_per_s=memory_bytes_per_s,
                    memory_total_bytes=counts[0],
                    memory_free_bytes=counts[1],
                    num_cores=counts[2],
                ),
                limits=Limits(memory_bytes=limits[0], num_threads=limits[1]),
                version=version,
                incarnation=incarnation,
                expires_at_s=expires_at_s,
                reach=Reach(Coordinate(*reach[:5]), *reach[5:]),
            )
    raise BadAdvertError("schema", "not the fields of an advert")


def _are(values: list[Any], kind: type) -> bool:
    """Whether all values are of exactly this type: True is no int here."""
    return all(type(value) is kind for value in values)


def _check(advert: Advert) -> None:
    """Refuse what no honest machine says. Raises: BadAdvertError("schema", which field)."""
    device, limits, reach = advert.device, advert.limits, advert.reach
    suffix = f"/p2p/{advert.peer}"
    checks = (
        (1 <= len(advert.addresses) <= MAX_ADDRESSES, "number of addresses"),
        (len(set(advert.addresses)) == len(advert.addresses), "repeated address"),
        (all(_is_address(a) and a.endswith(suffix) for a in advert.addresses), "address"),
        (device.kind in ("cpu", "cuda"), "device kind"),
        (_TEXT.fullmatch(device.name) is not None, "device name"),
        (set(device.flops) == set(_DTYPES), "dtypes of flops"),
        (all(_is_within(f, 1e6, 1e17) for f in device.flops.values()), "flops"),
        (_is_within(device.memory_bytes_per_s, 1e6, 1e15), "memory bandwidth"),
        (1 << 20 <= device.memory_total_bytes <= 1 << 46, "memory"),
        (0 <= device.memory_free_bytes <= device.memory_total_bytes, "free memory"),
        (1 <= device.num_cores <= 4096, "cores"),
        (0 <= limits.memory_bytes <= 1 << 46, "memory limit"),
        (1 <= limits.num_threads <= 4096, "thread limit"),
        (_VERSION.fullmatch(advert.version) is not None, "version"),
        (0 <= advert.incarnation < 1 << 63, "incarnation"),
        (_is_within(advert.expires_at_s, 0.0, 1e11), "expiry"),
        (coordinates.is_sound(reach.coordinate), "coordinate"),
        (_is_within(reach.uplink_bytes_per_s, 0.0, MAX_BYTES_PER_S), "uplink"),
        (_is_within(reach.downlink_bytes_per_s, 0.0, MAX_BYTES_PER_S), "downlink"),
    )
    for is_fine, what in checks:
        if not is_fine:
            raise BadAdvertError("schema", f"impossible {what}")


def _is_address(text: str) -> bool:
    return len(text) <= 256 and _ADDRESS.fullmatch(text) is not None


def _is_within(value: float, least: float, most: float) -> bool:
    return math.isfinite(value) and least <= value <= most
