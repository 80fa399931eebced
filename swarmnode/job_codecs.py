"""Which codecs a job asks for, and what every part of a job description has in common."""

from dataclasses import asdict
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

from swarmnode.codec_specs import PRESETS, Memory, parse_spec, spec_with
from swarmnode.errors import ManifestError

DELTA_CACHE_BYTES = 1 << 30
FOLLOWING_PRESETS = ("lan", "home")
"""Those of which a slow link may take a coarser one: `fidelity` is to lose nothing at all."""


class Section(BaseModel):
    """A closed, frozen part of a job description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def _codec_name(*memories: Memory) -> AfterValidator:
    """The one name of the codec, so that the same job has the same id."""

    def name(text: str) -> str:
        try:
            return str(spec_with(text, *memories))
        except ManifestError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(name)


ActivationCodecName = Annotated[str, _codec_name("delta")]
ActivationGradientCodecName = Annotated[str, _codec_name()]
GradientCodecName = Annotated[str, _codec_name("feedback")]


class CodecConfig(Section):
    """How tensors are coded on the wire: names as in docs/compression.md."""

    preset: Literal["home", "slow", "lan", "fidelity"] | None = Field(default=None, exclude=True)
    """Names the codecs that are not named here, for a kind of link; see compression.md."""
    activation: ActivationCodecName = "int8"
    """Codec of hidden states, from stage to stage; may begin with aq/; compression.md names all."""
    activation_gradient: ActivationGradientCodecName = "int8"
    """Codec of their gradients, back from stage to stage."""
    gradient: GradientCodecName = "none"
    """Codec of parameter gradients, among the slots of a stage; may end in +ef."""
    delta_cache_bytes: int = Field(default=DELTA_CACHE_BYTES, ge=0, le=1 << 50)
    """With aq/: memory for hidden states, at each end of each boundary of each slot."""
    follow_links: bool = False
    """Whether links too slow for these codecs go over to coarser ones; by default with a preset."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that older versions do not know is there only where it says something."""
        found: dict[str, Any] = serialize(self)
        if self.delta_cache_bytes == DELTA_CACHE_BYTES:
            found.pop("delta_cache_bytes", None)
        if not self.follow_links:
            found.pop("follow_links", None)
        return found

    @property
    def by_role(self) -> dict[str, str]:
        return {
            "activation": self.activation,
            "activation_gradient": self.activation_gradient,
            "gradient": self.gradient,
        }

    @property
    def keeps_deltas(self) -> bool:
        """Whether hidden states travel as changes since their sample's last visit."""
        return parse_spec(self.activation).memory == "delta"

    @property
    def keeps_residuals(self) -> bool:
        """Whether what coding loses of parameter gradients is owed."""
        return parse_spec(self.gradient).memory == "feedback"

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
        return {"follow_links": follows, **asdict(PRESETS[name]), **named}

    @model_validator(mode="after")
    def _can_follow(self) -> Self:
        if self.follow_links and self.keeps_deltas:
            raise ValueError("aq/ does not go with codecs.follow_links; leave one of them out")
        return self
