"""What the daemon needs to know of or do with a model, done by a short-lived child with torch.

`python -m swarmnode.worker.models.tool` answers one JSON request on its pipe and ends.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swarmnode.children import python_module, spawn_child
from swarmnode.domain import ModelFacts
from swarmnode.errors import ChildError, DataError

TIMEOUT_S = 600.0
MAX_KEPT = 32
"""Answers that a desk remembers."""


async def model_facts(
    config: Mapping[str, Any], log: Path, stages: int, stored: tuple[str, ...] | None = None
) -> ModelFacts:
    """Check that a config can be cut into `stages` stages, and count its weights.

    With `stored`, also that these tensors of a folder are all that the model needs.
    Raises: DataError with one clear line, ChildError.
    """
    request = {"do": "facts", "config": dict(config), "stages": stages, "stored": stored}
    return ModelFacts(**await _ask(request, log))


class FactsDesk:
    """Asks for facts of models, and remembers the answers: importing torch takes seconds."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._known: dict[str, ModelFacts] = {}

    async def ask(
        self, config: Mapping[str, Any], stages: int, stored: tuple[str, ...] | None = None
    ) -> ModelFacts:
        """As `model_facts`."""
        question = json.dumps([dict(config), stages, stored], sort_keys=True)
        if question not in self._known:
            found = await model_facts(config, self._log, stages, stored)
            if len(self._known) >= MAX_KEPT:
                self._known.clear()
            self._known[question] = found
        return self._known[question]


async def export_model(
    config: Mapping[str, Any], weights: Path, tokenizer: Path, directory: Path, log: Path
) -> None:
    """Write the Hugging Face folder of a whole model from a file of its canonical tensors.

    Raises: DataError, ChildError.
    """
    request = {
        "do": "export",
        "config": dict(config),
        "weights": str(weights),
        "tokenizer": str(tokenizer),
        "directory": str(directory),
    }
    await _ask(request, log)


async def _ask(request: Mapping[str, Any], log: Path) -> Any:
    child = spawn_child(
        python_module("swarmnode.worker.models.tool"),
        env={"OMP_NUM_THREADS": "1"},
        name="model tool",
        log=log,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await child.send(json.dumps(request).encode())
            answer = json.loads(await child.receive())
    except TimeoutError:
        raise ChildError(f"model tool: no answer in {TIMEOUT_S:.0f} s") from None
    finally:
        await child.stop(grace_s=1.0)
    if "error" in answer:
        raise DataError(answer["error"])
    return answer["value"]


def facts_of(config: Mapping[str, Any], stages: int, stored: list[str] | None) -> ModelFacts:
    """The child's part of `model_facts`."""
    from swarmnode.worker.models import build_stage, read_config, sources_for, stage_shapes

    checked = read_config(config)
    count = int(checked.num_hidden_layers)
    if stored is not None:
        sources_for(config, (0, count), stored)
    whole = {name: t.numel() for name, t in stage_shapes(config, (0, count)).items()}
    first = {name: t.numel() for name, t in stage_shapes(config, (0, 1)).items()}
    last = stage_shapes(config, (count - 1, count))
    per_layer: dict[int, int] = {}
    for name, numel in whole.items():
        number = layer_of(name)
        if number is not None:
            per_layer[number] = per_layer.get(number, 0) + numel
    outside = [name for name in whole if layer_of(name) is None]
    if stages > 1 and count >= stages:
        # A trial run of the borders: a family that cannot be cut is refused here, not later.
        build_stage(config, layers=(count - 1, count))
    return ModelFacts(
        num_layers=count,
        layer_weights=max(per_layer.values()),
        first_weights=sum(whole[name] for name in outside if name in first),
        last_weights=sum(whole[name] for name in outside if name not in first),
        hidden_size=int(checked.hidden_size),
        vocab_size=int(checked.vocab_size),
        max_positions=int(checked.max_position_embeddings),
        tied=count > 1 and any(name not in whole for name in last),
    )


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to: the first number in its dotted name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def export(request: Mapping[str, Any]) -> None:
    """The child's part of `export_model`."""
    from safetensors.torch import load_file

    from swarmnode.worker.models import export_folder

    tensors = load_file(request["weights"])
    export_folder(
        Path(request["directory"]), request["config"], tensors, Path(request["tokenizer"])
    )


def main() -> None:
    """Answer one request."""
    from swarmnode.pipes import ChildPipe

    pipe = ChildPipe.inherit()
    request = json.loads(pipe.receive())
    try:
        if request["do"] == "facts":
            found = facts_of(request["config"], request["stages"], request["stored"])
            answer: dict[str, Any] = {"value": asdict(found)}
        else:
            export(request)
            answer = {"value": None}
    except DataError as error:
        answer = {"error": str(error)}
    pipe.send(json.dumps(answer).encode())
    pipe.close()


if __name__ == "__main__":
    main()
