"""The verb `plan`, run as a user runs it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmnode.cli.main import main
from swarmnode.cli.plan import PlanOptions, run_plan
from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES
from swarmnode.errors import UserError

KEYS = [
    "objective", "cost", "parts", "bound", "gap", "optimal", "assignment", "layers", "seconds",
    "moves_done", "seed", "reasons", "moved",
]  # fmt: skip
OBJECTIVES = ("dtfm", "training", "serving")


class Plan:
    """Runs `swarmnode plan` in this process."""

    def __init__(self, folder: Path, monkeypatch: Any, capsys: Any) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys

    def file(self, name: str, content: object) -> str:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def __call__(self, network: object, objective: str, *args: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        path = self.file("network.json", network)
        argv = ["swarmnode", "plan", "--network", path, "--objective", objective, *args]
        self._monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            main()
        captured = self._capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    def json(self, network: object, objective: str, *args: str) -> dict[str, Any]:
        status, out, err = self(network, objective, "--json", *args)
        assert (status, out.count("\n")) == (0, 1), err
        return dict(json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON")))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: Any, capsys: Any) -> Plan:
    return Plan(tmp_path, monkeypatch, capsys)


def network(count: int = 8, seed: int = 0, **extra: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    gbps, latency = (random.uniform(low, high, (count, count)) for low, high in ((0.2, 2), (5, 99)))
    return {
        "latency_ms": np.minimum(latency, latency.T).tolist(),
        "bandwidth_gbps": np.minimum(gbps, gbps.T).tolist(),
        **extra,
    }


def dtfm_cost(raw: dict[str, Any], rows: list[list[int]]) -> float:
    """DT-FM's objective written down once more, from its paper: row sums, hops, both ways."""
    latency, gbps = np.array(raw["latency_ms"]) / 1e3, np.array(raw["bandwidth_gbps"])

    def send(i: int, j: int, gigabytes: float) -> float:
        return float(latency[i, j] + gigabytes / (gbps[i, j] / 8))

    shard = GRADIENT_BYTES / 1e9 / len(rows[0])
    reduction = max(sum(2 * send(i, j, shard) for j in row if j != i) for row in rows for i in row)
    hops = [
        max(send(i, j, ACTIVATION_BYTES / 1e9) for i, j in zip(a, b, strict=True))
        for a, b in pairwise(rows)
    ]
    return reduction + 2 * sum(hops)


def test_json_has_one_object_with_just_the_keys(plan: Plan) -> None:
    for objective in OBJECTIVES:
        answer = plan.json(network(), objective, "--moves", "5000")
        assert list(answer) == KEYS
        assert answer["objective"] == objective
        assert answer["cost"] > 0
        assert answer["bound"] is None or answer["bound"] <= answer["cost"] * (1 + 1e-9)
        assert not answer["optimal"] or answer["gap"] == 0
        assert {n for row in answer["assignment"] for n in row} <= set(range(8))
        assert len(answer["layers"]) == len(answer["assignment"])


def test_the_cost_is_that_of_the_assignment(plan: Plan) -> None:
    raw = network(12)
    answer = plan.json(raw, "dtfm", "--stages", "3", "--slots", "4", "--moves", "20000")
    assert [len(row) for row in answer["assignment"]] == [4, 4, 4]
    assert len({n for row in answer["assignment"] for n in row}) == 12
    assert answer["cost"] == pytest.approx(dtfm_cost(raw, answer["assignment"]), rel=1e-9)
    shuffled = np.random.default_rng(1).permutation(12).reshape(3, 4).tolist()
    assert dtfm_cost(raw, shuffled) > answer["cost"]


def test_the_same_seed_gives_the_same_plan(plan: Plan) -> None:
    def once(objective: str) -> dict[str, Any]:
        answer = plan.json(network(), objective, "--seed", "7", "--moves", "4000")
        return {**answer, "seconds": 0}

    for objective in OBJECTIVES:
        assert once(objective) == once(objective)
    assert once("dtfm")["seed"] == 7


