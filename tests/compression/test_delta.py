"""The delta cache: what a sample costs and loses; only what is committed lasts."""

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swarmnode.compression.codec import get_codec
from swarmnode.compression.delta import DeltaReceiver, DeltaSender
from swarmnode.compression.delta_cache import DeltaCache
from swarmnode.compression.delta_frames import PREFIX_BYTES
from swarmnode.compression.payload import header_bytes
from swarmnode.errors import CapacityError, CodecError, ManifestError
from tests.compression.delta_pair import SCOPE, SHAPE, SLOT_BYTES, SLOT_VALUES, normal, pair, visit


def error(received: Tensor, hidden: Tensor) -> float:
    return float((received - hidden).norm() / hidden.norm())


# ---- what it loses and costs ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["aq/int4/32", "aq/int2/32", "aq/bf16", "aq/none"])
def test_the_first_visit_is_a_bfloat16_and_a_constant_sample_stays_there(spec: str) -> None:
    sender, receiver = pair(spec)
    hidden = normal(0)
    assert torch.equal(visit(sender, receiver, b"x", hidden), hidden.to(torch.bfloat16).float())
    for _ in range(3):
        assert error(visit(sender, receiver, b"x", hidden), hidden) <= 0.002


@pytest.mark.parametrize(
    ("spec", "most"),
    [("aq/int4/32", [0.1, 0.011, 0.0018]), ("aq/int2/32", [0.4, 0.16, 0.07, 0.03, 0.013])],
)
def test_a_sample_that_jumped_is_caught_up_by_one_factor_a_visit(
    spec: str, most: list[float]
) -> None:
    sender, receiver = pair(spec)
    visit(sender, receiver, b"x", torch.zeros(SHAPE))
    hidden = normal(1)
    errors = [error(visit(sender, receiver, b"x", hidden), hidden) for _ in most]
    assert all(found <= bound for found, bound in zip(errors, most, strict=True)), errors
    delta = get_codec(spec.removeprefix("aq/")).energy_bound
    before = 1.0
    for found in errors:  # the contract: a contraction, and a rounding to bfloat16
        assert found <= delta**0.5 * before + 2.0**-8
        before = found


def test_history_of_another_sample_is_worse_than_none() -> None:
    sender, receiver = pair("aq/int4/32")
    visit(sender, receiver, b"x", normal(2))
    hidden = normal(3)
    codec = get_codec("int4/32")
    direct = error(codec.decode(codec.encode(hidden), SHAPE), hidden)
    assert error(visit(sender, receiver, b"x", hidden), hidden) > 1.25 * direct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frame_has_exactly_the_bytes_of_its_codec_and_its_headers(dtype: torch.dtype) -> None:
    sender, receiver = pair("aq/int4/32")
    for spec, item in (("bf16", torch.bfloat16), ("int4/32", torch.float32)):
        codec = get_codec(spec)
        frame = sender.prepare(b"x", normal(4).to(dtype))
        header = PREFIX_BYTES + header_bytes(codec, SHAPE)
        assert len(frame) == header + codec.wire_bytes(SHAPE, item)
        found = receiver.receive(frame).tensor
        assert found is not None
        assert (found.dtype, tuple(found.shape)) == (torch.float32, SHAPE)


def test_only_a_delta_has_this_memory() -> None:
    with pytest.raises(ManifestError):
        pair("aq/topk64of4096/int4")
    with pytest.raises(AssertionError):
        pair("int4/32")
    sender, _ = pair()
    for hidden in (normal(5).to(torch.float16), normal(5, (49, 64))):
        with pytest.raises(CodecError):
            sender.prepare(b"x", hidden)


# ---- two phases ----------------------------------------------------------------------------------


def test_a_step_that_was_rolled_back_never_was() -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(6))
    control = pair()
    visit(*control, b"x", normal(6))
    receiver.receive(sender.prepare(b"x", normal(7)))
    receiver.receive(sender.prepare(b"y", normal(8)))
    sender.rollback()
    receiver.rollback()
    assert torch.equal(visit(sender, receiver, b"x", normal(9)), visit(*control, b"x", normal(9)))
    assert receiver.counts.num_refused == 0


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_step_that_only_one_end_committed_is_refused_once_and_heals(who: str) -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(10))
    receiver.receive(sender.prepare(b"x", normal(11)))
    for name, end in (("sender", sender), ("receiver", receiver)):
        end.commit() if name == who else end.rollback()
    found = receiver.receive(sender.prepare(b"x", normal(12)))
    assert found.tensor is None
    assert found.refusal is not None
    assert sender.refused(found.refusal) == b"x"
    hidden = normal(12)
    assert torch.equal(visit(sender, receiver, b"x", hidden), hidden.to(torch.bfloat16).float())
    visit(sender, receiver, b"x", hidden)
    assert (receiver.counts.num_refused, receiver.counts.num_deltas) == (1, 2)


