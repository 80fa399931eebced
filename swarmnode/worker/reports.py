"""What a worker tells its coordinator in the middle of its work: what it has sent and computed."""

import math
from collections.abc import Callable, Iterable

from swarmnode.codings import MAX_CODINGS, Coding, total
from swarmnode.domain import JobId, Plan
from swarmnode.fields import SentKind
from swarmnode.messages import MAX_LINK_REPORTS, LinkReport, Message, Traffic
from swarmnode.worker.tools import HostTools

REPORT_S = 5.0
"""Seconds of computing after which the coordinator is told, also in the middle of a step."""
MOVES_S = 30.0
"""While bytes of the job come or leave, it is told at least so often: a slow line is no hang."""


class Reports:
    """The counters of one job on one node; what is to be told goes to `post`."""

    def __init__(
        self,
        job: JobId,
        tools: HostTools,
        post: Callable[[Message], None],
        plan: Callable[[], Plan | None],
    ) -> None:
        """`plan` gives the one that is carried out now."""
        self.control_bytes = 0
        self._job = job
        self._tools = tools
        self._post = post
        self._plan = plan
        self._compute_s = 0.0
        self._codings: tuple[Coding, ...] = ()
        self._num_fetched = 0
        self._moved = 0
        self._told_s = math.inf

    def coded(self, codings: Iterable[Coding]) -> None:
        """So much was coded since the last time."""
        self._codings = total((*self._codings, *codings))[:MAX_CODINGS]

    def computed(self, seconds: float, now_s: float) -> None:
        """So long was computed since the last time; a long step is told of meanwhile."""
        self._compute_s += seconds
        if self._compute_s > REPORT_S:
            self.tell(now_s)

    def fetched(self, now_s: float) -> None:
        """A piece of what was asked for has come."""
        self._num_fetched += 1
        self.look(now_s)

    def look(self, now_s: float) -> None:
        """Tell if something has moved, and it is time to say so: not at once."""
        self._told_s = min(self._told_s, now_s)
        if self._moves() != self._moved and now_s - self._told_s >= MOVES_S:
            self.tell(now_s)

    def tell(self, now_s: float) -> None:
        """Tell everything now."""
        sent: dict[SentKind, int] = self._tools.switch.sent(self._job)
        sent["control"] = self.control_bytes
        before, self._moved, self._told_s = self._moved, self._moves(), now_s
        is_moving = self._moved != before
        links, codings = self._links(), self._codings
        self._post(Traffic(self._job, sent, self._compute_s, links, codings, is_moving))
        self._compute_s = 0.0

    def _moves(self) -> int:
        """Another number whenever bytes have come or left."""
        return self._tools.switch.moved(self._job) + self._num_fetched

    def _links(self) -> tuple[LinkReport, ...]:
        """Our paths to the other peers of the plan, as far as they were measured."""
        if (plan := self._plan()) is None:
            return ()
        reports = [link for link in self._tools.links() if plan.names(link.peer)]
        return tuple(reports[:MAX_LINK_REPORTS])