def test_pins_are_obeyed(plan: Plan) -> None:
    args = ("--stages", "2", "--slots", "4", "--moves", "4000")
    rows = plan.json(network(), "dtfm", *args, "--pin", "node7=0", "--pin", "0=1")["assignment"]
    assert 7 in rows[0]
    assert 0 in rows[1]
    status, _, err = plan(network(), "dtfm", *args, *(f"--pin={i}=0" for i in range(5)))
    assert (status, err.count("\n")) == (2, 1)


def test_pins_count_nodes_as_the_network_file_does(plan: Plan) -> None:
    args = ("--gone", "2", "--moves", "2000")
    for node in (5, 9):
        pins = ("--stages", "2", "--slots", "4", "--pin", f"{node}=0", "--pin", "1=1")
        rows = plan.json(network(10), "dtfm", *args, *pins)["assignment"]
        assert (node in rows[0], 1 in rows[1]) == (True, True)
    answer = plan.json(network(10), "serving", *args, "--pin", "5=0:8")
    held = {
        n: tuple(answer["layers"][r]) for r, row in enumerate(answer["assignment"]) for n in row
    }
    assert held[5] == (0, 8)


def test_a_limit_beyond_all_nodes_is_none(plan: Plan) -> None:
    args = ("--moves", "500")
    free = plan.json(network(), "serving", *args)
    assert plan.json(network(), "serving", *args, "--max-hops", str(10**30))["cost"] == free["cost"]


def test_a_repair_moves_few_and_never_uses_the_dead(plan: Plan) -> None:
    raw = network(14)
    args = ("--stages", "3", "--slots", "4", "--moves", "20000")
    before = plan.json({**raw, "gone": [12, 13]}, "dtfm", *args)
    assert not {12, 13} & {n for row in before["assignment"] for n in row}
    path = plan.file("before.json", before)
    after = plan.json(raw, "dtfm", "--previous", path, "--gone", "2, 5", "--moves", "20000")
    hosts = {n for row in after["assignment"] for n in row}
    assert hosts == set(range(14)) - {2, 5}
    stage_of = {n: s for s, row in enumerate(before["assignment"]) for n in row}
    moved = [
        n
        for s, row in enumerate(after["assignment"])
        for n in row
        if n in stage_of and stage_of[n] != s
    ]
    assert sorted(moved) == after["moved"]
    stays = plan.json(raw, "dtfm", "--previous", path, "--gone", "2,5", "--horizon", "1e-6")
    assert stays["moved"] == []
    status, _, err = plan(raw, "dtfm", "--previous", path, "--stages", "4")
    assert (status, "ask for the same" in err) == (2, True)


def test_a_serving_plan_can_be_repaired(plan: Plan) -> None:
    before = plan.json(network(), "serving", "--moves", "2000")
    path = plan.file("before.json", before)
    used = before["assignment"][0][0]
    after = plan.json(
        network(), "serving", "--previous", path, "--gone", str(used), "--moves", "2000"
    )
    assert used not in {n for row in after["assignment"] for n in row}


def test_devices_and_models_come_from_files(plan: Plan) -> None:
    config = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    model, nodes = plan.file("config.json", config), plan.file("nodes.json", [{"tflops": 1}] * 8)
    fast = plan.file("fast.json", {"nodes": [{"tflops": 4}] * 8})
    args = ("--stages", "4", "--slots", "2", "--moves", "2000", "--model", model)
    slow = plan.json(network(), "training", *args, "--nodes", nodes)
    assert slow["layers"][-1][1] == 4
    assert plan.json(network(), "training", *args, "--nodes", fast)["cost"] < slow["cost"]
    job = plan.file("job.toml", 'name = "j"\n[model]\nconfig = "config.json"\n'
                    '[data]\npath = "x"\n[batch]\nnum_microbatches = 6\n'
                    "[placement]\nstages = 2\nslots = 3\n")  # fmt: skip
    rows = plan.json(network(), "training", "--job", job, "--moves", "2000")["assignment"]
    assert (len(rows), len(rows[0])) == (2, 3)


