"""Swarms and workloads that the tests of the training objective share."""

import numpy as np

from benchmarks.networks import irregular_swarm
from swarmnode.coordinator.cost.needs import Workload, ranges_of
from swarmnode.coordinator.cost.step_formula import Tables
from swarmnode.coordinator.cost.training import Device, tables_of
from swarmnode.coordinator.objective import Arrangement
from swarmnode.coordinator.topology import Topology, make_topology

GB = 1e9


def lan(count: int, *, latency_s: float = 0.0, bytes_per_s: float = 1e12) -> Topology:
    """All links alike."""
    names = [f"node{i}" for i in range(count)]
    shape = (count, count)
    return make_topology(names, np.full(shape, latency_s), np.full(shape, bytes_per_s))


def plain_work(num_layers: int, num_microbatches: int, **more: object) -> Workload:
    """A layer is 1 FLOP a microbatch and has one weight; nothing else costs anything."""
    values: dict[str, object] = {
        "num_layers": num_layers,
        "layer_flops": 1.0,
        "first_flops": 0.0,
        "last_flops": 0.0,
        "layer_weights": 1,
        "first_weights": 0,
        "last_weights": 0,
        "tied": False,
        "num_microbatches": num_microbatches,
        "activation_bytes": 0.0,
        "kept_bytes_per_layer": 0,
        "gradient_bytes_per_weight": 0.0,
    }
    return Workload(**{**values, **more})  # type: ignore[arg-type]


def plain_devices(*flops: float, room: float = 1e18) -> list[Device]:
    return [Device(f, 1e18, room) for f in flops]


def llama_like(*, hidden: int, num_microbatches: int, **more: object) -> Workload:
    """32 layers, sequences of 2048 tokens, one row a microbatch, int8 on the wire."""
    weights, tokens, words = 12 * hidden * hidden, 2048, 32_000
    values: dict[str, object] = {
        "layer_flops": (6.0 * weights + 12.0 * 2048 * hidden) * tokens,
        "last_flops": 6.0 * words * hidden * tokens,
        "layer_weights": weights,
        "first_weights": words * hidden,
        "last_weights": words * hidden,
        "activation_bytes": 4.0 * tokens * hidden,
        "gradient_bytes_per_weight": 4.0,
        "kept_bytes_per_layer": 40 * tokens * hidden,
        "activation_share": 0.254,
        "activation_gradient_share": 0.254,
        "gradient_share": 0.254,
    }
    return plain_work(32, num_microbatches, **{**values, **more})


def uneven_devices(count: int, seed: int) -> list[Device]:
    """Speeds spread 10 times, memory 24, 16, 12 and 8 GB, in no order."""
    random = np.random.default_rng(seed)
    speeds = np.geomspace(4e12, 4e13, count)[random.permutation(count)]
    rooms = np.array([24, 16, 12, 8])[np.arange(count) % 4] * GB
    return [Device(f, 3e11, room) for f, room in zip(speeds.tolist(), rooms.tolist(), strict=True)]


def random_case(seed: int) -> tuple[Arrangement, Tables]:
    """A random arrangement on a random swarm: from bound by compute to bound by the network."""
    random = np.random.default_rng(seed)
    stages, slots = int(random.integers(1, 9)), int(random.choice([1, 2, 4, 8]))
    count = stages * slots + 2
    if random.random() < 0.5:
        count = int(random.integers(1, stages * slots + 1))
    speed = 10 ** random.uniform(11, 13.5)
    devices = [Device(speed * 10 ** random.uniform(0, 1), 1e15, 1e18) for _ in range(count)]
    layers = stages * int(random.integers(1, 5))
    work = plain_work(
        layers,
        slots * int(random.choice([1, 2, 4, 8, 16])),
        layer_flops=1e12,
        last_flops=5e11,
        layer_weights=int(10 ** random.uniform(5, 7.5)),
        first_weights=10**6,
        last_weights=10**6,
        tied=bool(random.random() < 0.3),
        activation_bytes=10 ** random.uniform(4, 7),
        gradient_bytes_per_weight=4.0,
    )
    tables = tables_of(irregular_swarm(count, seed), devices, work, stages, slots)
    if count <= stages * slots:
        hosts = random.integers(0, count, stages * slots)
    else:
        hosts = random.permutation(count)[: stages * slots]
    grid = hosts.reshape(stages, slots).tolist()
    counts = [layers // stages] * stages
    return Arrangement(tuple(map(tuple, grid)), ranges_of(counts)), tables
