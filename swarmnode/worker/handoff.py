"""From what a worker holds of a stage to the state that it is assigned: the least work, purely.

State = base + updates. A base is what is in memory, a file on the disk, a state to fetch, or the
state before the first step; the committed updates bring it to the assigned step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from swarmnode.domain import BlobRef
from swarmnode.errors import DataError
from swarmnode.messages import (
    Committed,
    Held,
    StateSource,
)

How = Literal["keep", "load", "fetch", "init"]


@dataclass(frozen=True)
class Holding:
    """What a worker has of one stage."""

    memory: int | None = None
    """Committed steps in the state of the running child; None if it has none."""
    snapshots: tuple[int, ...] = ()
    """Committed steps in each state file."""
    log: Mapping[int, BlobRef] = field(default_factory=dict)
    """The newest updates without a gap, by step."""
    starts_itself: bool = True
    """Whether the state before the first step follows from the manifest alone."""


class Update(NamedTuple):
    """An update to apply."""

    step: int
    scale: float
    ref: BlobRef
    is_ours: bool
    """Whether exactly this one is in the own log; else it is fetched."""


@dataclass(frozen=True)
class Handoff:
    """How one stage comes to the assigned step, and what is worthless once it is there."""

    how: How
    step: int
    """Committed steps in the base."""
    updates: tuple[Update, ...]
    stale_snapshots: tuple[int, ...]
    """State files of a history that is not the assigned one, or cut off from it."""
    stale_log: tuple[int, ...]
    disproved_after: int | None = None
    """States of more steps are of another history, as the own log tells; None where it does not."""

    @property
    def to_fetch(self) -> tuple[Update, ...]:
        return tuple(update for update in self.updates if not update.is_ours)


def plan_handoff(
    stage: int, step: int, source: StateSource, holding: Holding, commits: Sequence[Committed]
) -> Handoff:
    """How to bring `stage` to `step` committed steps.

    `keep` takes what is in memory, else the newest file, else the own start; only where every
    update that we know to be in it is the committed one.
    Raises: DataError if the assigned step cannot be reached from any base that is allowed.
    """
    refs = {c.step: c.updates[stage] for c in commits if stage < len(c.updates)}
    scales = {c.step: c.scale for c in commits}
    log = holding.log
    disproved_after = min((s for s in log if s in refs and log[s] != refs[s]), default=None)
    for how, base in _bases(source, holding, step):
        is_own = how in ("keep", "load")
        if is_own and disproved_after is not None and base > disproved_after:
            continue
        if all(s in refs for s in range(base, step)):
            updates = tuple(
                Update(s, scales[s], refs[s], log.get(s) == refs[s]) for s in range(base, step)
            )
            return replace(
                _handoff(how, base, step, updates, holding), disproved_after=disproved_after
            )
    raise DataError(_why_not(stage, step, source, holding, refs))


def held(stage: int, layers: tuple[int, int], holding: Holding) -> Held | None:
    """What to tell a coordinator that asks: the best state, and the log; None without a state."""
    log_from, log_to = min(holding.log, default=0), max(holding.log, default=-1) + 1
    if holding.memory is not None:
        best = holding.memory
    elif holding.snapshots:
        best = max(holding.snapshots)
    elif holding.starts_itself and holding.log and log_from == 0:
        best = 0
    else:
        return None
    if not holding.log:
        log_from = log_to = best
    first, last = holding.log.get(log_from), holding.log.get(best - 1)
    return Held(stage, *layers, best, log_from, log_to, first, last)


def retained(snapshots: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The state files to keep, and the first step of the log to keep: the two newest files, and
    the updates since the older of them; everything while there are fewer than two."""
    newest = tuple(sorted(snapshots)[-2:])
    return newest, newest[0] if len(newest) == 2 else 0


def _bases(source: StateSource, holding: Holding, step: int) -> list[tuple[How, int]]:
    """The bases that the source allows, the least work first."""
    if source.how == "fetch":
        return [("fetch", source.step)]
    if source.how == "init":
        return [("init", 0)] if holding.starts_itself else []
    found: list[tuple[How, int]] = []
    if holding.memory is not None and holding.memory <= step:
        found.append(("keep", holding.memory))
    files = sorted((s for s in holding.snapshots if s <= step), reverse=True)
    found.extend(("load", s) for s in files)
    if holding.starts_itself:
        found.append(("init", 0))
    return found


def _handoff(
    how: How, base: int, step: int, updates: tuple[Update, ...], holding: Holding
) -> Handoff:
    stale_log = {s for s in holding.log if s >= step}
    stale_snapshots = {s for s in holding.snapshots if s > step}
    if how in ("fetch", "init"):  # a history of its own begins here
        stale_log |= {s for s in holding.log if s < base}
        stale_snapshots |= set(holding.snapshots)
    else:
        wrong = min(
            (u.step for u in updates if not u.is_ours and u.step in holding.log), default=step
        )
        stale_snapshots |= {s for s in holding.snapshots if s > wrong}
    return Handoff(how, base, updates, tuple(sorted(stale_snapshots)), tuple(sorted(stale_log)))


def _why_not(
    stage: int, step: int, source: StateSource, holding: Holding, refs: Mapping[int, BlobRef]
) -> str:
    has = [] if holding.memory is None else [f"step {holding.memory} in memory"]
    has += [f"step {s} on the disk" for s in sorted(holding.snapshots)]
    known = f"updates {min(refs)} to {max(refs)} are committed" if refs else "no update is known"
    return (
        f"stage {stage} cannot come to step {step} ({source.how}): "
        f"we have {', '.join(has) or 'nothing of it'}, and {known}"
    )
