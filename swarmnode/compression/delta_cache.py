"""The memory of one end of a boundary: values by slot, which change only when a step is committed.

The sender says which slot a sample lies in, so both ends have the same room and nobody has to
agree on what to throw away. Values are bfloat16: float32's range, half of its bytes.
"""

import mmap
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swarmnode.codec_specs import DELTA_VALUE_BYTES
from swarmnode.errors import CapacityError

_ADVICE_BYTES = 128 << 10
"""So much is asked for at once: Linux reads no more ahead of one request."""


@dataclass(frozen=True)
class Entry:
    """What is known of the values in one slot."""

    version: int
    crc: int
    shape: tuple[int, ...]


class DeltaCache:
    """Slots of `slot_values` values each, as many as `budget_bytes` have room for.

    In memory, or in a file without a name under `folder` that is mapped into memory and goes away
    with the process: after a restart its entries would mean nothing. `put` writes aside; `commit`
    makes that last, `rollback` forgets it. What lies aside (the samples of one step) is beyond
    the budget.

    Raises: CapacityError if there is no such memory, or no room in the folder.
    """

    def __init__(self, budget_bytes: int, slot_values: int, folder: Path | None = None) -> None:
        assert budget_bytes >= 0 < slot_values
        self.slot_values = slot_values
        self.num_slots = budget_bytes // (DELTA_VALUE_BYTES * slot_values)
        num_values = self.num_slots * slot_values
        self._file = _file(DELTA_VALUE_BYTES * num_values, folder)
        """What maps the file, if there is one."""
        self._rows = _values(num_values, self._file).view(-1, slot_values)
        self._entries: dict[int, Entry] = {}
        self._aside: dict[int, tuple[Entry, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Of all slots, used or not."""
        return DELTA_VALUE_BYTES * self._rows.numel()

    @property
    def num_entries(self) -> int:
        """Committed ones."""
        return len(self._entries)

    def entry(self, slot: int) -> Entry | None:
        """What the open step sees in `slot`."""
        return self._aside[slot][0] if slot in self._aside else self._entries.get(slot)

    def values(self, slot: int) -> Tensor:
        """The values of an entry that there is: bfloat16, on the host. Not to be written to."""
        if slot in self._aside:
            return self._aside[slot][1]
        entry = self._entries[slot]
        return self._rows[slot, : torch.Size(entry.shape).numel()].view(entry.shape)

    def prefetch(self, slot: int) -> None:
        """Have the disk read the values of a slot beside what else happens, if it has to. Never
        waits for them; nothing for a slot that there is not, or that lies in memory anyway."""
        if self._file is None or slot in self._aside or slot not in self._entries:
            return
        start = slot * self.slot_values * DELTA_VALUE_BYTES
        stop = start + torch.Size(self._entries[slot].shape).numel() * DELTA_VALUE_BYTES
        for at in range(start - start % mmap.PAGESIZE, stop, _ADVICE_BYTES):
            self._file.madvise(mmap.MADV_WILLNEED, at, min(_ADVICE_BYTES, stop - at))

    def put(self, slot: int, entry: Entry, values: Tensor) -> None:
        """Replace what is in `slot`, once it is committed. `values` are kept, not copied."""
        assert 0 <= slot < self.num_slots
        assert values.numel() <= self.slot_values
        self._aside[slot] = (entry, values)

    def forget(self, slot: int) -> None:
        """Nothing is in `slot` any more, committed or not: that is never wrong, only cold."""
        self._aside.pop(slot, None)
        self._entries.pop(slot, None)

    def commit(self) -> None:
        """All that was put since the last step lasts."""
        for slot, (entry, values) in self._aside.items():
            self._rows[slot, : values.numel()].copy_(values.reshape(-1))
            self._entries[slot] = entry
        self._aside.clear()

    def rollback(self) -> None:
        """Nothing that was put since the last step ever was."""
        self._aside.clear()

    def clear(self) -> None:
        self._aside.clear()
        self._entries.clear()


def crc_of(values: Tensor) -> int:
    """CRC-32 of the bytes of bfloat16 values on the host."""
    return zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def _file(num_bytes: int, folder: Path | None) -> mmap.mmap | None:
    """A mapped file of that size, which has no name; all of it is reserved."""
    if folder is None or not num_bytes:
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk says so now, not by a signal later
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            file.truncate(num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise _no_room(num_bytes, error) from error


def _values(num_values: int, file: mmap.mmap | None) -> Tensor:
    """Room for so many bfloat16 values; pages that were never written to take none."""
    try:
        if file is not None:
            return torch.frombuffer(file, dtype=torch.bfloat16)
        return torch.empty(num_values, dtype=torch.bfloat16)
    except RuntimeError as error:
        raise _no_room(DELTA_VALUE_BYTES * num_values, error) from error


def _no_room(num_bytes: int, error: Exception) -> CapacityError:
    return CapacityError(f"no room for a delta cache of {num_bytes} bytes: {error}")
