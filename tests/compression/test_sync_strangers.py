"""Contributions that are not finite, far too large, or no message at all."""

import math

import pytest
import torch

from swarmnode.compression.sync.averaging import Averager
from swarmnode.compression.sync.layout import layout_of
from swarmnode.compression.sync.loopback import exchange
from swarmnode.compression.sync.messages import HEADER_BYTES, REPLY
from swarmnode.compression.sync.neighbours import NeighbourSync
from swarmnode.compression.sync.sums import checked_mean, rejected_slots
from swarmnode.errors import CodecError
from swarmnode.sync_specs import Sync, parse_sync
from tests.compression.sync_stage import RATE, SHAPES, Stage
from tests.compression.test_sync import run_exchange

BAD = [math.nan, math.inf, 1e4, 1e30]


def averagers_of(sync: Sync, count: int = 4) -> list[Averager]:
    layout = layout_of(SHAPES, sync, count)
    return [Averager(sync, layout, slot) for slot in range(count)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("topology", ["owners", "everyone"])
def test_a_bad_contribution_is_left_out_of_the_mean(topology: str, bad: float) -> None:
    averagers = averagers_of(Sync(sends="difference", codec="none", topology=topology))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(averagers[0].layout.num_values, generator=generator) for _ in range(4)]
    honest_N = (values[0] + values[1] + values[3]) / 3
    values[2] = values[2] * bad
    mean = run_exchange(averagers, values)[0]
    for part, each in mean.items():
        torch.testing.assert_close(each, honest_N[part.start : part.stop], rtol=0, atol=1e-6)
    for averager in averagers:
        averager.commit()
    assert all(averager.num_rejected == 1 for averager in averagers)


def test_rejection_holds_to_the_median_of_those_who_say_something() -> None:
    assert rejected_slots({0: 1.0, 1: 2.0, 2: 19.0, 3: 21.0}) == (3,)
    assert rejected_slots({0: 0.0, 1: 0.0, 2: 5.0}) == ()
    assert rejected_slots({0: 0.0, 1: 0.0}) == ()
    assert rejected_slots({0: math.nan, 1: math.inf}) == (0, 1)
    assert rejected_slots({}) == ()


def test_with_nothing_to_accept_the_mean_is_zero() -> None:
    mean = checked_mean({0: [torch.full((3,), math.nan)], 1: [torch.full((3,), math.inf)]})
    assert mean.rejected == (0, 1)
    assert torch.equal(mean.values, torch.zeros(3))


def test_sums_go_in_the_order_of_slots_whatever_the_order_of_arrival() -> None:
    generator = torch.Generator().manual_seed(2)
    given = {slot: [torch.randn(1000, generator=generator)] for slot in range(5)}
    backwards = dict(reversed(given.items()))
    assert torch.equal(checked_mean(given).values, checked_mean(backwards).values)


def test_a_slot_that_does_not_answer_is_not_in_the_mean() -> None:
    averagers = averagers_of(Sync(sends="difference", codec="none", topology="everyone"))
    values = [torch.full((averagers[0].layout.num_values,), float(slot)) for slot in range(4)]
    pushes = {a.slot: a.prepare(v) for a, v in zip(averagers, values, strict=True)}
    found = averagers[0].receive({slot: pushes[slot][0] for slot in (1, 2)})
    assert all(torch.equal(each, torch.ones_like(each)) for each in found.values())


@pytest.mark.parametrize("codec", ["none", "topk64of4096/int2", "int4/32"])
def test_any_other_bytes_are_a_codec_error_and_can_be_rolled_back(codec: str) -> None:
    sync = parse_sync(f"sparseloco,codec={codec}")
    averagers = averagers_of(sync, 2)
    generator = torch.Generator().manual_seed(4)
    values = [torch.randn(averagers[0].layout.num_values, generator=generator) for _ in range(2)]
    run_exchange(averagers, values)
    for averager in averagers:
        averager.commit()
    before = averagers[0].residual()
    messages = [a.prepare(v) for a, v in zip(averagers, values, strict=True)]
    good = messages[1][0]
    picks = torch.randint(len(good), (20,), generator=generator).tolist()
    damaged = [good[:k] + bytes([good[k] ^ 0x41]) + good[k + 1 :] for k in (*range(20), *picks)]
    for bad in (b"", good[:HEADER_BYTES], good[:-1], good + b"\0", bytes(len(good)), *damaged):
        with pytest.raises(CodecError):
            averagers[0].receive({1: bad})
    with pytest.raises(CodecError):
        averagers[0].receive({0: good})  # another's name
    averagers[0].receive({1: good})
    averagers[0].rollback()
    assert torch.equal(averagers[0].residual(), before)


