"""Placement: which machine hosts which slot."""

from swarmnode.coordinator.solver.fill import Decision, newcomers_help, solve

__all__ = ["Decision", "newcomers_help", "solve"]
