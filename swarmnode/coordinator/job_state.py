"""What is known of one job: its plan, its step, what is committed; written down, not decided."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from swarmnode.boundary_codecs import evaluation_codec, levels_of
from swarmnode.coordinator import events as on
from swarmnode.coordinator.forming import Head
from swarmnode.coordinator.link_codecs import LinkCodecs
from swarmnode.coordinator.outlook import Outlook
from swarmnode.coordinator.pool import Pool
from swarmnode.coordinator.progress import Progress
from swarmnode.coordinator.recovery import CommitLog, origin, snapshot_every
from swarmnode.coordinator.replanning import Replanning
from swarmnode.coordinator.solver.decision import decision_of
from swarmnode.coordinator.stragglers import Stragglers
from swarmnode.coordinator.votes import mean_loss
from swarmnode.domain import Generation, ModelFacts, PeerId, Plan, SlotId
from swarmnode.manifest import Manifest
from swarmnode.messages import Evaluated, Release, Traffic


class JobState:
    """A job as its journal and its workers tell it."""

    def __init__(self, manifest: Manifest, facts: ModelFacts, me: PeerId, now_s: float) -> None:
        self.manifest = manifest
        self.facts = facts
        self.me = me
        self.job = manifest.job
        self.phase = "waiting"
        self.reason = ""
        self.plan: Plan | None = None
        """The last plan that was told to anybody, also while the next one is formed."""
        self.is_begun = False
        """Whether a majority of the voters before has adopted `plan`."""
        self.generation = Generation(0)
        self.step = manifest.start_step
        """Committed steps."""
        self.checkpoint: on.CheckpointRecord | None = None
        self.commits = CommitLog()
        self.pool = Pool()
        self.progress = Progress(manifest, now_s)
        self.outlook = Outlook(facts, manifest, me)
        self.replanning = Replanning(now_s)
        self.stragglers = Stragglers()
        levels = levels_of(manifest.codecs)
        self.link_codecs = LinkCodecs(levels if manifest.follows_links else levels[:1])
        self.standing_by: set[PeerId] = set()
        """Who has said that it has all that a coordinator needs, the newest checkpoint included."""
        self.successor: PeerId | None = None
        """Who coordinates the job instead, once a majority follows somebody else."""
        self._leftover: set[PeerId] = set()
        """Peers that have no part in the plan, and may still hold what its workers fetch."""
        self._snapshot_every = snapshot_every(manifest)

    @property
    def is_over(self) -> bool:
        return self.phase in ("stopped", "failed", "handed over")

    @property
    def is_trained(self) -> bool:
        """Whether every step is committed."""
        return self.step >= self.manifest.num_steps

    @property
    def head(self) -> Head:
        """What the next generation starts from."""
        beginning = origin(self.checkpoint, self.manifest, self.me)
        return Head(self.step, self.plan, self.is_begun, self.commits, beginning)

    def is_worker(self, peer: PeerId) -> bool:
        return self.plan is not None and peer in self.plan.workers()

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether the state after `step` committed steps is to be kept for good: at every so many
        steps, and as soon as may be after one that came to nothing."""
        every = self.manifest.run.checkpoint_every
        newest_due = step // every * every if every else 0
        return newest_due > self._complete_step or step >= self.manifest.num_steps

    def is_snapshot_due(self, step: int) -> bool:
        """Whether every holder writes its state after `step` committed steps to its own disk."""
        return step % self._snapshot_every == 0

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the state at hand is to be evaluated before anything else is done with it."""
        run, step = self.manifest.run, self.step
        every = run.evaluate_every
        is_wanted = bool(every and step % every == 0 and step > self.manifest.start_step)
        trains = self.manifest.num_steps > 0
        return trains and (is_wanted or self.is_trained) and not self.progress.is_evaluated(step)

    def record_commit(self, record: on.CommitRecord, now_s: float) -> None:
        """A step of the plan at hand is in the journal."""
        assert self.plan is not None
        self.step = record.step + 1
        self.commits.add(record.committed)
        self.progress.committed(record.step, record.loss, now_s)
        self.pool.forgive(self.plan.workers())
        self.outlook.step_done(self.plan)
        self.stragglers.committed(now_s)
        self._look_at_links(self.plan, now_s)
        self.reason = ""

    def _look_at_links(self, plan: Plan, now_s: float) -> None:
        """Whether some link stalls the pipeline, or could be coded more finely again."""
        computing_s = self.outlook.computing_s(plan) if self.link_codecs.can_change else None
        if computing_s is not None:
            loads = self.outlook.line_loads(plan, self.link_codecs)
            steps_left = self.manifest.num_steps - self.step
            self.link_codecs.see(plan.generation, loads, computing_s, steps_left, now_s)

    def recodes_links(self) -> bool:
        """Whether a link is to be coded otherwise: then by the same machines, where they are."""
        is_due = self.plan is not None and self.link_codecs.is_due(self.plan)
        if self.plan is not None and is_due:
            self.replanning.chosen = decision_of(self.plan)
        return is_due

    def record_evaluation(self, said: Mapping[SlotId, Evaluated]) -> on.EvaluationRecord:
        """The slots of the last stage have evaluated the state at hand."""
        loss = mean_loss([loss for at in sorted(said) for loss in said[at].losses])
        self.outlook.measured.disturbed()
        codec = evaluation_codec(self.manifest.codecs, self.plan)
        self.progress.evaluated(self.step, loss, codec)
        return on.EvaluationRecord(self.step, loss, codec)

    def record_traffic(self, peer: PeerId, traffic: Traffic) -> None:
        """What a worker has sent, computed and measured."""
        self.progress.traffic(peer, traffic)
        self.outlook.measured.busy(peer, traffic.compute_s)
        self.stragglers.computed(peer, traffic.compute_s)
        self.outlook.measured.linked(peer, traffic.links)

    def look_for_better(self, now_s: float) -> list[on.Effect]:
        """While the job runs: what a step should take by now, and whether it could be less."""
        if self.plan is None or self.phase not in ("training", "serving"):
            return []
        peers = self.pool.usable(now_s)
        if not peers:  # the directory has lost them for now; the workers work all the same
            return []
        self.outlook.predict(self.plan, peers, now_s)
        serves = self.phase == "serving"
        if not self.replanning.wants_answer(now_s, serves=serves):
            return []
        calm_s = self.replanning.churn.calm_s(now_s)
        request = self.outlook.request(self.plan, peers, serves=serves, calm_s=calm_s)
        return [on.Improve(request)]

    @property
    def _complete_step(self) -> int:
        """Of the newest complete state."""
        return self.checkpoint.step if self.checkpoint else self.manifest.start_step

    @property
    def redo_s(self) -> float:
        """How long it would take to compute again what `go_back` gives up."""
        step_s = self.plan.predicted_step_s if self.plan is not None else 0.0
        return (self.step - self._complete_step) * step_s

    def go_back(self) -> None:
        """To the newest complete state; what was committed since is given up."""
        self.step = self._complete_step
        self.commits.rewind(self.step)
        self.progress.rewind(self.step)

    def restore(self, records: Sequence[on.Record]) -> None:
        """Take up where a journal ends."""
        for record in records:
            match record:
                case on.HistoryRecord(_, first_step, losses, validation, codec):
                    self.step = first_step + len(losses)
                    self.progress.losses.extend(losses)
                    self.progress.validation.extend(validation)
                    self.progress.val_codec = codec
                case on.StartedRecord(step=step) as started:
                    self.plan, self.generation = started.plan(), started.generation
                    self.is_begun = False
                    self.link_codecs.restore(started.links)
                    self.step = step
                    self.commits.rewind(step)
                    self.progress.rewind(step)
                case on.BegunRecord(generation):
                    self.is_begun = generation == self.generation
                case on.CommitRecord() as commit:
                    self.step = commit.step + 1
                    self.commits.add(commit.committed)
                    self.progress.committed(commit.step, commit.loss, None)
                case on.CheckpointRecord() as checkpoint:
                    self.checkpoint = checkpoint
                case on.EvaluationRecord(step, loss, codec):
                    self.progress.evaluated(step, loss, codec)
                case on.EndRecord(phase, reason):
                    self.phase, self.reason = phase, reason
        if records and not self.is_over:
            self.reason = "restarted; looking for peers"

    def _let_go(self, peers: Iterable[PeerId]) -> list[on.Effect]:
        """The generation at hand does without these. Who may vote still keeps what it has."""
        effects: list[on.Effect] = []
        for peer in sorted(peers):
            if peer in self._leftover:
                effects.append(on.Send(peer, Release(self.job, "others do it now")))
            effects.append(on.Hangup(peer))
        self._leftover -= set(peers)
        return effects

    def _end(self, phase: Literal["stopped", "failed"], reason: str) -> list[on.Effect]:
        self.phase, self.reason = phase, reason
        named = {*self.plan.workers(), *self.plan.voters} if self.plan else set()
        effects: list[on.Effect] = [on.Write(on.EndRecord(phase, reason))]
        holders = sorted(named | self._leftover)  # a voter may still hold what it hosted before
        return effects + [
            on.Send(peer, Release(self.job, reason, is_over=True)) for peer in holders
        ]
