"""The codecs of what crosses from stage to stage, as both ends read them off the plan."""

from collections.abc import Mapping
from typing import Literal

from swarmnode.boundary_codecs import BoundaryCodecs, Link, boundary_codecs
from swarmnode.codec_specs import parse_spec
from swarmnode.compression.codec import Codec, codec_of, get_codec
from swarmnode.domain import Plan, SlotId
from swarmnode.errors import ManifestError
from swarmnode.job_codecs import CodecConfig
from swarmnode.worker.training.expected import Boundary

BoundaryRole = Literal[Boundary, "held_out"]
_ByRole = Mapping[BoundaryRole, Codec]


class Boundaries:
    """The codec of each frame of one generation: its link's, or the job's."""

    def __init__(self, codecs: CodecConfig, plan: Plan) -> None:
        """Raises: ManifestError for a codec that does not exist or cannot be used here."""
        if plan.links and codecs.keeps_deltas:
            raise ManifestError("hidden states travel as changes: no link has codecs of its own")
        self._plan = plan
        self._own = _by_role(BoundaryCodecs(codecs.activation, codecs.activation_gradient))
        self._by_link: dict[Link, _ByRole] = {
            link: _by_role(found) for link, found in boundary_codecs(plan).items()
        }

    def codec(self, role: BoundaryRole, source: SlotId, target: SlotId) -> Codec:
        """Of the change, where hidden states travel as changes. Both slots must be in the plan."""
        sender, receiver = self._plan.host(source), self._plan.host(target)
        if sender == receiver:
            return self._own[role]
        return self._by_link.get((sender, receiver), self._own)[role]


def _by_role(codecs: BoundaryCodecs) -> _ByRole:
    activation = parse_spec(codecs.activation)
    return {
        "activation": codec_of(activation),
        "activation_gradient": get_codec(codecs.activation_gradient),
        "held_out": codec_of(activation.cold),
    }
