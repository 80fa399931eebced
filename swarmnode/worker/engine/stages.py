"""The stages of a generation: taken from memory, a file or the seed, and brought to its step."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from swarmnode.codec_specs import parse_spec
from swarmnode.domain import BlobRef
from swarmnode.engine_messages import Base, Configure
from swarmnode.errors import DataError
from swarmnode.manifest import Manifest
from swarmnode.updates import index_update
from swarmnode.worker.engine.setup import groups_of
from swarmnode.worker.training.replay import replay
from swarmnode.worker.training.state import StageState, initial_state, loaded_state


def make_stages(
    configure: Configure, manifest: Manifest, held: Mapping[int, StageState]
) -> dict[int, StageState]:
    """The stages that a generation holds here, at its step, by number.

    Raises: DataError if a stage has no base, is not held as its base says, or does not come to
    the step; CodecError if an update does not decode.
    """
    bases = {base.stage: base for base in configure.bases}
    stages: dict[int, StageState] = {}
    for stage in configure.plan.stages_of(configure.peer):
        base = bases.get(stage)
        if base is None:
            raise DataError(f"nothing says where stage {stage} comes from")
        state = stages[stage] = _based_on(base, configure, manifest, held.get(stage))
        if base.replays and state.step < configure.step:
            replay(
                state,
                groups_of(state, stage, configure.plan, manifest.codecs),
                parse_spec(manifest.codecs.share),
                base.replays,
                num_steps=manifest.num_steps,
                device=configure.device,
            )
        if state.step != configure.step:
            raise DataError(f"stage {stage} is held at step {state.step}, not {configure.step}")
    return stages


def committed_update(configure: Configure, stage: int) -> BlobRef | None:
    """The update that was committed in the step before, where it is to be applied again here."""
    replays = [r for base in configure.bases if base.stage == stage for r in base.replays]
    for update in replays:
        if update.step == configure.step - 1:
            with contextlib.suppress(OSError):
                return index_update(update.step, [Path(update.path).read_bytes()]).ref
    return None


def _based_on(
    base: Base, configure: Configure, manifest: Manifest, held: StageState | None
) -> StageState:
    layers, device = configure.plan.layers[base.stage], configure.device
    if base.how == "keep":
        if held is None or held.layers != layers:
            raise DataError(f"stage {base.stage} with layers {layers} is not held here")
        if held.step < base.step:
            raise DataError(f"stage {base.stage} is held at step {held.step}, not {base.step}")
        return held
    if base.how == "load":
        return loaded_state(manifest, layers, device, path=Path(base.path), step=base.step)
    if base.step != 0:
        raise DataError(f"stage {base.stage} cannot be at step {base.step} from the seed")
    return initial_state(manifest, layers, device)
