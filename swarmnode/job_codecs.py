"""Which codecs a job asks for, and what every part of a job description has in common."""

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from swarmnode.codec_specs import PRESETS, Memory, parse_spec, spec_with, stateless_spec
from swarmnode.errors import ManifestError
from swarmnode.sync_specs import Sync, parse_sync

DELTA_CACHE_BYTES = 1 << 30
FOLLOWING_PRESETS = ("lan", "home")
"""Those of which a slow link may take a coarser one: `fidelity` is to lose nothing at all."""
_NEEDS_MATRICES = (
    "codes matrices, and training cuts a stage's gradients into flat shards, which it would send "
    "as bf16; use another, as topk64of4096/int4"
)


class Section(BaseModel):
    """A closed, frozen part of a job description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _codec_name(*memories: Memory, is_flat: bool = False) -> AfterValidator:
    """The one name of the codec, so that the same job has the same id.

    `is_flat`: of vectors. Codecs of matrices are refused: they would do nothing there.
    """

    def name(text: str) -> str:
        try:
            spec = spec_with(text, *memories)
        except ManifestError as error:
            raise ValueError(str(error)) from None
        if is_flat and spec.rank:
            raise ValueError(f"{text!r} {_NEEDS_MATRICES}")
        return str(spec)

    return AfterValidator(name)


ActivationCodecName = Annotated[str, _codec_name("delta")]
ActivationGradientCodecName = Annotated[str, _codec_name()]
GradientCodecName = Annotated[str, _codec_name("feedback", is_flat=True)]


def _sync_name(text: str | None) -> str | None:
    """The one text of a sync that training can run. Raises: ValueError with what it cannot."""
    if text is None:
        return None
    try:
        sync = parse_sync(text)
    except ManifestError as error:
        raise ValueError(str(error)) from None
    refusals = {
        f"it sends {sync.sends}, training exchanges differences; for gradients of every step "
        "use codecs.gradient": sync.sends != "difference",
        "results that come late (staleness = 1) are in no training step yet": sync.staleness > 0,
        "fragments are in no training step yet; leave them at 1": sync.fragments > 1,
        "weights that differ from slot to slot (memory = weights) do not outlast a step; use "
        "feedback": sync.memory == "weights",
        "the reply has the codec of what is sent; leave it out": sync.reply not in ("", sync.codec),
        "an outer step is not clipped here; leave /clip out": sync.outer.clip > 0,
        f"its codec {_NEEDS_MATRICES}": stateless_spec(sync.codec).rank > 0,
    }
    for refusal, holds in refusals.items():
        if holds:
            raise ValueError(f"{text!r:.60}: {refusal}")
    codec = str(stateless_spec(sync.codec))
    return str(replace(sync, codec=codec, reply=""))


SyncName = Annotated[str | None, AfterValidator(_sync_name)]


class CodecConfig(Section):
    """How tensors are coded on the wire: names as in docs/compression.md."""

    preset: Literal["home", "slow", "lan", "fidelity"] | None = Field(default=None, exclude=True)
    """Names the codecs that are not named here, for a kind of link; see compression.md."""
    activation: ActivationCodecName = "int8"
    """Codec of hidden states, from stage to stage; may begin with aq/; compression.md names all."""
    activation_gradient: ActivationGradientCodecName = "int8"
    """Codec of their gradients, back from stage to stage."""
    gradient: GradientCodecName = "none"
    """Codec of parameter gradients, among the slots of a stage; may end in +ef; no powersgd."""
    sync: SyncName = None
    """Instead of gradients: local steps, then one exchange; as diloco,every=30; compression.md."""
    delta_cache_bytes: int = Field(default=DELTA_CACHE_BYTES, ge=0, le=1 << 50)
    """With aq/: memory for hidden states, at each end of each boundary of each slot."""
    delta_cache_on_disk: bool = False
    """With aq/: that memory is a file in the job's folder on each node, reserved at once."""
    follow_links: bool = False
    """Whether links too slow for these codecs go over to coarser ones; by default with a preset."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that older versions do not know is there only where it says something."""
        found: dict[str, Any] = serialize(self)
        if self.delta_cache_bytes == DELTA_CACHE_BYTES:
            found.pop("delta_cache_bytes", None)
        if not self.delta_cache_on_disk:
            found.pop("delta_cache_on_disk", None)
        if not self.follow_links:
            found.pop("follow_links", None)
        if self.sync is None:
            found.pop("sync", None)
        return found

    @property
    def by_role(self) -> dict[str, str]:
        shared = ("gradient", self.gradient) if self.sync is None else ("sync", self.sync)
        return {
            "activation": self.activation,
            "activation_gradient": self.activation_gradient,
            **dict([shared]),
        }

    @property
    def local(self) -> Sync | None:
        """How slots train on their own for some steps, where they do."""
        return None if self.sync is None else parse_sync(self.sync)

    @property
    def num_local_steps(self) -> int:
        """Steps of a slot's own in one committed step, H."""
        return 1 if self.local is None else self.local.every

    @property
    def share(self) -> str:
        """What a slot's part of a sum is coded with: of a gradient, or of a difference."""
        sync = self.local
        if sync is None:
            return self.gradient
        return sync.codec + ("+ef" if sync.memory == "feedback" else "")

    @property
    def gathers(self) -> bool:
        """Whether a slot's part goes to everybody, who sum alike; else to who owns a shard."""
        return self.local is not None and self.local.topology == "everyone"

    @property
    def keeps_deltas(self) -> bool:
        """Whether hidden states travel as changes since their sample's last visit."""
        return parse_spec(self.activation).memory == "delta"

    @property
    def keeps_residuals(self) -> bool:
        """Whether what coding loses of gradients or differences is owed."""
        return parse_spec(self.share).memory == "feedback"

    @property
    def evaluation(self) -> str:
        """What hidden states of held-out samples are coded with."""
        return str(parse_spec(self.activation).cold)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, raw: Any) -> Any:
        """Only what it stands for stays: the same codecs are the same job."""
        name = raw.get("preset") if isinstance(raw, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return raw
        named = {key: raw[key] for key in raw if key != "preset"}
        can_follow = not str(named.get("activation", "")).startswith("aq/")
        follows = name in FOLLOWING_PRESETS and can_follow
        preset = asdict(PRESETS[name])
        if raw.get("sync") is not None:
            del preset["gradient"]
        return {"follow_links": follows, **preset, **named}

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.follow_links and self.keeps_deltas:
            raise ValueError("aq/ does not go with codecs.follow_links; leave one of them out")
        if self.sync is not None and self.gradient != "none":
            raise ValueError("sync says what slots send each other; leave gradient out")
        if self.sync is not None and self.keeps_deltas:
            raise ValueError("sync and aq/ do not go together; take aq/ out of activation")
        return self
