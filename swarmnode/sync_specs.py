"""How the slots of one stage stay together: when, what, to whom, coded how. Only arithmetic.

A text is a preset and what differs from it, or all that differs from plain averaging:

    sparseloco    sparseloco,every=15,codec=topk32of4096/int2    sends=difference,every=100

Sources. allreduce, bytegrad, qadam, decentralised, lowprecision: Bagua (arXiv 2107.01499);
cocktail: CocktailSGD (ICML 2023), as its code does it: model differences, one step late;
diloco: arXiv 2311.08105; streaming: Streaming DiLoCo (arXiv 2501.18512); sparseloco:
SparseLoCo (arXiv 2508.15706); co2: CO2 (arXiv 2401.16265), without its penalty on the staleness
gap; powersgd: PowerSGD (arXiv 1905.13727), with a fixed start and both factors in one message.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from swarmnode.codec_specs import SMALL_ELEMENTS, CodecSpec, for_size, stateless_spec
from swarmnode.errors import ManifestError

Sends = Literal["gradient", "momentum", "difference", "weights"]
Topology = Literal["owners", "everyone", "neighbours"]
SyncMemory = Literal["none", "feedback", "weights", "mirror"]
MAX_EVERY = 100_000
MAX_FRAGMENTS = 1000
MAX_TEXT_CHARS = 300

_OUTER = re.compile(
    r"(?P<kind>sgd|momentum|nesterov)(?P<rate>[0-9.]+(e-?[0-9]+)?)"
    r"(?:/(?P<momentum>[0-9.]+(e-?[0-9]+)?))?(?:/clip(?P<clip>[0-9.]+(e-?[0-9]+)?))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Outer:
    """What is done with the mean: anchor <- anchor - rate * (mean, or its momentum)."""

    rate: float = 1.0
    momentum: float = 0.0
    is_nesterov: bool = False
    clip: float = 0.0
    """Largest norm of the momentum, relative to that of the mean; 0 for any."""

    def __post_init__(self) -> None:
        if not (0 < self.rate <= 10 and 0 <= self.momentum < 1 and 0 <= self.clip <= 1000):
            raise ManifestError(f"outer step {self}: rate in (0, 10], momentum in [0, 1)")

    def __str__(self) -> str:
        kind = "nesterov" if self.is_nesterov else "momentum" if self.momentum else "sgd"
        text = kind + _digits(self.rate) + (f"/{_digits(self.momentum)}" if self.momentum else "")
        return text + (f"/clip{_digits(self.clip)}" if self.clip else "")


@dataclass(frozen=True)
class Sync:
    """One way to stay together. `str` gives the text that `parse_sync` reads."""

    sends: Sends = "gradient"
    """A gradient; Adam's momentum of it; by how far the parameters went since the anchor, which
    is common to all (a pseudo-gradient); or the parameters, to neighbours."""
    every: int = 1
    """H: local steps from one exchange to the next, of the same fragment."""
    staleness: int = 0
    """1: what an exchange brings is applied when the next one begins, so it may take that long."""
    topology: Topology = "owners"
    """owners: each slot sums one shard and sends the mean back; everyone: each sends to all, who
    sum alike; neighbours: a ring, nothing is common."""
    codec: str = "bf16"
    """Of what a slot sends: a spec without a memory. Under 4096 values: bf16 if it is coarser."""
    reply: str = ""
    """Of the owners' means; the same unless given."""
    memory: SyncMemory = "none"
    """Where what coding loses stays: feedback, in a vector of its own, at the slots and at the
    owners; weights, in the slot's own parameters, and in a vector at the owners; mirror, nowhere:
    changes are sent, of what the neighbours have."""
    decay: float = 1.0
    """Of the feedback at the slots, for every exchange."""
    outer: Outer = Outer()
    """Of differences."""
    fragments: int = 1
    """Parts of the parameters that are exchanged in turn, each every H steps."""
    blend: float = 0.0
    """Share of its own parameters that a slot keeps where a late result arrives."""
    warmup: int = 0
    """First exchanges, in full: bf16 gradients."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ManifestError(f"sync {str(self)!r:.120}: {problem}")

    def _problem(self) -> str:
        # Long because it is a list of what does not go together.
        sent, answered = stateless_spec(self.codec), stateless_spec(self.reply or "none")
        is_model = self.sends in ("difference", "weights")
        is_lossy_sum = not (sent.is_dense and answered.is_dense)
        checks = {
            f"sends is one of {get_args(Sends)}": self.sends in get_args(Sends),
            f"topology is one of {get_args(Topology)}": self.topology in get_args(Topology),
            f"memory is one of {get_args(SyncMemory)}": self.memory in get_args(SyncMemory),
            f"every is 1 .. {MAX_EVERY}": 1 <= self.every <= MAX_EVERY,
            "staleness is 0 or 1": self.staleness in (0, 1),
            "fragments divide every": 1 <= self.fragments <= MAX_FRAGMENTS
            and not self.every % self.fragments,
            "decay is in [0, 1], and 1 without feedback": 0 <= self.decay <= 1
            and (self.decay == 1 or self.memory == "feedback"),
            "gradients and momenta go every step": is_model or self.every == 1,
            "weights go to neighbours, and nothing else does": (self.sends == "weights")
            == (self.topology == "neighbours"),
            "only neighbours have a mirror": self.memory != "mirror" or self.sends == "weights",
            "neighbours mix at once, all of it": self.sends != "weights"
            or (self.staleness == 0 and self.fragments == 1),
            "weights are coded densely, with a mirror or without a memory": self.sends != "weights"
            or (sent.is_dense and self.memory in ("none", "mirror")),
            "only differences can stay in the weights": self.memory != "weights"
            or self.sends == "difference",
            "a sparse or low-rank codec needs a memory": self.memory != "none" or not is_lossy_sum,
            "only owners reply": not self.reply or self.topology == "owners",
            "only differences have an outer step": self.sends == "difference"
            or self.outer == Outer(),
            "blend is in [0, 1), for late fragments": self.blend == 0
            or (0 < self.blend < 1 and self.staleness == 1 and self.fragments > 1),
            "a warm-up is of gradients or momenta": self.warmup == 0
            or (self.warmup > 0 and not is_model),
        }
        return next((text for text, holds in checks.items() if not holds), "")

    def __str__(self) -> str:
        default = Sync.__dataclass_fields__
        parts = [
            f"{each.name}={_text(getattr(self, each.name))}"
            for each in fields(self)
            if getattr(self, each.name) != default[each.name].default
        ]
        return ",".join(parts) or "sends=gradient"

    @property
    def gap(self) -> int:
        """Steps from one exchange to the next, of whichever fragment."""
        return self.every // self.fragments

    def codec_for(self, exchange: int, *, is_small: bool, is_reply: bool = False) -> CodecSpec:
        """Of small tensors or of large ones, in this exchange."""
        if exchange < self.warmup:
            return CodecSpec("bf16")
        name = (self.reply if is_reply else "") or self.codec
        return for_size(stateless_spec(name), 0 if is_small else SMALL_ELEMENTS)


def parse_sync(text: str) -> Sync:
    """The sync that `text` names. Raises: ManifestError with what is wrong."""
    if not 0 < len(text) <= MAX_TEXT_CHARS:
        raise ManifestError(f"a sync has 1 .. {MAX_TEXT_CHARS} characters: {text!r:.60}")
    sync, parts = Sync(), text.split(",")
    if "=" not in parts[0]:
        name = parts.pop(0)
        if name not in SYNC_PRESETS:
            raise ManifestError(f"unknown sync {name!r:.60}; use one of: {', '.join(SYNC_PRESETS)}")
        sync = SYNC_PRESETS[name]
    changes: dict[str, Any] = dict(_field(part) for part in parts)
    return replace(sync, **changes)


_TYPES = {each.name: each.type for each in fields(Sync)}


def _text(value: object) -> str:
    return _digits(value) if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    """All digits that tell it from any other number, and no more."""
    return repr(value).removesuffix(".0")


def _field(part: str) -> tuple[str, object]:
    name, found, value = part.partition("=")
    if not found or name not in _TYPES:
        raise ManifestError(f"a sync has no {name!r:.60}; it has {', '.join(_TYPES)}")
    kind = _TYPES[name]
    try:
        if kind is int:
            return name, int(value)
        if kind is float:
            return name, float(value)
    except ValueError as error:
        raise ManifestError(f"{name} is a number, not {value!r:.40}") from error
    return name, _outer(value) if name == "outer" else value


def _outer(text: str) -> Outer:
    part = _OUTER.fullmatch(text)
    try:
        assert part is not None
        outer = Outer(
            float(part["rate"]),
            float(part["momentum"] or 0),
            part["kind"] == "nesterov",
            float(part["clip"] or 0),
        )
        assert (part["kind"] == "sgd") == (outer.momentum == 0)
    except (AssertionError, ValueError):
        raise ManifestError(
            f"unknown outer step {text!r:.60}; use sgdRATE, momentumRATE/M or nesterovRATE/M, "
            "and /clipC"
        ) from None
    return outer


SYNC_PRESETS: Mapping[str, Sync] = MappingProxyType(
    {
        "allreduce": Sync(),
        "bytegrad": Sync(codec="int8"),
        "qadam": Sync(sends="momentum", codec="int8", warmup=100),
        "powersgd": Sync(codec="powersgd/r8", memory="feedback", warmup=100),
        "decentralised": Sync(sends="weights", topology="neighbours", codec="none"),
        "lowprecision": Sync(sends="weights", topology="neighbours", codec="int8", memory="mirror"),
        "cocktail": Sync(
            sends="difference", staleness=1, codec="cocktail/p0.1/k0.2/int4", memory="weights"
        ),
        "diloco": Sync(
            sends="difference", every=30, codec="none", outer=Outer(0.7, 0.9, is_nesterov=True)
        ),
        "streaming": Sync(
            sends="difference",
            every=30,
            staleness=1,
            codec="int4/32",
            outer=Outer(0.7, 0.9, is_nesterov=True),
            fragments=3,
            blend=0.5,
        ),
        "sparseloco": Sync(
            sends="difference",
            every=30,
            topology="everyone",
            codec="topk64of4096/int2",
            memory="feedback",
            decay=0.95,
        ),
        "co2": Sync(sends="difference", every=30, staleness=1, outer=Outer(1.0, 0.2, clip=1.0)),
    }
)
"""Numbers are the papers' where they give them for such a case; none is tuned for a model."""
