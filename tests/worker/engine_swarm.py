"""Several engines in one process: real models, codecs and token files, a queue for a network."""

import hashlib
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from swarmnode.domain import BlobRef, Generation, LinkPreset, PeerId, Plan
from swarmnode.engine_messages import Base, Configure, Configured, EngineMessage
from swarmnode.manifest import (
    BatchConfig,
    CodecConfig,
    DataContent,
    Manifest,
    ModelContent,
    OptimizerConfig,
    PlacementConfig,
    RunConfig,
)
from swarmnode.messages import (
    Applied,
    Begin,
    Commit,
    Evaluated,
    Failed,
    Frame,
    Message,
    Ready,
)
from swarmnode.session_messages import (
    SessionClose,
    SessionFrame,
)
from swarmnode.tokens import TokenIndex
from swarmnode.wire import pack, unpack_local
from swarmnode.worker.engine.engine import Engine
from swarmnode.worker.models import initialize, read_config
from swarmnode.worker.training.log import UpdateLog
from swarmnode.worker.training.samples import SampleMap, TokenReader
from swarmnode.worker.training.state import StageState

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 80, "vocab_size": 67}
"""Matrices large enough that a coarse codec is used for them."""
TIED = {**LLAMA, "tie_word_embeddings": True}
_homes = itertools.count()
PLACEMENTS: dict[str, list[list[str]]] = {
    "four": [["a", "b"], ["c", "d"]],
    "one": [["a", "a"], ["a", "a"]],
    "three": [["a", "b"], ["c", "b"]],
}
"""slots[stage][slot] by name: a node for each slot, one for all, and something uneven."""


def _undurable_log(directory: Path) -> UpdateLog:
    return UpdateLog(directory, durable=False)


def write_tokens(directory: Path, tokens: np.ndarray, chunk_tokens: int = 700) -> BlobRef:
    """Store a token stream in chunks, and its index; the index's name."""

    def put(data: bytes) -> BlobRef:
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data))
        path = directory / ref.sha256[:2] / ref.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return ref

    starts = range(0, len(tokens), chunk_tokens)
    chunks = tuple(put(tokens[s : s + chunk_tokens].astype("<u2").tobytes()) for s in starts)
    return put(TokenIndex("uint16", chunk_tokens, len(tokens), chunks).canonical())


def make_manifest(
    blobs: Path,
    config: Mapping[str, Any] = LLAMA,
    *,
    codecs: CodecConfig | None = None,
    clip_norm: float = 0.5,
    num_microbatches: int = 4,
    stages: int = 2,
    slots: int = 2,
    layers: tuple[int, ...] | None = None,
    steps: int = 10,
    num_tokens: int = 5000,
    **run: Any,
) -> Manifest:
    """A training job over a text with structure: each token mostly follows from the last."""
    drawn = np.random.default_rng(0)
    tokens = [0]
    for noise in drawn.integers(0, 8, 6000):
        tokens.append((tokens[-1] * 3 + 7 + int(noise == 0)) % int(config["vocab_size"]))
    stream = np.array(tokens)
    return Manifest(
        name="test",
        optimizer=OptimizerConfig(warmup_steps=3, clip_norm=clip_norm, weight_decay=0.1),
        batch=BatchConfig(rows=2, sequence_length=16, num_microbatches=num_microbatches),
        codecs=codecs or CodecConfig(activation="none", activation_gradient="none"),
        placement=PlacementConfig(stages=stages, slots=slots, layers=layers),
        run=RunConfig(**{"steps": steps, "seed": 5, "evaluate_microbatches": 5, **run}),
        model=ModelContent(config=dict(config)),
        data=DataContent(
            train=write_tokens(blobs, stream[:num_tokens]),
            validation=write_tokens(blobs, stream[5000:]),
        ),
        tokenizer=BlobRef("0" * 64, 1),
        submitter=PeerId("submitter"),
        submitted_at_s=0.0,
    )


