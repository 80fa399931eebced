"""What one process of the placement benchmark does: one solve, one oracle, or one trace."""

import json
import resource
import time
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from networks import dtfm_case, irregular_swarm

MOST_ORDERED = 12
"""Random grids of more stages are paired, but not ordered."""
MOST_BRUTE = 8
CHURN_ROUNDS, CHURN_NODES = 5, 4
MOST_MOVED = 5
"""Survivors that a repair may send to another stage."""
MEMORY_GB = (24, 16, 12, 8)


def topology_of(network: Mapping[str, Any]) -> Any:
    """The network that a case names."""
    from swarmnode.coordinator.planning.inputs import read_topology

    if "dtfm" in network:
        return dtfm_case(network["dtfm"])
    if "irregular" in network:
        return irregular_swarm(network["irregular"], network.get("seed", 0))
    return read_topology(json.loads(Path(network["file"]).read_text()))


def objective_of(case: Mapping[str, Any]) -> Any:
    """The objective of a case, with DT-FM's constants for a grid."""
    from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES

    options = case["options"] or {}
    if case["group"] == "serving":
        from swarmnode.coordinator.cost.serving import parse_serving
        from swarmnode.coordinator.solver.serving.objective import ServingObjective

        raw = json.loads(Path(case["network"]["file"]).read_text())
        return ServingObjective(parse_serving(raw), max_hops=options["max_hops"], partial=False)
    if case["group"] == "training":
        return uneven_training(topology_of(case["network"]))
    from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective

    stages, slots = case["grid"]
    return DtfmObjective(
        topology_of(case["network"]), stages, slots,
        gradient_bytes=GRADIENT_BYTES, activation_bytes=ACTIVATION_BYTES,
    )  # fmt: skip


def uneven_training(topology: Any) -> Any:
    """A 24-layer model on machines whose speeds spread tenfold, with 24, 16, 12 or 8 GB."""
    from swarmnode.coordinator.cost.training import Device, workload_of
    from swarmnode.coordinator.planning.inputs import PRESETS, llama_facts
    from swarmnode.coordinator.solver.training.objective import TrainingObjective
    from swarmnode.manifest import BatchConfig, JobBase

    facts = llama_facts(PRESETS["llama-1b"])
    assert facts is not None
    batch = BatchConfig(rows=1, sequence_length=1024, num_microbatches=32)
    workload = workload_of(facts, JobBase(name="bench", batch=batch))
    speeds = np.geomspace(4e12, 40e12, topology.num_nodes)
    order = np.random.default_rng(0).permutation(topology.num_nodes)
    devices = [
        Device(float(speeds[order[i]]), 500e9, MEMORY_GB[i % 4] * 1e9)
        for i in range(topology.num_nodes)
    ]
    return TrainingObjective(topology, devices, workload, 8, 2)


def measured(case: Mapping[str, Any], seed: int, moves: int) -> dict[str, Any]:
    """One solve in this process."""
    from swarmnode.coordinator.objective import Effort
    from swarmnode.coordinator.solver.search import solve

    objective = objective_of(case)
    began_s = time.process_time()
    solution = solve(objective, effort=Effort(moves=moves, seed=seed))
    return {
        "cost_s": solution.cost_s,
        "bound_s": solution.bound.seconds if solution.bound else None,
        "gap": solution.gap,
        "is_optimal": solution.is_optimal,
        "moves": solution.moves_done,
        "cpu_s": time.process_time() - began_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parts": dict(solution.parts),
    }


def random_costs(case: Mapping[str, Any], count: int) -> dict[str, float]:
    """Means over random arrangements: as they come, and with lanes and stages put right."""
    from swarmnode.coordinator.objective import Arrangement
    from swarmnode.coordinator.solver.grid.polish import pair_hops, polish

    if case["group"] == "serving":
        return {}
    objective = objective_of(case)
    topology, random = objective.topology, np.random.default_rng(0)
    count_nodes = topology.num_nodes
    if case["group"] == "training":
        return _random_training(objective, count)
    stages, slots = case["grid"]
    hop = topology.transfer_s(0.471e9)
    layers = tuple((s, s + 1) for s in range(stages))
    plain, paired = [], []
    for _ in range(count):
        grid = random.permutation(count_nodes)[: stages * slots].reshape(stages, slots)
        if stages <= MOST_ORDERED:
            pins = np.full(count_nodes, -1)
            best = polish(grid, hop, np.zeros((count_nodes, stages)), pins)
        else:
            best = pair_hops(grid, hop)
        for into, rows in ((plain, grid), (paired, best)):
            slots_of = tuple(tuple(int(node) for node in row) for row in rows)
            into.append(objective.price(Arrangement(slots_of, layers)).total_s)
    return {"random_mean_s": mean(plain), "random_least_s": min(plain),
            "random_paired_mean_s": mean(paired)}  # fmt: skip


