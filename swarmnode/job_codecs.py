"""Which codecs a job asks for, and what every part of a job description has in common."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from swarmnode.codec_specs import PRESETS, Memory, parse_spec, spec_with
from swarmnode.errors import ManifestError


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


BoundaryCodecName = Annotated[str, _codec_name()]
GradientCodecName = Annotated[str, _codec_name("feedback")]


class CodecConfig(Section):
    """How tensors are coded on the wire: names as in docs/compression.md."""

    preset: Literal["home", "slow", "lan", "fidelity"] | None = Field(default=None, exclude=True)
    """Names the codecs that are not named here, for a kind of link; see compression.md."""
    activation: BoundaryCodecName = "int8"
    """Codec of hidden states, from stage to stage; compression.md names them."""
    activation_gradient: BoundaryCodecName = "int8"
    """Codec of their gradients, back from stage to stage."""
    gradient: GradientCodecName = "none"
    """Codec of parameter gradients, among the slots of a stage; may end in +ef."""

    @property
    def by_role(self) -> dict[str, str]:
        return {
            "activation": self.activation,
            "activation_gradient": self.activation_gradient,
            "gradient": self.gradient,
        }

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
        return {**asdict(PRESETS[name]), **{key: raw[key] for key in raw if key != "preset"}}