def test_what_the_caller_does_to_its_tensor_later_does_not_matter() -> None:
    sender, receiver = pair()
    hidden = normal(13).to(torch.bfloat16)
    before = hidden.clone()
    receiver.receive(sender.prepare(b"x", hidden))
    hidden.zero_()
    sender.commit()
    receiver.commit()
    assert torch.equal(visit(sender, receiver, b"x", before), before.float())


def test_a_late_refusal_of_a_committed_frame_is_no_reason_to_send_now_but_forgets() -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(14))
    receiver.reset(SCOPE)
    found = receiver.receive(sender.prepare(b"x", normal(15)))
    sender.commit()
    assert found.refusal is not None
    assert sender.refused(found.refusal) is None
    visit(sender, receiver, b"x", normal(16))
    assert (sender.counts.num_full, receiver.counts.num_refused) == (2, 1)


# ---- order, drift and scope ----------------------------------------------------------------------


def test_a_repeated_frame_changes_nothing_and_an_older_one_is_refused() -> None:
    sender, receiver = pair()
    first = bytes(sender.prepare(b"x", normal(17)))
    second = bytes(sender.prepare(b"x", normal(18)))
    assert receiver.receive(first).tensor is not None
    newest = receiver.receive(second)
    again = receiver.receive(second)
    assert again.is_repeated
    assert newest.tensor is not None
    assert again.tensor is not None
    assert torch.equal(again.tensor, newest.tensor)
    old = receiver.receive(first)
    assert old.tensor is None
    assert old.refusal is not None
    assert sender.refused(old.refusal) is None, "a newer frame is under way"
    sender.commit()
    receiver.commit()
    assert receiver.receive(second).is_repeated
    visit(sender, receiver, b"x", normal(19))
    assert receiver.counts.num_refused == 1


def test_a_sender_that_began_anew_in_the_same_scope_is_believed_after_one_refusal() -> None:
    sender, receiver = pair()
    for seed in range(5):
        visit(sender, receiver, b"x", normal(seed))
    sender, _ = pair()
    refused = receiver.receive(sender.prepare(b"x", normal(30))).refusal
    assert refused is not None
    assert sender.refused(refused) == b"x"
    visit(sender, receiver, b"x", normal(30))
    assert receiver.counts.num_refused == 1


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_one_flipped_bit_in_a_cache_is_found_and_healed(who: str) -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(20))
    end = sender if who == "sender" else receiver
    end._cache.values(0).view(torch.int16)[3, 5] ^= 4
    refused = receiver.receive(sender.prepare(b"x", normal(21))).refusal
    assert refused is not None
    assert sender.refused(refused) == b"x"
    visit(sender, receiver, b"x", normal(21))
    visit(sender, receiver, b"x", normal(22))
    assert torch.equal(sender._cache.values(0), receiver._cache.values(0))


@pytest.mark.parametrize("change", ["generation", "codec"])
def test_frames_of_another_generation_or_codec_are_dropped(change: str) -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(23))
    late = bytes(sender.prepare(b"x", normal(24)))
    if change == "generation":
        receiver.reset(b"generation 4, cut 1")
        sender.reset(b"generation 4, cut 1")
    else:
        sender, receiver = pair("aq/int3/32")
    with pytest.raises(CodecError, match="another boundary"):
        receiver.receive(late)
    visit(sender, receiver, b"x", normal(25))
    assert sender.counts.num_deltas == (1 if change == "generation" else 0)


def test_another_shape_of_the_same_sample_is_sent_in_full() -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(26))
    hidden = normal(27, (10, 64))
    assert visit(sender, receiver, b"x", hidden).shape == hidden.shape
    assert sender.counts.num_full == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
def test_what_is_not_finite_is_cold_and_counted_and_arrives_as_it_is(value: float) -> None:
    sender, receiver = pair()
    visit(sender, receiver, b"x", normal(28))
    hidden = normal(29)
    hidden[1, 2] = value
    found = visit(sender, receiver, b"x", hidden)
    assert torch.equal(found.isfinite(), hidden.to(torch.bfloat16).isfinite())
    assert sender.counts.num_cold == 1
    visit(sender, receiver, b"x", normal(30))
    visit(sender, receiver, b"x", normal(30))
    assert (sender.counts.num_full, sender.counts.num_deltas) == (2, 1)
    assert bool(receiver._cache.values(0).isfinite().all())


def test_a_change_that_leaves_the_range_of_floats_goes_in_full() -> None:
    sender, receiver = pair()
    for sign in (1.0, -1.0):
        hidden = torch.full(SHAPE, sign * 3e38)
        assert torch.equal(visit(sender, receiver, b"x", hidden), hidden.to(torch.bfloat16).float())
    assert (sender.counts.num_full, sender.counts.num_deltas) == (2, 0)


# ---- room ----------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_who_finds_no_room_is_sent_in_full() -> None:
    budget = 3 * SLOT_BYTES + 100
    caches = [DeltaCache(budget, SLOT_VALUES) for _ in range(2)]
    sender = DeltaSender("aq/int4/32", SCOPE, caches[0])
    receiver = DeltaReceiver("aq/int4/32", SCOPE, caches[1])
    for _ in range(3):
        for sample in range(5):
            visit(sender, receiver, b"%d" % sample, normal(sample))
    assert all(cache.num_bytes <= budget and cache.num_entries == 3 for cache in caches)
    counts = sender.counts
    assert (counts.num_full, counts.num_deltas, counts.num_unkept) == (3, 6, 6)
    assert receiver.counts.num_refused == 0


