"""The model zoo: Hugging Face causal language models, cut into stages, initialised and stored.

Names are loaded when they are first used: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmnode.worker.models.export import export_folder
    from swarmnode.worker.models.initialise import initialize
    from swarmnode.worker.models.library import (
        VERIFIED_FAMILIES,
        ModelConfig,
        check_vocabulary,
        read_config,
    )
    from swarmnode.worker.models.stage import StageModule, build_stage, stage_shapes
    from swarmnode.worker.models.weights import (
        load_tensors,
        needed_tensors,
        save_tensors,
        sources_for,
    )

__all__ = [
    "VERIFIED_FAMILIES",
    "ModelConfig",
    "StageModule",
    "build_stage",
    "check_vocabulary",
    "export_folder",
    "initialize",
    "load_tensors",
    "needed_tensors",
    "read_config",
    "save_tensors",
    "sources_for",
    "stage_shapes",
]

_HOMES = {
    "export": ("export_folder",),
    "initialise": ("initialize",),
    "library": ("VERIFIED_FAMILIES", "ModelConfig", "check_vocabulary", "read_config"),
    "stage": ("StageModule", "build_stage", "stage_shapes"),
    "weights": ("load_tensors", "needed_tensors", "save_tensors", "sources_for"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
