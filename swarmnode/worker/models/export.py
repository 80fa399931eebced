"""Weights as a plain Hugging Face folder that anybody's tools load."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from swarmnode.errors import DataError
from swarmnode.tensorfiles import INDEX_NAME
from swarmnode.worker.models.library import ModelConfig, build_empty, read_config, tied_names
from swarmnode.worker.models.weights import save_tensors

MAX_FILE_BYTES = 4 << 30
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
"""What is copied from a tokenizer's folder; nothing else in it is looked at."""


def export_folder(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer_directory: Path | None = None,
) -> None:
    """Write a whole model: config, weights, and the tokenizer's files if a folder is given.

    `tensors` holds every tensor of the whole model by canonical name; a tied head may be left
    out. `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load the
    folder. It is written beside `directory` and renamed, replacing an earlier export.
    Raises: DataError if a tensor is missing, foreign or misshapen, or the folder can't be written.
    """
    stored = _stored_tensors(config, tensors)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_weights(temporary, stored)
        _write_json(temporary / "config.json", _plain_config(config, tensors))
        for name in TOKENIZER_NAMES if tokenizer_directory is not None else ():
            assert tokenizer_directory is not None
            if (tokenizer_directory / name).is_file():
                shutil.copyfile(tokenizer_directory / name, temporary / name)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    except OSError as error:
        raise DataError(f"cannot write {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _stored_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the tensors against the whole model and give them the names that others expect."""
    model = build_empty(read_config(config), torch.float32, "sdpa")
    tied = tied_names(model)
    expected = {n: t.shape for n, t in model.state_dict().items() if n not in tied}
    for name in sorted((expected.keys() | tensors.keys()) - tied.keys()):
        if name not in tensors:
            raise DataError(f"the weights lack tensor {name}")
        if name not in expected:
            raise DataError(f"the model has no tensor {name}")
        if tensors[name].shape != expected[name]:
            raise DataError(
                f"tensor {name} is {tuple(tensors[name].shape)}, "
                f"but {tuple(expected[name])} in the model"
            )
    stored: dict[str, Tensor] = revert_weight_conversion(model, {n: tensors[n] for n in expected})
    return stored


def _plain_config(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    model = build_empty(read_config(config), torch.float32, "sdpa")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    content = config if isinstance(config, Mapping) else config.to_dict()
    plain = {key: value for key, value in content.items() if key != "torch_dtype"}
    return {**plain, "architectures": [type(model).__name__], "dtype": dtypes[0]}


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, or numbered files of at most `MAX_FILE_BYTES` and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = total_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.nbytes > MAX_FILE_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if len(shards) == 1:
        save_tensors(folder / "model.safetensors", shards[0])
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file_name, shard)
        placed.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": placed}
    _write_json(folder / INDEX_NAME, index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
