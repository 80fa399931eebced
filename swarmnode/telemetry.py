"""What a node tells about itself: structured logs, and metrics in a registry of its own.

Names carry their unit; counters end in `_total`. The label `job` belongs to Prometheus, so a
swarm job is named by `job_id` and `job_name`, which are one to one.
"""

import itertools
import json
import logging
import logging.handlers
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prometheus_client
import psutil
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from swarmnode.codings import Coding

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
LOG_FILE_BYTES = 16 << 20
"""A log file is rotated at this size; two older ones are kept."""
STEP_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)

MAX_LINKS = 64
"""Links that the metrics show, so that a large swarm does not flood Prometheus."""


# ---- logs --------------------------------------------------------------------------------------


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log that goes without a line, rather than flood the terminal, when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the record."""


def configure_logging(level: str = "info", *, path: Path | None = None, **bound: str) -> None:
    """Log to the file `path` as JSON lines, or to the terminal in a readable form.

    Every line carries `bound` (peer=...). Libraries log warnings and errors only. May be called
    again: the last call holds. Raises: OSError if the file cannot be opened.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
        last: list[Any] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, maxBytes=LOG_FILE_BYTES, backupCount=2, encoding="utf-8")
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler.set_name("swarmnode")
    drop_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[drop_meta, *last])
    )
    close_logging()
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("swarmnode").setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)


