"""Instances to serve on: random, alike and small, and the published one."""

from typing import Any

import numpy as np

from swarmnode.coordinator.cost.serving import (
    ServingInstance,
    parse_serving,
)
from swarmnode.coordinator.objective import Effort
from swarmnode.coordinator.topology import make_topology

QUICK = Effort(moves=60_000)


def random_instance(
    seed: int, num_nodes: int, num_layers: int, *, sparse: bool = False
) -> ServingInstance:
    """Rates that fall faster than 1 / layers, links that bind now and then, ends that do too."""
    random = np.random.default_rng(seed)
    k = np.arange(1, num_layers + 1)
    peak = random.uniform(5, 50, num_nodes)
    rate = peak[:, None] / k ** random.uniform(1.0, 1.6, (num_nodes, 1))
    rate[k > random.integers(1, num_layers + 1, num_nodes)[:, None]] = 0.0
    link = random.uniform(1, 40, (num_nodes, num_nodes))
    link *= random.random((num_nodes, num_nodes)) > (0.4 if sparse else 0.0)
    np.fill_diagonal(link, 0.0)
    late = random.uniform(0.01, 0.1, (num_nodes, num_nodes))
    names = [f"n{i}" for i in range(num_nodes)]
    return ServingInstance(
        topology=make_topology(names, late, link),
        num_layers=num_layers,
        rate=np.column_stack([np.zeros(num_nodes), rate]),
        link_tokens_per_s=link,
        source_tokens_per_s=random.uniform(2, 60, num_nodes),
        sink_tokens_per_s=random.uniform(2, 60, num_nodes),
        layer_s=random.uniform(0.0, 0.02, num_nodes),
        kinds=tuple(names),
    )


def alike_instance(
    num_nodes: int = 6, rates: tuple[float, ...] = (10.0, 4.0, 2.0), num_layers: int = 6
) -> ServingInstance:
    return parse_serving(raw_network(num_nodes, rates, num_layers))


def raw_network(
    num_nodes: int = 6, rates: tuple[float, ...] = (10.0, 4.0, 2.0), num_layers: int = 6
) -> dict[str, Any]:
    return {
        "layers": num_layers,
        "node_types": ["small"] * num_nodes,
        "tokens_per_s_by_layers": {"small": list(rates)},
        "link_tokens_per_s": [[100.0] * num_nodes for _ in range(num_nodes)],
        "link_latency_s": [[0.001] * num_nodes for _ in range(num_nodes)],
        "source_tokens_per_s": [1e6] * num_nodes,
        "sink_tokens_per_s": [1e6] * num_nodes,
    }


HELIX_RATES = {
    "A100": [
        23833.8699,
        11384.2547,
        7201.4124,
        5264.6234,
        4096.6545,
        3124.1431,
        2595.6793,
        2045.6410,
        1754.3819,
        1392.6348,
        1212.1768,
        952.1074,
    ],
    "L4": [
        7557.8630,
        3625.7147,
        2171.8782,
        1476.0846,
        1017.5728,
        747.7854,
        531.7026,
    ],
    "T4": [
        5709.2079,
        2434.3672,
        1347.8665,
        757.8532,
    ],
}
"""Tokens/s by layers held, LLaMA-70B. Source: Thesys-lab/Helix-ASPLOS25 at 148b733, single24."""


def helix_instance() -> ServingInstance:
    """single24: 4 A100, 8 L4 and 12 T4 at 10 Gbit/s and 1 ms among all."""
    types = ["A100"] * 4 + ["L4"] * 8 + ["T4"] * 12
    return parse_serving(
        {
            "layers": 80,
            "node_types": types,
            "tokens_per_s_by_layers": HELIX_RATES,
            "link_tokens_per_s": [[61035.15625] * 24] * 24,
            "link_latency_s": [[0.001] * 24] * 24,
            "source_tokens_per_s": [5e8] * 24,
            "sink_tokens_per_s": [5e8] * 24,
        }
    )
