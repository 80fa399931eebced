"""What must hold whatever happens, checked the moment that it could break.

The committed prefix only grows and is that of the undisturbed run; one coordinator begins each
generation; each microbatch counts once; equal steps have equal states; nobody applies what is
fenced off; a commit is in a journal before anybody hears of it.
"""

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass, field

from swarmnode.coordinator.events import BegunRecord, CommitRecord, Record, StartedRecord
from swarmnode.domain import Generation, JobId, Plan, SlotId
from swarmnode.errors import SwarmError
from swarmnode.messages import (
    Answer,
    Commit,
    Ready,
)
from swarmnode.simulation.history import History


class Violation(SwarmError):
    """Something happened that never may: a bug, in the product or in the simulation."""


@dataclass
class _Job:
    history: History
    num_committed: int = 0
    """The most steps that were ever committed."""
    head: int = 0
    """Where the job stands: less, after a stage was lost."""
    held_by: Plan | None = None
    """The plan whose holders have the newest step: they agreed on it, or took it since."""
    said: dict[tuple[int, str], int] = field(default_factory=dict)
    """By stage and machine: the newest step of which it has said that its update is on its disk;
    a plan that begins at an earlier one takes it off again."""
    damaged: dict[str, Generation] = field(default_factory=dict)
    """By machine: the newest generation when its disk last lost something."""
    ready: dict[tuple[Generation, SlotId], int] = field(default_factory=dict)
    """By slot or shadow of a generation: the newest step of which it was said at all."""
    begun: dict[Generation, tuple[str, Plan]] = field(default_factory=dict)
    promised: dict[str, Generation] = field(default_factory=dict)
    """By machine: the highest generation that it was heard to promise."""
    journals: dict[str, int] = field(default_factory=dict)
    """By machine: the steps that its own journal ends with."""
    writing: dict[str, Record] = field(default_factory=dict)
    """By machine: what it was about to write when it was last heard of."""
    journaled: set[tuple[str, Generation, int]] = field(default_factory=set)

    @property
    def newest(self) -> Generation:
        """The last generation of which anybody was told."""
        return max(self.begun, default=Generation(0))