def test_a_family_that_only_the_library_knows_is_asked_for(plan: Plan) -> None:
    config = {"model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 32,
              "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "max_position_embeddings": 32}  # fmt: skip
    path = plan.file("config.json", config)
    status, _, err = plan(network(), "training", "--model", path, "--moves", "500")
    assert (status, err) == (0, "")


TABLE = network(4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        {},
        {"latency_ms": TABLE["latency_ms"]},
        {**TABLE, "bandwidth_gbps": [[1]]},
        {**TABLE, "bandwidth_gbps": [[1, 2], [3]]},
        {**TABLE, "bandwidth_gbps": "fast"},
        {**TABLE, "names": ["a", "a", "b", "c"]},
        {**TABLE, "names": 5},
        {**TABLE, "regions": 5},
        {**TABLE, "gone": [9]},
        {**TABLE, "gone": "all"},
        {**TABLE, "latency_ms": [[0]] * 5000},
        '{"latency_ms": [[1' + "0" * 400 + ']], "bandwidth_gbps": [[1]]}',
        {"latency_ms": [], "bandwidth_gbps": []},
        {"tokens_per_s_by_layers": 3, "latency_ms": 3},
    ],
)
def test_a_bad_network_is_one_line(plan: Plan, raw: object, objective: str) -> None:
    status, out, err = plan(raw, objective, "--stages", "2", "--json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("swarmnode: ")


def test_a_huge_file_is_not_read(plan: Plan) -> None:
    huge = plan.folder / "huge.json"
    huge.touch()
    os.truncate(huge, 65 << 20)
    status, _, err = plan(network(4), "dtfm", "--previous", str(huge))
    assert (status, "64 MiB" in err) == (2, True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--stages", "9", "--slots", "9"), "81 nodes"),
        (("--pin", "node9=0"), "no node"),
        (("--previous", "/nowhere"), "check the path"),
        (("--gone", "x"), "--gone"),
        (("--horizon", "0"), "above 0"),
        (("--horizon", "nan"), "above 0"),
        (("--seconds", "-1"), "above 0"),
        (("--gradient-bytes", "inf"), "above 0"),
        (("--draw", "/nowhere/x.svg"), "--draw"),
        (("--nodes", "{null}"), "is null"),
        (("--gone", "2", "--pin", "2=0"), "gone"),
    ],
)
def test_a_bad_option_is_one_line(plan: Plan, args: tuple[str, ...], said: str) -> None:
    null = plan.file("null.json", None)
    args = tuple(arg.replace("{null}", null) for arg in args)
    status, _, err = plan(network(4), "dtfm", "--moves", "500", *args)
    assert (status, err.count("\n"), said in err) == (2, 1, True), err


@pytest.mark.parametrize(
    ("key", "value"),
    [("bandwidth_gbps", x) for x in (1e300, 1e308, 1e-308, 5e-324)] + [("latency_ms", 1e308)],
)
def test_links_beyond_all_sense_are_none(plan: Plan, key: str, value: float) -> None:
    for objective in OBJECTIVES:
        raw = network(4)
        raw[key][0][1] = value
        status, _, err = plan(raw, objective, "--moves", "500", "--explain")
        assert (status, err) == (0, "")