def test_a_message_of_another_exchange_or_sync_is_refused() -> None:
    averagers = averagers_of(Sync(topology="everyone"), 2)
    values_N = torch.ones(averagers[0].layout.num_values)
    old = averagers[1].prepare(values_N)[0]
    averagers[0].prepare(values_N)
    averagers[0].receive({1: old})
    averagers[0].commit()
    averagers[0].prepare(values_N)
    with pytest.raises(CodecError, match="not the message of exchange 1"):
        averagers[0].receive({1: old})
    other = averagers_of(Sync(sends="difference", topology="everyone"), 2)
    other[0].prepare(values_N)
    with pytest.raises(CodecError, match="not the message of exchange 0"):
        other[0].receive({1: old})


@pytest.mark.parametrize("name", ["diloco,every=1", "lowprecision"])
def test_slots_that_have_drifted_apart_refuse_each_other(name: str) -> None:
    stage = Stage(parse_sync(name))
    stage.train(2, is_last=False)
    first = stage.slots[0].exchange
    drifted_N = first.mirrors[1] if isinstance(first, NeighbourSync) else stage.slots[0].common
    drifted_N[7] = drifted_N[7].nextafter(torch.tensor(9.0))
    for slot in stage.slots:
        slot.learn(stage.gradient(slot), RATE)
    with pytest.raises(CodecError, match="not the message of exchange 2"):
        exchange(stage.slots, stage.traffic)


def test_a_value_that_cannot_be_coded_leaves_nothing_under_way() -> None:
    averager = averagers_of(parse_sync("sparseloco"), 2)[0]
    values_N = torch.ones(averager.layout.num_values)
    values_N[5] = math.nan
    with pytest.raises(CodecError):
        averager.prepare(values_N)
    assert not averager.residual().any()
    averager.prepare(torch.ones_like(values_N))
    averager.rollback()


def test_replies_of_other_slots_than_the_owners_are_a_codec_error() -> None:
    averagers = averagers_of(Sync(), 3)
    values_N = torch.ones(averagers[0].layout.num_values)
    pushes = [a.prepare(values_N) for a in averagers]
    replies = [a.reduce({s: pushes[s][a.slot] for s in range(3) if s != a.slot}) for a in averagers]
    good = {slot: replies[slot][0] for slot in (1, 2)}
    for bad in ({}, {1: good[1]}, {**good, 0: good[1]}, {**good, 7: good[1]}):
        with pytest.raises(CodecError, match=r"instead of \[1, 2\]"):
            averagers[0].receive(bad)
    averagers[0].receive(good)


@pytest.mark.parametrize("topology", ["owners", "everyone"])
def test_a_contribution_of_nobody_is_a_codec_error(topology: str) -> None:
    averagers = averagers_of(Sync(topology=topology), 3)  # type: ignore[arg-type]
    values_N = torch.ones(averagers[0].layout.num_values)
    pushes = [a.prepare(values_N) for a in averagers]
    take = averagers[0].reduce if topology == "owners" else averagers[0].receive
    for stranger in (0, 3, -1):
        with pytest.raises(CodecError, match="none of the others"):
            take({stranger: pushes[1][0]})
    assert take({1: pushes[1][0], 2: pushes[2][0]})


@pytest.mark.parametrize("name", ["decentralised", "lowprecision"])
def test_messages_of_others_than_the_neighbours_are_a_codec_error(name: str) -> None:
    slots = Stage(parse_sync(name), num_slots=5).slots
    pushes = [slot.prepare() for slot in slots]
    good = {slot: pushes[slot][0] for slot in (1, 4)}
    for bad in ({}, {1: good[1]}, {**good, 2: pushes[2][1]}, {1: good[1], 2: pushes[2][1]}):
        with pytest.raises(CodecError, match=r"instead of \[1, 4\]"):
            slots[0].receive(bad)
    slots[0].receive(good)


def test_a_reply_that_cannot_be_coded_may_be_tried_again() -> None:
    """What is owed to the owner's second matrix overflows: the reply fails after its first one."""
    sync = parse_sync("powersgd,warmup=0,codec=powersgd/r2")
    layout = layout_of([(80, 90)] * 4, sync, 2)
    averagers, untroubled = ([Averager(sync, layout, s) for s in range(2)] for _ in range(2))
    generator = torch.Generator().manual_seed(6)
    values = [torch.randn(layout.num_values, generator=generator) for _ in range(2)]
    for each in (averagers, untroubled):
        run_exchange(each, values)
        for averager in each:
            averager.commit()
    owner, push, same = averagers[0], averagers[1].prepare(values[1])[0], untroubled[0]
    owner.prepare(values[0])
    same.prepare(values[0])
    residual = owner._feedback[REPLY, layout.parts_of(0, owner=0)[1]].residual
    assert residual is not None
    kept, residual[0] = float(residual[0]), math.inf
    for _ in range(2):
        with pytest.raises(CodecError):
            owner.reduce({1: push})
    residual[0] = kept
    assert owner.reduce({1: push}) == same.reduce({1: push})
    for averager in (owner, same):
        averager.rollback()
    assert torch.equal(owner.residual(REPLY), same.residual(REPLY))
