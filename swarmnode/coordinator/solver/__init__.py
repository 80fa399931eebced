"""Placement: which machine hosts which slot. `fill` answers at once; `search` is thorough."""
