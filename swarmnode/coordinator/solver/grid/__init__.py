"""Grids whose nodes have one slot each: the objective of DT-FM."""
