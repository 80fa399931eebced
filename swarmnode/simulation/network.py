"""Streams between machines: ordered and reliable while they live, as TCP with Noise is.

A stream dies as a whole: cut, or because an end is silent; its ends learn of it at different
times, and what was on its way arrives up to some point. Silence is computed, not simulated: no
heartbeat is an event of its own. What is damaged on the way kills the stream, as Noise does.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from swarmnode.domain import JobId
from swarmnode.messages import (
    Assign,
    Frame,
    Inquire,
    Message,
)
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.presence import Presence
from swarmnode.simulation.world import Process, World

DEAD_AFTER_S, HEARTBEAT_S = 5.0, 1.0
"""As in p2p.session, which needs a loop to be imported for."""
OPEN_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 30.0
HEADER_BYTES = 120
Protocol = Literal["control", "tensor"]
OnMessage = Callable[[Message, bytes], object]
OnClosed = Callable[[str], object]


@dataclass(eq=False)
class Machine:
    """A computer in the network, whether or not its daemon runs."""

    name: str
    latency_s: float = 0.005
    """From it to the middle of the network."""
    bytes_per_s: float = 12.5e6
    """Of its line, each way."""
    disk: Disk = field(default_factory=Disk)
    process: Process | None = None
    accept: "Callable[[End, Protocol], object] | None" = None
    """The listening daemon's; None while none runs."""
    speed: float = 1.0
    """Of its computing, relative to the scenario's."""
    clock_off_s: float = 0.0
    """How much more than the right time its wall clock shows. Its monotonic clock never jumps."""

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.alive


