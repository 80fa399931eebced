"""The simulated world itself: time, processes, disks, streams."""

from random import Random

import pytest

from swarmnode.domain import JobId
from swarmnode.heartbeats import Ping
from swarmnode.messages import Message
from swarmnode.simulation.directory import Directory, View
from swarmnode.simulation.disk import Disk
from swarmnode.simulation.network import End, Machine, Network, Protocol
from swarmnode.simulation.world import Process, World


class Listener:
    """A machine with a process; keeps what reaches it, and when."""

    def __init__(self, network: Network, name: str) -> None:
        self.world = network.world
        self.machine = Machine(name, latency_s=0.01)
        self.machine.process = Process(name)
        self.machine.accept = self._accept
        network.add(self.machine)
        self.heard: list[tuple[float, str]] = []
        self.ends: list[End] = []

    def _accept(self, end: End, _protocol: Protocol) -> None:
        self.attach(end)

    def attach(self, end: End) -> End:
        self.ends.append(end)
        end.on_message = lambda message, _: self.heard.append((self.world.now_s, message.job))
        end.on_closed = lambda reason: self.heard.append((self.world.now_s, reason))
        return end


def joined(protocol: Protocol = "control") -> tuple[World, Network, Listener, Listener]:
    world = World(1)
    network = Network(world)
    a, b = Listener(network, "a"), Listener(network, "b")
    assert a.machine.process is not None

    def dial():  # type: ignore[no-untyped-def]  # noqa: ANN202
        end = yield from network.open(a.machine, "b", protocol)
        a.attach(end)

    world.start(a.machine.process, dial())
    run(world, 1.0)
    assert len(a.ends) == len(b.ends) == 1
    return world, network, a, b


def run(world: World, until_s: float) -> None:
    world.after(until_s - world.now_s, None, lambda: None)
    while world.now_s < until_s:
        world.step()


def ping(text: str) -> Message:
    return Ping(JobId(text))


def test_events_happen_by_time_then_in_the_order_of_asking() -> None:
    world, seen = World(0), list[str]()
    for delay_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        world.after(delay_s, None, seen.append, name)
    run(world, 3.0)
    assert seen == ["a", "b", "c"]


def test_what_was_planned_for_a_dead_process_does_not_happen() -> None:
    world, seen, process = World(0), list[str](), Process("p")
    world.after(1.0, process, seen.append, "a")
    world.kill(process)
    run(world, 2.0)
    assert seen == []


def test_a_frozen_process_catches_up_in_order_when_it_thaws() -> None:
    world, seen, process = World(0), list[tuple[float, str]](), Process("p")
    for delay_s, name in ((1.0, "a"), (2.0, "b")):
        world.after(delay_s, process, lambda name=name: seen.append((world.now_s, name)))
    world.freeze(process)
    world.after(5.0, None, world.thaw, process)
    run(world, 6.0)
    assert seen == [(5.0, "a"), (5.0, "b")]


def test_a_stream_keeps_its_order_whatever_the_delays() -> None:
    world, _, a, b = joined()
    for number in range(50):
        a.ends[0].send(ping(str(number)))
    run(world, 3.0)
    assert [text for _, text in b.heard] == [str(number) for number in range(50)]


def test_adverts_are_believed_by_the_wall_clock_of_whoever_reads_them() -> None:
    world = World(0)
    directory, machines = Directory(world, lease_s=12.0), [Machine(name) for name in "abc"]
    for machine in machines:
        directory.publish(machine, flops=1e9, memory_bytes=1)
    views = [View(directory, machine) for machine in machines]
    a, b, _ = machines

    def seen() -> list[str]:
        return ["".join(advert.peer for advert in view.peers()) for view in views]

    assert seen() == ["abc"] * 3
    directory.turn_clock(a, 3600.0)
    run(world, 5.0)
    assert seen() == ["a", "abc", "abc"], "all leases have ended but its own; its last one is left"
    run(world, 20.0)
    assert seen() == ["a", "bc", "bc"], "what ends in an hour is not believed"
    directory.turn_clock(a, -3600.0)
    run(world, 40.0)
    assert seen() == ["abc"] * 3
    directory.turn_clock(b, 300.0)
    run(world, 50.0)
    directory.pause("b")
    run(world, 200.0)
    assert seen()[::2] == ["abc"] * 2, "a lease too long, but not too long to be believed"
    run(world, 400.0)
    assert seen()[::2] == ["ac"] * 2


def test_what_is_sent_into_a_partition_arrives_when_it_heals_soon() -> None:
    world, network, a, b = joined()
    network.block([("a", "b"), ("b", "a")])
    a.ends[0].send(ping("x"))
    run(world, 4.0)
    assert b.heard == []
    network.unblock([("a", "b"), ("b", "a")])
    run(world, 10.0)
    assert [text for _, text in b.heard] == ["x"]


@pytest.mark.parametrize("way", [("a", "b"), ("b", "a")])
def test_silence_for_long_breaks_a_conversation_at_both_ends(way: tuple[str, str]) -> None:
    world, network, a, b = joined()
    network.block([way])
    run(world, 8.0)
    network.unblock([way])
    run(world, 20.0)
    deaf, other = (b, a) if way == ("a", "b") else (a, b)
    assert [text for _, text in deaf.heard] == ["silent for 5 s"]
    assert 6.0 <= deaf.heard[0][0] <= 7.1
    assert [text for _, text in other.heard] == ["reset the stream"]


def test_a_killed_daemon_is_known_at_once_and_a_dark_machine_by_its_silence() -> None:
    for with_power, earliest_s in ((False, 1.0), (True, 6.0)):
        world, network, a, b = joined()
        assert b.machine.process is not None
        world.kill(b.machine.process)
        network.died(b.machine, with_power=with_power)
        run(world, 10.0)
        assert len(a.heard) == 1
        assert earliest_s <= a.heard[0][0] <= earliest_s + 1.1


def test_a_cut_stream_delivers_a_beginning_of_what_was_on_its_way() -> None:
    world, network, a, b = joined()
    for number in range(20):
        a.ends[0].send(ping(str(number)))
    network.cut(a.ends[0])
    run(world, 20.0)
    texts = [text for _, text in b.heard if text != "connection reset"]
    assert texts == [str(number) for number in range(len(texts))]
    assert len(texts) < 20
    assert sum(text == "connection reset" for _, text in a.heard) == 1


def test_a_loss_of_power_keeps_what_was_synchronised() -> None:
    lengths = set()
    for seed in range(50):
        disk = Disk()
        disk.append("f", b"safe")
        disk.sync("f")
        disk.append("f", b"torn")
        assert disk.read("f") == b"safetorn"
        disk.lose_power(Random(seed))
        assert b"safetorn".startswith(disk.read("f"))
        lengths.add(len(disk.read("f")))
    assert min(lengths) == 4
    assert len(lengths) > 2


def test_what_an_earlier_process_left_can_be_made_safe_although_the_disk_is_full() -> None:
    disk = Disk()
    disk.append("f", b"left")
    disk.is_full = True
    disk.settle("f")
    for seed in range(10):
        disk.lose_power(Random(seed))
        assert disk.read("f") == b"left"


def test_a_full_disk_refuses_and_keeps_what_it_has() -> None:
    disk = Disk()
    disk.replace("f", b"old")
    disk.is_full = True
    with pytest.raises(OSError, match="No space"):
        disk.replace("f", b"new")
    assert disk.read("f") == b"old"
