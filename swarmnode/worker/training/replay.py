"""Updates applied again: the same bytes and the same scale give the same state, bit for bit."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from swarmnode.codec_specs import CodecSpec
from swarmnode.engine_messages import Replay
from swarmnode.errors import DataError
from swarmnode.worker.training.groups import StageGroups
from swarmnode.worker.training.reduce import FlatGradient, ReducedGradient, ShardCodecs
from swarmnode.worker.training.state import StageState


def replay(
    state: StageState,
    groups: StageGroups,
    spec: CodecSpec,
    updates: Iterable[Replay],
    *,
    num_steps: int,
    device: str,
) -> None:
    """Apply the updates that are not in `state` yet, in order.

    Raises: DataError if one is missing between or has the wrong size, CodecError if one does not
    decode; the state then holds all updates before it.
    """
    flats = {g.index: FlatGradient(p, g.num_values, device) for g, p in groups.groups}
    views = {name: view for flat in flats.values() for name, view in flat.views.items()}
    for update in updates:
        if update.step < state.step:
            continue
        if update.step > state.step:
            raise DataError(f"the update of step {state.step} is missing")
        codecs = ShardCodecs(spec, update.step)
        _decode(update, groups, codecs, {index: flat.flat for index, flat in flats.items()})
        for flat in flats.values():
            flat.flat.mul_(update.scale)
        state.apply(views, num_steps=num_steps)


def _decode(
    update: Replay, groups: StageGroups, codecs: ShardCodecs, flats: Mapping[int, Tensor]
) -> None:
    """Fill the flat gradients with what an update's file holds."""
    path = Path(update.path)
    shards = [
        (group, part, codecs.of(group, part).wire_bytes((stop - start,)))
        for group, _ in groups.groups
        for part in range(group.num_parts)
        for start, stop in (group.shard(part),)
    ]
    expected = sum(num_bytes for _, _, num_bytes in shards)
    try:
        num_bytes = path.stat().st_size
        data = memoryview(path.read_bytes()) if num_bytes == expected else memoryview(b"")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(data) != expected:
        raise DataError(f"{path} has {num_bytes} bytes, an update of this stage {expected}")
    reduced = {g.index: ReducedGradient(g, codecs, flats[g.index]) for g, _ in groups.groups}
    offset = 0
    for group, part, size in shards:
        reduced[group.index].take(part, data[offset : offset + size])
        offset += size
