"""A plan in a terminal, and the same plan as the parts of a picture."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarmnode.cli.plan_drawing import Box, Column, Picture, Wire
from swarmnode.coordinator.objective import NOBODY, Arrangement
from swarmnode.coordinator.planning.loads import Load, Place
from swarmnode.coordinator.solver.search import Solution
from swarmnode.coordinator.topology import Topology

if TYPE_CHECKING:
    from swarmnode.cli.plan import Planned

MAX_MOVED = 12
"""More names than this are counted instead."""


def show_plan(planned: "Planned") -> None:
    """Print the plan as a table, its cost and what it means."""
    solution, topology = planned.solution, planned.problem.objective.topology
    console = Console(highlight=False)
    console.print(_table(planned))
    console.print(_safe(cost_line(solution)), style="bold")
    parts = ", ".join(f"{name} {value:.4g}" for name, value in solution.parts.items())
    console.print(_safe(f"made of: {parts}"))
    console.print(_safe(gap_line(solution)))
    for reason in planned.reasons:
        console.print(_safe(f"- {reason}"))
    if planned.problem.previous is not None:
        console.print(_safe(moved_line(solution, topology)))
    console.print(
        _safe(
            f"{solution.moves_done} moves in {planned.cpu_s:.2f} s of processor time, "
            f"seed {solution.seed}"
        ),
        style="dim",
    )


def cost_line(solution: Solution) -> str:
    """What the plan costs, in the words of its objective."""
    if solution.objective == "serving":
        rate = solution.parts.get("tokens_per_s", 1.0 / solution.cost_s)
        return f"{rate:.5g} tokens/s (cost {solution.cost_s:.4g} s per token)"
    return f"{solution.cost_s:.5g} s per {'iteration' if solution.objective == 'dtfm' else 'step'}"


def gap_line(solution: Solution) -> str:
    """How good the plan is, in words; "optimal" only with a proof."""
    if solution.is_optimal:
        return f"proven optimal: {solution.bound.why}" if solution.bound else "proven optimal"
    if solution.bound is None or solution.gap is None:
        return "no bound is known: a better placement may exist"
    return (
        f"no placement can cost less than {solution.bound.seconds:.4g} s "
        f"({100 * solution.gap:.1f} % less than this one): {solution.bound.why}"
    )


def moved_line(solution: Solution, topology: Topology) -> str:
    """Which survivors must fetch other weights."""
    if not solution.moved:
        return "no surviving node changes its stage"
    names = [topology.names[node] for node in solution.moved[:MAX_MOVED]]
    rest = f" and {len(solution.moved) - MAX_MOVED} more" * (len(solution.moved) > MAX_MOVED)
    return f"{len(solution.moved)} surviving nodes change their stage: {', '.join(names)}{rest}"


def _table(planned: "Planned") -> Table:
    solution, topology = planned.solution, planned.problem.objective.topology
    arrangement = solution.arrangement
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("range" if _is_ragged(arrangement) else "stage", justify="right")
    table.add_column("layers")
    table.add_column("nodes, one for each slot")
    for stage in _order(arrangement):
        start, stop = arrangement.layers[stage]
        row = arrangement.slots[stage]
        table.add_row(
            str(stage), layers_word(start, stop) if solution.objective != "dtfm" else "-",
            _safe(_by_region(row, topology)),
        )  # fmt: skip
    return table


def _order(arrangement: Arrangement) -> list[int]:
    """Rows by where their layers begin; rows without nodes are left out."""
    rows = [i for i, row in enumerate(arrangement.slots) if any(n != NOBODY for n in row)]
    return sorted(rows, key=lambda i: (arrangement.layers[i], i))


def layers_word(start: int, stop: int) -> str:
    """A half-open range as people write it."""
    return f"{start}-{stop - 1}" if stop - start > 1 else str(start)


def _by_region(row: tuple[int, ...], topology: Topology) -> str:
    if not topology.regions:
        return " ".join(topology.names[node] for node in row if node != NOBODY)
    grouped: dict[str, list[str]] = {}
    for node in row:
        if node != NOBODY:
            grouped.setdefault(topology.regions[node], []).append(topology.names[node])
    return "; ".join(f"{region}: {' '.join(names)}" for region, names in grouped.items())


def _safe(text: str) -> Text:
    """Without markup, control characters or halves of characters."""
    kept = "".join(c if c.isprintable() else "?" for c in text)
    return Text(kept.encode("utf-8", "replace").decode())


def plain(value: float) -> str:
    """Three digits that count, without an exponent where people would write none."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _is_ragged(arrangement: Arrangement) -> bool:
    """Whether stages are not simply one after the other with the same number of slots."""
    widths = {len(row) for row in arrangement.slots}
    ends = [stop for _, stop in arrangement.layers]
    starts = [start for start, _ in arrangement.layers]
    return len(widths) != 1 or starts[1:] != ends[:-1]


