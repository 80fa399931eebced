"""The links of a swarm as matrices: what every placement cost reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmnode.errors import DataError

Matrix = NDArray[np.float64]
MAX_NODES = 4096
BYTES_PER_GBIT = 1e9 / 8
LEAST_BYTES_PER_S, MAX_LATENCY_S = 1.0, 1e9
"""A link that is slower is none: sums of such seconds would say nothing."""
LOCAL_BYTES_PER_S = 1e13
"""What a machine hands to itself is never on a wire: as good as free, and finite."""


@dataclass(frozen=True, eq=False)
class Topology:
    """Directed links among `num_nodes` machines; row sends, column receives.

    Shapes: latency_s and bytes_per_s are (N, N) float64. The diagonal is 0 s and
    `LOCAL_BYTES_PER_S`. A pair without a link has 0 bytes/s and is never used.
    """

    names: tuple[str, ...]
    latency_s: Matrix
    """One way."""
    bytes_per_s: Matrix
    regions: tuple[str, ...] = ()
    """Where each node is, as far as somebody said; otherwise empty."""

    @property
    def num_nodes(self) -> int:
        return len(self.names)

    def transfer_s(self, num_bytes: float) -> Matrix:
        """Seconds to send `num_bytes` over each link: latency + size / bandwidth; inf for none.

        Shapes: (N, N), 0 on the diagonal.
        """
        with np.errstate(divide="ignore"):
            seconds = self.latency_s + num_bytes / self.bytes_per_s
        np.fill_diagonal(seconds, 0.0)
        return np.asarray(seconds, dtype=np.float64)

    def take(self, nodes: Sequence[int]) -> "Topology":
        """The part of the swarm that `nodes` are, in that order."""
        rows = np.asarray(nodes, dtype=np.intp)
        return Topology(
            names=tuple(self.names[i] for i in nodes),
            latency_s=self.latency_s[np.ix_(rows, rows)],
            bytes_per_s=self.bytes_per_s[np.ix_(rows, rows)],
            regions=tuple(self.regions[i] for i in nodes) if self.regions else (),
        )


def make_topology(
    names: Sequence[str], latency_s: Matrix, bytes_per_s: Matrix, regions: Sequence[str] = ()
) -> Topology:
    """Check and complete the matrices: unknown (nan), negative or infinite means no link.

    So does less than LEAST_BYTES_PER_S or more than MAX_LATENCY_S; no link is faster than
    LOCAL_BYTES_PER_S.

    Raises: DataError for repeated names, wrong shapes, more than MAX_NODES nodes, or an odd
    number of regions.
    """
    count = len(names)
    if not 1 <= count <= MAX_NODES:
        raise DataError(f"a network of {count} nodes; give 1 to {MAX_NODES}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"the node {name!r:.80} is listed twice; give each node one name")
        seen.add(name)
    if regions and len(regions) != count:
        raise DataError(f"{len(regions)} regions for {count} nodes; give one for each, or none")
    latency, speed = (np.array(matrix, dtype=np.float64) for matrix in (latency_s, bytes_per_s))
    for what, matrix in (("latency", latency), ("bandwidth", speed)):
        if matrix.shape != (count, count):
            raise DataError(f"the {what} table is {matrix.shape}, but there are {count} nodes")
    off = ~np.eye(count, dtype=bool)
    is_near = (latency >= 0) & (latency <= MAX_LATENCY_S)
    broken = off & ~(is_near & (speed >= LEAST_BYTES_PER_S) & np.isfinite(speed))
    latency[broken], speed[broken] = 0.0, 0.0
    speed = np.minimum(speed, LOCAL_BYTES_PER_S)
    np.fill_diagonal(latency, 0.0)
    np.fill_diagonal(speed, LOCAL_BYTES_PER_S)
    return Topology(tuple(names), latency, speed, tuple(regions))


def load_network(path: Path) -> dict[str, Any]:
    """The JSON object in a network file. Raises: DataError with one line that says what to do."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"network file {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"network file {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"network file {path} is not a JSON object")
    return raw


def parse_topology(raw: Mapping[str, Any]) -> Topology:
    """A topology from `latency_ms` (one way) and `bandwidth_gbps` tables, with `names`, `regions`.

    A null in a table means that nobody knows the link: it is not used. Regions that name places
    rather than nodes (as many as the table has distinct rows) are left out.

    Raises: DataError naming the key that is missing or wrong.
    """
    tables = {}
    for key in ("latency_ms", "bandwidth_gbps"):
        try:
            rows = [[np.nan if x is None else float(x) for x in _row(row)] for row in raw[key]]
            tables[key] = np.array(rows, dtype=np.float64)
        except KeyError:
            raise DataError(f"the network has no {key}; give one row for each node") from None
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the network's {key} is not a square table of numbers: {error}"
            ) from None
    count = len(tables["latency_ms"])
    names = raw.get("names") or [f"node{i}" for i in range(count)]
    regions = raw.get("regions") or ()
    with np.errstate(over="ignore"):
        bytes_per_s = tables["bandwidth_gbps"] * BYTES_PER_GBIT
    return make_topology(
        [str(name) for name in names],
        tables["latency_ms"] / 1e3,
        bytes_per_s,
        tuple(str(region) for region in regions) if len(regions) == count else (),
    )


def _row(row: object) -> list[float | None]:
    """A row of a table. Raises: TypeError for a text, a truth value, or anything but a list."""
    if not isinstance(row, list):
        raise TypeError(f"{row!r:.40} is no list")
    odd = set(map(type, row)) - {int, float, type(None)}
    if odd:
        raise TypeError(f"a row holds a {min(kind.__name__ for kind in odd)}")
    return row
