"""Which codecs frames between stages have: the job's own, or on a slow link those of a preset."""

from typing import NamedTuple

from swarmnode.codec_specs import PRESETS, parse_spec, spec_with, wire_share
from swarmnode.domain import PeerId, Plan
from swarmnode.job_codecs import CodecConfig

Link = tuple[PeerId, PeerId]
"""Sender, receiver."""
COARSER_PRESETS = ("lan", "home", "slow")
"""From the finest on; nothing is coded more coarsely than the last."""


class BoundaryCodecs(NamedTuple):
    """What crosses a directed link: hidden states, or on the way back their gradients."""

    activation: str
    activation_gradient: str


class Level(NamedTuple):
    """One of the ways to code what crosses a link; a higher one is coarser."""

    preset: str
    """Empty for the job's own codecs, which are the lowest level."""
    codecs: BoundaryCodecs


def levels_of(codecs: CodecConfig) -> tuple[Level, ...]:
    """The job's own codecs, then each preset that sends less; none is finer in any role.

    Only the own ones where hidden states travel as changes: both ends would lose their history.
    """
    own = BoundaryCodecs(codecs.activation, codecs.activation_gradient)
    levels = [Level("", own)]
    for name in () if codecs.keeps_deltas else COARSER_PRESETS:
        preset = PRESETS[name]
        found = BoundaryCodecs(
            _coarser(own.activation, preset.activation),
            _coarser(own.activation_gradient, preset.activation_gradient),
        )
        if found != levels[-1].codecs:
            levels.append(Level(name, found))
    return tuple(levels)


def _coarser(own: str, other: str) -> str:
    """Whichever sends less; a low rank is kept, as how much it sends depends on the shape."""
    is_less = wire_share(other) < wire_share(own) and not parse_spec(own).rank
    return other if is_less else own


def boundary_codecs(plan: Plan) -> dict[Link, BoundaryCodecs]:
    """By (sender, receiver): the codecs of the links that do not have the job's.

    Raises: ManifestError for codecs that do not exist or keep a memory: a plan comes from a peer.
    """
    found = {}
    for link in plan.links:
        names = (link.activation, link.activation_gradient)
        found[link.source, link.target] = BoundaryCodecs(*(str(spec_with(name)) for name in names))
    return found


def evaluation_codec(codecs: CodecConfig, plan: Plan | None) -> str:
    """What hidden states of held-out samples are coded with, in words: `int8`, and where some
    links are coarser, how many of those that carry hidden states: `int8, int4/32 on 1 of 3 links`.
    """
    own = codecs.evaluation
    if plan is None:
        return own
    pairs = hidden_state_links(plan)
    coarse = [link for link in plan.links if (link.source, link.target) in pairs]
    counts: dict[str, int] = {}
    for link in coarse:
        name = str(parse_spec(link.activation).cold)
        if name != own:
            counts[name] = counts.get(name, 0) + 1
    told = [f"{name} on {count} of {len(pairs)} links" for name, count in sorted(counts.items())]
    return ", ".join([own, *told])


def boundary_links(plan: Plan) -> frozenset[Link]:
    """Every (sender, receiver) of frames between stages, both ways."""
    forward = hidden_state_links(plan)
    return forward | {(receiver, sender) for sender, receiver in forward}


def hidden_state_links(plan: Plan) -> frozenset[Link]:
    """Every (sender, receiver) of hidden states; what stays on one peer is on no link."""
    return frozenset(
        (sender, receiver)
        for row, following in zip(plan.slots, plan.slots[1:], strict=False)
        for sender, receiver in zip(row, following, strict=True)
        if sender != receiver
    )