@pytest.mark.parametrize("num_slots", [0, 2])
def test_a_receiver_with_less_room_is_asked_once_and_then_respected(num_slots: int) -> None:
    sender = DeltaSender("aq/int4/32", SCOPE, DeltaCache(5 * SLOT_BYTES, SLOT_VALUES))
    cache = DeltaCache(num_slots * SLOT_BYTES, SLOT_VALUES)
    receiver = DeltaReceiver("aq/int4/32", SCOPE, cache)
    for _ in range(3):
        for sample in range(5):
            found = receiver.receive(sender.prepare(b"%d" % sample, normal(sample)))
            if found.refusal is not None:
                assert sender.refused(found.refusal) == b"%d" % sample
                found = receiver.receive(sender.prepare(b"%d" % sample, normal(sample)))
            assert found.tensor is not None
            sender.commit()
            receiver.commit()
    assert receiver.counts.num_refused == 1
    assert sender.counts.num_deltas == 2 * num_slots
    assert cache.num_entries == num_slots


def test_a_cache_on_disk_is_the_same_as_one_in_memory(tmp_path: Path) -> None:
    in_memory, on_disk = pair(), pair(folder=tmp_path)
    for visit_number in range(3):
        for sample in range(6):
            hidden = normal(100 * visit_number + sample)
            key = b"%d" % sample
            frames = [ends[0].prepare(key, hidden) for ends in (in_memory, on_disk)]
            assert frames[0] == frames[1]
            found = [
                ends[1].receive(frame).tensor
                for ends, frame in zip((in_memory, on_disk), frames, strict=True)
            ]
            assert found[0] is not None
            assert found[1] is not None
            assert torch.equal(found[0], found[1])
            for end in (*in_memory, *on_disk):
                end.commit()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what it holds")
def test_what_is_prefetched_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Both caches were written to the disk and dropped from memory; nobody looks at them since."""
    ends = sender, receiver = pair(folder=tmp_path)
    for sample in range(4):
        visit(sender, receiver, b"%d" % sample, normal(sample))
    drop_from_memory(tmp_path, [end._cache for end in ends])
    if any(resident(end._cache) for end in ends):
        pytest.skip("files here are kept in memory")
    slot_1 = set(range(SLOT_BYTES // mmap.PAGESIZE, -(-2 * SLOT_BYTES // mmap.PAGESIZE)))
    sender.prefetch(b"of nobody")
    assert resident(sender._cache) == set()
    sender.prefetch(b"1")
    until_resident(sender._cache, slot_1)
    frame = sender.prepare(b"1", normal(5))
    receiver.prefetch(frame[:7])
    receiver.prefetch(bytes(32))
    receiver.prefetch(b"\xff" * 40)
    assert resident(receiver._cache) <= set(range(2)), "at most slot 0, which zeros name"
    receiver.prefetch(frame)
    until_resident(receiver._cache, slot_1)
    assert receiver.receive(frame).tensor is not None


def drop_from_memory(folder: Path, caches: Iterable[DeltaCache]) -> None:
    """What the files in `folder` have is on the disk, and there alone."""
    for cache in caches:
        assert cache._file is not None
        cache._file.madvise(mmap.MADV_DONTNEED)
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().parent == folder.resolve():
                os.fsync(int(link.name))
                os.posix_fadvise(int(link.name), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(cache: DeltaCache) -> set[int]:
    """Pages of its file that the kernel holds in memory."""
    pages = (ctypes.c_ubyte * -(-cache.num_bytes // mmap.PAGESIZE))()
    address, size = ctypes.c_void_p(cache._rows.data_ptr()), ctypes.c_size_t(cache.num_bytes)
    assert ctypes.CDLL(None).mincore(address, size, pages) == 0
    return {at for at, page in enumerate(pages) if page & 1}


def until_resident(cache: DeltaCache, pages: set[int]) -> None:
    deadline_s = time.monotonic() + 10
    while not pages <= resident(cache):
        assert time.monotonic() < deadline_s, resident(cache)


def test_a_folder_without_room_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="no room"):
        DeltaCache(1 << 60, 1 << 20, tmp_path)
    with pytest.raises(CapacityError, match="no room"):
        DeltaCache(SLOT_BYTES, SLOT_VALUES, tmp_path / "missing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", ["aq/int4/32", "aq/int2/32", "aq/int4/32+hadamard", "aq/bf16"])
def test_a_gpu_and_a_cpu_keep_the_same_values(spec: str) -> None:
    sender, receiver = pair(spec)
    for seed in range(8):
        frame = sender.prepare(b"x", normal(seed).to("cuda"))
        found = receiver.receive(frame, "cpu")
        assert found.refusal is None
        sender.commit()
        receiver.commit()
        assert torch.equal(sender._cache.values(0), receiver._cache.values(0))
