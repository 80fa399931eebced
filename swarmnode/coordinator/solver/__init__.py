"""Placement: which machine hosts which slot."""

from swarmnode.coordinator.solver.fill import Decision, solve

__all__ = ["Decision", "solve"]