class End:
    """One end of a stream, as the process that holds it sees it."""

    def __init__(self, network: "Network", machine: Machine, protocol: Protocol) -> None:
        assert machine.process is not None
        self.machine, self.process, self.protocol = machine, machine.process, protocol
        self.is_open = True
        self.on_message: OnMessage = _ignore
        self.on_closed: OnClosed = _ignore
        self.other: End = self
        self._network = network
        self._arrival_s = 0.0
        self._held: list[tuple[Message, bytes]] = []
        self._limit: int | None = None
        """How many more messages of ours arrive, once the stream was cut."""

    @property
    def peer(self) -> str:
        return self.other.machine.name

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Queue a message; it arrives in order, later or never."""
        if not self.is_open:
            return
        way = (self.machine.name, self.other.machine.name)
        if way in self._network.blocked:
            if self.protocol == "tensor" and not self._held:
                self._network.watch_blocked_sender(self, way)
            self._held.append((message, payload))
            return
        network = self._network
        num_bytes = HEADER_BYTES + len(payload) * network.factor_of(message)
        delay_s = network.delay_s(self.machine, self.other.machine, num_bytes)
        self._arrival_s = max(self._arrival_s, network.world.now_s + delay_s)
        network.num_messages += 1
        network.world.after(
            self._arrival_s - network.world.now_s,
            self.other.process,
            self._arrive,
            message,
            payload,
        )

    def release(self) -> None:
        """The way is free again: what was held is on its way."""
        held, self._held = self._held, []
        for message, payload in held:
            self.send(message, payload)

    def cut(self, num_arriving: int) -> None:
        self._limit = num_arriving

    def close(self) -> None:
        """Leave; the other end learns of it behind everything that was sent before."""
        if not self.is_open:
            return
        self.is_open = False
        self._network.forget(self)
        self._held.clear()
        if self._limit is None and self.other.is_open:
            self._network.say_closed(self, "closed its stream", self._arrival_s)

    def break_off(self, reason: str) -> None:
        """This end learns that the stream is dead."""
        if not self.is_open:
            return
        self.is_open = False
        self._network.forget(self)
        self._network.say_closed(self, "reset the stream", 0.0)
        self.on_closed(reason)

    def _arrive(self, message: Message, payload: bytes) -> None:
        other = self.other
        if self._limit is not None:
            if self._limit <= 0:
                return
            self._limit -= 1
        if not other.is_open:
            return
        other.on_message(message, payload)
        if self._network.repeats:
            self._network.repeat(self, message, payload)


class Network:
    """All machines, and the streams that join them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.machines: dict[str, Machine] = {}
        self.blocked: dict[tuple[str, str], int] = {}
        """Ways on which nothing arrives, each with the number of its blocking."""
        self.factor = 1.0
        """All delays are this many times longer."""
        self.byte_factors: dict[JobId, float] = {}
        """Bytes that one byte of a job's toy payloads stands for."""
        self.num_messages = 0
        self.presence = Presence()
        self._ends: dict[str, dict[End, None]] = {}
        self._blockings = 0
        self._repeats: dict[str, float] = {}
        self._past: dict[tuple[str, str, Protocol], list[tuple[Message, bytes]]] = {}

    def add(self, machine: Machine) -> None:
        self.machines[machine.name] = machine
        self._ends[machine.name] = {}

    def factor_of(self, message: Message) -> float:
        return self.byte_factors.get(message.job, 1.0) if isinstance(message, Frame) else 1.0

    def delay_s(self, source: Machine, target: Machine, num_bytes: float) -> float:
        """What a message takes now, chance included."""
        if source is target:
            return 1e-5
        speed = min(source.bytes_per_s, target.bytes_per_s)
        spread = 1.0 + 0.5 * self.world.random.random()
        return (source.latency_s + target.latency_s) * spread * self.factor + num_bytes / speed

    # ---- streams ---------------------------------------------------------------------------

    def open(
        self, source: Machine, name: str, protocol: Protocol
    ) -> Generator[float, None, End | None]:
        """A new stream to the machine `name`, or None where none answers in time."""
        target, process = self.machines.get(name), source.process
        if target is None:
            return None
        yield 3.0 * self.delay_s(source, target, 0)
        if self.joins(source, target) and not target.runs:
            return None  # refused at once: the machine is up, its daemon is not
        asked_s = self.world.now_s
        while not (target.runs and self.joins(source, target) and not _is_frozen(target)):
            if self.world.now_s - asked_s >= OPEN_TIMEOUT_S:
                return None
            yield 1.0
        assert source.process is process
        ours, theirs = End(self, source, protocol), End(self, target, protocol)
        ours.other, theirs.other = theirs, ours
        self._ends[source.name][ours] = None
        self._ends[target.name][theirs] = None
        if target.accept is not None:
            target.accept(theirs, protocol)
        return ours

    def ends_of(self, name: str) -> list[End]:
        return list(self._ends[name])

    def forget(self, end: End) -> None:
        self._ends[end.machine.name].pop(end, None)

    def say_closed(self, end: End, reason: str, not_before_s: float) -> None:
        """Tell the other end, if anything can reach it."""
        other, way = end.other, (end.machine.name, end.other.machine.name)
        if not other.is_open or way in self.blocked:
            return
        delay_s = self.delay_s(end.machine, other.machine, 0)
        delay_s = max(delay_s, not_before_s - self.world.now_s)
        self.world.after(delay_s, other.process, other.break_off, reason)

    def joins(self, one: Machine, two: Machine) -> bool:
        """Whether messages arrive both ways."""
        names = (one.name, two.name)
        return names not in self.blocked and names[::-1] not in self.blocked

    # ---- what goes wrong -------------------------------------------------------------------

    def cut(self, end: End) -> None:
        """The stream is dead: some more messages arrive, and each end learns of it when it does."""
        chance = self.world.random
        for side in (end, end.other):
            side.cut(chance.choice((0, 0, 1, 2, 5)))
            late_s = chance.choice((0.0, 0.01, 0.3, DEAD_AFTER_S))
            self.world.after(late_s, side.process, side.break_off, "connection reset")

    def died(self, machine: Machine, *, with_power: bool) -> None:
        """The daemon of `machine` is gone. With its machine up, the kernel says so at once."""
        self.presence.begins((machine.name, "down"), self.world.now_s)
        for end in self.ends_of(machine.name):
            end.is_open = False
            self.forget(end)
            if with_power:
                self._silence(end.other)
            else:
                self.say_closed(end, "connection reset", end._arrival_s)

    def rebooted(self, machine: Machine) -> None:
        """The kernel of a machine that came back refuses what belonged to its earlier life."""
        self.presence.ends((machine.name, "down"), self.world.now_s)
        self.presence.ends((machine.name, "frozen"), self.world.now_s)
        for ends in self._ends.values():
            for end in list(ends):
                if end.other.machine is machine and not end.other.is_open:
                    delay_s = HEARTBEAT_S * self.world.random.random()
                    self.world.after(delay_s, end.process, end.break_off, "connection reset")

    def froze(self, machine: Machine) -> None:
        """Nothing comes from `machine`: whoever has a conversation with it loses patience."""
        process = machine.process
        assert process is not None
        self.presence.begins((machine.name, "frozen"), self.world.now_s)
        freezes = process.freezes
        for end in self.ends_of(machine.name):
            if end.protocol == "control" and end.other.machine is not machine:
                self.world.after(
                    self._patience_s(), None, self._still_frozen, end, process, freezes
                )

    def thawed(self, machine: Machine) -> None:
        """It goes on: with what came meanwhile, in its order."""
        self.presence.ends((machine.name, "frozen"), self.world.now_s)

    def _still_frozen(self, end: End, process: Process, freezes: int) -> None:
        if process.frozen and process.freezes == freezes:
            other = end.other
            self.world.after(0.0, other.process, other.break_off, "silent for 5 s")

    def block(self, ways: Iterable[tuple[str, str]]) -> None:
        """Nothing arrives on these ways any more."""
        self._blockings += 1
        for way in ways:
            self.blocked[way] = self._blockings
            self.presence.begins(way, self.world.now_s)
            for end in self.ends_of(way[1]):
                if end.peer == way[0] and end.protocol == "control":
                    self.world.after(
                        self._patience_s(), end.process, self._still_blocked,
                        end, way, self._blockings,
                    )  # fmt: skip

    def watch_blocked_sender(self, end: End, way: tuple[str, str]) -> None:
        self.world.after(
            SEND_TIMEOUT_S, end.process, self._still_blocked, end, way, self.blocked[way]
        )

    def _still_blocked(self, end: End, way: tuple[str, str], blocking: int) -> None:
        if self.blocked.get(way) == blocking:
            end.break_off("silent for 5 s")

    def unblock(self, ways: Iterable[tuple[str, str]]) -> None:
        """The ways are free: what was held arrives, where streams still live."""
        for way in ways:
            if self.blocked.pop(way, None) is None:
                continue
            self.presence.ends(way, self.world.now_s)
            for end in self.ends_of(way[0]):
                if end.peer == way[1]:
                    end.release()
                    if not end.other.is_open:  # it closed while nobody could say so
                        self.say_closed(end.other, "reset the stream", 0.0)
            for end in self.ends_of(way[1]):
                if end.peer == way[0] and not end.other.is_open:
                    self.say_closed(end.other, "reset the stream", 0.0)

    @property
    def repeats(self) -> bool:
        return bool(self._repeats)

    def repeat_until(self, until_s: float, name: str) -> None:
        """What reaches or leaves this machine may arrive again, much later and on newer streams."""
        self._repeats[name] = until_s

    def repeat(self, end: End, message: Message, payload: bytes) -> None:
        """Remember a message that arrived, and let one of before arrive behind it."""
        names, chance = (end.machine.name, end.peer), self.world.random
        if names[0] == names[1]:
            return
        past = self._past.setdefault((*names, end.protocol), [])
        past.append((message, payload))
        del past[:-20]
        until_s = max(self._repeats.get(name, 0.0) for name in names)
        if self.world.now_s < until_s and chance.random() < 0.3 and end.other.is_open:
            again, its_payload = chance.choice(past)
            if not isinstance(again, Assign | Inquire) or chance.random() < 0.2:
                end.other.on_message(again, its_payload)

    def _silence(self, end: End) -> None:
        patience_s = self._patience_s()
        if end.protocol == "tensor":
            patience_s += SEND_TIMEOUT_S
        self.world.after(patience_s, end.process, end.break_off, "silent for 5 s")

    def _patience_s(self) -> float:
        return DEAD_AFTER_S + HEARTBEAT_S * self.world.random.random()


def _is_frozen(machine: Machine) -> bool:
    return machine.process is not None and machine.process.frozen


def _ignore(*_: Any) -> None:
    pass
