"""A plan as a picture: pipelines are lanes, stages columns, links as thick as their load.

The SVG stands alone: no script, no style sheet, no font that it does not find everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999933",
    "#882255", "#44AA99", "#AA4499", "#DDCC77", "#332288", "#117733",
)  # fmt: skip
"""Told apart with all common kinds of colour blindness: Okabe and Ito 2008, then P. Tol 2021."""
NO_COLOUR = "#8A8A8A"
ALARM = "#D55E00"
"""Only for what bounds the plan; no region has it."""
INK, FAINT = "#1B1B1B", "#6A6A6A"
BOX_HEIGHT, LANE, HEAD, MARGIN = 40, 60, 44, 24
LEAST_BOX, STAGE_WIDTH, GAP = 108.0, 202.0, 52.0
LEAST_STEP, LEAST_WIDTH = 30.0, 880.0
THINNEST, THICKEST = 1.0, 9.0
FONT = "font-family='DejaVu Sans, Verdana, Arial, sans-serif'"


@dataclass(frozen=True)
class Box:
    """One node in one stage."""

    name: str
    note: str
    """A second line under the name."""
    region: str
    start: float
    """Where it begins and ends along the model, in columns or in layers."""
    stop: float
    lane: int = -1
    is_bottleneck: bool = False


@dataclass(frozen=True)
class Wire:
    """What flows from one box to another."""

    source: int
    """Index of a box."""
    target: int
    load: float
    is_bottleneck: bool = False


@dataclass(frozen=True)
class Column:
    """A heading over the boxes, and what is to be said below them."""

    start: float
    stop: float
    title: str
    note: str
    foot: str = ""
    foot_share: float = 0.0
    """Length of the bar under the column, of the longest."""


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn."""

    title: str
    lines: tuple[str, ...]
    """Below the title."""
    columns: tuple[Column, ...]
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    load_unit: str
    """What a wire's load is, in words."""
    node_unit: str = ""
    """Why a box is marked as the bottleneck, in words."""
    wire_word: str = "the busiest link"
    """What a marked wire is."""
    colour_word: str = "region"
    is_ragged: bool = False
    """Whether ranges of layers are free: boxes are as long as it takes, columns are boundaries."""
    foot_word: str = ""
    """What the bars below the columns are."""


def pack_lanes(boxes: Sequence[Box], wires: Sequence[Wire]) -> tuple[Box, ...]:
    """Give each box without a lane the one of the box that feeds it most, if nothing is there."""
    feeds: dict[int, list[tuple[float, int]]] = {}
    for wire in wires:
        feeds.setdefault(wire.target, []).append((-wire.load, wire.source))
    lanes: list[float] = []
    placed = list(boxes)
    for i in sorted(range(len(boxes)), key=lambda i: (boxes[i].start, boxes[i].stop, i)):
        free = [lane for lane, end in enumerate(lanes) if end <= boxes[i].start]
        wanted = [placed[source].lane for _, source in sorted(feeds.get(i, []))]
        lane = next((lane for lane in wanted if lane in free), free[0] if free else len(lanes))
        if lane == len(lanes):
            lanes.append(0.0)
        lanes[lane] = boxes[i].stop
        placed[i] = replace(boxes[i], lane=lane)
    return tuple(placed)


def colours_of(regions: Sequence[str]) -> Mapping[str, str]:
    """A colour for each region, by order of first use; one grey if there is nothing to tell."""
    distinct = list(dict.fromkeys(regions))
    if len(distinct) < 2:
        return dict.fromkeys(distinct, NO_COLOUR)
    return {region: COLOURS[i % len(COLOURS)] for i, region in enumerate(distinct)}


class _Sheet:
    """Where things are, in pixels."""

    def __init__(self, picture: Picture, boxes: Sequence[Box]) -> None:
        is_grid = all(b.stop - b.start == 1.0 for b in boxes) and not picture.is_ragged
        self._at = _positions(boxes, STAGE_WIDTH if is_grid else LEAST_BOX + GAP)
        self.lanes = 1 + max((b.lane for b in boxes), default=0)
        self.body_width = max(LEAST_WIDTH, max(self._at.values(), default=0.0))
        self.width = self.body_width + 2 * MARGIN
        self.top = MARGIN + 30 + 19 * len(picture.lines) + HEAD
        self.bottom = self.top + self.lanes * LANE

    def x(self, position: float) -> float:
        return MARGIN + self._at[position]

    def room(self, column: Column) -> float:
        """Pixels for a text over a column, or at a boundary."""
        return max(34.0, self.x(column.stop) - self.x(column.start))

    def left(self, box: Box) -> float:
        return self.x(box.start) + GAP / 2

    def right(self, box: Box) -> float:
        return self.x(box.stop) - GAP / 2

    def y(self, box: Box) -> float:
        return self.top + box.lane * LANE + (LANE - BOX_HEIGHT) / 2


