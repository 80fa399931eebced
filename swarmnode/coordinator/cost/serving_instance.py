"""What a placement for serving starts from: rates by layers held, links in tokens, latencies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swarmnode.coordinator.topology import Matrix, Topology, make_topology
from swarmnode.errors import DataError

MAX_LAYERS = 1024
MAX_TOKENS_PER_S = 1e9
"""No rate or link counts as faster: sums stay exact enough."""
HELIX_BYTES_PER_TOKEN = 16384
"""Bytes of one token between two layers of LLaMA-70B: 8192 values of 2 bytes."""


@dataclass(frozen=True, eq=False)
class ServingInstance:
    """One model on one swarm of N nodes.

    Shapes: rate (N, K + 1), link_tokens_per_s and latency_s (N, N), the others (N,); float64.
    """

    topology: Topology
    num_layers: int
    rate: Matrix
    """Tokens/s that a node serves while it holds k layers; 0 where k layers do not fit."""
    link_tokens_per_s: Matrix
    """Row sends, column receives; 0 for no link, and on the diagonal."""
    source_tokens_per_s: Matrix
    """From where prompts come in to each node; 0 where it cannot be the first."""
    sink_tokens_per_s: Matrix
    layer_s: Matrix
    """Seconds that one layer adds to the latency of a token on each node; 0 where unknown."""
    kinds: tuple[str, ...]
    """What each node is, in words; nodes of one kind may still differ in their links."""

    @property
    def num_nodes(self) -> int:
        return len(self.kinds)

    @property
    def latency_s(self) -> Matrix:
        return self.topology.latency_s


@dataclass(frozen=True)
class ServingDevice:
    """What serving needs to know of a machine, as measured."""

    kind: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    """Floating point operations per second at the precision that serves."""


@dataclass(frozen=True)
class ServingModel:
    """What serving needs to know of a model; all layers count as alike."""

    num_layers: int
    layer_bytes: float
    kv_bytes_per_token: float
    """Keys and values of one token in one layer."""
    layer_flops_per_token: float
    activation_bytes_per_token: float
    """What goes from layer to layer for one token."""


def serving_instance(
    topology: Topology,
    devices: Sequence[ServingDevice],
    model: ServingModel,
    *,
    context_tokens: int,
    max_batch: int = 1024,
) -> ServingInstance:
    """Rates of our own machines from memory and a roofline.

    A machine that holds k layers has room for a batch of B sequences of `context_tokens` in
    what k layers leave of its memory; a decoding step reads the weights once and computes B
    tokens, whichever takes longer. Any node may be the first and the last: prompts and tokens
    are small beside activations.

    Raises: DataError if a size or a speed makes no sense.
    """
    if len(devices) != topology.num_nodes:
        raise DataError(f"{len(devices)} devices for {topology.num_nodes} nodes; give one for each")
    _check_model(model, context_tokens, max_batch)
    for name, device in zip(topology.names, devices, strict=True):
        facts = (device.memory_bytes, device.memory_bytes_per_s, device.flops)
        if not all(np.isfinite(x) and x > 0 for x in facts):
            raise DataError(f"node {name:.80}: memory and speeds must be above 0, not {facts}")
    rate = np.array([_roofline(d, model, context_tokens, max_batch) for d in devices])
    link = np.minimum(topology.bytes_per_s / model.activation_bytes_per_token, MAX_TOKENS_PER_S)
    np.fill_diagonal(link, 0.0)
    free = np.full(topology.num_nodes, MAX_TOKENS_PER_S)
    return ServingInstance(
        topology=topology,
        num_layers=model.num_layers,
        rate=rate,
        link_tokens_per_s=link,
        source_tokens_per_s=free,
        sink_tokens_per_s=free.copy(),
        layer_s=np.array([model.layer_bytes / d.memory_bytes_per_s for d in devices]),
        kinds=tuple(d.kind for d in devices),
    )


def _check_model(model: ServingModel, context_tokens: int, max_batch: int) -> None:
    if not 1 <= model.num_layers <= MAX_LAYERS:
        raise DataError(f"a model of {model.num_layers} layers; give 1 to {MAX_LAYERS}")
    sizes = (
        model.layer_bytes,
        model.kv_bytes_per_token,
        model.layer_flops_per_token,
        model.activation_bytes_per_token,
        context_tokens,
        max_batch,
    )
    if not all(np.isfinite(x) and x > 0 for x in sizes):
        raise DataError(f"the model's sizes, the context and the batch must be above 0: {sizes}")


def _roofline(
    device: ServingDevice, model: ServingModel, context_tokens: int, max_batch: int
) -> Matrix:
    """Tokens/s by layers held. Shapes: (num_layers + 1,)."""
    k = np.arange(1, model.num_layers + 1)
    room_bytes = device.memory_bytes - k * model.layer_bytes
    batch = np.floor(room_bytes / (k * model.kv_bytes_per_token * context_tokens))
    batch = np.clip(batch, 0, max_batch)
    step_s = k * np.maximum(
        model.layer_bytes / device.memory_bytes_per_s,
        batch * model.layer_flops_per_token / device.flops,
    )
    return np.concatenate([[0.0], np.minimum(batch / step_s, MAX_TOKENS_PER_S)])


def parse_serving(raw: Mapping[str, Any]) -> ServingInstance:
    """An instance from the Helix file's keys; `layer_latency_s` by node type is optional.

    Keys: layers, node_types, tokens_per_s_by_layers, link_tokens_per_s, link_latency_s,
    source_tokens_per_s, sink_tokens_per_s. A null or a value that is not above 0 in a link
    table means no link.

    Raises: DataError naming the key that is missing or wrong.
    """
    num_layers, types = _key(raw, "layers"), _key(raw, "node_types")
    is_whole = isinstance(num_layers, int) and not isinstance(num_layers, bool)
    if not is_whole or not 1 <= num_layers <= MAX_LAYERS:
        raise DataError(f"layers is {num_layers!r:.40}; give a whole number, 1 to {MAX_LAYERS}")
    if not isinstance(types, list) or not types or not all(isinstance(t, str) for t in types):
        raise DataError("node_types is not a list of names; give one type for each node")
    count = len(types)
    link = _numbers(raw, "link_tokens_per_s", (count, count))
    names = raw.get("names") or [f"{kind}-{i}" for i, kind in enumerate(types)]
    if not isinstance(names, list):
        raise DataError("names is not a list; give one name for each node, or none")
    topology = make_topology(
        [str(name) for name in names],
        _numbers(raw, "link_latency_s", (count, count)),
        link * HELIX_BYTES_PER_TOKEN,
    )
    usable = np.where(topology.bytes_per_s > 0, np.nan_to_num(link), 0.0)
    np.fill_diagonal(usable, 0.0)
    tables = _rate_tables(raw, types, num_layers)
    latencies = raw.get("layer_latency_s") or {}
    if not isinstance(latencies, Mapping):
        raise DataError("layer_latency_s is not an object of seconds by node type")
    return ServingInstance(
        topology=topology,
        num_layers=num_layers,
        rate=np.array([tables[kind] for kind in types]),
        link_tokens_per_s=np.minimum(usable, MAX_TOKENS_PER_S),
        source_tokens_per_s=_ends(raw, "source_tokens_per_s", count),
        sink_tokens_per_s=_ends(raw, "sink_tokens_per_s", count),
        layer_s=np.array([_seconds(latencies.get(kind, 0.0)) for kind in types]),
        kinds=tuple(types),
    )


def _key(raw: Mapping[str, Any], key: str) -> Any:
    try:
        return raw[key]
    except (KeyError, TypeError, IndexError):
        raise DataError(f"the network has no {key}; a serving network needs it") from None


def _numbers(raw: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Matrix:
    """The table as floats, null as nan."""
    value = _key(raw, key)
    try:
        table = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{key} is not a table of numbers") from None
    if table.shape != shape:
        raise DataError(f"{key} is {table.shape}, but {shape} is needed")
    return table


def _ends(raw: Mapping[str, Any], key: str, count: int) -> Matrix:
    values = np.nan_to_num(_numbers(raw, key, (count,)), posinf=MAX_TOKENS_PER_S)
    return np.clip(values, 0.0, MAX_TOKENS_PER_S)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise DataError(f"layer_latency_s holds {value!r:.40}; give seconds, at least 0")
    return float(value)


def _rate_tables(
    raw: Mapping[str, Any], types: Sequence[str], num_layers: int
) -> dict[str, list[float]]:
    """By type: tokens/s for 0 .. num_layers layers; 0 beyond what the file lists."""
    given = _key(raw, "tokens_per_s_by_layers")
    if not isinstance(given, Mapping):
        raise DataError("tokens_per_s_by_layers is not an object; give a list by node type")
    tables = {}
    for kind in sorted(set(types)):
        if not isinstance(given.get(kind), list):
            raise DataError(f"tokens_per_s_by_layers has no list for the type {kind!r:.80}")
        rates = _numbers(given, kind, (len(given[kind]),))[:num_layers]
        if not (np.isfinite(rates).all() and (rates >= 0).all()):
            raise DataError(f"tokens_per_s_by_layers of {kind!r:.80} holds a negative or no number")
        rest = [0.0] * (num_layers - len(rates))
        tables[kind] = [0.0, *np.minimum(rates, MAX_TOKENS_PER_S).tolist(), *rest]
    return tables
