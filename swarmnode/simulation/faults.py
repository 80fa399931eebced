"""What goes wrong, when, and to whom: a seeded schedule, and coming and going by availability."""

from typing import TYPE_CHECKING

from swarmnode.simulation.invariants import Violation
from swarmnode.simulation.network import Machine
from swarmnode.simulation.scenario import FaultKind

if TYPE_CHECKING:
    from swarmnode.simulation.daemon import Daemon
    from swarmnode.simulation.swarm import Swarm

RESTARTS_S = (0.2, 1.0, 3.0, 8.0)
LENGTHS_S = (0.5, 2.0, 4.0, 7.0, 15.0)
AT_COORDINATOR = 0.3
"""Share of faults that hit a machine that coordinates."""
STAYS_WRONG = 0.5
"""Share of clocks that never jump back, of those that may."""
MOST_NODES = 6
SAY_AGAIN_S = 1.0
"""As in worker.service."""
DRAIN_S = 20.0
"""Who leaves goes after so long, also where it was not let go."""
PEACEFUL = frozenset({"leave", "join"})
"""Where nothing but these happens, everybody who leaves is let go within DRAIN_S."""
CLOCK_JUMPS_S = (90.0, 420.0, 3600.0, 6 * 3600.0)
"""Forward or back. Adverts of the first two are believed for a while, as they end within 600 s."""