def test_islands_and_one_way_links_are_refused_or_avoided(plan: Plan) -> None:
    raw = network(8)
    gbps = np.array(raw["bandwidth_gbps"])
    gbps[:4, 4:] = 0
    args = ("--stages", "2", "--slots", "4", "--moves", "4000")
    island = {**raw, "bandwidth_gbps": gbps.tolist()}
    status, _, err = plan(island, "dtfm", *args)
    assert (status, err.count("\n")) == (2, 1)
    gbps = np.array(raw["bandwidth_gbps"])
    gbps[0, 1] = -1
    rows = plan.json({**raw, "bandwidth_gbps": gbps.tolist()}, "dtfm", *args)["assignment"]
    assert all(not {0, 1} <= set(row) for row in rows)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(OBJECTIVES),
    st.integers(1, 6),
    st.lists(
        st.tuples(
            st.sampled_from(["latency_ms", "bandwidth_gbps"]),
            st.integers(0, 5),
            st.integers(0, 5),
            st.sampled_from([None, 0, -1, math.nan, math.inf, 1e-300, 1e300, "x", [], True]),
        ),
        max_size=8,
    ),
    st.sampled_from([(None, None), (1, 1), (2, 1), (2, 2), (1, 3), (3, None), (None, 2)]),
)
def test_no_network_crashes_it(
    tmp_path_factory: Any, objective: str, count: int, odd: Any, grid: Any
) -> None:
    raw = network(count)
    for key, i, j, value in odd:
        raw[key][i % count][j % count] = value
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "network.json"
    path.write_text(json.dumps(raw))
    options = PlanOptions(path, objective, *grid, moves=200, explain=True, draw=folder / "x.svg")
    try:
        run_plan(options, as_json=True)
    except UserError:
        assert not (folder / "x.svg").exists()
    else:
        ElementTree.parse(folder / "x.svg")


def test_ctrl_c_gives_the_best_so_far(plan: Plan) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started us aside
    plan(network(16), "dtfm", "--stages", "4", "--slots", "4", "--moves", "1000")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    raw = network(64)
    status, out, err = plan(raw, "dtfm", "--moves", str(1 << 38), "--json")
    timer.join()
    assert (status, "best so far" in err) == (0, True)
    answer = json.loads(out)
    assert any("Ctrl-C" in reason for reason in answer["reasons"])
    assert answer["cost"] == pytest.approx(dtfm_cost(raw, answer["assignment"]), rel=1e-9)
    assert signal.getsignal(signal.SIGINT) is before


def test_seconds_end_the_search(plan: Plan) -> None:
    began_s = time.process_time()
    answer = plan.json(network(64), "dtfm", "--seconds", "0.5", "--moves", str(1 << 38))
    assert time.process_time() - began_s < 8.0
    assert any("0.5 s of processor time" in reason for reason in answer["reasons"])


def test_people_read_a_table(plan: Plan) -> None:
    names = ["[bold]x", "esc\x1b[31m", "half\ud800", *"abcde"]
    raw = network(8, names=names, regions=["here"] * 4 + ["there"] * 4)
    status, out, _ = plan(raw, "dtfm", "--stages", "2", "--slots", "4", "--moves", "500",
                          "--explain")  # fmt: skip
    assert status == 0
    assert "[bold]x" in out
    assert "\x1b[31m" not in out
    assert "here:" in out
    assert re.search(r"proven optimal|no placement can cost less|no bound is known", out)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_drawing_stands_alone(plan: Plan, objective: str) -> None:
    names = ["<script>alert(1)</script>", "a&b", "'\"", "\x00\x08", *"wxyz"]
    raw = network(8, names=names, regions=[f"<r{i}>" for i in range(8)])
    path = plan.folder / "plan.svg"
    plan.json(raw, objective, "--draw", str(path), "--moves", "500")
    text = path.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("}svg")
    assert not re.search(r"<script|href|@import|url\(|<image|<foreignObject", text)
    boxes = {box.text for box in root.iter("{http://www.w3.org/2000/svg}title")}
    assert any("alert(1)" in (text or "") for text in boxes) or objective != "dtfm"


def test_neither_help_nor_daemon_loads_the_solver() -> None:
    code = (
        "import sys, swarmnode.cli.main, swarmnode.daemon, swarmnode.coordinator.planning;"
        "print([m for m in ('numba', 'scipy', 'ortools', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
