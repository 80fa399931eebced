"""What people want to know of a run: how much was done, and how long each recovery took."""

from dataclasses import dataclass, field
from statistics import median

from swarmnode.coordinator.events import CommitRecord
from swarmnode.domain import Generation, JobId, Plan


@dataclass
class JobStatistics:
    """One job."""

    num_committed: int = 0
    num_generations: int = 0
    num_takeovers: int = 0
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    """(kind of fault, seconds until the next commit of a later generation)."""
    _plan: Plan | None = None
    _intervals_s: list[float] = field(default_factory=list)
    _last: tuple[Generation, float] | None = None
    _first_s: float = 0.0
    _hits: list[tuple[str, float, Generation]] = field(default_factory=list)

    def begun(self, plan: Plan, now_s: float) -> None:
        if self._plan is None:
            self._first_s = now_s
        if self._plan is None or self._plan.generation != plan.generation:
            self.num_generations += 1
            other = self._plan is not None and self._plan.coordinator != plan.coordinator
            self.num_takeovers += other
        self._plan = plan

    def hit(self, name: str, kind: str, now_s: float) -> None:
        plan = self._plan
        if plan is not None and name in (plan.coordinator, *plan.workers()):
            self._hits.append((kind, now_s, plan.generation))

    def committed(self, record: CommitRecord, now_s: float) -> None:
        self.num_committed += 1
        if self._last is not None and self._last[0] == record.generation:
            self._intervals_s.append(now_s - self._last[1])
            since_s = self._last[1]
            # A whole step in the generation that was hit: nothing had to be recovered.
            self._hits = [h for h in self._hits if h[2] != record.generation or h[1] > since_s]
        self._last = (record.generation, now_s)
        for kind, hit_s, generation in self._hits:
            if generation < record.generation:
                self.recoveries.append((kind, now_s - hit_s))
        self._hits = [hit for hit in self._hits if hit[2] >= record.generation]

    @property
    def step_s(self) -> float | None:
        """What a step takes where nothing goes wrong."""
        return median(self._intervals_s) if self._intervals_s else None

    def goodput(self, now_s: float, *, is_done: bool) -> float | None:
        """Committed steps for each step that there was time for, up to the last commit of a job
        that is done, and else up to now. None: it never began, or no step was undisturbed."""
        until_s = self._last[1] if self._last is not None and is_done else now_s
        if self._plan is None or until_s <= self._first_s:
            return None
        if self.num_committed == 0:
            return 0.0
        if self.step_s is None:
            return None
        return self.num_committed * self.step_s / (until_s - self._first_s)

    def open_hits(self, now_s: float) -> list[tuple[str, float]]:
        """Faults without a whole step or a recovery since: (kind, seconds until now)."""
        return [(kind, now_s - hit_s) for kind, hit_s, _ in self._hits]


@dataclass
class Statistics:
    """One run."""

    jobs: dict[JobId, JobStatistics] = field(default_factory=dict)
    ended_s: float = 0.0
    num_events: int = 0
    num_messages: int = 0

    def of(self, job: JobId) -> JobStatistics:
        return self.jobs.setdefault(job, JobStatistics())

    def begun(self, job: JobId, plan: Plan, now_s: float) -> None:
        self.of(job).begun(plan, now_s)

    def committed(self, job: JobId, record: CommitRecord, now_s: float) -> None:
        self.of(job).committed(record, now_s)

    def hit(self, name: str, kind: str, now_s: float) -> None:
        for job in self.jobs.values():
            job.hit(name, kind, now_s)

    def ended(self, now_s: float, num_events: int, num_messages: int) -> None:
        self.ended_s, self.num_events, self.num_messages = now_s, num_events, num_messages


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie; `values` is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
