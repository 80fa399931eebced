"""What a job's steps should take, by what its machines have measured; and what they took."""

import math
from collections.abc import Sequence

from swarmnode.coordinator.cost.needs import stage_needs, workload_of
from swarmnode.coordinator.cost.simulate import simulate_step
from swarmnode.coordinator.cost.training import devices_of, tables_of
from swarmnode.coordinator.measurements import Measurements
from swarmnode.coordinator.objective import NOBODY
from swarmnode.coordinator.solver.request import ImproveRequest, Swarm
from swarmnode.coordinator.survey import arrangement_of, speeds, survey
from swarmnode.domain import Advert, ModelFacts, PeerId, Plan
from swarmnode.manifest import PlacedJob

PERIOD_S = 5.0
"""Seconds between two predictions of the same plan."""


class Outlook:
    """Prediction beside reality, for one job."""

    def __init__(self, facts: ModelFacts, job: PlacedJob, me: PeerId) -> None:
        self.measured = Measurements()
        self.predicted_s: float | None = None
        """What a step of the running plan should take; None before anything was predicted."""
        self._facts = facts
        self._job = job
        self._me = me
        self._predicted_at: tuple[int, float] | None = None

    def swarm(self, peers: Sequence[Advert]) -> Swarm:
        """These machines, with everything that was measured about them."""
        return Swarm(tuple(peers), self.measured.links, tuple(self.measured.flops.items()))

    def request(
        self, plan: Plan, peers: Sequence[Advert], *, serves: bool, calm_s: float
    ) -> ImproveRequest:
        """The question for a better placement than `plan`."""
        job = PlacedJob(**{name: getattr(self._job, name) for name in PlacedJob.model_fields})
        return ImproveRequest(self.swarm(peers), self._facts, job, plan, serves, calm_s)

    def predict(self, plan: Plan, peers: Sequence[Advert], now_s: float) -> None:
        """Predict a step of `plan`, at most every PERIOD_S and for every generation."""
        if not self._job.num_steps:
            return
        at = self._predicted_at
        if at is not None and at[0] == plan.generation and now_s - at[1] < PERIOD_S:
            return
        self._predicted_at = (plan.generation, now_s)
        named = {self._me, *plan.workers()}  # a table of all pairs: of no more peers than needed
        swarm = self.swarm([advert for advert in peers if advert.peer in named])
        self.predicted_s = self._step_s(plan, swarm) if swarm.peers else None

    def step_done(self, plan: Plan) -> None:
        """A step of `plan` is committed: what its machines computed meanwhile was this."""
        needs = stage_needs(self._facts, self._job, plan.layers)
        per_slot = self._job.batch.num_microbatches // plan.num_slots
        self.measured.step_done(
            {
                peer: sum(needs[at.stage].flops for at in plan.hosted_by(peer)) * per_slot
                for peer in plan.workers()
            }
        )

    def _step_s(self, plan: Plan, swarm: Swarm) -> float | None:
        """What one step of `plan` should take, event by event; None if a host is not here."""
        topology = survey(swarm)
        index = {PeerId(name): node for node, name in enumerate(topology.names)}
        arrangement = arrangement_of(plan, index)
        if any(NOBODY in row for row in arrangement.slots):
            return None
        devices = devices_of(swarm.peers, self._job, speeds(swarm, self._job))
        tables = tables_of(
            topology,
            devices,
            workload_of(self._facts, self._job),
            plan.num_stages,
            plan.num_slots,
            coordinator=index.get(self._me),
        )
        predicted_s = simulate_step(arrangement, tables)
        return predicted_s if math.isfinite(predicted_s) else None
