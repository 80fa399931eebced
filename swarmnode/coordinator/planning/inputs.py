"""What a plan is made from, read out of JSON: machines, a model's sizes, pins, an earlier plan.

Everything here judges text that somebody wrote by hand: whatever is wrong is one clear line.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarmnode.coordinator.objective import Arrangement
from swarmnode.coordinator.topology import MAX_NODES, Topology, parse_topology
from swarmnode.domain import ModelFacts
from swarmnode.errors import DataError

DEFAULT_FLOPS = 20e12
"""What half of a consumer card of today reaches in matrix products of half precision."""
DEFAULT_MEMORY_BYTES = 24e9
DEFAULT_MEMORY_BYTES_PER_S = 500e9
MAX_LAYERS = 4096
MAX_AMOUNT = 1e24
"""Of bytes or operations: above what any machine has, and sums of it stay finite."""


def _llama(
    hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int
) -> dict[str, Any]:
    """What the config of a Llama says of its sizes."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "vocab_size": vocab, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": _llama(2048, 5504, 24, 16, 16, 32000),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-70b": _llama(8192, 28672, 80, 64, 8, 32000),
}
"""Sizes to plan with by name: LLaMA's (arXiv:2302.13971, arXiv:2307.09288); the smallest has the
24 layers of width 2048 of DT-FM's GPT3-XL."""


@dataclass(frozen=True)
class Machine:
    """What a plan knows of one machine."""

    flops: float = DEFAULT_FLOPS
    """Effective FLOP/s."""
    memory_bytes: float = DEFAULT_MEMORY_BYTES
    memory_bytes_per_s: float = DEFAULT_MEMORY_BYTES_PER_S


def number(value: object, what: str, *, least: float = 0.0, is_open: bool = True) -> float:
    """A finite number above `least` (or at least that). Raises: DataError that names `what`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{what} is {value!r:.40}, not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or result < least or (is_open and result == least):
        raise DataError(
            f"{what} is {result:g}; give a number {'over' if is_open else 'from'} {least:g}"
        )
    return result


def whole(value: object, what: str, least: int, most: int) -> int:
    """An integer in [least, most]. Raises: DataError that names `what`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{what} is {value!r:.40}, not a whole number")
    if not least <= value <= most:
        raise DataError(f"{what} is {value!s:.40}; give {least} to {most}")
    return value


def read_topology(raw: Mapping[str, Any]) -> Topology:
    """`parse_topology`, with a line for what only odd files hold. Raises: DataError."""
    for key in ("names", "regions"):
        if not isinstance(raw.get(key, []), list):
            raise DataError(f"the network's {key} is not a list; give one text for each node")
    table = raw.get("latency_ms")
    if isinstance(table, list) and len(table) > MAX_NODES:
        raise DataError(f"a network of {len(table)} nodes; give 1 to {MAX_NODES}")
    try:
        return parse_topology(raw)
    except OverflowError:
        raise DataError("the network has a number too large to be true; mend it") from None


def read_machines(raw: object, names: Sequence[str]) -> tuple[Machine, ...]:
    """One machine for each of `names`: matched by name where all have one, else by order.

    Raises: DataError naming the entry and the key.
    """
    if isinstance(raw, dict):
        raw = raw.get("nodes")
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise DataError('the nodes file is no list of objects; give [{"tflops": 20}, ...]')
    if raw and all("name" in entry for entry in raw):
        raw = _by_name(raw, names)
    if len(raw) != len(names):
        raise DataError(f"the nodes file has {len(raw)} nodes, the network {len(names)}")
    return tuple(_machine(entry, f"node {i}") for i, entry in enumerate(raw))