def _positions(boxes: Sequence[Box], least: float) -> dict[float, float]:
    """Where each boundary of a box is: as far left as leaves `least` pixels to every box."""
    ends = sorted({end for box in boxes for end in (box.start, box.stop)})
    at: dict[float, float] = {}
    for i, end in enumerate(ends):
        starts = [at[box.start] + least for box in boxes if box.stop == end]
        at[end] = max([0.0 if i == 0 else at[ends[i - 1]] + LEAST_STEP, *starts])
    return at


def draw(picture: Picture) -> str:
    """The picture as an SVG document."""
    boxes = picture.boxes
    if any(box.lane < 0 for box in boxes):
        boxes = pack_lanes(boxes, picture.wires)
    sheet = _Sheet(picture, boxes)
    colours = colours_of(sorted({box.region for box in boxes}))
    body = [
        *_headings(picture, sheet),
        *_wires(picture, sheet, boxes),
        *(_box(box, sheet, colours[box.region]) for box in boxes),
        *_labels(picture, sheet, boxes),
    ]
    feet, y = _feet(picture, sheet)
    legend, height = _legend(picture, sheet, colours, y)
    size = f"width='{sheet.width:.0f}' height='{height:.0f}'"
    view = f"viewBox='0 0 {sheet.width:.0f} {height:.0f}'"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} {view} {FONT} font-size='12'>",
            f"<title>{_text(picture.title)}</title>",
            "<rect width='100%' height='100%' fill='#FFFFFF'/>",
            *body,
            *feet,
            *legend,
            "</svg>\n",
        ]
    )


def _text(text: str) -> str:
    """Escaped, and without the characters that XML cannot hold."""
    kept = "".join(c if c.isprintable() else "?" for c in text)
    return escape(kept.encode("utf-8", "replace").decode(), quote=True)


def _short(text: str, width: float, size: float) -> str:
    """As much of `text` as fits into `width` pixels at a font size; letters are about 0.6 wide."""
    most = max(2, int(width / (0.62 * size)))
    return text if len(text) <= most else text[: most - 2] + ".."


def _label(
    x: float, y: float, text: str, *, size: float = 12, anchor: str = "start",
    colour: str = INK, bold: bool = False,
) -> str:  # fmt: skip
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size:g}' text-anchor='{anchor}' "
        f"fill='{colour}'{weight}>{_text(text)}</text>"
    )


def _headings(picture: Picture, sheet: _Sheet) -> list[str]:
    width = sheet.body_width
    drawn = [_label(MARGIN, MARGIN + 12, _short(picture.title, width, 18), size=18, bold=True)]
    for i, line in enumerate(picture.lines):
        drawn.append(_label(MARGIN, MARGIN + 36 + 19 * i, _short(line, width, 12), colour=FAINT))
    for column in picture.columns:
        middle, room = (sheet.x(column.start) + sheet.x(column.stop)) / 2, sheet.room(column)
        drawn.append(_label(middle, sheet.top - 24, _short(column.title, room, 12),
                            anchor="middle", bold=True))  # fmt: skip
        drawn.append(_label(middle, sheet.top - 9, _short(column.note, room, 10), size=10,
                            anchor="middle", colour=FAINT))  # fmt: skip
    return drawn


def _ends(wire: Wire, sheet: _Sheet, boxes: Sequence[Box]) -> tuple[float, float, float, float]:
    """Where a wire begins and ends: at the edge, or in the middle of a range entered there."""
    source, target = boxes[wire.source], boxes[wire.target]
    x0, y0 = sheet.right(source), sheet.y(source) + BOX_HEIGHT / 2
    if target.start >= source.stop or source.lane == target.lane:
        return x0, y0, sheet.left(target), sheet.y(target) + BOX_HEIGHT / 2
    is_below = target.lane > source.lane
    return x0, y0, sheet.x(source.stop), sheet.y(target) + (0 if is_below else BOX_HEIGHT)


def _wires(picture: Picture, sheet: _Sheet, boxes: Sequence[Box]) -> list[str]:
    """Curves, the bottleneck last so that it lies on top."""
    most = max((wire.load for wire in picture.wires), default=0.0) or 1.0
    drawn = []
    for wire in sorted(picture.wires, key=lambda wire: (wire.is_bottleneck, wire.load)):
        x0, y0, x1, y1 = _ends(wire, sheet, boxes)
        bend = max(10.0, (x1 - x0) / 2)
        width = THINNEST + (THICKEST - THINNEST) * wire.load / most
        colour = ALARM if wire.is_bottleneck else "#7D8894"
        said = f"{boxes[wire.source].name} to {boxes[wire.target].name}: {wire.load:.4g}"
        drawn.append(
            f"<path d='M{x0:.1f} {y0:.1f} C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} "
            f"{x1:.1f} {y1:.1f}' fill='none' stroke='{colour}' stroke-width='{width:.2f}'>"
            f"<title>{_text(said)} {_text(picture.load_unit)}</title></path>"
        )
    return drawn