class Faults:
    """Plans faults and lets them happen; all of them are mended soon after the last one began."""

    def __init__(self, swarm: "Swarm") -> None:
        self._swarm = swarm
        self._chance = swarm.world.random
        self._num_wiped = 0
        self._wrong: Machine | None = None
        """Whose clock stays wrong."""
        section = swarm.scenario.faults
        self.last_s = 0.0 if section is None else section.last_s + max(LENGTHS_S)
        """By then everything that was broken is mended."""

    def schedule(self) -> None:
        """Put the whole schedule into the world's future."""
        section, world = self._swarm.scenario.faults, self._swarm.world
        if section is not None:
            at_s = section.first_s * self._chance.random()
            while at_s < section.last_s:
                world.after(at_s, None, self._happen, self._chance.choice(section.kinds))
                at_s += world.exponential_s(section.every_s)
        if self._swarm.scenario.availability is not None:
            for machine in self._swarm.network.machines.values():
                self._stay(machine)

    # ---- one fault -------------------------------------------------------------------------

    def _happen(self, kind: FaultKind) -> None:
        getattr(self, f"_{kind}")(self._somebody())

    def _somebody(self) -> Machine:
        swarm = self._swarm
        running = [m for m in swarm.network.machines.values() if m.runs]
        heads = [m for m in running if swarm.daemons[m.name].coordinates()]
        if heads and self._chance.random() < AT_COORDINATOR:
            return self._chance.choice(heads)
        return self._chance.choice(running or list(swarm.network.machines.values()))

    def _tell(self, machine: Machine, kind: str) -> None:
        self._swarm.world.tell(machine.name, f"fault: {kind}")
        self._swarm.disturbed(machine.name)
        self._swarm.hit(machine.name, kind)

    def _end(self, machine: Machine, kind: str, *, with_power: bool, back_s: float) -> None:
        if machine.runs:
            self._tell(machine, kind)
            self._swarm.kill(machine, with_power=with_power)
            self._swarm.world.after(back_s, None, self._start, machine)

    def _start(self, machine: Machine) -> None:
        if not machine.runs:
            self._swarm.boot(machine)

    def _kill(self, machine: Machine) -> None:
        back_s = self._chance.choice(RESTARTS_S)
        self._end(machine, "kill", with_power=False, back_s=back_s)

    def _power(self, machine: Machine) -> None:
        back_s = 3.0 + self._chance.choice(LENGTHS_S)
        self._end(machine, "power", with_power=True, back_s=back_s)

    def _wipe(self, machine: Machine) -> None:
        """The disk is lost; not that of a voter without which the others are no majority."""
        section = self._swarm.scenario.faults
        if section is None or self._num_wiped >= section.most_wiped or not machine.runs:
            return
        if self._swarm.daemons[machine.name].coordinates():
            return
        if not self._swarm.invariants.has_majority_without(machine.name):
            return
        self._num_wiped += 1
        self._end(machine, "wipe", with_power=True, back_s=3.0 + self._chance.choice(LENGTHS_S))
        machine.disk.wipe()
        self._swarm.invariants.wiped(machine.name)

    def _freeze(self, machine: Machine) -> None:
        process = machine.process
        if process is None or not process.alive or process.frozen:
            return
        self._tell(machine, "freeze")
        swarm = self._swarm
        swarm.world.freeze(process)
        swarm.network.froze(machine)
        swarm.directory.pause(machine.name)

        def thaw() -> None:
            if process.alive:
                swarm.world.tell(machine.name, "thaws")
                swarm.world.thaw(process)
                swarm.network.thawed(machine)
                swarm.directory.resume(machine.name)
                swarm.disturbed(machine.name)

        swarm.world.after(self._chance.choice(LENGTHS_S), None, thaw)

    def _block(self, ways: list[tuple[str, str]], touched: list[Machine], kind: str) -> None:
        network = self._swarm.network
        ways = [way for way in ways if way not in network.blocked]
        for machine in touched:
            self._tell(machine, kind)
        network.block(ways)

        def heal() -> None:
            self._swarm.world.tell("", f"{kind} heals")
            network.unblock(ways)
            for machine in touched:
                self._swarm.disturbed(machine.name)

        self._swarm.world.after(self._chance.choice(LENGTHS_S), None, heal)

    def _partition(self, machine: Machine) -> None:
        """Some machines, this one among them, and the rest do not hear each other."""
        machines = list(self._swarm.network.machines.values())
        others = [m for m in machines if m is not machine]
        self._chance.shuffle(others)
        cut = self._chance.randint(0, max(0, len(others) - 1))
        inside, outside = [machine, *others[:cut]], others[cut:]
        ways = [(a.name, b.name) for a in inside for b in outside]
        self._block(ways + [(b, a) for a, b in ways], machines, "partition")

    def _one_way(self, machine: Machine) -> None:
        """What this machine says does not arrive, at some or at all of the others."""
        others = [m for m in self._swarm.network.machines.values() if m is not machine]
        deaf = self._chance.sample(others, self._chance.randint(1, len(others)))
        ways = [(machine.name, other.name) for other in deaf]
        if self._chance.random() < 0.5:
            ways = [(b, a) for a, b in ways]
        self._block(ways, [machine, *deaf], "one way")

    def _cut(self, machine: Machine) -> None:
        network = self._swarm.network
        ends = [end for end in network.ends_of(machine.name) if end.other.machine is not machine]
        if ends:
            self._tell(machine, "cut")
            for end in self._chance.sample(ends, self._chance.randint(1, min(3, len(ends)))):
                network.cut(end)

    def _slow_network(self, machine: Machine) -> None:
        network = self._swarm.network
        self._tell(machine, "slow network")
        network.factor = self._chance.choice((3.0, 10.0, 40.0))

        def heal() -> None:
            network.factor = 1.0

        self._swarm.world.after(self._chance.choice(LENGTHS_S), None, heal)

    def _repeat(self, machine: Machine) -> None:
        """For a while, messages of before come again, on the streams of now."""
        self._tell(machine, "repeat")
        self._swarm.network.repeat_until(
            self._swarm.world.now_s + self._chance.choice(LENGTHS_S), machine.name
        )

    def _corrupt(self, machine: Machine) -> None:
        corrupt = self._swarm.blobs.corrupt
        self._tell(machine, "corrupt")
        corrupt.add(machine.name)

        def heal() -> None:
            corrupt.discard(machine.name)

        self._swarm.world.after(self._chance.choice(LENGTHS_S), None, heal)

    def _full_disk(self, machine: Machine) -> None:
        disk = machine.disk
        self._tell(machine, "full disk")
        disk.is_full = True
        presence, world = self._swarm.network.presence, self._swarm.world
        presence.begins((machine.name, "full"), world.now_s)

        def heal() -> None:
            disk.is_full = False
            presence.ends((machine.name, "full"), world.now_s)
            self._swarm.disturbed(machine.name)

        self._swarm.world.after(self._chance.choice(LENGTHS_S), None, heal)

    def _slow_disk(self, machine: Machine) -> None:
        disk = machine.disk
        self._tell(machine, "slow disk")
        disk.sync_s = self._chance.choice((0.05, 0.5, 2.0))

        def heal() -> None:
            disk.sync_s = 0.001

        self._swarm.world.after(self._chance.choice(LENGTHS_S), None, heal)

    def _clock(self, machine: Machine) -> None:
        """The wall clock jumps, and later back; that of one machine, perhaps, never."""
        if machine is self._wrong:
            return  # right for a while, it would win an election, and then see nobody
        jump_s = self._chance.choice(CLOCK_JUMPS_S) * self._chance.choice((-1.0, 1.0))

        def turn(seconds: float) -> None:
            self._swarm.world.tell(machine.name, f"its clock jumps by {seconds:+.0f} s")
            self._swarm.directory.turn_clock(machine, seconds)
            self._swarm.disturbed(machine.name)

        self._tell(machine, "clock")
        turn(jump_s)
        if self._chance.random() < STAYS_WRONG and self._may_stay_wrong(machine):
            self._wrong = machine
        else:
            self._swarm.world.after(self._chance.choice(LENGTHS_S), None, turn, -jump_s)

    def _may_stay_wrong(self, machine: Machine) -> bool:
        """Who sees nobody cannot begin a job, nor place it anew: not one that coordinates."""
        swarm = self._swarm
        has_begun = all(map(swarm.invariants.num_committed, swarm.manifests))
        is_first = self._wrong is None
        return has_begun and is_first and not swarm.daemons[machine.name].coordinates()

    def _rot(self, machine: Machine) -> None:
        """The power fails, and a bit flips in a state or a log; promises and journals stay."""
        if machine.runs:
            self._end(machine, "rot", with_power=True, back_s=3.0 + self._chance.choice(LENGTHS_S))
            self._flip(machine)

    def _live_rot(self, machine: Machine) -> None:
        """The same under a running daemon, which has looked at its files when it started."""
        self._tell(machine, "live rot")
        swarm = self._swarm
        swarm.network.presence.begins((machine.name, "rotten"), swarm.world.now_s)
        self._flip(machine)

    def _flip(self, machine: Machine) -> None:
        paths = [path for path in machine.disk.paths("jobs/") if "/stage-" in path]
        if paths:
            machine.disk.rot(self._chance.choice(paths), self._chance)
            self._swarm.invariants.damaged(machine.name)

    def _child(self, machine: Machine) -> None:
        if machine.runs:
            self._tell(machine, "child")
            for hosting in list(self._swarm.daemons[machine.name].hostings.values()):
                hosting.work.crash()

    def _leave(self, machine: Machine) -> None:
        """The machine says that it goes until it is let go, or for a while; it comes back."""
        if machine.runs:
            daemon = self._swarm.daemons[machine.name]
            self._drain(machine, daemon, self._swarm.world.now_s)

    def _drain(self, machine: Machine, daemon: "Daemon", since_s: float) -> None:
        swarm, section = self._swarm, self._swarm.scenario.faults
        if not machine.runs or swarm.daemons[machine.name] is not daemon:
            return
        hostings = [hosting for hosting in daemon.hostings.values() if not hosting.is_alone]
        is_late = swarm.world.now_s - since_s >= DRAIN_S
        if hostings and is_late and section is not None and set(section.kinds) <= PEACEFUL:
            raise Violation(f"{machine.name} wants to leave and is not let go in {DRAIN_S:.0f} s")
        if not hostings or is_late:
            self._end(machine, "leave", with_power=False, back_s=5.0)
            return
        if not daemon.process.frozen:
            for hosting in hostings:
                hosting.say_leaving()
        swarm.world.after(SAY_AGAIN_S, None, self._drain, machine, daemon, since_s)

    def _join(self, _machine: Machine) -> None:
        if len(self._swarm.network.machines) < MOST_NODES:
            self._swarm.add_machine()

    # ---- volunteers ------------------------------------------------------------------------

    def _stay(self, machine: Machine) -> None:
        """The machine is there for a while."""
        availability = self._swarm.scenario.availability
        assert availability is not None
        stay_s = self._swarm.world.exponential_s(availability.session_h * 3600.0)
        self._swarm.world.after(stay_s, None, self._go, machine)

    def _go(self, machine: Machine) -> None:
        availability, chance = self._swarm.scenario.availability, self._chance
        assert availability is not None
        if not machine.runs:
            self._stay(machine)
            return
        if chance.random() < availability.polite_share:
            for hosting in self._swarm.daemons[machine.name].hostings.values():
                hosting.say_leaving()
            self._swarm.world.after(60.0, None, self._gone, machine, "leave")
        else:
            self._gone(machine, chance.choice(("kill", "power")))

    def _gone(self, machine: Machine, kind: str) -> None:
        availability = self._swarm.scenario.availability
        assert availability is not None
        self._tell(machine, kind)
        self._swarm.kill(machine, with_power=kind == "power")
        if self._chance.random() < availability.lost_share:
            machine.disk.wipe()
            self._swarm.invariants.wiped(machine.name)
        away_s = self._swarm.world.exponential_s(availability.away_h * 3600.0)
        self._swarm.world.after(away_s, None, self._come_back, machine)

    def _come_back(self, machine: Machine) -> None:
        self._start(machine)
        self._stay(machine)
