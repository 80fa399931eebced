"""What the traces of a job say: step times, computing, waiting, and when each frame moved."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

_TAIL_BYTES = 1 << 18
CODING = ("encode", "decode")
WORK = ("forward", "backward")


@dataclass(frozen=True)
class Span:
    """One line of a trace."""

    what: str
    began_s: float
    ended_s: float
    facts: dict[str, Any] = field(hash=False)

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


@dataclass(frozen=True)
class Transfer:
    """A frame from the queue of its sender to the reader at the other end."""

    kind: str
    step: int
    sender: int
    receiver: int
    queued_s: float
    began_s: float
    arrived_s: float
    num_bytes: int
    label: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """A time in which a node had nothing to compute, and what it did next."""

    began_s: float
    ended_s: float
    cause: str


@dataclass
class NodeTrace:
    """All spans of one node, in order of their beginning."""

    worker: list[Span]
    daemon: list[Span]


def read(homes: Sequence[Path], job: str) -> list[NodeTrace]:
    """The traces of a job's nodes so far; a line that is being written is left out."""
    return [
        NodeTrace(
            [s for path in (home / "trace").glob(f"worker-{job}-*.jsonl") for s in _spans(path)],
            [s for s in _spans(home / "trace" / "daemon.jsonl") if s.facts.get("job") == job],
        )
        for home in homes
    ]


def _spans(path: Path) -> list[Span]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            facts = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(Span(facts.pop("what"), facts.pop("began_s"), facts.pop("ended_s"), facts))
    return sorted(found, key=lambda span: (span.began_s, -span.ended_s))


def stage_of(trace: NodeTrace) -> int:
    """The stage that a node computes."""
    return next(int(span.facts["slot"][0]) for span in trace.worker if span.what == "forward")


def last_applied(home: Path, job: str) -> int:
    """The newest step that a node has applied; -1 before there is one. Reads little."""
    for path in (home / "trace").glob(f"worker-{job}-*.jsonl"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("ascii").splitlines()[1:]
        for line in reversed(lines):
            if '"what": "apply"' in line and line.endswith("}"):
                return int(json.loads(line)["step"])
    return -1


def commits(traces: Iterable[NodeTrace]) -> dict[int, float]:
    """When each step was applied on all nodes, by step; steps that some node lacks are left out."""
    ends: dict[int, list[float]] = defaultdict(list)
    count = 0
    for trace in traces:
        count += 1
        for span in trace.worker:
            if span.what == "apply":
                ends[span.facts["step"]].append(span.ended_s)
    return {step: max(found) for step, found in sorted(ends.items()) if len(found) == count}


def computing_s(trace: NodeTrace, began_s: float, ended_s: float) -> float:
    """Forward and backward without the coding inside of them."""
    inside = _within(trace.worker, began_s, ended_s)
    work = sum(span.seconds for span in inside if span.what in WORK)
    return work - coding_s(trace, began_s, ended_s, boundary=True)


def coding_s(trace: NodeTrace, began_s: float, ended_s: float, *, boundary: bool) -> float:
    """Coding of hidden states and their gradients, or of parameter gradients."""
    return sum(
        span.seconds
        for span in _within(trace.worker, began_s, ended_s)
        if span.what in CODING and span.facts["kind"].startswith("activation") == boundary
    )


def sent_bytes(trace: NodeTrace, began_s: float, ended_s: float) -> dict[str, int]:
    """Bytes of frames that went out, by kind."""
    total: dict[str, int] = defaultdict(int)
    for span in _within(trace.daemon, began_s, ended_s):
        if span.what == "send":
            total[span.facts["kind"]] += span.facts["bytes"]
    return dict(total)


def waits(trace: NodeTrace, began_s: float, ended_s: float, least_s: float = 0.002) -> list[Wait]:
    """The gaps in a worker's work, each named after what came when it ended."""
    found, until_s = [], began_s
    for span in [*_within(trace.worker, began_s, ended_s), None]:
        if span is None:
            if ended_s - until_s > least_s:
                found.append(Wait(until_s, ended_s, "next step"))
            continue
        if span.began_s - until_s > least_s:
            found.append(Wait(until_s, span.began_s, _cause(span)))
        until_s = max(until_s, span.ended_s)
    return found


def _cause(span: Span) -> str:
    """What a node that does this next was waiting for."""
    if span.what in WORK:
        if span.what == "forward" and span.facts["slot"][0] == 0:
            return "next step"
        return "activation" if span.what == "forward" else "activation_gradient"
    if span.what == "apply":
        return "commit"
    return str(span.facts.get("kind", span.what))


def transfers(traces: Sequence[NodeTrace]) -> list[Transfer]:
    """Every frame that was sent and has arrived."""
    arrivals = {
        _key(span): (node, span.ended_s)
        for node, trace in enumerate(traces)
        for span in trace.daemon
        if span.what == "receive"
    }
    return [
        Transfer(
            span.facts["kind"], span.facts["step"], node, arrivals[_key(span)][0],
            span.facts["queued_s"], span.began_s, arrivals[_key(span)][1], span.facts["bytes"],
            (span.facts["microbatch"], span.facts["group"], span.facts["part"]),
        )
        for node, trace in enumerate(traces)
        for span in trace.daemon
        if span.what == "send" and _key(span) in arrivals
    ]  # fmt: skip


def _key(span: Span) -> tuple[object, ...]:
    names = ("job", "step", "kind", "evaluate", "microbatch", "group", "part")
    ends = (tuple(span.facts["source"]), tuple(span.facts["target"]))
    return tuple(span.facts[name] for name in names) + ends


def _within(spans: Iterable[Span], began_s: float, ended_s: float) -> list[Span]:
    return [span for span in spans if began_s <= span.began_s < ended_s]


def summary(traces: Sequence[NodeTrace], since: int, until: int) -> dict[str, Any]:
    """Medians over the steps `since` .. `until` - 1; of nodes, the largest of their figures."""
    ends = commits(traces)
    windows = [(ends[step - 1], ends[step]) for step in range(since, until)]
    steps = sorted(end_s - began_s for began_s, end_s in windows)
    waited: dict[str, list[float]] = defaultdict(list)
    for trace in traces:
        total: dict[str, float] = defaultdict(float)
        for window in windows:
            for wait in waits(trace, *window):
                total[wait.cause] += (wait.ended_s - wait.began_s) / len(windows)
        for cause, seconds in total.items():
            waited[cause].append(seconds)
    sent = [sent_bytes(trace, windows[0][0], windows[-1][1]) for trace in traces]
    return {
        "num_steps": len(steps),
        "step_s": {"median": median(steps), "min": steps[0], "max": steps[-1]},
        "computing_s": _largest(traces, windows, computing_s),
        "coding_s": _largest(traces, windows, lambda *at: coding_s(*at, boundary=True))
        + _largest(traces, windows, lambda *at: coding_s(*at, boundary=False)),
        "waited_s": {cause: max(each) for cause, each in sorted(waited.items())},
        "sent_bytes": [
            {kind: round(count / len(windows)) for kind, count in sorted(each.items())}
            for each in sent
        ],
    }


def _largest(traces: Sequence[NodeTrace], windows: Any, figure: Any) -> float:
    return max(median(figure(trace, *window) for window in windows) for trace in traces)
