"""Networks to place on: the five cases of DT-FM, and irregular swarms of any size from a seed.

Source: the region table and the five cases are DT-FM's (Yuan et al., arXiv:2206.01288, code
DS3Lab/DT-FM at cda948f): latency one way in ms, bandwidth in Gbit/s, among ten AWS regions.
"""

import numpy as np

from swarmnode.coordinator.topology import BYTES_PER_GBIT, Topology, make_topology

REGIONS = (
    "Oregon", "Virginia", "Ohio", "Tokyo", "Seoul",
    "Singapore", "Sydney", "London", "Frankfurt", "Ireland",
)  # fmt: skip
LATENCY_MS = np.array([
    [5, 67, 49, 96, 124, 163, 139, 136, 143, 124],
    [67, 5, 11, 143, 172, 230, 197, 76, 90, 67],
    [49, 11, 5, 130, 159, 197, 185, 86, 99, 77],
    [96, 143, 130, 5, 34, 73, 100, 210, 223, 199],
    [124, 172, 159, 34, 5, 74, 148, 238, 235, 228],
    [163, 230, 197, 73, 74, 5, 92, 169, 155, 179],
    [139, 197, 185, 100, 148, 92, 5, 262, 265, 254],
    [136, 76, 86, 210, 238, 169, 262, 5, 14, 12],
    [143, 90, 99, 223, 235, 155, 265, 14, 5, 24],
    [124, 67, 77, 199, 228, 179, 254, 12, 24, 5],
], dtype=np.float64)  # fmt: skip
BANDWIDTH_GBPS = np.array([
    [2, 0.79, 1.1, 0.523, 0.46, 0.341, 0.36, 0.42, 0.404, 0.482],
    [0.79, 2, 1.12, 0.524, 0.5, 0.364, 0.383, 1.16, 1.02, 1.05],
    [1.1, 1.12, 2, 0.694, 0.529, 0.452, 0.484, 1.05, 0.799, 1.14],
    [0.523, 0.524, 0.694, 2, 1.1, 1.01, 0.761, 0.366, 0.36, 0.465],
    [0.46, 0.5, 0.529, 1.1, 2, 1.14, 0.58, 0.342, 0.358, 0.335],
    [0.341, 0.364, 0.452, 1.01, 1.14, 2, 0.816, 0.5, 0.535, 0.492],
    [0.36, 0.383, 0.484, 0.761, 0.58, 0.816, 2, 0.326, 0.328, 0.344],
    [0.42, 1.16, 1.05, 0.366, 0.342, 0.5, 0.326, 2, 1.14, 1.09],
    [0.404, 1.02, 0.799, 0.36, 0.358, 0.535, 0.328, 1.14, 2, 1.08],
    [0.482, 1.05, 1.14, 0.465, 0.335, 0.492, 0.344, 1.09, 1.08, 2],
], dtype=np.float64)  # fmt: skip


def irregular_swarm(num_nodes: int, seed: int, *, jitter: float = 0.3) -> Topology:
    """Nodes drawn at random over the ten regions; bandwidth jitters by node and by pair.

    Each node and each pair has a log-normal factor of standard deviation `jitter` (natural log);
    a link's bandwidth is the table's times the pair's factor times the smaller node factor.
    """
    random = np.random.default_rng(seed)
    place = random.integers(0, len(REGIONS), num_nodes)
    node = random.lognormal(0.0, jitter, num_nodes)
    pair = random.lognormal(0.0, jitter, (num_nodes, num_nodes))
    pair = np.triu(pair, 1) + np.triu(pair, 1).T
    gbps = BANDWIDTH_GBPS[np.ix_(place, place)] * pair * np.minimum.outer(node, node)
    return make_topology(
        [f"node{i}" for i in range(num_nodes)],
        LATENCY_MS[np.ix_(place, place)] / 1e3,
        gbps * BYTES_PER_GBIT,
        [REGIONS[i] for i in place],
    )


def _blocks(place: np.ndarray, latency_ms: np.ndarray, gbps: np.ndarray) -> Topology:
    """Nodes of the same place all look alike."""
    count = len(place)
    return make_topology(
        [f"node{i}" for i in range(count)],
        latency_ms[np.ix_(place, place)] / 1e3,
        gbps[np.ix_(place, place)] * BYTES_PER_GBIT,
        [str(i) for i in place],
    )


def dtfm_case(number: int) -> Topology:
    """Case 0 data center, 1 spot, 2 two data centers, 3 four regions, 4 eight cities; 64 nodes."""
    match number:
        case 0 | 1:
            boxes = np.repeat(np.arange(8), 8) if number == 0 else _spot_boxes()
            across, count = (3.125, 8) if number == 0 else (1.25, 40)
            gbps = np.where(np.eye(count, dtype=bool), 100.0, across)
            return _blocks(boxes, np.zeros((count, count)), gbps)
        case 2:
            same = np.eye(2, dtype=bool)
            place = np.repeat(np.arange(2), 32)
            return _blocks(place, np.where(same, 1.0, 11.0), np.where(same, 5.0, 1.12))
        case 3:
            return _four_regions()
        case 4:
            cities = [i for i, name in enumerate(REGIONS) if name not in ("Singapore", "Sydney")]
            return _blocks(np.repeat(cities, 8), LATENCY_MS, BANDWIDTH_GBPS)
    raise ValueError(f"DT-FM has no case {number}")


def _spot_boxes() -> np.ndarray:
    """Eight machines with four GPUs, then 32 with one."""
    return np.concatenate([np.repeat(np.arange(8), 4), np.arange(8, 40)])


def _four_regions() -> Topology:
    """Virginia, Oregon, California, Ohio."""
    latency = np.array([[5, 67, 59, 11], [67, 5, 12, 49], [59, 12, 5, 52], [11, 49, 52, 5]])
    gbps = np.array(
        [[2, 1.15, 1.05, 1.12], [1.15, 2, 1.25, 1.1], [1.05, 1.25, 2, 1.02], [1.12, 1.1, 1.02, 2]]
    )
    return _blocks(np.repeat(np.arange(4), 16), latency.astype(np.float64), gbps)
