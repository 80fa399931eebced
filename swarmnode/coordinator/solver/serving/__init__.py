"""Tokens per second through ranges of layers."""
