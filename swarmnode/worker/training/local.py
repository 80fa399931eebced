"""Slots that train on their own for some steps: a committed step is a round of those.

A round begins at the stage's weights, the anchor, which all slots have alike. Each slot then has
weights of its own; what it sends is by how far they went, and nothing of them outlasts the round.
Only the moments of its AdamW do: they live with the process that computes, like residuals, behind
exactly the committed step that left them. Elsewhere a slot begins a round with moments of zero.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmnode.domain import BlobRef, SlotId
from swarmnode.manifest import Manifest
from swarmnode.worker.models import StageModule
from swarmnode.worker.training.fingerprint import sum_of_squares
from swarmnode.worker.training.optimizer import StageOptimizer
from swarmnode.worker.training.reduce import FlatGradient
from swarmnode.worker.training.state import StageState, local_state


@dataclass
class _Slot:
    """What a slot has of its own."""

    state: StageState
    optimizer: StageOptimizer
    num_steps: int = 0
    """That the moments have seen."""
    step: int = -1
    """The committed step that it works for, or has worked for."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """The moments as the step `kept_step` left them."""
    kept_step: int = -1
    num_kept_steps: int = 0

    def keep(self) -> None:
        """The round is committed: its moments are those to go on from."""
        moments = self.optimizer.moments()
        if self.kept:
            for name, moment in moments.items():
                self.kept[name].copy_(moment)
        else:
            self.kept = {name: moment.clone() for name, moment in moments.items()}
        self.kept_step, self.num_kept_steps = self.step, self.num_steps

    def go_back(self) -> None:
        """To the moments that were kept, or to none."""
        is_kept = self.kept_step == self.step - 1 and bool(self.kept)
        moments = self.optimizer.moments()
        for name, moment in moments.items():
            if is_kept:
                moment.copy_(self.kept[name])
            else:
                moment.zero_()
        self.num_steps = self.num_kept_steps if is_kept else 0
        self.optimizer.set_state(self.num_steps, moments)


class LocalSlots:
    """The slots of one node that train on their own, from generation to generation.

    `dropped["moments"]` counts rounds that a slot had to begin with moments of zero although
    others were before it.
    """

    def __init__(self, dropped: Counter[str]) -> None:
        self._dropped = dropped
        self._layout: object = None
        self._slots: dict[SlotId, _Slot] = {}
        self._keeps = True
        self._logged: dict[int, tuple[int, BlobRef]] = {}
        """By stage: the newest step whose update was logged here, and the update."""

    def begin(
        self,
        layout: object,
        step: int,
        hosted: Collection[SlotId],
        update_of: Callable[[int], BlobRef | None],
        *,
        keeps: bool,
    ) -> None:
        """A generation begins with `step`; other slots than the `hosted` are forgotten.

        `layout` and `update_of` are as in `Residuals.begin`. `keeps`: whether moments outlast a
        round at all; not where bits must not depend on who was lost.
        """
        self._keeps = keeps
        if layout != self._layout:
            self._slots.clear()
            self._layout = layout
        for gone in set(self._slots) - set(hosted):
            del self._slots[gone]
        for at, slot in self._slots.items():
            logged = self._logged.get(at.stage)
            was_open = slot.step == step - 1 and slot.kept_step != slot.step
            if keeps and was_open and logged == (step - 1, update_of(at.stage)):
                slot.keep()
        self._logged.clear()

    def logged(self, stage: int, step: int, update: BlobRef) -> None:
        """The whole update of a stage in `step` is here, what this node sent for it included."""
        self._logged[stage] = step, update

    def of(
        self, manifest: Manifest, stages: Mapping[int, StageState], device: str
    ) -> "LocalSteps | None":
        """Their steps in a generation, whose anchors are `stages`; None where none train so."""
        if manifest.kind != "train" or manifest.codecs.local is None:
            return None
        return LocalSteps(self, manifest, stages, device)

    def slot(self, at: SlotId, make: Callable[[], StageState]) -> _Slot:
        if at not in self._slots:
            state = make()
            assert isinstance(state.optimizer, StageOptimizer)
            self._slots[at] = _Slot(state, state.optimizer)
        return self._slots[at]

    def began(self, slot: _Slot, *, is_first: bool) -> None:
        """Put a slot where its round begins, and count what it has to do without."""
        slot.go_back()
        if self._keeps and slot.num_steps == 0 and not is_first:
            self._dropped["moments"] += 1

    def committed(self, step: int) -> None:
        """The round of `step` is over: its moments are those to go on from."""
        for slot in self._slots.values():
            if self._keeps and slot.step == step:
                slot.keep()


@dataclass(frozen=True)
class LocalSteps:
    """The rounds of one generation.

    start(slot, step); then after every local step's microbatches step(slot, gradients), and at
    the end difference(slot, gradients), which is what is summed; committed(step).
    """

    slots: LocalSlots
    manifest: Manifest
    anchors: Mapping[int, StageState]
    device: str

    @property
    def num_steps(self) -> int:
        """In a round, H."""
        return self.manifest.codecs.num_local_steps

    def start(self, at: SlotId, step: int) -> None:
        """A round begins, perhaps again: at the anchor."""
        anchor = self.anchors[at.stage]
        slot = self._slot(at)
        slot.step, slot.state.step = step, step * self.num_steps
        with torch.no_grad():
            own = slot.state.module.tensors_by_name()
            for name, tensor in anchor.module.tensors_by_name().items():
                own[name].copy_(tensor)
        self.slots.began(slot, is_first=step == self.manifest.start_step)

    def module(self, at: SlotId) -> StageModule:
        """The stage with the slot's own weights."""
        return self._slot(at).state.module

    def step(self, at: SlotId, gradients: Iterable[FlatGradient]) -> None:
        """One step of AdamW with the slot's own gradient, which is then zero.

        Nobody knows the norm over all stages: each keeps to an equal share of what is allowed, so
        that all together never exceed it.
        """
        slot, gradients = self._slot(at), list(gradients)
        top = self.manifest.optimizer.clip_norm / math.sqrt(self.manifest.placement.stages)
        norm = math.sqrt(math.fsum(sum_of_squares(each.flat) for each in gradients)) if top else 0.0
        if norm > top:
            for each in gradients:
                each.flat.mul_(top / norm)
        views = {name: view for each in gradients for name, view in each.views.items()}
        slot.state.apply(views, num_steps=self.manifest.num_steps * self.num_steps)
        slot.num_steps += 1
        for each in gradients:
            each.flat.zero_()

    def difference(self, at: SlotId, into: Iterable[FlatGradient]) -> None:
        """By how far the slot went: anchor - its own weights, in place of its gradient."""
        anchor = self.anchors[at.stage].module.parameters_by_name()
        own = self.module(at).parameters_by_name()
        with torch.no_grad():
            for each in into:
                for name, view in each.views.items():
                    torch.sub(anchor[name], own[name], out=view)

    def logged(self, stage: int, step: int, update: BlobRef) -> None:
        self.slots.logged(stage, step, update)

    def committed(self, step: int) -> None:
        self.slots.committed(step)

    def _slot(self, at: SlotId) -> _Slot:
        return self.slots.slot(
            at, lambda: local_state(self.manifest, self.anchors[at.stage].layers, self.device)
        )
