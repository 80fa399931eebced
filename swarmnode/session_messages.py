"""The messages of conversations with a model: between a head and the stages that serve it."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from swarmnode.domain import JobId, SlotId
from swarmnode.fields import Count, Fence, Text


class Sampling(NamedTuple):
    """How the last stage picks a token; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_logprobs: int = 0


@dataclass(frozen=True)
class SessionFrame:
    """One piece of a conversation on its way through the stages.

    The payload is int64 token ids for stage 0 and coded hidden states for later stages.
    It holds positions [start, stop); a stage whose cache does not end at `start` refuses.
    """

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    target: SlotId
    start: Count
    stop: Count
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    sampling: Sampling
    max_positions: Count
    """The longest that this session may become."""


@dataclass(frozen=True)
class SessionToken:
    """The last stage's answer to a SessionFrame: the token at position `position`."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    position: Count
    token: Count
    logprob: float
    top: Annotated[tuple[tuple[int, float], ...], Field(max_length=32)] = ()


@dataclass(frozen=True)
class SessionFailed:
    """A stage cannot go on with a session: its cache is gone or there is no room."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    reason: Text


@dataclass(frozen=True)
class SessionClose:
    """The head is done with a session: free its cache, and pass this on to the next stage."""

    job: JobId
    generation: Fence
    session: Annotated[str, Field(min_length=1, max_length=64)]
    target: SlotId
