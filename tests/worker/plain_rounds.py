"""Local steps as a plain loop over whole models: what the engine must come to."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from swarmnode.domain import BlobRef
from swarmnode.manifest import Manifest
from swarmnode.tokens import TokenIndex
from swarmnode.worker.models import initialize, read_config
from swarmnode.worker.training.samples import SampleMap, TokenReader


@dataclass
class Plain:
    """Whole models, one for each pipeline, that train alone and meet at an anchor."""

    manifest: Manifest
    blobs: Path
    keeps_moments: bool = True
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.anchor = self._model()
        initialize(self.anchor, self.manifest.run.seed)
        self.momentum = {n: torch.zeros_like(p) for n, p in self.anchor.named_parameters()}
        self.models = [self._model() for _ in range(self.manifest.placement.slots)]
        self.adamws = [self._adamw(model) for model in self.models]
        data = self.manifest.data
        assert data is not None
        index = TokenIndex.parse(self._path(data.train).read_bytes())
        batch = self.manifest.batch
        self.reader = TokenReader(index, self._path)
        self.samples = SampleMap(
            self.manifest.run.seed, index.num_tokens, batch.sequence_length, batch.rows,
            batch.num_microbatches,
        )  # fmt: skip

    def round(self, number: int) -> None:
        sync, slots = self.manifest.codecs.local, self.manifest.placement.slots
        assert sync is not None
        count, total = self.manifest.batch.num_microbatches, 0.0
        for slot, model in enumerate(self.models):
            model.load_state_dict(self.anchor.state_dict())
            if not self.keeps_moments:
                self.adamws[slot] = self._adamw(model)
            for step in range(number * sync.every, (number + 1) * sync.every):
                for microbatch in range(slot, count, slots):
                    loss = self._loss(model, step, microbatch) / (count // slots)
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.item() / slots / sync.every
                self._step(slot, step, sync.every)
        self.losses.append(total)
        with torch.no_grad():
            for name, anchor in self.anchor.named_parameters():
                ends = [dict(model.named_parameters())[name] for model in self.models]
                mean = sum(anchor - end for end in ends) / slots
                outer = sync.outer
                self.momentum[name] = outer.momentum * self.momentum[name] + mean
                move = mean + outer.momentum * self.momentum[name] if outer.momentum else mean
                anchor -= outer.rate * move

    def _step(self, slot: int, step: int, every: int) -> None:
        model, adamw, config = self.models[slot], self.adamws[slot], self.manifest.optimizer
        by_stage: list[list[torch.nn.Parameter]] = [[], []]
        for name, parameter in model.named_parameters():
            is_last = "lm_head" in name or "layers.2." in name or "layers.3." in name
            by_stage[is_last or name == "model.norm.weight"].append(parameter)
        if config.clip_norm:
            for stage in by_stage:
                torch.nn.utils.clip_grad_norm_(stage, config.clip_norm / math.sqrt(2))
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate_at(step, self.manifest.run.steps * every)
        adamw.step()
        adamw.zero_grad()

    def _loss(self, model: Any, step: int, microbatch: int) -> torch.Tensor:
        length = self.manifest.batch.sequence_length
        offsets = self.samples.sample_offsets(step, microbatch)
        rows = torch.from_numpy(self.reader.read(offsets, length))
        logits = model(rows[:, :-1]).logits.float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())

    def _model(self) -> Any:
        config = read_config(self.manifest.model.config)
        return transformers.AutoModelForCausalLM.from_config(config)

    def _adamw(self, model: Any) -> torch.optim.AdamW:
        config = self.manifest.optimizer
        parameters = list(model.parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2]},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    def _path(self, ref: BlobRef) -> Path:
        return self.blobs / ref.sha256[:2] / ref.sha256


def distance(weights: dict[str, torch.Tensor], plain: Plain) -> float:
    """Of all weights, over how far they went since the beginning."""
    wanted = {name: each.detach() for name, each in plain.anchor.named_parameters()}
    assert weights.keys() == wanted.keys()
    beginning = plain._model()
    initialize(beginning, plain.manifest.run.seed)
    first = {name: each.detach() for name, each in beginning.named_parameters()}
    away = math.hypot(*(float((weights[name] - wanted[name]).norm()) for name in weights))
    return away / math.hypot(*(float((wanted[name] - first[name]).norm()) for name in weights))
