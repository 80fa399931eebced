"""What a job's steps should take, by what its machines have measured; and what they took."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from swarmnode.boundary_codecs import Link, boundary_links
from swarmnode.codec_specs import parse_spec, wire_share
from swarmnode.coordinator.cost.needs import Workload, stage_needs, workload_of
from swarmnode.coordinator.cost.simulate import simulate_step
from swarmnode.coordinator.cost.training import devices_of, tables_of
from swarmnode.coordinator.link_codecs import LineLoad, LinkCodecs
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
        self._boundary = (job.batch.rows, job.batch.sequence_length, facts.hidden_size)
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
        self.measured.step_done(self._flops(plan))

    def computing_s(self, plan: Plan) -> float | None:
        """What the slowest machine of `plan` computes in a step, by the speeds that they reached;
        None while one of them has not been seen at work."""
        reached, work = self.measured.flops, self._flops(plan)
        hosts = [peer for peer, flops in work.items() if flops]
        if not hosts or not all(peer in reached for peer in hosts):
            return None
        return max(work[peer] / reached[peer] for peer in hosts)

    def line_loads(self, plan: Plan, choice: LinkCodecs) -> dict[Link, LineLoad]:
        """What a step of `plan` puts on the sender's line, for each measured link of it: with the
        link at each level, and all others where they are now."""
        codecs = [level.codecs for level in choice.levels]
        own_s: dict[Link, list[float]] = {}
        for link, (forward, backward) in self._frames(plan).items():
            rate = self.measured.rate(*link)
            if rate:
                own_s[link] = [
                    (
                        forward * self._frame_bytes(each.activation)
                        + backward * self._frame_bytes(each.activation_gradient)
                    )
                    / rate
                    for each in codecs
                ]
        line_s: dict[PeerId, float] = {}
        for link, seconds in own_s.items():
            line_s[link[0]] = line_s.get(link[0], 0.0) + seconds[choice.level(link)]
        return {
            link: LineLoad(
                tuple(line_s[link[0]] - seconds[choice.level(link)] + each for each in seconds)
            )
            for link, seconds in own_s.items()
        }

    def _frames(self, plan: Plan) -> dict[Link, tuple[int, int]]:
        """Hidden states and gradients of them that cross each link in a step."""
        per_slot = self._job.microbatches_per_step // plan.num_slots
        forward = Counter(
            (sender, receiver)
            for row, following in pairwise(plan.slots)
            for sender, receiver in zip(row, following, strict=True)
        )
        return {
            (sender, receiver): (
                per_slot * forward[sender, receiver],
                per_slot * forward[receiver, sender],
            )
            for sender, receiver in boundary_links(plan)
        }

    def _frame_bytes(self, codec: str) -> int:
        return parse_spec(codec).stateless.wire_bytes(self._boundary, 4)

    def _flops(self, plan: Plan) -> dict[PeerId, float]:
        """What each worker of `plan` has to do in a step."""
        needs = stage_needs(self._facts, self._job, plan.layers)
        per_slot = self._job.microbatches_per_step // plan.num_slots
        return {
            peer: sum(needs[at.stage].flops for at in plan.hosted_by(peer)) * per_slot
            for peer in plan.workers()
        }

    def _step_s(self, plan: Plan, swarm: Swarm) -> float | None:
        """What one step of `plan` should take, event by event; None if a host is not here.

        Of a round of local steps, so many times one of them.
        """
        topology = survey(swarm)
        index = {PeerId(name): node for node, name in enumerate(topology.names)}
        arrangement = arrangement_of(plan, index)
        if any(NOBODY in row for row in arrangement.slots):
            return None
        devices = devices_of(swarm.peers, self._job, speeds(swarm, self._job))
        tables = tables_of(
            topology,
            devices,
            self._workload(plan, index),
            plan.num_stages,
            plan.num_slots,
            coordinator=index.get(self._me),
        )
        predicted_s = simulate_step(arrangement, tables) * self._job.codecs.num_local_steps
        return predicted_s if math.isfinite(predicted_s) else None

    def _workload(self, plan: Plan, index: Mapping[PeerId, int]) -> Workload:
        """The job's, with the codecs that the plan's links have."""
        workload = workload_of(self._facts, self._job)
        if not plan.links:
            return workload
        forward, backward = (
            np.full((len(index), len(index)), share)
            for share in (workload.activation_share, workload.activation_gradient_share)
        )
        for link in plan.links:
            if link.source in index and link.target in index:
                at = index[link.source], index[link.target]
                forward[at] = wire_share(link.activation, self._boundary)
                backward[at] = wire_share(link.activation_gradient, self._boundary)
        return replace(workload, activation_share=forward, activation_gradient_share=backward)
