"""Scenarios and runs that several tests share."""

from pathlib import Path

from swarmnode.simulation.outcome import Outcome, run_seed
from swarmnode.simulation.scenario import (
    FaultSection,
    JobSection,
    Scenario,
    SwarmSection,
    load_scenario,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "scenarios"
FAULTS = load_scenario(EXAMPLES / "faults.toml")
CALM = Scenario(name="calm")
PEACE = Scenario(
    name="peace",
    swarm=SwarmSection(load_s=(0.1,)),
    jobs=(JobSection(steps=40, step_s=0.6, evaluate_every=3),),
    faults=FaultSection(every_s=6.0, last_s=60.0, kinds=("leave", "join")),
)
"""Nothing breaks, but machines come and, politely, go."""


def first_violation(scenario: Scenario, most_seeds: int, violation: str) -> Outcome | None:
    """The first seed in which this happened, which never may."""
    outcomes = (run_seed(scenario, seed) for seed in range(most_seeds))
    return next((outcome for outcome in outcomes if violation in outcome.violation), None)
