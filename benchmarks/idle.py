"""What a node without a job costs: resident memory of the daemon and of its children, and CPU.

Prints one JSON line. Targets: daemon < 150 MB, with children < 600 MB, < 2 % of a core.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from _environment import environment

from swarmnode.cli.local_swarm import LocalSwarm


def main() -> None:
    """Start two nodes that know each other, let them settle, and measure the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settle-s", type=float, default=15.0)
    parser.add_argument("--measure-s", type=float, default=30.0)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, LocalSwarm(Path(root), options.nodes) as swarm:
        swarm.start()
        roles = swarm.node(0).client.node().pids
        time.sleep(options.settle_s)
        family = swarm.node(0).processes()
        before = {p.pid: sum(p.cpu_times()[:2]) for p in family}
        time.sleep(options.measure_s)
        cpu = {p.pid: (sum(p.cpu_times()[:2]) - before[p.pid]) / options.measure_s for p in family}
        rss = {p.pid: p.memory_info().rss for p in family}
        daemon = roles["daemon"]
        import_check = Path(f"/proc/{daemon}/maps").read_text() if Path("/proc").exists() else ""
        result = {
            "bench": "idle",
            "num_nodes": options.nodes,
            "daemon_rss_mb": rss[daemon] / 1e6,
            "with_children_rss_mb": sum(rss.values()) / 1e6,
            "daemon_cpu_percent": 100 * cpu[daemon],
            "with_children_cpu_percent": 100 * sum(cpu.values()),
            "torch_is_loaded_in_daemon": "libtorch" in import_check,
        }
    print(json.dumps({**result, **environment()}))


if __name__ == "__main__":
    main()
