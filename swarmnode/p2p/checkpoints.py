"""A checkpoint's manifest: canonical JSON that says what a state is made of, signed.

The state is a set of atoms: the weight `NAME` and its moments `NAME::exp_avg` and
`NAME::exp_avg_sq`, or with local steps `NAME::outer_momentum`; each a tensor in chunks named by
their hash. Nothing in it depends on how the job was cut into stages and slots.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from swarmnode.domain import BlobRef, JobId, LinkPreset
from swarmnode.errors import DataError, ProtocolError
from swarmnode.manifest import Section
from swarmnode.p2p import identity
from swarmnode.p2p.states import (
    ADAMW_SUFFIXES,
    MOMENT_SUFFIXES,
    OUTER_SUFFIXES,
    IndexedTensor,
    TensorIndex,
    rows_of,
    tensors_of,
)

MAX_MANIFEST_BYTES = 64 << 20
MAX_LINKS = 1 << 16
_SIGNED_PREFIX = b"swarmnode checkpoint 1\n"
_SIGNATURE_BYTES = 64

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Step = Annotated[int, Field(ge=0, lt=1 << 53)]
Label = Annotated[str, Field(max_length=128)]


class DataCursor(Section):
    """Where training reads next."""

    next_step: Step
    """The first step whose samples have not been used."""
    samples: Literal["job"] = "job"
    """(step, microbatch) -> samples is a function of the job alone: its seed, batch and data."""


class RandomState(Section):
    """Chance: everything that is drawn is a function of the seed and of the step."""

    seed: int = Field(ge=0, lt=1 << 63)


class OptimizerState(Section):
    """What the optimizer keeps besides the moments, which are atoms."""

    kind: Literal["adamw", "outer"] = "adamw"
    """outer: that of a job with local steps, whose slots keep their own moments to themselves."""
    step: Step
    """Updates done; decides bias correction and learning rate."""


class CheckpointManifest(Section):
    """What a checkpoint is. Raises, when made from impossible parts: ValueError."""

    schema_: Literal["swarmnode.checkpoint/1"] = Field(
        default="swarmnode.checkpoint/1", alias="schema"
    )
    job: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    job_manifest: dict[str, Any]
    """The job itself, whose hash is `job`: model config, data, batch, seed, optimizer."""
    step: Step
    """Committed steps in the state."""
    generation: Step
    """The generation of the job in which the checkpoint was recorded."""
    parent: Sha256 | None
    """The manifest before it, as a file's hash; absent for a first one."""
    data: DataCursor
    random: RandomState
    optimizer: OptimizerState
    loss: float | None
    """Mean training loss of the last step in the state, nats per token."""
    coarser_links: tuple[LinkPreset, ...] = Field(default=(), max_length=MAX_LINKS)
    """Links that carried boundary frames with other codecs than the job's when it was recorded."""
    weights_sha256: Sha256
    """See `hash_weights`."""
    software: dict[Label, Label] = Field(max_length=16)
    """Versions of what made it."""
    created_at_s: float = Field(ge=0)
    coordinator: Annotated[str, Field(max_length=64)]
    """Whose signature it carries."""
    atoms: tuple[IndexedTensor, ...]
    """Sorted by name."""

    @field_validator("atoms", mode="before")
    @classmethod
    def _from_rows(cls, rows: Any) -> Any:
        is_read = isinstance(rows, list)
        return tensors_of(rows) if is_read else rows

    @field_serializer("atoms")
    def _to_rows(self, atoms: tuple[IndexedTensor, ...]) -> list[Any]:
        return rows_of(atoms)

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that older versions do not know is there only where it says something."""
        found: dict[str, Any] = serialize(self)
        if not self.coarser_links:
            found.pop("coarser_links", None)
        return found

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if job_id_of(self.job_manifest) != self.job:
            raise ValueError("the job it holds is not the one that it names")
        model = self.job_manifest.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
            raise ValueError("the job it holds has no model")
        if not self.step == self.data.next_step == self.optimizer.step:
            raise ValueError("data, optimizer and weights are at different steps")
        _check_atoms(self.atoms)
        return self

    def canonical(self) -> bytes:
        """The bytes that are signed: sorted JSON without spaces."""
        return _canonical(self.model_dump(mode="json", by_alias=True))

    @property
    def codecs(self) -> dict[str, str]:
        """What the job codes its tensors with, by role: part of what is signed."""
        codecs = self.job_manifest.get("codecs")
        pairs = codecs.items() if isinstance(codecs, dict) else ()
        return {str(role): spec for role, spec in pairs if isinstance(spec, str)}

    @property
    def config(self) -> dict[str, Any]:
        """The model's Hugging Face config."""
        config: dict[str, Any] = self.job_manifest["model"]["config"]
        return config

    @property
    def num_bytes(self) -> int:
        return sum(atom.num_bytes for atom in self.atoms)

    @property
    def chunks(self) -> tuple[BlobRef, ...]:
        """Every chunk once."""
        return TensorIndex(self.step, self.atoms).chunks()


