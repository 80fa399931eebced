"""What local steps save on the wire, and what they cost in loss, in a real swarm.

    python benchmarks/local_steps.py [--steps 480] [--seed 3] [--sync SYNC ...]

Four daemons on this machine's loopback train the same small byte model, 2 stages x 2 slots, on
the same samples: first with a gradient exchanged every step (`none`), then with each SYNC, whose
H divides the steps. Equal are the tokens and AdamW's learning rate, which nobody has tuned for any
of them. One JSON line for each: held-out loss, and bytes sent between the machines for gradients
or differences (shares and sums), as the workers count them. Times are not measured.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from _environment import environment

from swarmnode.cli.demo_data import write_stdlib_sources
from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.errors import SwarmError
from swarmnode.http.api import JobView
from swarmnode.presets import byte_llama_config
from swarmnode.sync_specs import parse_sync

NUM_NODES = 4
DATA_BYTES = 2_000_000
LIMIT_S = 600.0
MODEL = {**byte_llama_config(), "hidden_size": 64, "intermediate_size": 128}
SYNCS = ("diloco,every=10", "diloco,every=10,codec=int4/32", "sparseloco,every=10,outer=sgd2")


def job_of(data: Path, sync: str | None, steps: int, seed: int) -> dict[str, Any]:
    """The job of `steps` local steps."""
    every = 1 if sync is None else parse_sync(sync).every
    if steps % every:
        raise SystemExit(f"{sync}: {steps} steps are not whole rounds of {every}")
    return {
        "name": "local-steps",
        "model": {"config": MODEL},
        "data": {"path": str(data), "max_bytes": DATA_BYTES},
        "batch": {"rows": 4, "sequence_length": 64, "num_microbatches": 4},
        "codecs": {"sync": sync} if sync is not None else {},
        "placement": {"stages": 2, "slots": 2, "min_peers": NUM_NODES},
        "run": {"steps": steps // every, "seed": seed, "checkpoint_every": 0},
    }


def trained(swarm: LocalSwarm, job: dict[str, Any], root: Path) -> JobView:
    """The job when all its steps are done. Raises: SwarmError if that takes too long."""
    swarm.wait_for_peers(NUM_NODES)
    client = swarm.node(0).client
    name = client.submit(job, root)
    until_s = time.monotonic() + LIMIT_S
    while (view := client.job(name)).phase != "serving":
        if time.monotonic() > until_s or view.phase in ("failed", "stopped"):
            raise SwarmError(f"the job is {view.phase} after step {view.step}: {view.reason}")
        time.sleep(0.2)
    client.stop(name)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--sync", action="append", help="again for another; three unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarmnode-local-") as folder:
        root = Path(folder)
        write_stdlib_sources(root / "data", DATA_BYTES, options.seed)
        with LocalSwarm(root / "swarm", NUM_NODES) as swarm:
            swarm.start()
            for sync in (None, *(options.sync or SYNCS)):
                view = trained(
                    swarm, job_of(root / "data", sync, options.steps, options.seed), root
                )
                sent = view.bytes_by_kind
                figures = {
                    "sync": sync or "none",
                    "local_steps": options.steps,
                    "commits": view.step,
                    "tokens": view.tokens_total,
                    "val_loss": view.val_loss,
                    "loss": view.loss,
                    "exchange_bytes": sent.get("gradient", 0) + sent.get("reduced", 0),
                    "recoveries": view.recoveries,
                }
                line = {"bench": "local_steps", "seed": options.seed, **figures}
                print(json.dumps({**line, **environment(["torch"])}), flush=True)


if __name__ == "__main__":
    main()