def _random_training(objective: Any, count: int) -> dict[str, float]:
    """Equal layers, one slot on each node, nodes at random; those that fit their memory."""
    from swarmnode.coordinator.cost.needs import split_layers
    from swarmnode.coordinator.objective import Arrangement

    random, costs = np.random.default_rng(0), []
    layers = split_layers(objective.workload.num_layers, objective.stages)
    for _ in range(20 * count):
        grid = random.permutation(objective.topology.num_nodes).reshape(objective.stages, -1)
        rows = tuple(tuple(int(node) for node in row) for row in grid)
        costs.append(objective.price(Arrangement(rows, layers)).total_s)
    fitting = [cost for cost in costs if np.isfinite(cost)]
    if not fitting:
        return {"share_that_fits": 0.0}
    return {"random_mean_s": mean(fitting), "random_least_s": min(fitting),
            "share_that_fits": len(fitting) / len(costs)}  # fmt: skip


def small_instance(grid: tuple[int, int], seed: int, limit_s: float) -> dict[str, Any]:
    """A random instance by search, and by brute force or CP-SAT."""
    stages, slots = grid
    network = {"irregular": stages * slots, "seed": seed}
    case = {"group": "small", "network": network, "grid": grid, "options": None}
    found = measured(case, seed, 200_000)
    objective, began_s = objective_of(case), time.process_time()
    if stages * slots <= MOST_BRUTE:
        least, status = brute_force(objective, stages, slots), "optimal"
    else:
        least, status = by_cp_sat(objective.topology, stages, slots, limit_s)
    return {
        **found,
        "oracle": "brute force" if stages * slots <= MOST_BRUTE else "CP-SAT",
        "oracle_status": status,
        "oracle_s": least,
        "oracle_cpu_s": time.process_time() - began_s,
        "excess": found["cost_s"] / least - 1.0,
    }


def brute_force(objective: Any, stages: int, slots: int) -> float:
    """The least price over all grids; pipelines have no order, so the first row is sorted."""
    from swarmnode.coordinator.objective import Arrangement

    layers = tuple((s, s + 1) for s in range(stages))
    least = float("inf")
    for nodes in permutations(range(stages * slots)):
        rows = tuple(nodes[s * slots : (s + 1) * slots] for s in range(stages))
        if list(rows[0]) == sorted(rows[0]):
            least = min(least, objective.price(Arrangement(rows, layers)).total_s)
    return least


def by_cp_sat(topology: Any, stages: int, slots: int, limit_s: float) -> tuple[float, str]:
    """DT-FM's cost as an integer programme in microseconds; the best found and whether proven."""
    from ortools.sat.python import cp_model

    from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES

    count = topology.num_nodes
    row_us = np.rint(2e6 * topology.transfer_s(GRADIENT_BYTES / slots)).astype(int).tolist()
    hop_us = np.rint(2e6 * topology.transfer_s(ACTIVATION_BYTES)).astype(int).tolist()
    model = cp_model.CpModel()
    nodes, places = range(count), [(s, v) for s in range(stages) for v in range(slots)]
    at = {(n, s, v): model.new_bool_var("") for n in nodes for s, v in places}
    stage = {(n, s): model.new_bool_var("") for n in nodes for s in range(stages)}
    together = {(i, j): model.new_bool_var("") for i in nodes for j in nodes if i < j}
    for n in nodes:
        model.add_exactly_one(at[n, s, v] for s, v in places)
    for s, v in places:
        model.add_exactly_one(at[n, s, v] for n in nodes)
    for n, s in stage:
        model.add(stage[n, s] == sum(at[n, s, v] for v in range(slots)))
    for i, j in together:
        for s in range(stages):
            model.add_implication(stage[i, s], together[i, j]).only_enforce_if(stage[j, s])
    most = sum(max(row) for row in row_us)
    reduction = model.new_int_var(0, most, "")
    for i in nodes:
        peers = [(row_us[i][j], together[min(i, j), max(i, j)]) for j in nodes if j != i]
        model.add(reduction >= sum(cost * both for cost, both in peers))
    hops = [model.new_int_var(0, max(map(max, hop_us)), "") for _ in range(stages - 1)]
    for h, hop in enumerate(hops):
        for v in range(slots):
            for i, j in ((i, j) for i in nodes for j in nodes if i != j):
                met = [at[i, h, v], at[j, h + 1, v]]
                model.add(hop >= hop_us[i][j]).only_enforce_if(met)
    for v in range(1, slots):  # pipelines have no order
        first = [sum(n * at[n, 0, w] for n in nodes) for w in (v - 1, v)]
        model.add(first[0] < first[1])
    model.minimize(reduction + sum(hops))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return float("inf"), "nothing found"
    proven = status == cp_model.OPTIMAL
    return solver.objective_value / 1e6, "optimal" if proven else "not proven"