class Checkpoint:
    """A manifest and its coordinator's signature: the content of one file."""

    def __init__(self, manifest: CheckpointManifest, signature: bytes) -> None:
        self.manifest = manifest
        self.signature = signature

    @classmethod
    def signed(cls, manifest: CheckpointManifest, signer: identity.Identity) -> "Checkpoint":
        """Sign with the key of `manifest.coordinator`."""
        assert signer.peer == manifest.coordinator
        return cls(manifest, signer.sign(_SIGNED_PREFIX + manifest.canonical()))

    @property
    def is_authentic(self) -> bool:
        """Whether the signature is the named coordinator's over exactly this manifest."""
        body = _SIGNED_PREFIX + self.manifest.canonical()
        return identity.verify(self.manifest.coordinator, body, self.signature)

    def to_bytes(self) -> bytes:
        body = self.manifest.model_dump(mode="json", by_alias=True)
        return _canonical({**body, "signature": self.signature.hex()})

    @property
    def sha256(self) -> str:
        """The name that a later checkpoint gives as its parent."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @staticmethod
    def parse(data: bytes) -> "Checkpoint":
        """Read a file of `to_bytes`; its signature is not checked yet.

        Bound: at most MAX_MANIFEST_BYTES. Raises: DataError, one line, for anything else.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise DataError(f"a checkpoint manifest of over {MAX_MANIFEST_BYTES >> 20} MiB")
        try:
            raw = json.loads(data.decode("utf-8"))
            signature = bytes.fromhex(raw.pop("signature"))
            manifest = CheckpointManifest.model_validate(raw)
            checkpoint = Checkpoint(manifest, signature)
            is_canonical = checkpoint.to_bytes() == data
        except ProtocolError as error:
            raise DataError(f"not a checkpoint manifest: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"not a checkpoint manifest: {where} {first['msg']}"[:300]) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"not a checkpoint manifest: {error!s:.200}") from None
        if not is_canonical or len(signature) != _SIGNATURE_BYTES:
            raise DataError("not a checkpoint manifest: not in canonical form")
        return checkpoint


def job_id_of(job_manifest: Mapping[str, Any]) -> JobId:
    """The id of a job from its manifest as JSON, whatever version wrote it."""
    return JobId(hashlib.sha256(_canonical(job_manifest)).hexdigest()[:16])


def _canonical(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _check_atoms(atoms: Sequence[IndexedTensor]) -> None:
    """Each moment has its weight, of the same shape; and every weight has the same ones: both of
    AdamW, the one of an outer step, or none."""
    by_name = {atom.name: atom for atom in atoms}
    if list(by_name) != sorted(by_name):
        raise ValueError("its atoms are not in the order of their names")
    found: dict[str, int] = dict.fromkeys(MOMENT_SUFFIXES, 0)
    num_weights = 0
    for atom in atoms:
        name, mark, kind = atom.name.partition("::")
        if not mark:
            num_weights += 1
            continue
        weight = by_name.get(name)
        if mark + kind not in found or weight is None:
            raise ValueError(f"{atom.name!r:.80} is the moment of no weight")
        if atom.shape != weight.shape or atom.dtype != "F32":
            raise ValueError(f"{atom.name!r:.80} is not shaped like its weight")
        found[mark + kind] += 1
    kept = {suffix for suffix, count in found.items() if count}
    if kept not in (set(), set(ADAMW_SUFFIXES), set(OUTER_SUFFIXES)) or any(
        found[suffix] != num_weights for suffix in kept
    ):
        raise ValueError("some weights have moments and some have none")


# ---- what it is made of ------------------------------------------------------------------------


def merge(indexes: Iterable[TensorIndex], *, tied: bool) -> tuple[IndexedTensor, ...]:
    """The states of all stages as one set of atoms, sorted by name.

    What two stages hold under one name is there once; where the model is `tied`, a head that is
    a copy of the embedding is left out too. Raises: DataError if two stages disagree.
    """
    atoms: dict[str, IndexedTensor] = {}
    for index in indexes:
        for tensor in index.tensors:
            if atoms.setdefault(tensor.name, tensor) != tensor:
                raise DataError(f"two stages hold different values of {tensor.name}")
    for name in _copies(atoms) if tied else ():
        for each in (name, *(name + suffix for suffix in MOMENT_SUFFIXES)):
            atoms.pop(each, None)
    return tuple(atoms[name] for name in sorted(atoms))


def _copies(atoms: Mapping[str, IndexedTensor]) -> list[str]:
    """Matrices outside the layers that equal an earlier one, moments included."""
    seen: set[Any] = set()
    copies = []
    for name, atom in atoms.items():
        is_outside = not any(part.isdecimal() for part in name.split("."))
        if "::" in name or len(atom.shape) != 2 or not is_outside:
            continue
        moments = (atoms.get(name + suffix) for suffix in MOMENT_SUFFIXES)
        key = (atom.shape, atom.chunks, *(m.chunks if m else None for m in moments))
        if key in seen:
            copies.append(name)
        seen.add(key)
    return copies


class WeightsHash:
    """SHA-256 over all weights: JSON of [name, dtype, shape], then the bytes, sorted by name."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """The next weight; names must come sorted."""
        self._digest.update(json.dumps([name, dtype, list(shape)]).encode())

    def update(self, data: bytes) -> None:
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def hash_weights(atoms: Iterable[IndexedTensor], read: Callable[[BlobRef], bytes]) -> str:
    """The WeightsHash of a state, chunk by chunk; moments do not count. Raises: as `read`."""
    digest = WeightsHash()
    for atom in sorted(atoms, key=lambda atom: atom.name):
        if not atom.name.endswith(MOMENT_SUFFIXES):
            digest.begin(atom.name, atom.dtype, atom.shape)
            for chunk in atom.chunks:
                digest.update(read(chunk))
    return digest.hexdigest()


def finite(loss: float | None) -> float | None:
    """`loss` as a manifest takes it."""
    return loss if loss is not None and math.isfinite(loss) else None
