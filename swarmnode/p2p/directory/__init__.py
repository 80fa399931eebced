"""The directory: signed adverts in a DHT that runs in a small child process of its own."""

from swarmnode.p2p.directory.client import Directory

__all__ = ["Directory"]
