"""Names of codecs: what a manifest may ask for, and what each costs on the wire. Only arithmetic.

A spec is a pipeline, `memory -> transform -> select -> code`, and its text reads like one:

    none, bf16                      every value as it is; as a bfloat16
    int8, intB/G                    blocks of G values (16 .. 1024, a power of two), B bits each
                                    (2 .. 8); int8 is int8/128
    intB/G+hadamard                 the same, rotated block by block where that helps
    topkKofC/CODE                   the K largest of every C values, and where they are
    strideP/CODE                    every (1/P)-th value, a moving offset
    cocktail/pP/kK/CODE             stride P, then the largest share K of those
    powersgd/rR                     a matrix as two factors of rank R
    SPEC+ef, aq/SPEC                with error feedback; as a change of what the peer has

CODE is none, bf16 or intB[/G], in blocks of 128 unless it says otherwise.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from swarmnode.errors import ManifestError

Memory = Literal["none", "feedback", "delta"]
DEFAULT_BLOCK = 128
MAX_CHUNK = 1 << 16
MAX_RANK = 1024
MAX_PERIOD = 1000
MAX_SPEC_CHARS = 48
SMALL_ELEMENTS = 4096
"""A tensor with fewer values is not worth more than a bfloat16's loss."""
FORMS = (
    "none, bf16, int8, intB/G, intB/G+hadamard, topkKofC/CODE, strideP/CODE, "
    "cocktail/pP/kK/CODE, powersgd/rR (B 2..8, G 16..1024, CODE none, bf16 or intB)"
)
SHARE_ELEMENTS = 1 << 20
DELTA_VALUE_BYTES = 2
"""Of a value in a delta cache: bfloat16."""

