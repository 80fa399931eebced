import re
import shutil
import subprocess
from pathlib import Path

import generate
import pytest
import yaml
from prometheus_check import DASHBOARD, missing_binary

from swarmnode.telemetry import Metrics

NAME = re.compile(r"\b(?:swarmnode|process)_[a-z_]+\b")
REASON = missing_binary()


def known_names() -> set[str]:
    """Every sample name that a node can expose."""
    metrics = Metrics(version="0.1.0", peer="p")
    names = set()
    for family in metrics.registry.collect():
        names.add(family.name)
        names |= {family.name + suffix for suffix in ("_total", "_bucket", "_sum", "_count")}
    return names


def test_the_committed_dashboard_is_what_the_generator_writes() -> None:
    committed = (DASHBOARD / "grafana" / "swarmnode.json").read_text(encoding="utf-8")
    assert committed == generate.text(), "run make dashboard"


def test_every_metric_that_is_asked_for_exists() -> None:
    rules = yaml.safe_load((DASHBOARD / "rules.yml").read_text())
    asked = generate.expressions(generate.build()) + [
        rule["expr"] for group in rules["groups"] for rule in group["rules"]
    ]
    names = {name for expression in asked for name in NAME.findall(expression)}
    assert len(names) > 15
    assert names <= known_names()


def test_every_panel_asks_something_and_fits_the_grid() -> None:
    panels = [p for p in generate.build()["panels"] if p["type"] != "row"]
    assert all(panel["targets"] and panel["description"] for panel in panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_promtool_accepts_the_configuration_and_the_alerts_fire(tmp_path: Path) -> None:
    shutil.copytree(DASHBOARD, tmp_path / "dashboard")
    (tmp_path / "dashboard" / "targets" / "a.json").write_text('[{"targets": ["127.0.0.1:1"]}]')
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments],
            cwd=tmp_path / "dashboard",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_provisioning_and_compose_name_files_that_exist() -> None:
    compose = yaml.safe_load((DASHBOARD / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DASHBOARD / source).exists(), source
    source = yaml.safe_load(
        (DASHBOARD / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    assert source["datasources"][0]["type"] == "prometheus"
    provider = yaml.safe_load(
        (DASHBOARD / "grafana/provisioning/dashboards/swarmnode.yml").read_text()
    )
    folder = provider["providers"][0]["options"]["path"]
    volumes = compose["services"]["grafana"]["volumes"]
    assert any(f":{folder}/swarmnode.json" in volume for volume in volumes)
