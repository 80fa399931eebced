"""Codecs for kinds of links, by name: plain data.

A codec that loses more than half of the energy in one step needs error feedback, which none of
these asks for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """The codec specs of one kind of link."""

    activation: str
    """Hidden states, forward."""
    activation_gradient: str
    """Their gradients, backward."""
    gradient: str
    """Parameter gradients."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "home": Preset("int8", "int8", "int8"),
        "slow": Preset("int4/32", "int8", "int8"),
        "lan": Preset("bf16", "bf16", "bf16"),
        "fidelity": Preset("none", "none", "none"),
    }
)
"""home: lines of tens of megabits and more. slow: below that; coarser forward only, because
gradients bear less. lan: fast networks. fidelity: nothing is lost, to compare others with."""