def _by_name(raw: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The entries in the order of `names`; names of machines elsewhere are passed over."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in raw:
        name = str(entry["name"])
        if name in found:
            raise DataError(f"the nodes file lists {name!r:.80} twice; give each node one name")
        found[name] = entry
    if not any(name in found for name in names) and len(raw) == len(names):
        return list(raw)  # the network names nobody the same way: the order must do
    for name in names:
        if name not in found:
            raise DataError(f"the nodes file lacks {name!r:.80}, which the network has")
    return [found[name] for name in names]


def _machine(entry: Mapping[str, Any], what: str) -> Machine:
    known = {"name", "flops", "tflops", "memory_gb", "memory_gbps"}
    odd = sorted(set(entry) - known)
    if odd:
        raise DataError(f"{what}: unknown key {odd[0]!r:.40}; known are {', '.join(sorted(known))}")

    def value(key: str, scale: float, default: float) -> float:
        if key not in entry:
            return default
        amount = number(entry[key], f"{what}: {key}") * scale
        if not 1.0 <= amount <= MAX_AMOUNT:
            least, most = 1.0 / scale, MAX_AMOUNT / scale
            raise DataError(f"{what}: {key} is {entry[key]:g}; give {least:g} to {most:g}")
        return amount

    return Machine(
        value("flops", 1.0, value("tflops", 1e12, DEFAULT_FLOPS)),
        value("memory_gb", 1e9, DEFAULT_MEMORY_BYTES),
        value("memory_gbps", 1e9, DEFAULT_MEMORY_BYTES_PER_S),
    )


def llama_facts(config: Mapping[str, Any]) -> ModelFacts | None:
    """The sizes of a Llama-like model from its config alone; None for any other family.

    Counts every weight: attention, MLP and norms of a layer, embeddings, final norm, head.
    Raises: DataError naming a size that is missing or impossible.
    """
    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        return None

    def size(key: str, most: int = 1 << 24, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        return whole(value, f"the model's {key}", 1, most)

    hidden, heads = size("hidden_size"), size("num_attention_heads", 1 << 16)
    groups = size("num_key_value_heads", 1 << 16, heads)
    width = size("head_dim", 1 << 16, max(1, hidden // heads))
    layers = size("num_hidden_layers", MAX_LAYERS)
    vocab, inner = size("vocab_size"), size("intermediate_size")
    queries, keys = heads * width, groups * width
    layer = 2 * hidden * (queries + keys) + 3 * hidden * inner + 2 * hidden
    if family == "qwen2":
        layer += queries + 2 * keys
    elif family == "qwen3":
        layer += 2 * width
    if config.get("attention_bias") and family in ("llama", "qwen3"):
        layer += queries + 2 * keys + hidden
    if config.get("mlp_bias") and family == "llama":
        layer += 2 * inner + hidden
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelFacts(
        num_layers=layers,
        layer_weights=layer,
        first_weights=vocab * hidden,
        last_weights=hidden + (0 if tied else vocab * hidden),
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=size("max_position_embeddings", 1 << 30, 4096),
        tied=tied and layers > 1,
    )


def kv_share(config: Mapping[str, Any]) -> float:
    """Width of keys (or of values) in a layer, of the hidden size: below 1 with shared heads."""
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        groups = int(config.get("num_key_value_heads") or heads)
        share = groups * int(config.get("head_dim") or hidden // heads) / hidden
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 1.0
    return share if 0 < share <= 4 else 1.0


def read_pins(
    texts: Sequence[str], names: Sequence[str], num_stages: int | None, nodes: Sequence[int] = ()
) -> dict[int, int]:
    """Place in `names` -> stage, from texts `NODE=STAGE`; NODE is a name or an index.

    `nodes` are the indices that users know the names by; 0, 1, .. unless given.
    Raises: DataError naming the pin.
    """
    pins: dict[int, int] = {}
    for text in texts:
        node, value = _pinned(text, names, nodes)
        if not value.isdecimal():
            raise DataError(f"--pin {text!r:.60}: write NODE=STAGE, as in node3=0")
        stage = int(value[:9])
        if num_stages is not None and stage >= num_stages:
            raise DataError(f"--pin {text!r:.60}: stages are 0 to {num_stages - 1}")
        if pins.get(node, stage) != stage:
            raise DataError(f"--pin {text!r:.60}: the node is pinned to stage {pins[node]} already")
        pins[node] = stage
    return pins


def read_range_pins(
    texts: Sequence[str], names: Sequence[str], nodes: Sequence[int] = ()
) -> dict[int, tuple[int, int]]:
    """Place in `names` -> half-open range of layers, from texts `NODE=FROM:TO`; see read_pins.

    Raises: DataError naming the pin.
    """
    pins: dict[int, tuple[int, int]] = {}
    for text in texts:
        node, value = _pinned(text, names, nodes)
        start, colon, stop = value.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal()):
            raise DataError(
                f"--pin {text!r:.60}: without --stages write NODE=FROM:TO, the first layer and "
                "the one after the last"
            )
        wanted = (int(start[:9]), int(stop[:9]))
        if pins.get(node, wanted) != wanted:
            raise DataError(f"--pin {text!r:.60}: the node is pinned to other layers already")
        pins[node] = wanted
    return pins


def _pinned(text: str, names: Sequence[str], nodes: Sequence[int]) -> tuple[int, str]:
    """The place of the node that a pin names, and what it is pinned to."""
    name, found, value = text.rpartition("=")
    if not found or not name:
        raise DataError(f"--pin {text!r:.60}: write NODE=STAGE, as in node3=0")
    if name in names:
        return list(names).index(name), value
    node = int(name) if name.isdecimal() and len(name) < 9 else -1
    known = nodes or range(len(names))
    if node not in known:
        raise DataError(f"--pin {text!r:.60}: the network has no node {name!r:.60}, or it is gone")
    return known.index(node), value


@dataclass(frozen=True)
class EarlierPlan:
    """The part of an earlier answer of `swarmnode plan --json` that a repair starts from."""

    objective: str
    arrangement: Arrangement
    gone: frozenset[int]


def read_plan(raw: Mapping[str, Any]) -> EarlierPlan:
    """An earlier plan, in the node indices of its own network.

    Raises: DataError naming the key that is missing or wrong.
    """
    rows, layers = raw.get("assignment"), raw.get("layers")
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and r for r in rows):
        raise DataError("the previous plan has no assignment: one list of node indices per stage")
    most = 2 * MAX_NODES
    slots = tuple(
        tuple(whole(n, "a node of the previous plan", -1, 1 << 31) for n in row) for row in rows
    )
    if len(rows) > most or not isinstance(layers, list) or len(layers) != len(rows):
        raise DataError(
            f"the previous plan has {len(rows)} stages, but not one layer range for each"
        )
    ranges = tuple(_layer_range(pair) for pair in layers)
    return EarlierPlan(str(raw.get("objective", "")), Arrangement(slots, ranges), read_gone(raw))


def _layer_range(pair: object) -> tuple[int, int]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise DataError(f"the previous plan has {pair!r:.40} for a range of layers, not [from, to]")
    start, stop = (whole(end, "a layer of the previous plan", 0, 1 << 20) for end in pair)
    if start >= stop:
        raise DataError(f"the previous plan has an empty range of layers, {pair!r:.40}")
    return start, stop


def read_gone(raw: Mapping[str, Any]) -> frozenset[int]:
    """The indices of dead nodes that a file lists under `gone`. Raises: DataError."""
    gone = raw.get("gone", [])
    if not isinstance(gone, list):
        raise DataError("`gone` is not a list of node indices")
    return frozenset(whole(node, "a node in `gone`", 0, 1 << 31) for node in gone)
