"""An assignment carried out up to the child: data, states and updates brought here."""

import asyncio
from collections.abc import Collection

from swarmnode.domain import PeerId
from swarmnode.engine_messages import Base
from swarmnode.errors import ProtocolError
from swarmnode.manifest import Manifest
from swarmnode.messages import (
    Assign,
    StateSource,
)
from swarmnode.worker.fetching import Fetcher
from swarmnode.worker.files import state_path
from swarmnode.worker.handoff import Handoff, plan_handoff
from swarmnode.worker.state_keeper import StateKeeper, base_of


def plan_handoffs(
    assign: Assign,
    me: PeerId,
    manifest: Manifest,
    keeper: StateKeeper,
    only: Collection[int] | None = None,
) -> dict[int, tuple[Handoff, StateSource]]:
    """How each stage that we are to hold, or `only` these, comes to the assigned step.

    Raises: DataError if one cannot, ProtocolError if a state to fetch has no index.
    """
    sources = dict(assign.sources)
    found: dict[int, tuple[Handoff, StateSource]] = {}
    for stage in assign.plan.stages_of(me) if only is None else sorted(only):
        source = sources.get(stage, StateSource("keep"))
        if source.how == "init" and manifest.model.weights is not None:
            source = StateSource(
                "fetch", manifest.start_step, manifest.model.weights, source.providers
            )
        if source.how == "fetch" and source.index is None:
            raise ProtocolError("a state to fetch has no index")
        holding = keeper.holding(stage)
        found[stage] = (
            plan_handoff(stage, assign.step, source, holding, assign.commits),
            source,
        )
    return found


async def gather(
    assign: Assign,
    manifest: Manifest,
    handoffs: dict[int, tuple[Handoff, StateSource]],
    keeper: StateKeeper,
    fetcher: Fetcher,
    me: PeerId,
) -> tuple[Base, ...]:
    """Fetch what is missing; what the child is told then.

    Raises: SwarmError, OSError.
    """
    plan = assign.plan
    computed = {slot.stage for slot in plan.hosted_by(me)}
    if manifest.data is not None and computed & {0, plan.num_stages - 1}:
        await fetcher.data(manifest.data)  # the first stage reads tokens, the last one labels
    elif manifest.data is not None and manifest.codecs.keeps_deltas:
        await fetcher.sample_index(manifest.data)
    bases: list[Base] = []
    for stage, (taken, source) in handoffs.items():
        if taken.to_fetch and taken.disproved_after is not None:
            await asyncio.to_thread(keeper.disprove, stage, taken.disproved_after)
        if taken.how == "fetch":
            assert source.index is not None
            path = state_path(keeper.directory, stage, taken.step, "fetched")
            await fetcher.state(source.index, source.providers, stage, path)
        if taken.to_fetch:
            await fetcher.updates(taken.to_fetch, source.providers, keeper.log(stage))
            for update in taken.to_fetch:
                keeper.logged(stage, update.step)
        bases.append(base_of(stage, taken, keeper))
    return tuple(bases)
