"""A real Prometheus scrapes a real /metrics, and every expression of the dashboard runs."""

import asyncio
import itertools
import os
from pathlib import Path

import pytest
from fake_node import FakeNode
from prometheus_check import (
    CORE,
    Prometheus,
    check_dashboard,
    missing_binary,
    running_prometheus,
    wait_for,
)

from swarmnode.http.server import serve
from swarmnode.telemetry import Metrics, remove_target, write_target

REASON = missing_binary()
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
ALWAYS = (
    "Last recovery", "Device memory in use", "Bytes sent by node", "Dropped",
    "Memory of the processes", "Peers by node", "Links: latency", "Links: bandwidth",
)  # fmt: skip


def one_step(metrics: Metrics, step: int) -> None:
    """What a node would tell after `step` commits of half a second."""
    metrics.set_peers(3)
    metrics.add_sent("activation", 1 << 20)
    metrics.add_compute(0.05)
    metrics.set_device_memory(total_bytes=8 << 30, free_bytes=6 << 30)
    metrics.observe_children({"directory": os.getpid()})
    metrics.count_dropped("stale_frame")
    metrics.set_links({"12D3KooWfarAwayNode": (0.02, 12.5e6)})
    metrics.observe_job(
        job_id="00112233aabbccdd", job_name="tiny", step=step, num_steps=1000, loss=2.5,
        val_loss=2.75, step_s=0.5, tokens_per_s=2048.0, tokens_total=1024 * step, generation=2,
        recoveries=1, recovery_s=1.5, predicted_step_s=0.4,
        bytes_by_kind={"activation": step << 20, "reduced": step},
    )  # fmt: skip


async def keep_training(metrics: Metrics) -> None:
    for step in itertools.count(1):
        one_step(metrics, step)
        await asyncio.sleep(0.1)


def check_values(targets: Path, home: Path) -> None:
    """The numbers on the dashboard are the ones that were told, and a gone node goes."""

    def value(prometheus: Prometheus, expression: str) -> float | None:
        series = prometheus.query(expression)
        return float(series[0]["value"][1]) if series else None

    with running_prometheus(targets, home) as prometheus:
        wait_for(
            lambda: bool(prometheus.query("job_name:swarmnode_job_sent_bytes:rate1m > 0")),
            60,
            lambda: "the recording rule has no data",
        )
        assert value(prometheus, "swarmnode_job_loss_nats") == 2.5
        assert value(prometheus, "max(swarmnode_peers)") == 3.0
        median = "histogram_quantile(0.5, swarmnode_job_step_seconds_bucket)"
        assert value(prometheus, median) == pytest.approx(0.375, abs=0.126)
        (series,) = prometheus.query("swarmnode_job_step")
        labels = series["metric"]
        assert (labels["job"], labels["job_name"]) == ("swarmnode", "tiny")
        assert (labels["peer"], labels["site"]) == ("abcdefgh", "home")
        remove_target(targets, peer="12D3KooWabcdefgh")
        wait_for(
            lambda: not prometheus.query("up"), 30, lambda: "a removed target is still scraped"
        )


async def test_every_panel_gets_data_from_a_real_prometheus(tmp_path: Path) -> None:
    metrics = Metrics(version="0.1.0", peer="12D3KooWabcdefgh")
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    targets = tmp_path / "targets"
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                serve(FakeNode(), metrics, "token", "127.0.0.1", 0, bound.set_result)
            ),
            group.create_task(keep_training(metrics)),
        ]
        address = f"127.0.0.1:{await bound}"
        write_target(targets, peer="12D3KooWabcdefgh", address=address, site="home")
        await asyncio.to_thread(check_dashboard, targets, tmp_path / "one", core=CORE + ALWAYS)
        await asyncio.to_thread(check_values, targets, tmp_path / "two")
        for task in tasks:
            task.cancel()


def test_a_folder_without_daemons_is_an_error_not_a_pass(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no daemon"):
        check_dashboard(tmp_path, tmp_path / "home")
