"""The types that fields of messages have: each says what a stranger may put there."""

from typing import Annotated, Literal

from pydantic import Field

from swarmnode.domain import Generation

FrameKind = Literal["activation", "activation_gradient", "gradient", "reduced"]
SentKind = Literal[FrameKind, "session", "control", "blob"]
"""What bytes on the wire are counted as."""
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Fence = Annotated[Generation, Field(strict=True, ge=0, lt=1 << 62)]
"""The generation that a message belongs to."""
Losses = Annotated[tuple[float, ...], Field(max_length=4096)]
"""Mean losses of microbatches, in nats per token."""
Hash = Annotated[str, Field(min_length=8, max_length=64, pattern=r"^[0-9a-f]+$")]
MAX_LEASE_BYTES = 480 << 10
"""With it, an Assign still has room for its updates and the plan."""
Proof = Annotated[bytes, Field(max_length=MAX_LEASE_BYTES)]
"""A lease as it goes over the wire: why its sender may coordinate (see swarmnode.p2p.lease)."""
Text = Annotated[str, Field(max_length=4096)]
Seconds = Annotated[float, Field(ge=0, le=60)]
Speed = Annotated[float, Field(gt=0, le=1e12)]
"""Bytes per second."""
