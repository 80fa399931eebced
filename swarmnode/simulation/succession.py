"""Ready to take over, as in `coordinator.succession`: the journals of others, and elections."""

from collections import Counter
from typing import TYPE_CHECKING

from swarmnode.coordinator.events import CheckpointRecord, EndRecord, Record, StartedRecord
from swarmnode.coordinator.journal import parse_line
from swarmnode.coordinator.succession import HEIR_S, NEXT_S, PATIENCE_S, vain_s
from swarmnode.domain import JobId, PeerId, Plan
from swarmnode.messages import (
    Entry,
)
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.world import Script

if TYPE_CHECKING:
    from swarmnode.simulation.daemon import Daemon


FETCH_S = 1.0
"""What a standby takes to fetch a checkpoint, which is not simulated."""


class SimStandby:
    """Copies of journals, as in `coordinator.standby`. Raises: OSError while the disk is full."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._counts: dict[str, int] = {}

    def path(self, job: JobId) -> str:
        return f"standby/{job}/journal"

    def num_lines(self, job: JobId) -> int:
        return self._count(self.path(job))

    def take(self, job: JobId, number: int, lines: bytes) -> list[Record]:
        """Append lines that follow on what is here; what they say."""
        rows = lines.splitlines(keepends=True)
        records = [record for record in map(parse_line, rows) if record is not None]
        if len(records) != len(rows) or not rows:
            return []
        path, disk = self.path(job), self._disk
        again = path + ".again"
        if number == 0:
            disk.remove(again)
            self._counts[again] = 0
        is_again = number == 0 or (again in disk and number == self._count(again))
        target = again if is_again else path
        if number != self._count(target):
            return []
        disk.append(target, lines)
        disk.sync(target)
        self._counts[target] = number + len(rows)
        if target == again and self._recency(again) >= self._recency(path):
            disk.replace(path, disk.read(again))
            disk.remove(again)
            self._counts[path] = self._counts.pop(again)
        return records

    def drop(self, job: JobId) -> None:
        for path in (self.path(job), self.path(job) + ".again"):
            self._disk.remove(path)
            self._counts.pop(path, None)

    def _recency(self, path: str) -> tuple[int, int]:
        """(generation, lines): of two copies the one with more of it knows better."""
        rows = self._disk.read(path).splitlines(keepends=True) if path in self._disk else []
        records = [record for record in map(parse_line, rows) if record is not None]
        begun = [record.generation for record in records if isinstance(record, StartedRecord)]
        return max(begun, default=0), len(records)

    def _count(self, path: str) -> int:
        if path not in self._counts:
            rows = self._disk.read(path).splitlines(keepends=True) if path in self._disk else []
            whole: list[bytes] = []
            for row in rows:
                if parse_line(row) is None:
                    break
                whole.append(row)
            if rows:
                self._disk.truncate(path, sum(map(len, whole)))
                self._disk.settle(path)
            self._counts[path] = len(whole)
        return self._counts[path]


class SimSuccession:
    """For every job that a machine works for: what to do once its coordinator is gone."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self.journals = SimStandby(daemon.machine.disk)
        self._waiting: dict[JobId, int] = {}
        self._num_waits = 0
        self._followed: set[JobId] = set()
        self._named: set[JobId] = set()
        self._num_vain: Counter[JobId] = Counter()
        self._early: set[JobId] = set()
        """Jobs of which lines came before a plan."""

    def followed(self, job: JobId) -> None:
        self._followed.add(job)
        self._named.discard(job)
        self._num_vain.pop(job, None)
        self._waiting.pop(job, None)

    def entry(self, entry: Entry) -> None:
        plan = self._plan(entry.job)
        if plan is not None and plan.coordinator == self._daemon.name:
            return
        try:
            records = self.journals.take(entry.job, entry.number, entry.lines)
        except OSError as error:
            self._daemon.note(f"standby: {error}")
            return
        if plan is None:
            self._early.add(entry.job)
        else:
            self._early.discard(entry.job)
        if any(isinstance(record, EndRecord) for record in records):
            self._waiting.pop(entry.job, None)
            self.journals.drop(entry.job)
        elif plan is not None and any(isinstance(record, CheckpointRecord) for record in records):
            self._daemon.after(FETCH_S, self._daemon.hostings[entry.job].stand_by, plan)

    def named(self, job: JobId) -> None:
        self._named.add(job)

    def orphaned(self, job: JobId) -> None:
        self._followed.discard(job)
        if self._plan(job) is None and job in self._early:
            self._early.remove(job)
            self.journals.drop(job)
        self._wait(job)

    def handed_over(self, job: JobId) -> None:
        if job not in self._followed:
            self._num_vain[job] += 1
            self._wait(job, vain_s(self._num_vain[job]))

    def _wait(self, job: JobId, longer_s: float = 0.0) -> None:
        plan, me = self._plan(job), PeerId(self._daemon.name)
        if plan is None or me not in plan.voters or job in self._waiting:
            return
        rank = plan.voters.index(me)
        if rank > 0:
            self._num_waits += 1
            self._waiting[job] = self._num_waits
            wait_s = PATIENCE_S + NEXT_S * (rank - 1) + longer_s
            if job in self._named:
                self._named.remove(job)
                wait_s = HEIR_S
            self._daemon.start(self._stand(job, wait_s, self._num_waits))

    def _stand(self, job: JobId, wait_s: float, number: int) -> Script:
        yield wait_s
        if self._waiting.get(job) != number:
            return
        del self._waiting[job]
        if self._plan(job) is not None and self.journals.num_lines(job):
            self._daemon.note("stands for election")
            try:
                self._daemon.take_over(job)
            except OSError as error:
                self._daemon.note(f"cannot take over: {error}")
                self.handed_over(job)

    def _plan(self, job: JobId) -> Plan | None:
        hosting = self._daemon.hostings.get(job)
        if hosting is None or hosting.tenancy.is_released:
            return None
        return hosting.tenancy.plan
