"""Scenarios and runs that several tests share."""

from pathlib import Path

from swarmnode.simulation.outcome import Outcome, run_seed
from swarmnode.simulation.scenario import Scenario, load_scenario

EXAMPLES = Path(__file__).parents[2] / "examples" / "scenarios"
FAULTS = load_scenario(EXAMPLES / "faults.toml")
CALM = Scenario(name="calm")


def first_violation(scenario: Scenario, most_seeds: int) -> Outcome | None:
    """The first seed in which something happened that never may."""
    outcomes = (run_seed(scenario, seed) for seed in range(most_seeds))
    return next((outcome for outcome in outcomes if outcome.violation), None)