def picture_of(planned: "Planned") -> Picture:
    """Everything that the drawing shows."""
    solution, topology = planned.solution, planned.problem.objective.topology
    arrangement = solution.arrangement
    load = planned.problem.loads(arrangement)
    is_serving = solution.objective == "serving"
    is_free = is_serving and _is_ragged(arrangement)
    places = [
        Place(s, v)
        for s in _order(arrangement)
        for v, node in enumerate(arrangement.slots[s])
        if node != NOBODY
    ]
    index = {place: i for i, place in enumerate(places)}
    regions = topology.regions or _kinds(planned)
    boxes = tuple(_box(place, arrangement, topology, regions, load, is_free) for place in places)
    wires = tuple(
        Wire(index[a], index[b], seconds, (a, b) in load.worst_wires)
        for (a, b), seconds in load.wires.items()
    )
    return Picture(
        title=f"{solution.objective}: {cost_line(solution)}{', over layers' * is_free}",
        lines=(gap_line(solution), _parts_line(solution)),
        columns=_boundaries(arrangement) if is_free else _columns(solution, load),
        boxes=boxes,
        wires=wires,
        load_unit=load.wire_unit,
        node_unit=load.node_unit,
        wire_word="links that bound the throughput" if is_serving else "the busiest link",
        is_ragged=is_free,
        colour_word="region" if topology.regions else "kind",
        foot_word="seconds that the stage's replicas take to exchange gradients",
    )


def _kinds(planned: "Planned") -> tuple[str, ...]:
    """What to colour by where nobody knows regions: the kinds of machines, if there are any."""
    instance = getattr(planned.problem.objective, "instance", None)
    count = planned.problem.objective.topology.num_nodes
    return instance.kinds if instance is not None else ("",) * count


def _parts_line(solution: Solution) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in solution.parts.items())


def _box(
    place: Place, arrangement: Arrangement, topology: Topology,
    regions: tuple[str, ...], load: Load, is_free: bool,
) -> Box:  # fmt: skip
    node, (start, stop) = (
        arrangement.slots[place.stage][place.slot],
        arrangement.layers[place.stage],
    )
    busy = load.nodes.get(place, 0.0)
    note = f"{plain(busy)}/s" if "tokens" in load.wire_unit else f"{plain(busy)} s"
    if is_free:
        note = f"{layers_word(start, stop)}: {note}"
    elif regions[node]:
        note = f"{note}, {regions[node]}"
    return Box(
        name=topology.names[node],
        note=note,
        region=regions[node],
        start=float(start) if is_free else float(place.stage),
        stop=float(stop) if is_free else place.stage + 1.0,
        lane=-1 if is_free else place.slot,
        is_bottleneck=place in load.worst_nodes,
    )


def _columns(solution: Solution, load: Load) -> tuple[Column, ...]:
    longest = max(load.stages, default=0.0) or 1.0
    has_layers = solution.objective != "dtfm"
    return tuple(
        Column(
            start=float(stage),
            stop=stage + 1.0,
            title=f"stage {stage}",
            note=f"layers {layers_word(*layers)}" if has_layers else "",
            foot=f"{plain(load.stages[stage])} s" if load.stages else "",
            foot_share=load.stages[stage] / longest if load.stages else 0.0,
        )
        for stage, layers in enumerate(solution.arrangement.layers)
    )


def _boundaries(arrangement: Arrangement) -> tuple[Column, ...]:
    """The number of each layer at which a range begins or ends."""
    used = [arrangement.layers[stage] for stage in _order(arrangement)]
    ends = sorted({end for pair in used for end in pair})
    return tuple(Column(float(end), float(end), "", str(end)) for end in ends)
