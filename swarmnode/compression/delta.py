"""The memory `aq/SPEC`: what travels is how a sample's activation changed since its last visit.

Both ends of a boundary keep the value m that the receiver last computed on, sample by sample:

    sender:     q = SPEC(x - m);  m' = m + q        receiver:   m' = m + q, and computes on m'

The first visit goes in full, as bfloat16. m is bfloat16; x - m and m + q are separate float32
operations, the same on every device, so the two m stay equal bit for bit. Every frame says which
version of m it changes, that version's CRC-32 and the CRC-32 of m': drift cannot go unnoticed,
and the receiver answers it with a refusal, upon which the sample is sent in full.

Two phases on both ends: what a step puts into the cache lasts only when the step is committed.

    frame = sender.prepare(key, hidden)                     found = receiver.receive(frame)
    key = sender.refused(found.refusal), and again    <-    if found.refusal is not None
    ... the step ends: commit() on both ends, or rollback() on both.

If only one end learns that the step was committed, the next visit is refused, and heals.
Source: AC-SGD, arXiv:2206.01299; versions, checksums and slots are ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swarmnode.codec_specs import parse_spec
from swarmnode.compression.codec import codec_of, get_codec
from swarmnode.compression.delta_cache import DeltaCache, Entry, crc_of
from swarmnode.compression.delta_frames import (
    NO_SLOT,
    Frame,
    Prefix,
    Refusal,
    pack_frame,
    pack_refusal,
    scope_of,
    slot_of,
    unpack_frame,
    unpack_refusal,
)
from swarmnode.compression.payload import MAX_STATE_VERSION, header_bytes, pack
from swarmnode.compression.tensors import Payload, item_bytes
from swarmnode.errors import CodecError

_BF16 = get_codec("bf16")


@dataclass
class DeltaCounts:
    """What one end did since it was made."""

    num_full: int = 0
    """Samples in full, to be kept."""
    num_deltas: int = 0
    """Samples as a change."""
    num_unkept: int = 0
    """Samples in full that found no room."""
    num_cold: int = 0
    """Samples that were not finite; the entry was dropped."""
    num_refused: int = 0
    """Frames that the receiver could not use."""
    num_repeated: int = 0
    """Frames that the receiver already had."""


@dataclass(frozen=True, eq=False)
class Received:
    """What became of a frame: either its values or why there are none."""

    tensor: Tensor | None
    """What to compute on: float32."""
    refusal: bytes | None = None
    """For the sender, instead of a tensor."""
    is_repeated: bool = False
    """This frame was received before, and nothing changed."""


class _End:
    """What both ends of one boundary have: a codec, a scope and a cache."""

    def __init__(self, spec: str, scope: bytes, cache: DeltaCache) -> None:
        """Raises: ManifestError unless `spec` is `aq/SPEC`."""
        form = parse_spec(spec)
        assert form.memory == "delta", f"{spec} keeps no delta"
        self.spec = str(form)
        self.counts = DeltaCounts()
        self._codec = codec_of(form)
        self._cache = cache
        self._scope = scope_of(self.spec, scope)

    def reset(self, scope: bytes) -> None:
        """Begin anew: another generation, cut point or peer. Everything is forgotten."""
        self._scope = scope_of(self.spec, scope)
        self._cache.clear()

    def commit(self) -> None:
        """The step is done: what it put into the cache lasts."""
        self._cache.commit()

    def rollback(self) -> None:
        """The step never was: the cache is, bit for bit, what it was before it."""
        self._cache.rollback()


class DeltaSender(_End):
    """The end that has the activations. `scope` and `spec` must be those of the receiver.

    A key names a sample at this boundary: (dataset hash, sample id, cut point), say. It does not
    travel: every key gets a slot, in order, until there are none; keys after that are always sent
    in full. Epochs visit samples in turn, so throwing out the oldest would leave no hit at all.
    """

    def __init__(self, spec: str, scope: bytes, cache: DeltaCache) -> None:
        super().__init__(spec, scope, cache)
        self._slots: dict[bytes, int] = {}
        self._num_slots = cache.num_slots
        self._version = 0
        self._open: dict[bytes, int] = {}
        """Versions of the frames of this step that may still be refused."""

    def reset(self, scope: bytes) -> None:
        super().reset(scope)
        self._slots.clear()
        self._num_slots = self._cache.num_slots
        self._open.clear()

    def prepare(self, key: bytes, hidden: Tensor) -> bytearray:
        """A frame with the activation of one sample; float32 or bfloat16, on any device.

        To send it again, send the same bytes. A value that is not finite makes the sample cold:
        it travels as it is, and nothing of it is kept.

        Raises: CodecError for another dtype, or more values than a slot has.
        """
        item_bytes(hidden.dtype)
        if hidden.numel() > self._cache.slot_values:
            raise CodecError(f"{tuple(hidden.shape)} is more than {self._cache.slot_values} values")
        x = hidden.detach()
        full = x.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        slot = self._slot(key)
        if not _is_finite(full):
            self.counts.num_cold += 1
            self._open.pop(key, None)
            if slot != NO_SLOT:
                self._cache.forget(slot)
            return self._pack_full(full, NO_SLOT, 0)
        if slot == NO_SLOT:
            self.counts.num_unkept += 1
            return self._pack_full(full, NO_SLOT, 0)
        self._version += 1
        self._open[key] = self._version
        entry = self._cache.entry(slot)
        if entry is not None and entry.shape == tuple(x.shape):
            frame = self._pack_delta(x, slot, entry)
            if frame is not None:
                self.counts.num_deltas += 1
                return frame
        self.counts.num_full += 1
        return self._pack_full(full, slot, self._version)

    def prefetch(self, key: bytes) -> None:
        """A sample is sent soon: have what is held of it read, where it lies on a disk."""
        self._cache.prefetch(self._slots.get(key, NO_SLOT))

    def held(self, key: bytes) -> Tensor | None:
        """What the receiver has of a sample, if it is kept; bfloat16, not to be written to."""
        slot = self._slots.get(key, NO_SLOT)
        return None if self._cache.entry(slot) is None else self._cache.values(slot)

    def refused(self, refusal: Payload) -> bytes | None:
        """The key to `prepare` again, in full; None if that frame was of an earlier step.

        Raises: CodecError for bytes that are no refusal of this scope.
        """
        found = unpack_refusal(refusal)
        if found.scope != self._scope:
            raise CodecError("refusal is about another boundary or generation")
        self.counts.num_refused += 1
        self._version = max(self._version, found.held_version)
        if found.num_slots < self._num_slots:
            self._num_slots = found.num_slots
            self._slots = {k: s for k, s in self._slots.items() if s < found.num_slots}
        entry = self._cache.entry(found.slot)
        if entry is not None and entry.version == found.version:
            self._cache.forget(found.slot)
        key = next((k for k, version in self._open.items() if version == found.version), None)
        if key is not None:
            del self._open[key]
        return key

    def commit(self) -> None:
        super().commit()
        self._open.clear()

    def rollback(self) -> None:
        super().rollback()
        self._open.clear()

    def _slot(self, key: bytes) -> int:
        """Where `key` lies; NO_SLOT if there is no room, or no version left to say it with."""
        if self._version >= MAX_STATE_VERSION:
            return NO_SLOT
        if key not in self._slots:
            if len(self._slots) >= self._num_slots:
                return NO_SLOT
            self._slots[key] = len(self._slots)
        return self._slots[key]

    def _pack_full(self, full: Tensor, slot: int, version: int) -> bytearray:
        payload = pack(_BF16, full, version)
        values = full.cpu()
        crc = crc_of(values)
        if slot != NO_SLOT:
            self._cache.put(slot, Entry(version, crc, tuple(values.shape)), values)
        return pack_frame(Prefix(self._scope, False, slot, 0, 0, crc), payload)

    def _pack_delta(self, x: Tensor, slot: int, entry: Entry) -> bytearray | None:
        """The frame with the change; None where a number leaves the range of floats."""
        base = self._cache.values(slot).to(x.device).float()
        delta = torch.sub(x.float(), base)
        if not _is_finite(delta):
            return None
        payload = pack(self._codec, delta, self._version)
        body = memoryview(payload)[header_bytes(self._codec, x.shape) :]
        change = self._codec.decode(body, x.shape, device=x.device)
        values = _changed(base, change)
        if not _is_finite(values):
            return None
        kept = values.cpu()
        crc = crc_of(kept)
        self._cache.put(slot, Entry(self._version, crc, entry.shape), kept)
        prefix = Prefix(self._scope, True, slot, entry.version, entry.crc, crc)
        return pack_frame(prefix, payload)


class DeltaReceiver(_End):
    """The end that computes on what comes. `scope` and `spec` must be those of the sender."""

    def prefetch(self, frame: Payload) -> None:
        """A frame has come, to be received later: have what it changes read from the disk."""
        self._cache.prefetch(slot_of(frame))

    def receive(self, frame: Payload, device: torch.device | str = "cpu") -> Received:
        """What a frame from a stranger holds, or the refusal to send back.

        A frame that was received before gives the same values again. One that is older than what
        its slot holds, or that changes what is not there, is refused.

        Raises: CodecError for bytes that no sender of this scope can have written; nothing has
        changed then, and there is nothing to answer.
        """
        found = unpack_frame(frame, self._cache.slot_values)
        prefix, payload = found.prefix, found.payload
        if prefix.scope != self._scope:
            raise CodecError("frame is of another boundary or generation")
        expected = (self._codec, torch.float32) if prefix.is_delta else (_BF16, torch.bfloat16)
        if (payload.codec, payload.dtype) != expected:
            raise CodecError(f"frame is coded as {payload.codec.spec}, not {expected[0].spec}")
        if prefix.slot == NO_SLOT:
            return Received(self._unkept(found, device))
        entry = self._cache.entry(prefix.slot)
        if entry is not None and (entry.version, entry.crc) == (found.version, prefix.crc):
            self.counts.num_repeated += 1
            values = self._cache.values(prefix.slot).to(device, torch.float32)
            return Received(values, is_repeated=True)
        if prefix.slot >= self._cache.num_slots or not self._follows(found, entry):
            return self._refuse(found, entry)
        return self._apply(found, entry, device)

    def _follows(self, frame: Frame, entry: Entry | None) -> bool:
        """Whether a frame is newer than what its slot holds, and changes exactly that."""
        prefix = frame.prefix
        if entry is None:
            return not prefix.is_delta
        base = (prefix.base_version, prefix.base_crc, frame.payload.shape)
        return frame.version > entry.version and (
            not prefix.is_delta or base == (entry.version, entry.crc, entry.shape)
        )

    def _is_intact(self, frame: Frame, crc: int) -> bool:
        """Whether what came out is what the sender has."""
        return crc == frame.prefix.crc

    def _apply(self, frame: Frame, entry: Entry | None, device: torch.device | str) -> Received:
        prefix, payload = frame.prefix, frame.payload
        decoded = payload.decode(device)
        values = decoded
        if prefix.is_delta:
            base = self._cache.values(prefix.slot).to(decoded.device).float()
            values = _changed(base, decoded)
        kept = values.cpu()
        crc = crc_of(kept)
        if not self._is_intact(frame, crc):
            if prefix.is_delta:
                return self._refuse(frame, entry)
            raise CodecError("frame does not hold the values that it announces")
        if not _is_finite(values):
            raise CodecError("frame has a value to keep that is not finite")
        self._cache.put(prefix.slot, Entry(frame.version, crc, payload.shape), kept)
        if prefix.is_delta:
            self.counts.num_deltas += 1
        else:
            self.counts.num_full += 1
        return Received(values.float())

    def _unkept(self, frame: Frame, device: torch.device | str) -> Tensor:
        values = frame.payload.decode(device)
        if not self._is_intact(frame, crc_of(values.cpu())):
            raise CodecError("frame does not hold the values that it announces")
        self.counts.num_unkept += 1
        return values.float()

    def _refuse(self, frame: Frame, entry: Entry | None) -> Received:
        self.counts.num_refused += 1
        held = 0 if entry is None else entry.version
        refusal = Refusal(
            self._scope, frame.prefix.slot, frame.version, held, self._cache.num_slots
        )
        return Received(None, refusal=pack_refusal(refusal))


def _changed(base: Tensor, change: Tensor) -> Tensor:
    """m + q as bfloat16: one addition, one rounding, never fused with what made q."""
    return torch.add(base, change).to(torch.bfloat16)


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
