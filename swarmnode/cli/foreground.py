"""`swarmnode up`: a node in the foreground."""

from swarmnode.config import NodeConfig
from swarmnode.daemon import run
from swarmnode.node import Node


def run_node(config: NodeConfig) -> int:
    """Run a node until a signal ends it; the exit status."""
    return run(config, _announce)


def _announce(node: Node) -> None:
    """Say where the node is, once it is there."""
    view = node.node()
    print(f"node     {view.peer}", f"home     {view.home}", f"device   {view.device}", sep="\n")
    print(f"page     {view.http_address}")
    print(f"join by  swarmnode up --join {view.join_address}", flush=True)
