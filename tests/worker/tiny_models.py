"""Tiny models of every verified family, whole and cut, for the tests of the worker."""

from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from swarmnode.worker.models import StageModule, build_stage, initialize

MAX_ERROR = 1e-5
Config = dict[str, Any]
Configs = dict[str, Config]

torch.set_num_threads(1)


def whole_model(config: Config, *, attention: str = "sdpa") -> transformers.PreTrainedModel:
    """Build the library's own whole model, with our initial weights for seed 7."""
    read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = transformers.AutoModelForCausalLM.from_config(
        read, dtype=torch.float32, attn_implementation=attention
    ).eval()
    initialize(model, 7)
    return model


def cut_model(config: Config, cut: tuple[int, ...], **options: Any) -> list[StageModule]:
    stages = [build_stage(config, layers=layers, **options) for layers in pairwise(cut)]
    for stage in stages:
        initialize(stage, 7)
    return stages


def run(stages: list[StageModule], inputs: Tensor, **options: Any) -> Tensor:
    for stage in stages:
        inputs = stage(inputs, **options)
    return inputs


def some_tokens(num_sequences: int = 2, num_tokens: int = 20, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 67, (num_sequences, num_tokens), generator=generator)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())
