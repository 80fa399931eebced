"""Who is here, as the directory says it: adverts are renewed while a daemon runs, and expire.

Every daemon judges by the wall clock of its machine, with the product's own `Membership`. The
directory itself keeps the right time: most of the nodes that hold it do.
"""

import math
from dataclasses import replace

from swarmnode.domain import Advert, DeviceSpec, Limits, PeerId
from swarmnode.p2p.adverts import BadAdvertError, check_lease
from swarmnode.p2p.membership import Membership, Records
from swarmnode.simulation.network import Machine
from swarmnode.simulation.world import World

WALL_START_S = 1.7e9
"""What a right clock shows when a run begins, in seconds since 1970."""


class Directory:
    """All adverts. Who dies or freezes is listed until the lease ends."""

    def __init__(self, world: World, lease_s: float) -> None:
        self.lease_s = lease_s
        self.world = world
        self._machines: dict[str, Machine] = {}
        self._adverts: dict[str, Advert] = {}
        """What each machine said last, with its lease by its own clock."""
        self._stored: dict[str, Advert] = {}
        """What the directory took of that."""
        self._renewed_s: dict[str, float] = {}
        self._lives: dict[str, bool] = {}

    def wall_s(self, machine: Machine) -> float:
        """What the wall clock of a machine shows."""
        return WALL_START_S + self.world.now_s + machine.clock_off_s

    def publish(self, machine: Machine, *, flops: float, memory_bytes: int) -> None:
        """A daemon has started."""
        name, peer = machine.name, PeerId(machine.name)
        device = DeviceSpec("cpu", name, {"float32": flops}, 1e10, memory_bytes, memory_bytes, 1)
        limits, incarnation = Limits(memory_bytes, 1), int(self.wall_s(machine) * 1e3)
        self._machines[name] = machine
        self._adverts[name] = Advert(peer, (name,), device, limits, "0", incarnation, 0.0)
        self._lives[name] = True
        self._advertise(name, self.world.now_s)

    def incarnation(self, name: str) -> int:
        """Of the life of a machine's daemon that is its last so far."""
        return self._adverts[name].incarnation

    def pause(self, name: str) -> None:
        """The daemon does not renew any more, for now or for ever."""
        self._renew(name)
        self._lives[name] = False

    def resume(self, name: str) -> None:
        self._lives[name] = True

    def turn_clock(self, machine: Machine, seconds: float) -> None:
        """From now on the wall clock of a machine shows so much more."""
        self._renew(machine.name)
        machine.clock_off_s += seconds

    def records(self, reader: str) -> dict[str, bytes]:
        """A record of everybody who is listed, by name; a reader knows its own in any case."""
        now_s = WALL_START_S + self.world.now_s
        for name in self._adverts:
            self._renew(name)
        listed = {name: b"" for name, a in self._stored.items() if a.expires_at_s > now_s}
        return {**listed, reader: b""}

    def decode(self, reader: str, now_s: float, owner: str | None) -> Advert:
        """The advert in the record of `owner`. Raises: BadAdvertError."""
        assert owner is not None
        advert = (self._adverts if owner == reader else self._stored)[owner]
        check_lease(advert, now_s)
        return advert

    def _renew(self, name: str) -> None:
        between_s = self.lease_s / 3
        num_due = (self.world.now_s - self._renewed_s[name]) // between_s
        if self._lives[name] and num_due:
            self._advertise(name, self._renewed_s[name] + num_due * between_s)

    def _advertise(self, name: str, at_s: float) -> None:
        right_s = WALL_START_S + at_s
        until_s = right_s + self._machines[name].clock_off_s + self.lease_s
        self._renewed_s[name] = at_s
        advert = self._adverts[name] = replace(self._adverts[name], expires_at_s=until_s)
        stored = self._stored.get(name)
        if stored is not None and right_s < stored.expires_at_s >= until_s:
            return  # as the DHT does it: what ends later stays
        try:
            check_lease(advert, right_s)
        except BadAdvertError:
            return
        self._stored[name] = advert


class View:
    """Who is here, as one daemon sees it in one life."""

    def __init__(self, directory: Directory, machine: Machine) -> None:
        self._directory = directory
        self._machine = machine
        self._membership = Membership(lease_s=directory.lease_s, decode=self._decode)
        self._looked_s = -math.inf

    def peers(self) -> tuple[Advert, ...]:
        """Everybody with a valid lease, by name."""
        directory, machine = self._directory, self._machine
        now_s, wall_s = directory.world.now_s, directory.wall_s(machine)
        if now_s - self._looked_s > directory.lease_s / 8:
            self._looked_s = now_s
            self._membership.handle(Records(directory.records(machine.name)), wall_s)
        return self._membership.peers(wall_s)

    def _decode(self, record: bytes, now_s: float, *, owner: str | None) -> Advert:
        assert not record, "the name is all that there is"
        return self._directory.decode(self._machine.name, now_s, owner)