@dataclass
class Step:
    """What a coordinator learns in one step."""

    losses: dict[int, float]
    """By microbatch."""
    norm: float
    hashes: dict[int, str]
    """By stage; every holder had the same."""
    updates: tuple[BlobRef, ...] = ()
    """By stage; every holder had the same."""
    scale: float = 1.0

    @property
    def loss(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class Swarm:
    """Engines by peer, and a coordinator's view of them.

    `shuffle` seeds who computes when and whose messages are slow; 0 delivers at once.
    """

    manifest: Manifest
    slots: Sequence[Sequence[str]]
    blobs: Path
    layers: tuple[tuple[int, int], ...] = ((0, 2), (2, 4))
    shuffle: int = 0
    engines: dict[PeerId, Engine] = field(default_factory=dict)
    received: list[tuple[PeerId, Message | EngineMessage, bytes]] = field(default_factory=list)
    num_frames: int = 0
    generation: int = 0
    device: str = "cpu"
    without_data: frozenset[str] = frozenset()
    """Peers whose blob directory is empty."""
    echo: bool = False
    """Whether every frame arrives twice."""
    shadows: Sequence[Sequence[str]] = ()
    links: tuple[LinkPreset, ...] = ()
    home: Path = Path()
    """Where each peer has a folder for its files."""

    def __post_init__(self) -> None:
        if self.home == Path():
            self.home = self.blobs / f"homes-{next(_homes)}"
        self.random = random.Random(self.shuffle)
        self.network: deque[tuple[PeerId, bytes]] = deque()

    @property
    def plan(self) -> Plan:
        rows = tuple(tuple(PeerId(name) for name in row) for row in self.slots)
        return Plan(
            Generation(self.generation), self.layers, rows, PeerId("coordinator"),
            shadows=tuple(tuple(PeerId(name) for name in row) for row in self.shadows),
            links=self.links,
        )  # fmt: skip

    def configure(self, step: int = 0, how: str = "init", paths: Sequence[str] = ()) -> None:
        """Start the next generation; `paths` has a file for each stage where `how` is load."""
        self.start(step, lambda _, s: Base(s, how, step, paths[s] if paths else ""))  # type: ignore[arg-type]

    def start(self, step: int, base: Callable[[PeerId, int], Base]) -> None:
        """Start the next generation, with a base for each peer and stage."""
        self.generation += 1
        for peer in self.plan.workers():
            if peer not in self.engines:
                self.engines[peer] = Engine(self._sender(peer), _undurable_log)
            bases = tuple(base(peer, stage) for stage in self.plan.stages_of(peer))
            self.tell(peer, self.configuration(peer, step, bases), self.manifest.canonical())
        self.pump()
        answers = self.take(Configured)
        assert len(answers) == len(self.plan.workers()), self.received

    def configuration(self, peer: PeerId, step: int, bases: tuple[Base, ...]) -> Configure:
        blobs = self.blobs / "empty" if peer in self.without_data else self.blobs
        return Configure(
            self.manifest.job, peer, self.plan, step, bases, str(blobs), str(self.home / peer),
            1, self.device,
        )  # fmt: skip

    def tell(self, peer: PeerId, message: Message | EngineMessage, payload: bytes = b"") -> None:
        """Hand a message to one engine, through the wire format."""
        self.engines[peer].handle(*unpack_local(pack(message) + payload))

    def begin(self, step: int, *, evaluate: bool = False) -> None:
        self.begin_only(self.plan.workers(), step, evaluate=evaluate)

    def begin_only(self, peers: Sequence[str], step: int, *, evaluate: bool = False) -> None:
        for peer in peers:
            begin = Begin(self.manifest.job, Generation(self.generation), step, evaluate)
            self.tell(PeerId(peer), begin)

    def pump(self, max_units: int = 1 << 30) -> None:
        """Let everybody compute, in random turns, until all wait (or for so many units)."""
        units = 0
        while units < max_units:
            while self.network and (not self.shuffle or self.random.random() < 0.7):
                sender, data = self._next_message()
                self._deliver(sender, *unpack_local(data))
            peers = sorted(self.engines)
            self.random.shuffle(peers)
            if not any(self.engines[peer].run_once() for peer in peers) and not self.network:
                return
            units += 1

    def take(self, kind: type[Any]) -> list[Any]:
        """Everything of one type that has been received; it is then gone."""
        found = [message for _, message, _ in self.received if isinstance(message, kind)]
        self.received = [item for item in self.received if not isinstance(item[1], kind)]
        return found

    def received_of(self, kind: type[Any]) -> list[Any]:
        """The same, but it stays."""
        return [message for _, message, _ in self.received if isinstance(message, kind)]

    def step_hashes(self) -> dict[tuple[PeerId, int], str]:
        """The hash of every stage of every peer, as it is now."""
        return {
            (peer, stage): state.state_hash()
            for peer, engine in self.engines.items()
            for stage, state in engine._held.items()
        }

    def step(self, step: int) -> Step:
        """One whole training step, as a coordinator does it."""
        self.begin(step)
        self.pump()
        return self.commit(step)

    def commit(self, step: int, *, eager: bool = False, snapshot: bool = False) -> Step:
        """Commit what all are ready for; if `eager`, one begins the next before others hear it."""
        readies = self.take(Ready)
        plan = self.plan
        expected = {slot for peer in plan.workers() for slot in plan.held_by(peer)}
        assert {r.source for r in readies} == expected, (self.take(Failed), self.dropped())
        assert len(readies) == len(expected)
        for stage in range(plan.num_stages):
            assert len({r.update for r in readies if r.source.stage == stage}) == 1
        squares = {group: value for r in readies for group, value in r.sums_of_squares}
        norm = math.sqrt(math.fsum(squares.values()))
        clip = self.manifest.update_clip_norm
        scale = 1.0 if clip == 0 else min(1.0, clip / (norm + 1e-6))
        for number, peer in enumerate(plan.workers()):
            generation = Generation(self.generation)
            self.tell(peer, Commit(self.manifest.job, generation, step, scale, snapshot))
            if number == 0 and eager:
                self.begin_only([peer], step + 1)
                self.pump()
        self.pump()
        applied = self.take(Applied)
        assert len(applied) == sum(len(plan.stages_of(peer)) for peer in plan.workers())
        hashes = {a.stage: a.state_hash for a in applied}
        assert len({(a.stage, a.state_hash) for a in applied}) == plan.num_stages
        last = [r for r in readies if r.source.stage == plan.num_stages - 1]
        losses = {mb: loss for r in last for mb, loss in zip(r.microbatches, r.losses, strict=True)}
        updates = {r.source.stage: r.update for r in readies}
        return Step(losses, norm, hashes, tuple(updates[s] for s in sorted(updates)), scale)

    def evaluate(self, step: int) -> list[float]:
        self.begin(step, evaluate=True)
        self.pump()
        return [loss for e in sorted(self.take(Evaluated), key=lambda e: e.source)
                for loss in e.losses]  # fmt: skip

    def states(self) -> dict[int, StageState]:
        """One holder of each stage."""
        return {s: state for e in self.engines.values() for s, state in e._held.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for state in self.states().values():
            found.update({n: p.detach() for n, p in state.module.parameters_by_name().items()})
        return found

    def dropped(self) -> dict[str, int]:
        return dict(sum((engine.dropped for engine in self.engines.values()), Counter()))

    def _next_message(self) -> tuple[PeerId, bytes]:
        """The oldest message, or with `shuffle` the oldest of some sender: roads differ."""
        index = 0
        if self.shuffle:
            chosen = self.random.choice([sender for sender, _ in self.network])
            index = next(i for i, (sender, _) in enumerate(self.network) if sender == chosen)
        item = self.network[index]
        del self.network[index]
        return item

    def _sender(self, peer: PeerId) -> Any:
        def send(message: Message | EngineMessage, payload: Any) -> None:
            self.network.append((peer, pack(message) + bytes(payload)))

        return send

    def _deliver(
        self, sender: PeerId, message: Message | EngineMessage, payload: memoryview
    ) -> None:
        if isinstance(message, Frame | SessionFrame | SessionClose):
            host = self.plan.host(message.target)
            assert host != sender, "a frame left the node that it is for"
            self.num_frames += 1
            for _ in range(2 if self.echo else 1):
                self.engines[host].handle(message, payload)
        else:
            self.received.append((sender, message, bytes(payload)))


def plain_run(manifest: Manifest, blobs: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same job as a plain loop over the whole model: losses per step, final weights."""
    model = transformers.AutoModelForCausalLM.from_config(read_config(manifest.model.config))
    initialize(model, manifest.run.seed)
    batch, optimizer = manifest.batch, manifest.optimizer
    assert manifest.data is not None

    def path(ref: BlobRef) -> Path:
        return blobs / ref.sha256[:2] / ref.sha256

    index = TokenIndex.parse(path(manifest.data.train).read_bytes())
    reader = TokenReader(index, path)
    samples = SampleMap(
        manifest.run.seed, index.num_tokens, batch.sequence_length, batch.rows,
        batch.num_microbatches,
    )  # fmt: skip
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    losses = []
    for step in range(manifest.run.steps):
        total = 0.0
        for microbatch in range(batch.num_microbatches):
            offsets = samples.sample_offsets(step, microbatch)
            rows = torch.from_numpy(reader.read(offsets, batch.sequence_length))
            logits = model(rows[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / batch.num_microbatches).backward()
            total += loss.item() / batch.num_microbatches
        if optimizer.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = optimizer.learning_rate_at(step, manifest.run.steps)
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses, {n: p.detach() for n, p in model.named_parameters()}
