"""Runs a real Prometheus over a targets folder and asks it everything that the dashboard asks."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

DASHBOARD = Path(__file__).parents[2] / "dashboard"
CORE = (
    "Peers", "Nodes scraped", "Tokens per second", "Progress", "Loss", "Bytes by kind",
    "Step time", "Generation", "Recoveries", "Steps", "Device use", "Processor of the daemon",
)  # fmt: skip
"""Panels that show something for any swarm that trains."""
VARIABLES = {"$job_name": ".*", "$peer": ".*", "$__rate_interval": "10s"}
SCRAPE_INTERVAL = "250ms"


def missing_binary() -> str | None:
    """Why a real Prometheus cannot run here, if so."""
    for name in ("prometheus", "promtool"):
        if shutil.which(name) is None:
            return f"no {name} here: apt-get install prometheus"
    return None


class Prometheus:
    """A client of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=address, timeout=10)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, with the dashboard's variables filled in."""
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        answer = self._http.get("/api/v1/query", params={"query": expression})
        body = answer.json()
        assert body["status"] == "success", (expression, body)
        series: list[dict[str, Any]] = body["data"]["result"]
        return series

    def get(self, path: str) -> Any:
        return self._http.get(path).json()["data"]

    def is_ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def running_prometheus(targets: Path, home: Path) -> Iterator[Prometheus]:
    """The committed configuration with another targets folder, a faster clock and a free port."""
    config = yaml.safe_load((DASHBOARD / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": "1s"}
    config["rule_files"] = [str(DASHBOARD / "rules.yml")]
    (scrape,) = config["scrape_configs"]
    scrape["file_sd_configs"] = [{"files": [str(targets / "*.json")], "refresh_interval": "1s"}]
    home.mkdir(parents=True, exist_ok=True)
    (home / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        "prometheus", f"--config.file={home / 'prometheus.yml'}",
        f"--storage.tsdb.path={home / 'data'}", f"--web.listen-address={address}",
    ]  # fmt: skip
    with open(home / "log", "wb") as log:
        env = os.environ | {"GOMAXPROCS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    client = Prometheus(f"http://{address}")
    try:
        wait_for(client.is_ready, 30, lambda: (home / "log").read_text()[-2000:])
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(20)


def wait_for(done: Callable[[], bool], limit_s: float, why: Callable[[], str]) -> None:
    """Look again and again until `done`; fail with `why` after `limit_s`."""
    until_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < until_s, why()
        time.sleep(0.1)


def check_dashboard(
    targets: Path, home: Path, *, core: Sequence[str] = CORE, limit_s: float = 60
) -> None:
    """Every expression of the dashboard runs, and the `core` panels get data.

    `targets` is the folder into which daemons write where they are scraped; `home` is for
    Prometheus's own files. Every node in the folder must be up, every rule healthy.
    """
    body = json.loads((DASHBOARD / "grafana" / "swarmnode.json").read_text())
    panels = {
        panel["title"]: [target["expr"] for target in panel.get("targets", [])]
        for panel in body["panels"]
        if panel["type"] != "row"
    }
    num_nodes = len(list(targets.glob("*.json")))
    assert num_nodes > 0, f"no daemon has written into {targets}"
    with running_prometheus(targets, home) as prometheus:

        def empty() -> list[str]:
            return [
                title
                for title in core
                if not any(prometheus.query(expression) for expression in panels[title])
            ]

        def all_up() -> bool:
            (up,) = prometheus.query('sum(up{job="swarmnode"})') or [{"value": [0, "0"]}]
            return int(up["value"][1]) == num_nodes

        wait_for(all_up, limit_s, lambda: f"not all {num_nodes} nodes are scraped")
        wait_for(lambda: not empty(), limit_s, lambda: f"no data in {empty()}")
        for expressions in panels.values():
            for expression in expressions:
                prometheus.query(expression)
        rules = [r for group in prometheus.get("/api/v1/rules")["groups"] for r in group["rules"]]

        def sick() -> list[tuple[str, str]]:
            groups = prometheus.get("/api/v1/rules")["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            return [(rule["name"], rule["health"]) for rule in rules if rule["health"] != "ok"]

        assert rules
        wait_for(lambda: not sick(), limit_s, lambda: f"rules that do not run: {sick()}")