def close_logging() -> None:
    """Flush and close what `configure_logging` opened."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.get_name() == "swarmnode"]:
        root.removeHandler(handler)
        handler.close()


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger below `swarmnode`; events are short sentences, facts are keyword arguments."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(f"swarmnode.{name}")
    return logger


@contextmanager
def log_context(**values: object) -> Iterator[None]:
    """Every line of this task, and of tasks started inside, carries `values` (job=, step=)."""
    with structlog.contextvars.bound_contextvars(**values):
        yield


# ---- metrics -----------------------------------------------------------------------------------


class Metrics:
    """The metrics of one node; nodes in one process do not share any."""

    def __init__(self, *, version: str, peer: str) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        job = ("job_id", "job_name")

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"swarmnode_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"swarmnode_{name}", text, labels, registry=registry)

        Info("swarmnode_build", "What runs here.", registry=registry).info(
            {"version": version, "python": platform.python_version(), "peer_id": peer}
        )
        self._peers = gauge("peers", "Peers with a valid advert, this node included.")
        self._sent = counter("sent_bytes_total", "Bytes sent by this node.", ("kind",))
        self._dropped = counter(
            "dropped_total", "Bad records, refused peers, stale frames.", ("reason",)
        )
        self._compute = counter("compute_seconds_total", "Seconds of computing on the device.")
        coding = ("kind", "codec")
        self._raw = counter(
            "uncoded_bytes_total", "Tensors that this node coded, as float32.", coding
        )
        self._coded = counter("coded_bytes_total", "The same tensors, coded.", coding)
        self._coding = counter("coding_seconds_total", "Seconds of coding and decoding.", coding)
        self._error = gauge(
            "coding_error_ratio", "Norm of what coding lost over norm of the tensor.", coding
        )
        self._device = gauge("device_memory_bytes", "Device memory in all.")
        self._device_free = gauge("device_memory_free_bytes", "Device memory free.")
        self._children = gauge(
            "children_rss_bytes", "Resident memory of the node's processes.", ("role",)
        )
        # `peer` is the node that is scraped: Prometheus puts that label on everything it exposes.
        self._latency = gauge(
            "link_latency_seconds", "One way to another peer, measured.", ("to_peer",)
        )
        self._bandwidth = gauge(
            "link_bytes_per_second", "From this node to another peer, measured.", ("to_peer",)
        )
        self._step = gauge("job_step", "Committed steps.", job)
        self._steps = gauge("job_steps", "Steps asked for.", job)
        self._loss = gauge("job_loss_nats", "Training loss of the last step, per token.", job)
        self._val_loss = gauge(
            "job_validation_loss_nats", "Held-out loss of the last evaluation, per token.", job
        )
        self._predicted = gauge(
            "job_predicted_step_seconds", "What a step should take, by what was measured.", job
        )
        self._rate = gauge("job_tokens_per_second", "Tokens trained per second.", job)
        self._generation = gauge("job_generation", "Generation of the placement.", job)
        self._recovery = gauge(
            "job_recovery_seconds", "From the last loss of a worker to the next commit.", job
        )
        self._tokens = counter("job_tokens_total", "Tokens trained in committed steps.", job)
        self._recoveries = counter("job_recoveries_total", "Lost workers that were replaced.", job)
        self._job_sent = counter(
            "job_sent_bytes_total", "Bytes sent by all workers of the job.", (*job, "kind")
        )
        self._step_s = Histogram(
            "swarmnode_job_step_seconds",
            "Seconds between two commits.",
            job,
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._names: dict[str, str] = {}
        self._seen_step: dict[str, int] = {}
        self._totals: dict[tuple[str, ...], int] = {}

    def set_peers(self, num_peers: int) -> None:
        self._peers.set(num_peers)

    def add_sent(self, kind: str, num_bytes: int) -> None:
        """Count bytes that this node put on the wire."""
        self._sent.labels(kind).inc(num_bytes)

    def count_dropped(self, reason: str, number: int = 1) -> None:
        """Count what was refused; `reason` is one of few fixed words, never a peer's text."""
        self._dropped.labels(reason).inc(number)

    def add_compute(self, seconds: float) -> None:
        """Count device time; its rate is the share of the device in use."""
        self._compute.inc(seconds)

    def add_codings(self, codings: Iterable[Coding]) -> None:
        """Count what coding came to since the last call; `codec` is a name from a manifest."""
        for each in codings:
            labels = (each.kind, each.codec)
            self._raw.labels(*labels).inc(each.raw_bytes)
            self._coded.labels(*labels).inc(each.coded_bytes)
            self._coding.labels(*labels).inc(each.seconds)
            if each.error is not None:
                self._error.labels(*labels).set(each.error)

    def set_device_memory(self, *, total_bytes: int, free_bytes: int) -> None:
        self._device.set(total_bytes)
        self._device_free.set(free_bytes)

    def observe_children(self, pids: Mapping[str, int]) -> None:
        """Measure the resident memory of the node's processes, by role; ended ones vanish."""
        self._children.clear()
        for role, pid in pids.items():
            try:
                self._children.labels(role).set(psutil.Process(pid).memory_info().rss)
            except psutil.Error:
                self._children.remove(role)

    def set_links(self, links: Mapping[str, tuple[float | None, float | None]]) -> None:
        """Show (latency in s, bytes/s) by peer, at most MAX_LINKS; the links of before vanish."""
        for number, gauge in enumerate((self._latency, self._bandwidth)):
            gauge.clear()
            for peer, link in itertools.islice(links.items(), MAX_LINKS):
                if (value := link[number]) is not None:
                    gauge.labels(peer[-8:]).set(value)

    def observe_job(
        self,
        *,
        job_id: str,
        job_name: str,
        step: int,
        num_steps: int,
        loss: float | None,
        val_loss: float | None,
        step_s: float | None,
        tokens_per_s: float | None,
        tokens_total: int,
        generation: int,
        recoveries: int,
        recovery_s: float | None,
        predicted_step_s: float | None,
        bytes_by_kind: Mapping[str, int],
    ) -> None:
        """Take over a job's numbers; call it at least once for each committed step.

        Totals are absolute: the counters advance by what is new, and never go back.
        """
        job = (job_id, job_name)
        self._names[job_id] = job_name
        if step > self._seen_step.get(job_id, 0) and step_s is not None:
            self._step_s.labels(*job).observe(step_s)
        self._seen_step[job_id] = step
        for gauge, value in (
            (self._step, step),
            (self._steps, num_steps),
            (self._loss, loss),
            (self._val_loss, val_loss),
            (self._rate, tokens_per_s),
            (self._generation, generation),
            (self._recovery, recovery_s),
            (self._predicted, predicted_step_s),
        ):
            if value is not None:
                gauge.labels(*job).set(value)
        self._advance(self._tokens, "tokens", job, tokens_total)
        self._advance(self._recoveries, "recoveries", job, recoveries)
        for kind, num_bytes in bytes_by_kind.items():
            self._advance(self._job_sent, "sent", (*job, kind), num_bytes)

    def idle_job(self, job_id: str) -> None:
        """The job no longer trains (it serves, failed or stopped): its rate is zero."""
        if job_id in self._names:
            self._rate.labels(job_id, self._names[job_id]).set(0)

    def forget_job(self, job_id: str) -> None:
        """Drop a job's series: it is no longer here."""
        if self._names.pop(job_id, None) is None:
            return
        del self._seen_step[job_id]
        for metric in (
            self._step, self._steps, self._loss, self._val_loss, self._rate, self._generation,
            self._recovery, self._tokens, self._recoveries, self._job_sent, self._step_s,
            self._predicted,
        ):  # fmt: skip
            metric.remove_by_labels({"job_id": job_id})
        self._totals = {key: v for key, v in self._totals.items() if key[1] != job_id}

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)

    def _advance(self, counter: Counter, name: str, labels: tuple[str, ...], total: int) -> None:
        key = (name, *labels)
        counter.labels(*labels).inc(max(0, total - self._totals.get(key, 0)))
        self._totals[key] = max(total, self._totals.get(key, 0))


# ---- who is scraped ----------------------------------------------------------------------------


def write_target(directory: Path, *, peer: str, address: str, **labels: str) -> Path:
    """Announce `address` (host:port) to Prometheus's file discovery: one file for each node.

    The file appears complete or not at all. Returns its path; `remove_target` takes it back.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{peer}.json"
    body = [{"targets": [address], "labels": {"peer": peer[-8:], **labels}}]
    unfinished = directory / f".{peer}.tmp"
    unfinished.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def remove_target(directory: Path, *, peer: str) -> None:
    """Stop being scraped; fine if it was never announced."""
    (directory / f"{peer}.json").unlink(missing_ok=True)