def _labels(picture: Picture, sheet: _Sheet, boxes: Sequence[Box]) -> list[str]:
    """What the bottleneck links carry, in a plate above their middle."""
    drawn = []
    for wire in [wire for wire in picture.wires if wire.is_bottleneck][:3]:
        x0, y0, x1, y1 = _ends(wire, sheet, boxes)
        text = f"{wire.load:.3g}"
        x, y, width = (x0 + x1) / 2, (y0 + y1) / 2 - 17, 8 + 7 * len(text)
        drawn.append(
            f"<rect x='{x - width / 2:.1f}' y='{y - 9:.1f}' width='{width}' height='18' rx='4' "
            f"fill='#FFFFFF' stroke='{ALARM}'/>"
        )
        drawn.append(_label(x, y + 4, text, size=11, anchor="middle", colour=ALARM, bold=True))
    return drawn


def _box(box: Box, sheet: _Sheet, colour: str) -> str:
    x, y, width = sheet.left(box), sheet.y(box), sheet.right(box) - sheet.left(box)
    edge, thick = (ALARM, 3) if box.is_bottleneck else (colour, 1)
    room = width - 16
    said = f"{box.name} {box.region} {box.note}"
    body = f"x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{BOX_HEIGHT}' rx='5'"
    stripe = f"x='{x:.1f}' y='{y:.1f}' width='7' height='{BOX_HEIGHT}' rx='3'"
    return "".join(
        [
            f"<g><title>{_text(said)}</title>",
            f"<rect {body} fill='#FFFFFF' stroke='{edge}' stroke-width='{thick}'/>",
            f"<rect {body} fill='{colour}' fill-opacity='0.16'/>",
            f"<rect {stripe} fill='{colour}'/>",
            _label(x + 12, y + 17, _short(box.name, room, 11.5), size=11.5, bold=True),
            _label(x + 12, y + 32, _short(box.note, room, 10), size=10, colour="#3A3A3A"),
            "</g>",
        ]
    )


def _feet(picture: Picture, sheet: _Sheet) -> tuple[list[str], float]:
    """A bar and a number under each column that has one, and where the next thing may begin."""
    drawn: list[str] = []
    for column in picture.columns:
        if not column.foot:
            continue
        x = sheet.x(column.start) + GAP / 2
        room = sheet.room(column) - GAP
        is_longest = column.foot_share >= 1.0
        drawn.append(
            f"<rect x='{x:.1f}' y='{sheet.bottom + 8:.1f}' height='8' "
            f"width='{room * column.foot_share:.1f}' fill='{ALARM if is_longest else '#B5BDC6'}'/>"
        )
        drawn.append(_label(x, sheet.bottom + 30, _short(column.foot, room, 10), size=10,
                            colour=FAINT))  # fmt: skip
    return drawn, sheet.bottom + (46 if drawn else 12)


def _legend(
    picture: Picture, sheet: _Sheet, colours: Mapping[str, str], y: float
) -> tuple[list[str], float]:
    """What colours, thickness and marks mean; returns the height of the sheet, too."""
    drawn: list[str] = []
    if len(colours) > 1:
        x = float(MARGIN)
        drawn.append(_label(x, y + 11, f"{picture.colour_word}:", colour=FAINT))
        x += 16 + 7.5 * len(picture.colour_word)
        for region, colour in colours.items():
            name = _short(region or "unknown", 180, 12)
            step = 30 + 7.6 * len(name)
            if x + step > sheet.width - MARGIN:
                x, y = float(MARGIN), y + 20
            drawn.append(f"<rect x='{x:.1f}' y='{y:.1f}' width='14' height='14' rx='3' "
                         f"fill='{colour}'/>")  # fmt: skip
            drawn.append(_label(x + 19, y + 11, name))
            x += step
        y += 26
    most = max((wire.load for wire in picture.wires), default=0.0)
    rows = [("line", f"thickness: {picture.load_unit}; the thickest is {most:.4g}")] * bool(
        picture.wires
    )
    if any(wire.is_bottleneck for wire in picture.wires):
        rows.append(("alarm", picture.wire_word))
    if any(box.is_bottleneck for box in picture.boxes):
        rows.append(("box", picture.node_unit or "the node that bounds the plan"))
    if any(column.foot for column in picture.columns):
        rows.append(("bar", picture.foot_word))
    for kind, text in rows:
        drawn.append(_sign(kind, MARGIN, y + 7))
        drawn.append(_label(MARGIN + 38, y + 11, _short(text, sheet.body_width - 38, 12)))
        y += 21
    return drawn, y + MARGIN / 2


def _sign(kind: str, x: float, y: float) -> str:
    if kind == "box":
        return (
            f"<rect x='{x}' y='{y - 7:.1f}' width='28' height='14' rx='4' fill='none' "
            f"stroke='{ALARM}' stroke-width='3'/>"
        )
    if kind == "bar":
        return f"<rect x='{x}' y='{y - 4:.1f}' width='28' height='8' fill='#B5BDC6'/>"
    colour, width = (ALARM, 6) if kind == "alarm" else ("#7D8894", 6)
    return (
        f"<line x1='{x}' y1='{y:.1f}' x2='{x + 28}' y2='{y:.1f}' stroke='{colour}' "
        f"stroke-width='{width}'/>"
    )
