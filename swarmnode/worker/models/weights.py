"""Weights in and out of safetensors files: only what a stage needs, under the right names.

Two sets of names: canonical (the model's parameters in this program) and stored (in the files).
They differ where the library packs tensors (Mixtral's experts), has renamed a part (GPT-NeoX's
head) or where a folder was saved without the base model's prefix (GPT-2).
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from swarmnode.errors import DataError
from swarmnode.failpoints import hit
from swarmnode.tensorfiles import DATA_SHA256, TensorSpan, read_bytes
from swarmnode.worker.models.library import (
    ModelConfig,
    build_empty,
    read_config,
    tied_names,
)
from swarmnode.worker.models.stage import StageModule, stage_shapes

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def needed_tensors(config: ModelConfig, layers: tuple[int, int]) -> tuple[str, ...]:
    """Return the canonical names of the tensors that a stage holds, in the stage's order.

    A tied head that has its own copy is named as the embedding: that is where its values are.
    """
    tied = tied_names(build_empty(read_config(config), torch.float32, "sdpa"))
    names = (tied.get(name, name) for name in stage_shapes(config, layers))
    return tuple(dict.fromkeys(names))


def sources_for(
    config: ModelConfig, layers: tuple[int, int], stored: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return which stored tensors a stage needs: canonical name -> stored names.

    Raises: DataError, naming one, if a tensor that the stage needs is in none of the files.
    """
    names = _Names(config)
    groups = names.group(stored)
    return {
        name: names.find(groups, name).stored_names() for name in needed_tensors(config, layers)
    }


def load_tensors(stage: StageModule, spans: Mapping[str, TensorSpan]) -> None:
    """Fill a stage from files; nothing but the stage's own tensors is read.

    Values are rounded to the stage's dtype. A tied head takes the embedding's values. At most one
    tensor (and, where the library packs several into one, its parts) is in memory besides.
    Raises: DataError if a tensor is missing or has another shape; the stage is then half filled.
    """
    names = _Names(stage.config)
    groups = names.group(spans)
    with torch.no_grad():
        for name, place in stage.tensors_by_name().items():
            value = names.find(groups, name).read(spans, names.model)
            if value.shape != place.shape:
                raise DataError(
                    f"tensor {name} is {tuple(value.shape)} in the files, "
                    f"but {tuple(place.shape)} in the model"
                )
            place.copy_(value)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file; it appears complete, on disk, or not at all.

    Raises: DataError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in held.items():  # the library refuses tensors that share memory
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            held[name] = tensor.clone()
        seen.add(storage.data_ptr())
    metadata = {"format": "pt", DATA_SHA256: _data_sha256(held)}
    try:
        safetensors.torch.save_file(held, temporary, metadata=metadata)
        hit("snapshot_write")
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hash that `check_data` finds; the tensors are contiguous and on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Group:
    """Stored tensors that become one canonical tensor, and how."""

    def __init__(self, converter: Any, target: str) -> None:
        self.converter = converter
        self.target = target
        self.parts: list[tuple[str, str]] = []
        """(stored name, pattern that it matched), in natural order."""

    def stored_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def read(self, spans: Mapping[str, TensorSpan], model: transformers.PreTrainedModel) -> Tensor:
        if self.converter is None:
            return _read_tensor(spans[self.parts[0][0]])
        converter = deepcopy(self.converter)
        for name, pattern in self.parts:
            converter.add_tensor(self.target, name, pattern, _read_tensor(spans[name]))
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"the stored parts of {self.target} do not fit together") from error
        value = made[self.target]
        value = value[0] if isinstance(value, list) else value
        assert isinstance(value, Tensor)
        return value


class _Names:
    """How one model's canonical names follow from stored ones; the library's own rules."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = build_empty(read_config(config), torch.float32, "sdpa")
        self._tied = tied_names(self.model)
        rules = get_model_conversion_mapping(self.model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def group(self, stored: Iterable[str]) -> dict[str, _Group]:
        """Return canonical name -> the stored tensors that it is made of.

        Raises: DataError if two stored tensors claim the same canonical name.
        """
        known = self.model.state_dict()
        by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        groups: dict[str, _Group] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, self._renamings, self._converters, self.model.base_model_prefix, known
            )
            if name in known:
                target, pattern = name, None
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, _Group(converter, target))
            group.parts.append((name, pattern or name))
            if group.converter is not converter or (converter is None and len(group.parts) > 1):
                raise DataError(f"several stored tensors claim to be {target}")
        return groups

    def find(self, groups: Mapping[str, _Group], name: str) -> _Group:
        """Return what `name`, or a parameter that is tied to it, is made of.

        Raises: DataError if there is no such thing.
        """
        canonical = self._tied.get(name, name)
        copies = sorted(copy for copy, of in self._tied.items() if of == canonical)
        for candidate in (canonical, *copies):
            if candidate in groups:
                return groups[candidate]
        raise DataError(f"the weights lack tensor {canonical}")


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_tensor(span: TensorSpan) -> Tensor:
    if span.num_bytes == 0:
        return torch.empty(span.shape, dtype=_DTYPES[span.dtype])
    return torch.frombuffer(read_bytes(span), dtype=_DTYPES[span.dtype]).reshape(span.shape)
