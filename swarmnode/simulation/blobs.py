"""Content by its hash, from whoever has it: damaged content is refused and taken elsewhere."""

import hashlib
from collections.abc import Callable, Generator, Sequence

from swarmnode.domain import BlobRef
from swarmnode.simulation.network import Machine, Network

TIMEOUT_S = 20.0
"""As in p2p.blobs, for small blobs."""
Serve = Callable[[BlobRef], bytes | None]


class Blobs:
    """What every running daemon serves; `corrupt` names machines that serve damaged bytes."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.servers: dict[str, Serve] = {}
        """By machine: looks a blob up in what its daemon serves."""
        self.corrupt: set[str] = set()
        self.num_refused = 0

    def fetch(
        self, machine: Machine, ref: BlobRef, providers: Sequence[str], real_bytes: float
    ) -> Generator[float, None, bytes | None]:
        """The content of `ref`, which stands for `real_bytes`, from the first that can give it."""
        network = self._network
        for name in providers:
            if name == machine.name:
                data = self.servers[name](ref)
                if data is not None:
                    return data
                continue
            other = network.machines.get(name)
            if other is None:
                continue
            yield 4.0 * network.delay_s(machine, other, 0)
            if not network.joins(machine, other) or (other.process and other.process.frozen):
                yield TIMEOUT_S
                continue
            if not other.runs:
                continue
            data = self.servers[name](ref)
            if data is None:
                continue
            yield network.delay_s(other, machine, real_bytes)
            if not (network.joins(machine, other) and other.runs):
                yield TIMEOUT_S
                continue
            if name in self.corrupt:
                flip = network.world.random.randrange(len(data))
                data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
            if hashlib.sha256(data).hexdigest() == ref.sha256 and len(data) == ref.num_bytes:
                return data
            self.num_refused += 1
        return None


def ref_of(data: bytes) -> BlobRef:
    return BlobRef(hashlib.sha256(data).hexdigest(), len(data))
