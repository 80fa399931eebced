"""The coordinator side of a simulated daemon: the real ledger and journal, driven as in `runner`.

One event at a time; its effects in order; the journal is on the disk before whatever follows.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swarmnode.coordinator import events as on
from swarmnode.coordinator.ledger import Ledger
from swarmnode.coordinator.room import ROOM_S
from swarmnode.coordinator.solver.fill import solve
from swarmnode.coordinator.solver.request import Improvement, ImproveRequest
from swarmnode.domain import Generation, PeerId
from swarmnode.errors import CapacityError
from swarmnode.messages import (
    Adopt,
    Answer,
    Assign,
    Commit,
    Entry,
    Inquire,
    Message,
)
from swarmnode.simulation.journals import SimJournal
from swarmnode.simulation.network import End
from swarmnode.simulation.world import Script

if TYPE_CHECKING:
    from swarmnode.simulation.daemon import Daemon

HANGUP_S = 2.0
"""A line that is given up stays open so long, as in `runner`."""
IMPROVE_S = 2.0
"""What the solver takes to look for a better placement."""


@dataclass(eq=False)
class _Line:
    """The control stream to one worker."""

    outbox: list[Message] = field(default_factory=list)
    end: End | None = None
    is_done: bool = False
    num_told: int = 0
    """Lines of the journal that were sent on it."""
    asked: int = 0
    """The last generation that was asked for on it: its other end serves nothing lower."""

    def close(self) -> None:
        """Hang up."""
        self.is_done = True
        if self.end is not None:
            self.end.close()


class Coordinating:
    """One job that a daemon coordinates."""

    def __init__(
        self, daemon: "Daemon", ledger: Ledger, canonical: bytes, journal: SimJournal
    ) -> None:
        self.ledger = ledger
        self._daemon = daemon
        self._canonical = canonical
        self._journal = journal
        self._events: deque[on.Event] = deque()
        self._is_busy = False
        self._lines: dict[PeerId, _Line] = {}
        self._is_stuck = False
        """The journal could not be written: the daemon begins anew when there is room."""

    def start(self) -> None:
        self._daemon.start(self._tick())

    def tell(self, event: on.Event) -> None:
        self._events.append(event)
        if not self._is_busy:
            self._is_busy = True
            self._daemon.start(self._run())

    @property
    def num_lines(self) -> int:
        return self._journal.num_lines

    @property
    def is_over(self) -> bool:
        return self.ledger.is_over

    def _run(self) -> Script:
        ledger, world = self.ledger, self._daemon.world
        while self._events and not self._is_at_rest:
            event = self._events.popleft()
            before = (ledger.phase, ledger.generation)
            for effect in ledger.handle(event, self._daemon.monotonic_s):
                match effect:
                    case on.Write(record):
                        yield from self._write(record)
                    case _:
                        self._perform(effect)
                if self._is_stuck:
                    break
            if world.keeps_trace and (ledger.phase, ledger.generation) != before:
                self._daemon.note(
                    f"ledger: {ledger.phase} g{ledger.generation} step {ledger.step} "
                    f"after {type(event).__name__}: {ledger.reason}"
                )
        self._is_busy = False
        if ledger.successor is not None and ledger.manifest.submitter != self._daemon.name:
            self._daemon.machine.disk.remove(f"coordinating/{ledger.job}/job.json")
        if self._is_at_rest:
            self._leave()
        if ledger.successor is not None:
            self._daemon.succession.handed_over(ledger.job)

    @property
    def _is_at_rest(self) -> bool:
        return self._is_stuck or self.is_over

    def _leave(self) -> None:
        for line in self._lines.values():
            self._daemon.after(HANGUP_S, line.close)
        self._lines.clear()

    def _tick(self) -> Script:
        daemon = self._daemon
        yield daemon.world.random.random() * 0.01
        while not self._is_at_rest:
            self.tell(on.PeersSeen(daemon.view.peers()))
            self.tell(on.Tick())
            yield daemon.swarm.scenario.swarm.tick_s

    # ---- effects ---------------------------------------------------------------------------

    def _write(self, record: on.Record) -> Script:
        daemon = self._daemon
        daemon.swarm.invariants.journaling(self.ledger.job, daemon.name, record)
        try:
            yield from self._journal.append(record)
        except OSError as error:
            self._is_stuck = True
            self.ledger.phase, self.ledger.reason = "waiting", f"waits for room: {error}"
            daemon.note(f"journal: {error}")
            daemon.start(self._go_on_later())
            return
        daemon.swarm.journaled(self.ledger.job, daemon.name, record)
        self._tell_voters()

    def _go_on_later(self) -> Script:
        """As `when_there_is_room`."""
        daemon = self._daemon
        yield ROOM_S
        while daemon.machine.disk.is_full:
            yield ROOM_S
        daemon.note("there is room again")
        daemon.coordinate(self.ledger.manifest)

    def _perform(self, effect: on.Effect) -> None:
        daemon = self._daemon
        match effect:
            case on.Send(peer, message):
                self._send(peer, message)
            case on.Hangup(peer):
                line = self._lines.pop(peer, None)
                if line is not None:  # what was said last still goes out
                    daemon.after(HANGUP_S, line.close)
            case on.StoreState():
                daemon.start(self._store(effect))
            case on.Improve(request):
                daemon.start(self._improve(request))

    def _improve(self, request: ImproveRequest) -> Script:
        """A solver that sometimes finds something else, and never says that it is worse."""
        yield IMPROVE_S
        found: Improvement | None = None
        if self._daemon.world.random.random() < self._daemon.swarm.improve_share:
            try:
                decision = solve(request.swarm.peers, request.facts, request.job)
                found = Improvement(decision, decision.cost_s * 2 + 1.0, 0.1)
            except CapacityError:
                found = None
        self.tell(on.Improved(request.plan.generation, found))

    def _send(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, Inquire):
            message = replace(
                message, num_lines=self._journal.num_lines, lease=self._lease(message)
            )
        elif isinstance(message, Adopt):
            message = replace(message, lease=self._daemon.name.encode())
        elif isinstance(message, Assign):
            message = replace(message, lease=self._daemon.name.encode())
            self._daemon.machine.disk.replace(self._lease_path, b"elected")
            self._daemon.swarm.begun(self.ledger.job, self._daemon.name, message)
        elif isinstance(message, Commit):
            self._daemon.swarm.commit_sent(self.ledger.job, self._daemon.name, message)
        if self._daemon.world.keeps_trace:
            self._daemon.note(f"-> {peer}: {brief(message)}")
        line = self._lines.get(peer)
        if line is None and isinstance(message, Assign | Inquire):
            line = self._lines[peer] = _Line()
            self._daemon.start(self._talk(peer, line))
        if line is not None:
            if isinstance(message, Inquire):
                line.asked = message.generation
            self._put(line, message)
            self._tell_voters()

    @property
    def _lease_path(self) -> str:
        return f"coordinating/{self.ledger.job}/lease"

    def _lease(self, inquire: Inquire) -> bytes:
        """Its name, where it was elected once, or is now; nothing before."""
        is_elected = inquire.is_agreed or self._lease_path in self._daemon.machine.disk
        return self._daemon.name.encode() if is_elected else b""

    def _put(self, line: _Line, message: Message) -> None:
        if line.end is None:
            line.outbox.append(message)
        else:
            line.end.send(message, self._payload(message))

    def _tell_voters(self) -> None:
        """As `JobRunner`: every line of the journal goes before what follows from it."""
        plan, me = self.ledger.plan, self.ledger.me
        if plan is None or plan.coordinator != me:
            return
        for peer in plan.voters:
            line = self._lines.get(peer)
            if line is None or peer == me or line.num_told == self._journal.num_lines:
                continue
            fence = Generation(max(plan.generation, line.asked))
            for number, lines in self._journal.lines(line.num_told):
                self._put(line, Entry(self.ledger.job, fence, number, lines))
            line.num_told = self._journal.num_lines

    def _payload(self, message: Message) -> bytes:
        return self._canonical if isinstance(message, Assign | Inquire) else b""

    def _talk(self, peer: PeerId, line: _Line) -> Script:
        """Open the control stream to one worker and send what waits."""
        daemon = self._daemon
        end = yield from daemon.swarm.network.open(daemon.machine, peer, "control")
        if line.is_done:
            if end is not None:
                end.close()
            return

        def closed(reason: str) -> None:
            if not line.is_done:
                line.is_done = True
                if self._lines.get(peer) is line:  # else we gave it up ourselves
                    del self._lines[peer]
                    self.tell(on.WorkerLost(peer, reason))

        if end is None:
            closed("cannot be reached")
            return

        def heard(message: Message, _payload: bytes) -> None:
            if not line.is_done:
                if daemon.world.keeps_trace:
                    daemon.note(f"<- {peer}: {brief(message)}")
                self.tell(on.Heard(peer, message))

        end.on_closed, end.on_message = closed, heard
        line.end = end
        for message in line.outbox:
            end.send(message, self._payload(message))
        line.outbox.clear()

    def _store(self, effect: on.StoreState) -> Script:
        """Fetch a published state into the daemon's own store."""
        daemon = self._daemon
        num_bytes = daemon.swarm.section(self.ledger.job).state_mb * 1e6
        data = yield from daemon.swarm.blobs.fetch(
            daemon.machine, effect.index, [effect.provider], num_bytes
        )
        if data is not None:
            try:
                daemon.store.put(data)
            except OSError:
                data = None
        known = (effect.stage, effect.step, effect.index)
        self.tell(on.StateStored(*known) if data else on.StateLost(*known, "not fetched"))


def brief(message: Message) -> str:
    """A message in one short line, for traces."""
    match message:
        case Inquire(generation=generation, based_on=based_on, num_lines=num_lines):
            return f"Inquire g{generation} based on g{based_on}, {num_lines} lines"
        case Answer():
            held = [f"{h.stage}@{h.step}[{h.log_from},{h.log_to})" for h in message.held]
            said = [f"{tuple(r.source)}@{r.step}" for r in message.ready]
            word = "granted" if message.granted else "refused"
            return (
                f"Answer g{message.generation} {word}, promised g{message.promised} to "
                f"{message.promised_to}, holds {' '.join(held)}, said {' '.join(said)}"
            )
        case Assign(plan=plan, step=step, sources=sources):
            how = [f"{stage}:{source.how}@{source.step}" for stage, source in sources]
            return f"Assign g{plan.generation} step {step} {' '.join(how)}"
    rest = [
        f"{name}={getattr(message, name)}"
        for name in ("generation", "step", "reason")
        if hasattr(message, name)
    ]
    return f"{type(message).__name__} {' '.join(rest)}"
