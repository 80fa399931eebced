"""How nodes, peers and jobs look in a terminal. Pure: views in, renderables or text out."""

from collections.abc import Iterable, Mapping, Sized
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swarmnode.codings import Coding
from swarmnode.http.api import CheckpointView, CoarserLink, Departure, JobView, NodeView, PeerView

SHORT_ID = 6
"""Peer ids begin alike, so the last characters name them for people."""
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def printable(text: str) -> str:
    """`text` with everything but printable characters and line ends escaped.

    What a model says must not move the cursor or set colours in somebody's terminal.
    """
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text.expandtabs(4).replace("\r\n", "\n")
    )


def amount(number: float, unit: str) -> str:
    """A number with a decimal prefix: 1234567, "B" -> 1.23 MB."""
    for factor, prefix in _UNITS:
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def short(peer: str) -> str:
    """The end of a peer id."""
    return peer[-SHORT_ID:]


def figure(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def traffic(bytes_by_kind: Mapping[str, int]) -> str:
    """Bytes by kind, the largest first."""
    kinds = sorted(bytes_by_kind.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {amount(count, 'B')}" for kind, count in kinds) or "-"


def boundaries(codecs: Mapping[str, str]) -> str:
    """The codecs between stages: forward and backward."""
    found = [codecs[role] for role in ("activation", "activation_gradient") if role in codecs]
    return printable(" and ".join(found)) or "-"


def link_lines(links: Iterable[CoarserLink]) -> str:
    """A line for each link that is coded more coarsely than the job asks for."""
    return "\n".join(
        f"{short(link.source)} to {short(link.target)}: {printable(link.preset)}, "
        f"{printable(link.activation)} and {printable(link.activation_gradient)}"
        for link in links
    )


def coding_lines(codings: Iterable[Coding]) -> str:
    """A line for each kind and codec: how much less it sends, what it costs and loses."""
    lines = []
    for each in codings:
        lost = f", error {each.error:.2%}" if each.error is not None else ""
        lines.append(
            f"{each.kind} in {printable(each.codec)}: {amount(each.coded_bytes, 'B')}, "
            f"float32 / {each.ratio:.1f}, {each.seconds:.1f} s{lost}"
        )
    return "\n".join(lines) or "-"


def departure_line(departure: Departure) -> str:
    """How a node ended that was asked to, in a line."""
    handed_over, kept = len(departure.handed_over), len(departure.kept)
    said = f"the node has ended; {handed_over} of its {handed_over + kept} slots were handed over"
    if kept:
        said += f", {kept} ended with it" + ("" if departure.in_time else " before others had them")
    if departure.coordinated:
        said += f"; it coordinated {', '.join(departure.coordinated)} to the end"
    return said


# ---- tables ------------------------------------------------------------------------------------


def node_table(view: NodeView, page: str) -> RenderableType:
    """One node, a fact per line."""
    return _facts(
        {
            "peer": view.peer,
            "version": view.version,
            "home": view.home,
            "join with": f"swarmnode up --join {view.join_address}",
            "transport": "\n".join(view.transport_addresses),
            "page": page,
            "OpenAI API": f"{view.http_address}/v1",
            "up for": f"{view.uptime_s:.0f} s",
            "peers": str(view.num_peers),
            "device": view.device,
            "hosts": "\n".join(view.hosted) or "-",
            "processes": ", ".join(f"{role} {pid}" for role, pid in view.pids.items()),
            "dropped": ", ".join(f"{why} {n}" for why, n in view.dropped.items()) or "-",
        }
    )


def peers_table(views: Iterable[PeerView]) -> RenderableType:
    table = _table("peer", "device", "float32", "memory", "free", "cores", "version", "lease")
    for view in views:
        table.add_row(
            view.peer + (" (this node)" if view.is_self else ""),
            view.device,
            amount(view.flops.get("float32", 0.0), "FLOP/s"),
            amount(view.memory_total_bytes, "B"),
            amount(view.memory_free_bytes, "B"),
            str(view.num_cores),
            view.version,
            f"{view.expires_in_s:.0f} s",
        )
    return table


def jobs_table(views: Iterable[JobView]) -> RenderableType:
    table = _table("job", "name", "phase", "step", "loss", "validation", "generation", "reason")
    for view in views:
        table.add_row(
            view.job,
            view.name,
            view.phase,
            f"{view.step}/{view.num_steps}",
            figure(view.loss),
            figure(view.val_loss),
            str(view.generation),
            view.reason,
        )
    return table


def checkpoints_table(views: Iterable[CheckpointView]) -> RenderableType:
    table = _table("step", "made", "generation", "loss", "size", "boundaries", "weights sha256")
    for view in views:
        made = datetime.fromtimestamp(view.created_at_s, UTC)
        table.add_row(
            str(view.step),
            f"{made:%Y-%m-%d %H:%M:%S} UTC",
            str(view.generation),
            figure(view.loss),
            amount(view.num_bytes, "B"),
            boundaries(view.codecs) + _coarser(view.coarser_links),
            view.weights_sha256,
        )
    return table


# ---- a job at work -----------------------------------------------------------------------------


def job_line(view: JobView) -> str:
    """A job's progress on one line, for a log."""
    parts = [f"{view.phase:<10} step {view.step}/{view.num_steps}"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    if view.val_loss is not None:
        parts.append(f"validation {view.val_loss:.4f}")
    if view.tokens_per_s is not None:
        parts.append(f"{view.tokens_per_s:.0f} tokens/s")
    parts.append(f"sent {amount(sum(view.bytes_by_kind.values()), 'B')}")
    raw_bytes = sum(each.raw_bytes for each in view.codings)
    if coded_bytes := sum(each.coded_bytes for each in view.codings):
        parts.append(f"coded float32 / {raw_bytes / coded_bytes:.1f}")
    parts.append(f"generation {view.generation}")
    if view.recoveries:
        parts.append(f"recoveries {view.recoveries}")
    if view.coarser_links:
        parts.append(_coarser(view.coarser_links).removeprefix(", "))
    if view.reason:
        parts.append(view.reason)
    return "  ".join(parts)


def job_panel(view: JobView) -> RenderableType:
    """A job's progress as a bar and its facts."""
    total = max(view.num_steps, 1)
    done = view.step if view.num_steps else total
    recoveries = str(view.recoveries)
    if view.recovery_s is not None:
        recoveries += f", the last one took {view.recovery_s:.1f} s"
    facts = {
        "phase": view.phase + (f": {view.reason}" if view.reason else ""),
        "step": f"{view.step} of {view.num_steps}"
        + (f", {view.step_s:.2f} s each" if view.step_s is not None else "")
        + (f", predicted {view.predicted_step_s:.2f} s" if view.predicted_step_s else ""),
        "loss": f"{figure(view.loss)} (first {figure(view.first_loss)})",
        "validation": figure(view.val_loss)
        + (f", boundaries in {view.val_codec}" if view.val_codec else ""),
        "speed": f"{figure(view.tokens_per_s, '.0f')} tokens/s",
        "sent": traffic(view.bytes_by_kind),
        "codecs": coding_lines(view.codings),
        "coarser links": link_lines(view.coarser_links) or "-",
        "placement": placement(view),
        "generation": str(view.generation),
        "recoveries": recoveries,
        "checkpoint": "-" if view.checkpoint_step is None else f"step {view.checkpoint_step}",
    }
    return Group(ProgressBar(total=total, completed=done), _facts(facts))


def placement(view: JobView) -> str:
    """Who hosts what: `layers: peer peer` for each stage."""
    rows = (
        f"layers {start}-{stop - 1}: " + " ".join(short(peer) for peer in peers)
        for (start, stop), peers in zip(view.layers, view.placement, strict=False)
    )
    return "\n".join(rows) or "-"


def _coarser(links: Sized) -> str:
    return f", {len(links)} link{'s' if len(links) > 1 else ''} coarser" if len(links) else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts(facts: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(value))
    return grid
