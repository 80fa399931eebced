"""What coding tensors came to: bytes before and after, seconds, and what was lost."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from swarmnode.fields import Count, FrameKind

MAX_CODINGS = 32
"""Four kinds of tensors, each with a few codecs: small ones and held out samples have others."""


@dataclass(frozen=True)
class Coding:
    """Tensors of one kind and one codec, so far."""

    kind: FrameKind
    codec: Annotated[str, Field(max_length=64)]
    raw_bytes: Count
    """As float32."""
    coded_bytes: Count
    """Also of what stayed on the node that coded it."""
    seconds: Annotated[float, Field(ge=0)]
    """Spent on coding and decoding."""
    seen_energy: Annotated[float, Field(ge=0)]
    """Squared norm of the tensors whose errors were measured: a sample of all."""
    lost_energy: Annotated[float, Field(ge=0)]
    """Squared norm of those errors."""

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than float32."""
        return self.raw_bytes / self.coded_bytes if self.coded_bytes else 1.0

    @property
    def error(self) -> float | None:
        """Norm of the errors over norm of the tensors; with a memory, what is owed counts."""
        return (self.lost_energy / self.seen_energy) ** 0.5 if self.seen_energy else None


def total(codings: Iterable[Coding]) -> tuple[Coding, ...]:
    """One for each kind and codec, sorted."""
    sums: dict[tuple[FrameKind, str], Coding] = {}
    for each in codings:
        key = (each.kind, each.codec)
        at = sums.get(key)
        sums[key] = each if at is None else _plus(at, each)
    return tuple(sums[key] for key in sorted(sums))


def _plus(one: Coding, other: Coding) -> Coding:
    return Coding(
        one.kind,
        one.codec,
        one.raw_bytes + other.raw_bytes,
        one.coded_bytes + other.coded_bytes,
        one.seconds + other.seconds,
        one.seen_energy + other.seen_energy,
        one.lost_energy + other.lost_energy,
    )
