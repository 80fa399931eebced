"""A model's parameters as one vector, cut into what is coded at once.

Large tensors come first in the vector, then those under 4096 values, which travel as bf16 under a
coarse codec. Where the codec is one of values or blocks, ranges of the large ones are coded as
they lie; matrices stay whole for a codec of matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swarmnode.codec_specs import SMALL_ELEMENTS, stateless_spec
from swarmnode.sync_specs import Sync

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A range of the vector that one codec codes as a tensor of `shape`."""

    start: int
    stop: int
    shape: Shape
    fragment: int
    owner: int
    """The slot that sums it, where there are owners."""
    is_small: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The same on every slot of a stage: it follows from the shapes, the sync and their number."""

    shapes: tuple[Shape, ...]
    num_slots: int
    num_fragments: int
    parts: tuple[Part, ...]
    offsets: tuple[int, ...]
    """Of each tensor in the vector, in the order of `shapes`."""

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, vector_N: Tensor) -> list[Tensor]:
        """The tensors, as views into the vector, in the order of `shapes`."""
        return [
            vector_N[offset : offset + math.prod(shape)].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]

    def parts_of(self, fragment: int, owner: int | None = None) -> list[Part]:
        """In the order of the vector; of one owner, or of all."""
        return [
            part for part in self.parts if part.fragment == fragment and owner in (None, part.owner)
        ]


def layout_of(shapes: Sequence[Shape], sync: Sync, num_slots: int) -> Layout:
    """Cut tensors of these shapes for an exchange between so many slots."""
    sizes = [math.prod(shape) for shape in shapes]
    is_small = [size < SMALL_ELEMENTS for size in sizes]
    order = sorted(range(len(shapes)), key=lambda index: is_small[index])
    offsets, end = [0] * len(shapes), 0
    for index in order:
        offsets[index], end = end, end + sizes[index]
    num_large = sum(size for size, small in zip(sizes, is_small, strict=True) if not small)
    num_owners = num_slots if sync.topology == "owners" else 1
    parts: list[Part] = []
    if stateless_spec(sync.codec).rank:
        whole = [index for index in order if not is_small[index]]
        for place, index in enumerate(whole):
            start, fragment = offsets[index], place * sync.fragments // len(whole)
            stop = start + sizes[index]
            parts.append(
                Part(start, stop, shapes[index], fragment, place % num_owners, is_small=False)
            )
    else:
        for piece, (start, stop) in enumerate(
            _cut(0, num_large, sync.fragments * num_owners, SMALL_ELEMENTS)
        ):
            fragment, owner = divmod(piece, num_owners)
            parts.append(Part(start, stop, (stop - start,), fragment, owner, is_small=False))
    for owner, (start, stop) in enumerate(_cut(num_large, end, num_owners, 1)):
        size = (stop - start,)
        parts.append(Part(start, stop, size, sync.fragments - 1, owner, is_small=True))
    kept = tuple(part for part in parts if part.size)
    return Layout(tuple(shapes), num_slots, sync.fragments, kept, tuple(offsets))


def _cut(start: int, stop: int, count: int, unit: int) -> list[tuple[int, int]]:
    """`count` ranges of about the same length, whole units but for the last."""
    units = -(-(stop - start) // unit)
    edges = [min(start + units * i // count * unit, stop) for i in range(count + 1)]
    return [(edges[i], edges[i + 1]) for i in range(count)]
