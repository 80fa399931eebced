"""Train and serve large language models on a swarm of home GPUs."""

__version__ = "0.1.0"
