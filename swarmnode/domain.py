"""The nouns that everybody shares: frozen, plain, without behaviour that needs the world."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, NewType

from pydantic import Field

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58: the hash of the peer's Ed25519 public key."""
JobId = NewType("JobId", str)
"""The first 16 hex digits of the SHA-256 of the job's canonical manifest."""
Generation = NewType("Generation", int)
"""The fencing token: grows with every change of a placement; lower ones are dropped."""
MAX_BLOB_BYTES = 16 << 20
"""Largest blob: a chunk is 1 MiB, an index may be larger."""


class SlotId(NamedTuple):
    """One virtual replica of a stage: the unit of placement and of numerics."""

    stage: int
    slot: int


@dataclass(frozen=True)
class DeviceSpec:
    """What a machine's best device can do, measured on the machine itself."""

    kind: Literal["cpu", "cuda"]
    name: str
    flops: Mapping[str, float]
    """Matrix FLOP/s by dtype name: float32, bfloat16."""
    memory_bytes_per_s: float
    memory_total_bytes: int
    memory_free_bytes: int
    num_cores: int


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, in numbers of weights; what placement needs to know of it."""

    num_layers: int
    layer_weights: int
    """Weights of one decoder layer (the largest)."""
    first_weights: int
    """Weights of the embeddings, held by the first stage."""
    last_weights: int
    """Weights of the final norm and the head, held by the last stage."""
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied: bool


@dataclass(frozen=True)
class Limits:
    """What the volunteer allows."""

    memory_bytes: int
    """Most device memory that jobs may use together."""
    num_threads: int
    """Most CPU threads that one worker child may use."""


class Coordinate(NamedTuple):
    """A place in the network, in seconds of round trip; `p2p.coordinates` does the sums."""

    x_s: float = 0.0
    y_s: float = 0.0
    z_s: float = 0.0
    height_s: float = 0.0
    """What the node's own line adds to every path."""
    error: float = 1.0
    """Relative error of predictions, 0 to 1; 1 if the node does not know where it is."""


@dataclass(frozen=True)
class Reach:
    """How a peer is connected, as it has measured itself; all unknown unless said."""

    coordinate: Coordinate = field(default=Coordinate())
    uplink_bytes_per_s: float = 0.0
    """Over its best link; 0 if unknown."""
    downlink_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Advert:
    """A peer as it describes itself in the directory; signed with the peer's own key."""

    peer: PeerId
    addresses: tuple[str, ...]
    device: DeviceSpec
    limits: Limits
    version: str
    incarnation: int
    """Grows with every start of the daemon, so that a late record of an earlier life loses."""
    expires_at_s: float
    """Wall clock, seconds since 1970; at most the directory's longest lease ahead."""
    reach: Reach = Reach()


class LinkPreset(NamedTuple):
    """A directed link between two peers whose boundary frames are coded more coarsely than the job
    asks for. It names the codecs: two versions may understand a preset differently."""

    source: PeerId
    """Who sends."""
    target: PeerId
    preset: str
    """What it is called; says nothing that the codecs do not."""
    activation: str
    activation_gradient: str


@dataclass(frozen=True)
class BlobRef:
    """Content by its hash. Wherever one is parsed (a message, a manifest, a line of a journal), it
    is refused unless it can name something."""

    sha256: Annotated[str, Field(min_length=64, max_length=64, pattern=r"^[0-9a-f]+$")]
    num_bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_BLOB_BYTES)]


@dataclass(frozen=True)
class Plan:
    """Which peer hosts which slot in one generation, and why."""

    generation: Generation
    layers: tuple[tuple[int, int], ...]
    """Per stage: the half-open range of decoder layers."""
    slots: tuple[tuple[PeerId, ...], ...]
    """slots[stage][slot] is the peer that hosts it."""
    coordinator: PeerId
    addresses: Mapping[PeerId, tuple[str, ...]] = field(default_factory=dict)
    """Where each named peer is reached."""
    reasons: tuple[str, ...] = ()
    predicted_step_s: float = 0.0
    bound_s: float | None = None
    """No placement of these machines has a faster step; None when nobody knows."""
    shadows: tuple[tuple[PeerId, ...], ...] = ()
    """shadows[stage]: peers that hold the stage's state and log without computing for it; none of
    them hosts one of its slots. Shadow k of a stage is addressed as slot num_slots + k."""
    voters: tuple[PeerId, ...] = ()
    """Whose majority begins the next generation, in order of succession, the coordinator first."""
    voters_before: tuple[PeerId, ...] = ()
    """Those of the last plan that began before: without them nobody begins this one or another."""
    links: tuple[LinkPreset, ...] = ()
    """Sorted; on all other links frames are coded as the job asks for."""

    @property
    def num_stages(self) -> int:
        return len(self.slots)

    @property
    def num_slots(self) -> int:
        return len(self.slots[0])

    @property
    def is_whole(self) -> bool:
        """Whether every stage has layers, the same number of slots, at least one, and no peer
        twice as a holder where it is a shadow."""
        widths = {len(row) for row in self.slots}
        if not len(self.layers) == len(self.slots) > 0 or len(widths) != 1 or widths == {0}:
            return False
        return not self.shadows or (
            len(self.shadows) == len(self.slots)
            and all(
                len(set(dark)) == len(dark) and not set(dark) & set(row)
                for row, dark in zip(self.slots, self.shadows, strict=True)
            )
        )

    def holders(self, stage: int) -> tuple[PeerId, ...]:
        """By slot number: who hosts the stage's slots, then who shadows it."""
        return self.slots[stage] + (self.shadows[stage] if self.shadows else ())

    @property
    def is_thin(self) -> bool:
        """Whether a single machine holds some stage."""
        return any(len(set(self.holders(stage))) < 2 for stage in range(self.num_stages))

    def computes(self, slot: SlotId) -> bool:
        """Whether `slot` is one that computes, and not a shadow or nothing at all."""
        return 0 <= slot.stage < self.num_stages and 0 <= slot.slot < self.num_slots

    def __contains__(self, slot: SlotId) -> bool:
        """Whether `slot` is a slot or a shadow of this plan."""
        in_grid = 0 <= slot.stage < self.num_stages and slot.slot >= 0
        return in_grid and slot.slot < len(self.holders(slot.stage))

    def host(self, slot: SlotId) -> PeerId:
        """The peer that hosts `slot` (or is that shadow), which must be in the plan."""
        assert slot in self
        return self.holders(slot.stage)[slot.slot]

    def held_by(self, peer: PeerId) -> tuple[SlotId, ...]:
        """The slots and shadows of `peer`, by stage, then by slot."""
        return tuple(
            SlotId(stage, number)
            for stage in range(self.num_stages)
            for number, holder in enumerate(self.holders(stage))
            if holder == peer
        )

    def hosted_by(self, peer: PeerId) -> tuple[SlotId, ...]:
        """The slots for which `peer` computes, by stage, then by slot."""
        return tuple(slot for slot in self.held_by(peer) if self.computes(slot))

    def stages_of(self, peer: PeerId) -> tuple[int, ...]:
        """The stages whose state `peer` holds, sorted."""
        return tuple(sorted({slot.stage for slot in self.held_by(peer)}))

    def workers(self) -> tuple[PeerId, ...]:
        """Every peer that hosts a slot or is a shadow, sorted, once."""
        stages = range(self.num_stages)
        return tuple(sorted({peer for stage in stages for peer in self.holders(stage)}))

    def names(self, peer: PeerId) -> bool:
        """Whether `peer` has any business with this job."""
        return peer == self.coordinator or peer in self.workers()