class Invariants:
    """Everything that was ever agreed on, by job."""

    def __init__(self) -> None:
        self._jobs: dict[JobId, _Job] = {}
        self.num_checks = 0

    def add(self, job: JobId, history: History) -> None:
        self._jobs[job] = _Job(history)

    def num_committed(self, job: JobId) -> int:
        return self._jobs[job].num_committed

    def journaling(self, job: JobId, who: str, record: Record) -> None:
        """A coordinator begins to write a record: after a crash it may be there or not."""
        self._jobs[job].writing[who] = record

    def journaled(self, job: JobId, who: str, record: Record) -> None:
        """A coordinator has this record safely on its disk."""
        known = self._jobs[job]
        known.writing.pop(who, None)
        if isinstance(record, StartedRecord):
            known.journals[who] = record.step
        if isinstance(record, BegunRecord) and record.generation in known.begun:
            self._taken(known, known.begun[record.generation][1])
        if not isinstance(record, CommitRecord):
            return
        step, wrote = record.step, known.journals.get(who, record.step)
        known.journals[who] = step + 1
        known.journaled.add((who, record.generation, step))
        self.num_checks += 1
        if step != wrote:
            raise Violation(
                f"{who} commits step {step} of generation {record.generation}, but its journal "
                f"has {wrote} steps"
            )
        if step > known.num_committed:
            raise Violation(
                f"{who} commits step {step} of generation {record.generation}, but only "
                f"{known.num_committed} steps were committed before"
            )
        right = known.history.step(step)
        if record.updates != right.updates or record.scale != right.scale:
            stages = [s for s, ref in enumerate(record.updates) if ref != right.updates[s]]
            raise Violation(
                f"{who} commits step {step} of generation {record.generation} with another update "
                f"of stages {stages} (scale {record.scale:g}) than the undisturbed run's"
            )
        known.num_committed = max(known.num_committed, step + 1)
        if record.generation < known.newest:
            return  # of a generation that is over: where the job stands, others decide by now
        known.head = max(known.head, step + 1)
        if record.generation in known.begun and step + 1 == known.head:
            known.held_by = known.begun[record.generation][1]

    def _taken(self, known: _Job, plan: Plan) -> None:
        """All holders of a plan have their states, and those of the one before may be let go. Who
        holds what is not known any more where a later plan was told to anybody meanwhile."""
        if plan.generation < known.newest:
            if known.held_by is not None and known.held_by.generation < plan.generation:
                known.held_by = None
            return
        known.held_by = plan
        for stage in range(plan.num_stages):
            for peer in plan.holders(stage):
                if known.damaged.get(peer, Generation(0)) < plan.generation:
                    known.said[stage, peer] = known.head - 1

    def replaced_journal(self, job: JobId, who: str) -> None:
        """A machine takes over, with a journal that it was told."""
        self._jobs[job].journals.pop(who, None)
        self._jobs[job].writing.pop(who, None)

    def restored(self, job: JobId, who: str, step: int) -> None:
        """A coordinator starts again from its own journal."""
        known = self._jobs[job]
        self.num_checks += 1
        wrote = known.journals.get(who, step)
        written = known.writing.pop(who, None)
        if isinstance(written, CommitRecord) and step == written.step + 1 != wrote:
            self.journaled(job, who, written)
        elif isinstance(written, StartedRecord) and step == written.step:
            known.journals[who] = step
        elif step != wrote:
            raise Violation(f"{who} takes up its journal at step {step}, it wrote {wrote} steps")
        known.journals[who] = step

    def said(self, who: str, ready: Ready) -> None:
        """A worker tells its coordinator that an update is in its log."""
        known = self._jobs[ready.job]
        known.said[ready.source.stage, who] = ready.step
        known.ready[ready.generation, ready.source] = ready.step

    def counted(self, who: str, stage: int, step: int, counts: bytes) -> None:
        """A machine holds the whole update of a stage, with each microbatch so often in it."""
        self.num_checks += 1
        if any(count != 1 for count in counts):
            raise Violation(
                f"{who} holds an update of stage {stage}, step {step}, in which the microbatches "
                f"count {list(counts)} times"
            )

    def begun(
        self, job: JobId, who: str, plan: Plan, step: int,
        known_at: Callable[[str], Set[int]],
    ) -> None:  # fmt: skip
        """A coordinator assigns work. `known_at`: how many seconds ago, as far back as a stage is
        looked for, it must have known what is on the disk of a machine."""
        known = self._jobs[job]
        self.num_checks += 1
        is_new = plan.generation > known.newest
        first = known.begun.setdefault(plan.generation, (who, plan))
        is_same = (first[1].slots, first[1].links) == (plan.slots, plan.links)
        if first[0] != who or not is_same or plan.coordinator != who:
            raise Violation(
                f"{who} begins generation {plan.generation}, which {first[0]} has begun already"
            )
        if not is_new:
            return  # told to one more, or late: it takes back nothing of a later one
        head, known.head = known.head, step
        said = known.said
        known.said = {key: min(newest, step - 1) for key, newest in said.items()}
        if step < head and known.held_by is not None:
            last = known.held_by
            found = [
                {p for p in last.holders(stage) if said.get((stage, p), -1) >= head - 1}
                for stage in range(last.num_stages)
            ]
            times: list[set[int]] = [set().union(*map(known_at, holders)) for holders in found]
            if at_once := set.intersection(*times):
                raise Violation(
                    f"{who} goes back to step {step} of {head} although {min(at_once)} s ago "
                    f"it could reach holders of all stages, {list(map(sorted, found))}"
                )

    def commit_sent(self, job: JobId, who: str, commit: Commit) -> None:
        known, generation = self._jobs[job], commit.generation
        self.num_checks += 1
        what = f"{who} tells of the commit of step {commit.step}, generation {generation},"
        if (who, generation, commit.step) not in known.journaled:
            raise Violation(f"{what} before it is in its journal")
        _, plan = known.begun[generation]
        for stage in range(plan.num_stages):
            slots = [SlotId(stage, number) for number in range(len(plan.holders(stage)))]
            late = [slot for slot in slots if known.ready.get((generation, slot)) != commit.step]
            if late:
                raise Violation(f"{what} before slots {late} have its update")

    def answered(self, job: JobId, who: str, answer: Answer) -> None:
        """A promise leaves the machine."""
        if answer.granted:
            promised = self._jobs[job].promised
            promised[who] = max(promised.get(who, answer.generation), answer.generation)

    def applied(self, job: JobId, who: str, generation: Generation, step: int) -> None:
        """A machine applies a commit."""
        known = self._jobs[job]
        self.num_checks += 1
        promised = known.promised.get(who, Generation(0))
        if generation < promised:
            raise Violation(
                f"{who} applies step {step} of generation {generation} after it promised {promised}"
            )
        if step >= known.num_committed:
            raise Violation(
                f"{who} applies step {step}, but only {known.num_committed} were ever committed"
            )

    def state(self, job: JobId, who: str, stage: int, step: int, state: bytes) -> None:
        """A machine holds this state of a stage after `step` steps."""
        self.num_checks += 1
        if self._jobs[job].history.state(stage, step) != state:
            raise Violation(
                f"{who} holds another state of stage {stage} after {step} steps than the "
                "undisturbed run"
            )

    def has_majority_without(self, who: str) -> bool:
        """Whether the jobs can go on if this machine forgets its promises: of the voters of the
        last plan and of those before enough are left. Half of them are, with the coordinator."""
        others = {voter for plan in self._plans() for voter in (*plan.voters, *plan.voters_before)}
        return all(_is_majority(plan, others - {who}) for plan in self._plans())

    def is_majority(self, job: JobId, there: Collection[str]) -> bool:
        """Whether those who are there can begin the next generation of a job: enough voters of
        its last plan and of those before."""
        return all(_is_majority(plan, there) for plan in self._plans(job))

    def _plans(self, of: JobId | None = None) -> list[Plan]:
        """The last plan of each job that has begun, or of one."""
        return [
            known.begun[max(known.begun)][1]
            for job, known in self._jobs.items()
            if known.begun and of in (None, job)
        ]

    def damaged(self, who: str) -> None:
        """Something that is lost was on a machine's disk: what it has said of it counts no more."""
        for known in self._jobs.values():
            known.said = {key: step for key, step in known.said.items() if key[1] != who}
            known.damaged[who] = known.newest

    def wiped(self, who: str) -> None:
        """A machine has lost its disk, and so its promises."""
        self.damaged(who)
        for known in self._jobs.values():
            known.promised.pop(who, None)
            known.journals.pop(who, None)
            known.writing.pop(who, None)


def _is_majority(plan: Plan, there: Collection[str]) -> bool:
    """Whether enough of both groups of a plan's voters are there; an empty group needs nobody."""
    for group in (plan.voters, plan.voters_before):
        left = [voter for voter in group if voter in there]
        wins_ties = left[:1] == [plan.coordinator] == list(group[:1])
        if group and 2 * len(left) + wins_ties <= len(group):
            return False
    return True
