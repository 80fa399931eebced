import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmnode import telemetry
from swarmnode.codings import Coding
from swarmnode.telemetry import MAX_LINKS, Metrics

JOB = {"job_id": "00112233aabbccdd", "job_name": "tiny"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0.1.0", peer="12D3KooWA")


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    telemetry.close_logging()
    logging.getLogger().setLevel(level)


def observe(metrics: Metrics, step: int, **changes: object) -> None:
    facts = {
        **JOB, "step": step, "num_steps": 10, "loss": 2.5, "val_loss": None, "step_s": 0.3,
        "tokens_per_s": 100.0, "tokens_total": step * 64, "generation": 1, "recoveries": 0,
        "recovery_s": None, "predicted_step_s": 0.25, "bytes_by_kind": {"activation": step * 1000},
    }  # fmt: skip
    metrics.observe_job(**(facts | changes))  # type: ignore[arg-type]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_counters_follow_totals_and_never_go_back(metrics: Metrics) -> None:
    for step in (1, 2, 3, 2, 3):
        observe(metrics, step)
    assert value(metrics, "swarmnode_job_tokens_total", **JOB) == 192
    assert value(metrics, "swarmnode_job_sent_bytes_total", **JOB, kind="activation") == 3000
    observe(metrics, 4)
    assert value(metrics, "swarmnode_job_tokens_total", **JOB) == 256


def test_coding_is_counted_by_kind_and_codec(metrics: Metrics) -> None:
    labels = {"kind": "gradient", "codec": "int8"}
    for _ in range(2):
        metrics.add_codings([Coding("gradient", "int8", 400, 100, 0.5, 4.0, 0.04)])
    assert value(metrics, "swarmnode_uncoded_bytes_total", **labels) == 800
    assert value(metrics, "swarmnode_coded_bytes_total", **labels) == 200
    assert value(metrics, "swarmnode_coding_seconds_total", **labels) == 1.0
    assert value(metrics, "swarmnode_coding_error_ratio", **labels) == pytest.approx(0.1)
    metrics.add_codings([Coding("activation", "none", 0, 0, 0.5, 0.0, 0.0)])
    assert value(metrics, "swarmnode_coding_error_ratio", kind="activation", codec="none") is None


def test_a_step_is_timed_once_however_often_it_is_told(metrics: Metrics) -> None:
    observe(metrics, 1)
    observe(metrics, 1)
    observe(metrics, 2, step_s=0.5)
    assert value(metrics, "swarmnode_job_step_seconds_count", **JOB) == 2
    assert value(metrics, "swarmnode_job_step_seconds_sum", **JOB) == pytest.approx(0.8)
    assert value(metrics, "swarmnode_job_predicted_step_seconds", **JOB) == 0.25


def test_what_is_unknown_is_absent_not_zero(metrics: Metrics) -> None:
    observe(metrics, 0, loss=None, step_s=None, tokens_per_s=None)
    assert value(metrics, "swarmnode_job_loss_nats", **JOB) is None
    assert value(metrics, "swarmnode_job_recovery_seconds", **JOB) is None
    assert value(metrics, "swarmnode_job_step", **JOB) == 0


def test_a_forgotten_job_leaves_no_series_and_may_come_back(metrics: Metrics) -> None:
    observe(metrics, 3)
    metrics.idle_job(JOB["job_id"])
    assert value(metrics, "swarmnode_job_tokens_per_second", **JOB) == 0
    metrics.forget_job(JOB["job_id"])
    assert b"tiny" not in metrics.text()
    metrics.forget_job(JOB["job_id"])
    metrics.idle_job(JOB["job_id"])
    assert b"tiny" not in metrics.text()
    observe(metrics, 3)
    assert value(metrics, "swarmnode_job_tokens_total", **JOB) == 192


def test_two_nodes_share_nothing(metrics: Metrics) -> None:
    other = Metrics(version="0.1.0", peer="12D3KooWB")
    metrics.count_dropped("stale_frame", 2)
    metrics.add_sent("blob", 7)
    assert value(metrics, "swarmnode_dropped_total", reason="stale_frame") == 2
    assert value(metrics, "swarmnode_sent_bytes_total", kind="blob") == 7
    assert value(other, "swarmnode_dropped_total", reason="stale_frame") is None


def test_processes_are_measured_and_ended_ones_vanish(metrics: Metrics) -> None:
    metrics.observe_children({"daemon": os.getpid(), "worker": 2**22 + 1})
    own = value(metrics, "swarmnode_children_rss_bytes", role="daemon")
    assert own is not None
    assert own > 1 << 20
    assert value(metrics, "swarmnode_children_rss_bytes", role="worker") is None
    metrics.observe_children({})
    assert value(metrics, "swarmnode_children_rss_bytes", role="daemon") is None
    resident = value(metrics, "process_resident_memory_bytes")
    assert resident is not None
    assert resident > 1 << 20


def test_names_carry_units_and_counters_end_in_total(metrics: Metrics) -> None:
    observe(metrics, 1)
    text = metrics.text().decode()
    kinds = dict(
        line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE swarmnode_")
    )
    assert len(kinds) > 15
    assert {name for name, kind in kinds.items() if kind == "counter"} == {
        name for name in kinds if name.endswith("_total")
    }
    assert "_created" not in text


def test_a_target_file_is_complete_and_can_be_taken_back(tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    path = telemetry.write_target(targets, peer="12D3KooWabcdefgh", address="127.0.0.1:99")
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:99"], "labels": {"peer": "abcdefgh"}}
    ]
    assert [each.name for each in targets.iterdir()] == ["12D3KooWabcdefgh.json"]
    telemetry.remove_target(targets, peer="12D3KooWabcdefgh")
    telemetry.remove_target(targets, peer="12D3KooWabcdefgh")
    assert list(targets.iterdir()) == []


def test_logs_are_json_lines_with_what_was_bound(tmp_path: Path) -> None:
    path = tmp_path / "home" / "log.jsonl"
    telemetry.configure_logging("info", path=path, peer="12D3KooWA")
    log = telemetry.get_logger("p2p")
    log.debug("not shown")
    with telemetry.log_context(job="0011", step=3):
        log.info("stale frame dropped", generation=1)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("handler failed")
    logging.getLogger("some.library").info("not shown")
    logging.getLogger("some.library").warning("odd %s", "thing")
    telemetry.close_logging()
    first, failed, foreign = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "stale frame dropped", "level": "info", "logger": "swarmnode.p2p",
        "peer": "12D3KooWA", "job": "0011", "step": 3, "generation": 1,
    }  # fmt: skip
    assert "ValueError: broken" in failed["exception"]
    assert "job" not in failed
    assert (foreign["event"], foreign["level"], foreign["peer"]) == (
        "odd thing", "warning", "12D3KooWA",
    )  # fmt: skip


def test_the_terminal_gets_readable_lines(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("warning")
    log = telemetry.get_logger("daemon")
    log.info("not shown")
    log.warning("no peers yet", waited_s=3)
    shown = capsys.readouterr().err
    assert "no peers yet" in shown
    assert "waited_s=3" in shown
    assert "not shown" not in shown


def test_links_are_shown_by_short_names_and_vanish_with_the_peer(metrics: Metrics) -> None:
    metrics.set_links({"12D3KooWabcdefgh": (0.02, 1e6), "12D3KooWijklmnop": (0.03, None)})
    text = metrics.text().decode()
    assert 'swarmnode_link_latency_seconds{to_peer="abcdefgh"} 0.02' in text
    assert 'swarmnode_link_bytes_per_second{to_peer="abcdefgh"} 1e+06' in text
    assert 'swarmnode_link_latency_seconds{to_peer="ijklmnop"} 0.03' in text
    assert 'swarmnode_link_bytes_per_second{to_peer="ijklmnop"}' not in text
    metrics.set_links({f"peer{number:08}": (0.01, 1.0) for number in range(1000)})
    text = metrics.text().decode()
    assert "abcdefgh" not in text
    assert text.count("link_latency_seconds{") == MAX_LINKS