_SPEC = re.compile(
    r"""(?P<aq>aq/)?
    (?:stride(?P<stride>0\.[0-9]+)/
      |topk(?P<count>[1-9][0-9]*)of(?P<chunk>[1-9][0-9]*)/
      |cocktail/p(?P<part>0\.[0-9]+)/k(?P<share>0\.[0-9]+)/)?
    (?:(?P<plain>none|bf16)
      |int(?P<bits>[2-8])(?:/(?P<block>16|32|64|128|256|512|1024))?
      |powersgd/r(?P<rank>[1-9][0-9]*))
    (?P<rotated>\+hadamard)?(?P<ef>\+ef)?""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class IntCode:
    """Blocks of values on a grid of 2^bits levels, with one bfloat16 scale each."""

    bits: int
    block: int = DEFAULT_BLOCK

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.block == DEFAULT_BLOCK else f"/{self.block}")

    def wire_bytes(self, num_values: int) -> int:
        return 2 * -(-num_values // self.block) + -(-num_values * self.bits // 8)


Code = Literal["none", "bf16"] | IntCode


@dataclass(frozen=True)
class TopChunk:
    """The `count` largest of every `chunk` values; positions as packed integers."""

    count: int
    chunk: int

    def __str__(self) -> str:
        return f"topk{self.count}of{self.chunk}"

    @property
    def index_bits(self) -> int:
        return (self.chunk - 1).bit_length()

    def num_kept(self, num_values: int) -> int:
        """A short last chunk keeps the same share, rounded up."""
        whole, rest = divmod(num_values, self.chunk)
        return whole * self.count + -(-rest * self.count // self.chunk)

    def index_bytes(self, num_values: int) -> int:
        return -(-self.num_kept(num_values) * self.index_bits // 8)


@dataclass(frozen=True)
class TopShare:
    """The largest `share` of all values, rounded up; positions as a bitmap."""

    share: Fraction

    def __str__(self) -> str:
        return f"k{float(self.share):g}"

    def num_kept(self, num_values: int) -> int:
        return math.ceil(self.share * num_values)

    def index_bytes(self, num_values: int) -> int:
        return -(-num_values // 8)


@dataclass(frozen=True)
class CodecSpec:
    """A parsed name. `str` gives the one text that names it."""

    code: Code
    memory: Memory = "none"
    is_rotated: bool = False
    period: int = 1
    """Of the stride; 1 takes every value."""
    top: TopChunk | TopShare | None = None
    rank: int = 0
    """Of the factors; 0 for none."""

    def __str__(self) -> str:
        text = str(self.code)
        if self.rank:
            text = f"powersgd/r{self.rank}"
        elif isinstance(self.top, TopShare):
            text = f"cocktail/p{1 / self.period:g}/{self.top}/{text}"
        elif self.top is not None:
            text = f"{self.top}/{text}"
        elif self.period > 1:
            text = f"stride{1 / self.period:g}/{text}"
        elif isinstance(self.code, IntCode) and self.code != IntCode(8):
            text = f"int{self.code.bits}/{self.code.block}"
        text += "+hadamard" if self.is_rotated else ""
        return {"none": text, "feedback": f"{text}+ef", "delta": f"aq/{text}"}[self.memory]

    @property
    def stateless(self) -> "CodecSpec":
        """The codec inside of the memory."""
        return replace(self, memory="none")

    @property
    def cold(self) -> "CodecSpec":
        """How a tensor travels that the peer has never had before, as in an evaluation."""
        return CodecSpec("bf16") if self.memory == "delta" else self.stateless

    @property
    def is_dense(self) -> bool:
        """Whether every value of a tensor is coded."""
        return self.period == 1 and self.top is None and not self.rank

    def factor_values(self, shape: Sequence[int]) -> int:
        """Values in both factors of such a tensor; 0 where they would not make it smaller."""
        if not self.rank or len(shape) < 2:
            return 0
        num_values = self.rank * (math.prod(shape[:-1]) + shape[-1])
        return num_values if num_values < math.prod(shape) else 0

    def wire_bytes(self, shape: Sequence[int], item_bytes: int) -> int:
        """Exact bytes of a coded tensor whose values have `item_bytes` each."""
        num_values = self.factor_values(shape) or math.prod(shape)
        num_values = -(-num_values // self.period)
        index_bytes = 0
        if self.top is not None:
            index_bytes = self.top.index_bytes(num_values)
            num_values = self.top.num_kept(num_values)
        if isinstance(self.code, IntCode):
            return index_bytes + self.code.wire_bytes(num_values)
        return index_bytes + num_values * (2 if self.code == "bf16" else item_bytes)


def parse_spec(text: str) -> CodecSpec:
    """The spec that `text` names. Raises: ManifestError with the forms that there are."""
    found = _SPEC.fullmatch(text) if len(text) <= MAX_SPEC_CHARS else None
    spec = _assemble(found.groupdict()) if found else None
    if spec is None:
        raise ManifestError(f"unknown codec {text!r:.60}; use one of: {FORMS}")
    return spec


def _assemble(part: dict[str, str | None]) -> CodecSpec | None:
    """The spec of the parts of a text; None where they do not go together."""
    top: TopChunk | TopShare | None = None
    if part["chunk"] and part["count"]:
        top = TopChunk(int(part["count"]), int(part["chunk"]))
        if not top.count <= top.chunk <= MAX_CHUNK or top.chunk < 2:
            return None
    if part["share"]:
        top = TopShare(Fraction(part["share"]))
        if not top.share or str(top) != f"k{part['share']}":
            return None
    period = _period(part["stride"] or part["part"])
    rank = int(part["rank"] or 0)
    is_dense = top is None and period == 1 and not rank
    is_rotated = part["rotated"] is not None
    code: Code = "none" if part["plain"] == "none" else "bf16"
    if part["bits"]:
        if is_dense and part["bits"] != "8" and not part["block"]:
            return None  # as the only stage, a block is a choice to be made
        code = IntCode(int(part["bits"]), int(part["block"] or DEFAULT_BLOCK))
    sparse = bool(part["stride"] or part["part"] or part["chunk"])
    if (
        not period
        or rank > MAX_RANK
        or (rank and sparse)
        or (is_rotated and not (is_dense and part["bits"]))
        or (part["aq"] and (part["ef"] or not is_dense))
    ):
        return None
    memory: Memory = "delta" if part["aq"] else "feedback" if part["ef"] else "none"
    return CodecSpec(code, memory, is_rotated, period, top, rank)


def _period(text: str | None) -> int:
    """1 where there is no stride; 0 for a share that is not one over a whole number."""
    if text is None:
        return 1
    share = float(text)
    period = round(1 / share) if share else 0
    return period if 2 <= period <= MAX_PERIOD and f"{1 / period:g}" == text else 0


def spec_with(text: str, *memories: Memory) -> CodecSpec:
    """The spec that `text` names, of a codec with no memory, or with one of `memories`.

    Raises: ManifestError if there is no such codec, or if it needs another memory.
    """
    spec = parse_spec(text)
    if spec.memory not in ("none", *memories):
        raise ManifestError(
            f"codec {text!r} keeps a memory, which cannot be asked for here; "
            f"use {str(spec.stateless)!r}"
        )
    return spec


def stateless_spec(text: str) -> CodecSpec:
    """The spec that `text` names, of a codec without a memory. Raises: ManifestError."""
    return spec_with(text)


def wire_share(text: str, shape: Sequence[int] = (SHARE_ELEMENTS,)) -> float:
    """Coded bytes over float32 bytes, for a tensor of `shape`; a long vector unless given.

    With a delta: those of a change, not of a first visit.
    """
    return parse_spec(text).stateless.wire_bytes(shape, 4) / (4 * math.prod(shape))


def for_size(spec: CodecSpec, num_values: int) -> CodecSpec:
    """The policy for small tensors: under 4096 values, bf16 for all that loses more than int8.

    Norms and biases are a small share of the bytes and a large one of the damage. It is the
    caller's to apply, on both ends: no codec does this by itself.
    """
    is_mild = spec.is_dense and (not isinstance(spec.code, IntCode) or spec.code.bits == 8)
    if is_mild or num_values >= SMALL_ELEMENTS:
        return spec
    return CodecSpec("bf16", memory=spec.memory)


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
        "slow": Preset("int4/32", "int4/32+hadamard", "int4/32"),
        "lan": Preset("bf16", "bf16", "bf16"),
        "fidelity": Preset("none", "none", "none"),
    }
)
"""home: lines of tens of megabits and more. slow: below that; backward too, where a rotation
costs no bytes. lan: fast networks. fidelity: nothing is lost, to compare others with.
None needs a memory: a codec that loses more than half of the energy in one step would."""