def churn_trace(seed: int, moves: int) -> Iterator[dict[str, Any]]:
    """Four of 64 nodes leave and four join, round after round; each round starts from the last."""
    from swarmnode.coordinator.cost.dtfm import ACTIVATION_BYTES, GRADIENT_BYTES
    from swarmnode.coordinator.objective import NOBODY, Arrangement, Effort
    from swarmnode.coordinator.planning.problem import BYTES_PER_STATE_WEIGHT, DEFAULT_HORIZON_STEPS
    from swarmnode.coordinator.solver.grid.dtfm import DtfmObjective
    from swarmnode.coordinator.solver.search import solve
    from swarmnode.coordinator.transition import charges

    world = irregular_swarm(64 + CHURN_ROUNDS * CHURN_NODES, 0)
    random = np.random.default_rng(seed)
    here = list(range(64))

    def objective() -> Any:
        return DtfmObjective(
            world.take(here), 8, 8,
            gradient_bytes=GRADIENT_BYTES, activation_bytes=ACTIVATION_BYTES,
            most_moved=MOST_MOVED,
        )  # fmt: skip

    effort = Effort(moves=moves, seed=seed)
    now = solve(objective(), effort=effort).arrangement
    state = [BYTES_PER_STATE_WEIGHT / 4 * GRADIENT_BYTES] * 8
    for number in range(CHURN_ROUNDS):
        gone = {int(i) for i in random.choice(64, CHURN_NODES, replace=False)}
        left = [node for i, node in enumerate(here) if i not in gone]
        fresh = list(range(64 + number * CHURN_NODES, 64 + (number + 1) * CHURN_NODES))
        index = {node: i for i, node in enumerate(left + fresh)}
        rows = tuple(tuple(index.get(here[n], NOBODY) for n in row) for row in now.slots)
        here = left + fresh
        changed = objective()
        previous = charges(
            Arrangement(rows, now.layers), changed.topology, state, DEFAULT_HORIZON_STEPS
        )
        began_s = time.process_time()
        first = changed.first(previous)
        first_cpu_s = time.process_time() - began_s
        solution = solve(changed, previous=previous, effort=effort)
        cpu_s = time.process_time() - began_s
        cold = solve(changed, effort=effort)
        now = solution.arrangement
        yield {
            "round": number, "first_cpu_s": first_cpu_s,
            "first_s": changed.price(first).total_s, "cost_s": solution.cost_s,
            "cold_s": cold.cost_s, "over_cold": solution.cost_s / cold.cost_s - 1.0,
            "num_moved": len(solution.moved), "cpu_s": cpu_s,
        }  # fmt: skip


def child(request: Mapping[str, Any]) -> Any:
    """What a child process is asked to do."""
    match request["do"]:
        case "solve":
            return measured(request["case"], request["seed"], request["moves"])
        case "random":
            return random_costs(request["case"], request["count"])
        case "small":
            return small_instance(tuple(request["grid"]), request["seed"], request["limit_s"])
        case "churn":
            return list(churn_trace(request["seed"], request["moves"]))
    raise ValueError(request["do"])
