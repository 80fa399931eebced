"""Groups, shards and sums: who owns what, and a sum that only the slots decide."""

import hashlib
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.codec_specs import parse_spec
from swarmnode.compression.codec import get_codec
from swarmnode.domain import Generation, PeerId, Plan, SlotId
from swarmnode.errors import ShareError
from swarmnode.worker.training import groups
from swarmnode.worker.training.fingerprint import digest, sum_of_squares
from swarmnode.worker.training.groups import Group, stage_groups
from swarmnode.worker.training.reduce import (
    ReducedGradient,
    ShardCodecs,
    ShardSum,
    check_norms,
    encode_shards,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {HEAD: EMBEDDING}


def members(count: int) -> tuple[SlotId, ...]:
    return tuple(SlotId(0, slot) for slot in range(count))


@settings(deadline=None)
@given(num_values=st.integers(0, 10_000), count=st.integers(1, 9), most=st.integers(1, 3000))
def test_shards_cover_the_gradient_once_and_are_near_equal(
    num_values: int, count: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MAX_SHARD_VALUES", most)
        group = Group(0, members(count), num_values)
        shards = [group.shard(part) for part in range(group.num_parts)]
        owners = [group.owner(part) for part in range(group.num_parts)]
    assert [value for start, stop in shards for value in (start, stop)][:: len(shards) * 2] == [0]
    assert shards[-1][1] == num_values
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shards))
    sizes = [stop - start for start, stop in shards]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(most, 1)
    assert {owners.count(slot) for slot in members(count)} == {len(shards) // count}


def test_tied_embeddings_form_a_group_of_both_ends() -> None:
    first = stage_groups(
        stage=0, num_stages=3, num_slots=2, tied=TIED,
        shapes={EMBEDDING: (7, 4), "model.layers.0.b": (4,), "model.layers.0.a": (2, 3)},
    )  # fmt: skip
    last = stage_groups(
        stage=2, num_stages=3, num_slots=2, tied=TIED,
        shapes={HEAD: (7, 4), "model.norm.weight": (4,)},
    )  # fmt: skip
    middle = stage_groups(
        stage=1, num_stages=3, num_slots=2, tied={}, shapes={"model.layers.1.a": (2, 3)}
    )
    assert first.indices == (0, 3)
    assert middle.indices == (1,)
    assert last.indices == (2, 3)
    assert first.groups[1][0] == last.groups[1][0]
    assert first.groups[1][0].members == (SlotId(0, 0), SlotId(0, 1), SlotId(2, 0), SlotId(2, 1))
    assert [p.name for p in first.groups[0][1]] == ["model.layers.0.a", "model.layers.0.b"]
    assert [p.start for p in first.groups[0][1]] == [0, 6]
    assert [p.name for p in last.groups[1][1]] == [HEAD]


def test_a_whole_model_in_one_stage_has_one_group() -> None:
    found = stage_groups(
        stage=0, num_stages=1, num_slots=2, tied={}, shapes={EMBEDDING: (7, 4), "b": (1,)}
    )
    assert found.indices == (0,)
    assert found.groups[0][0].num_values == 29


def test_small_parameters_have_a_group_of_their_own_where_that_is_asked_for() -> None:
    shapes = {EMBEDDING: (7, 4), "norm": (4,), "b": (3, 5), "a": (2, 5)}
    ends = [
        stage_groups(
            stage=stage, num_stages=2, num_slots=2, tied=TIED, shapes=shapes, small_values=12
        )
        for stage in (0, 1)
    ]
    assert [found.indices for found in ends] == [(0, 2, 3), (1, 2, 4)]
    own, tied, small = ends[0].groups
    assert [p.name for p in own[1]] == ["b"]
    assert [p.name for p in small[1]] == ["a", "norm"]
    assert (own[0].is_small, tied[0].is_small, small[0].is_small) == (False, False, True)
    assert small[0].members == own[0].members
    assert ShardCodecs(parse_spec("int2/32+ef")).of(small[0], 0).spec == "bf16"


def test_small_shards_lose_no_more_than_bfloat16() -> None:
    codecs, coarse = ShardCodecs(parse_spec("topk64of4096/int4+ef"), 3), "topk64of4096/int4"
    assert [codecs.for_values(count).spec for count in (4095, 4096)] == ["bf16", coarse]
    assert codecs.for_values(1 << 20, is_small=True).spec == "bf16"
    assert ShardCodecs(parse_spec("int8")).for_values(5).spec == "int8"


A, B, C = members(3)


@pytest.mark.parametrize(
    ("norms", "culprit"),
    [
        ({A: 1.0, B: 1.2, C: 999.0}, None),
        ({A: 1.0, B: 1.2, C: 1200.0}, "slot 2"),
        ({A: 1.0, B: 2000.0}, "slot 1"),
        ({A: 0.0, B: 5.0, C: 0.0}, None),
        ({A: 0.0, B: 0.0}, None),
        ({A: 1.0, B: float("nan"), C: 1.0}, "slot 1"),
        ({A: float("inf"), B: 1.0}, "slot 0"),
        ({A: float("inf"), B: float("nan")}, None),
        ({A: float("nan")}, None),
        ({A: 1e-6, B: 2e-6, SlotId(1, 0): 1.0, SlotId(1, 1): 2.0}, None),
    ],
)
def test_a_share_that_would_drown_the_others_is_named(
    norms: dict[SlotId, float], culprit: str | None
) -> None:
    if culprit is None:
        check_norms(norms)
        return
    with pytest.raises(ShareError, match=f"gradient of stage 0, {culprit} "):
        check_norms(norms)


def test_reduced_shards_go_once_to_each_host() -> None:
    a, b = PeerId("a"), PeerId("b")
    plan = Plan(Generation(1), ((0, 1),), ((b, a, b),), a)
    group = Group(0, members(3), 10)
    assert group.receivers(plan) == (SlotId(0, 0), SlotId(0, 1))
    assert group.receiver(plan, b) == SlotId(0, 0)
    assert group.receiver(plan, PeerId("c")) is None


@pytest.mark.parametrize("spec", ["none", "bf16", "int8"])
def test_the_sum_does_not_depend_on_the_order_of_arrival(spec: str) -> None:
    codec, group = get_codec(spec), Group(0, members(4), 1001)
    codecs = ShardCodecs(parse_spec(spec))
    generator = torch.Generator().manual_seed(0)
    shares = {slot: torch.randn(1001, generator=generator) for slot in group.members}
    sums = set()
    for seed in range(4):
        owners = {part: ShardSum(group, part, codecs, "cpu") for part in range(4)}
        sent = [
            (slot, part, payload)
            for slot, share in shares.items()
            for part, payload in encode_shards(
                group, slot, share, lambda _, values: codec.encode(values)
            )
        ]
        random.Random(seed).shuffle(sent)
        reduced = ReducedGradient(group, codecs, torch.zeros(1001))
        flat = reduced._flat
        for slot, part, payload in sent:
            total = owners[part].add(slot, payload)
            if total is not None:
                assert not reduced.is_complete
                reduced.take(part, codec.encode(total))
        assert reduced.is_complete
        sums.add(digest([flat]))
        exact = torch.stack(list(shares.values())).sum(dim=0)
        bound = {"none": 1e-5, "bf16": 0.1, "int8": 0.2}[spec]
        torch.testing.assert_close(flat, exact, rtol=0, atol=bound)
    assert len(sums) == 1


def test_the_digest_is_the_sha256_of_the_bytes() -> None:
    parts = [torch.randn(3, 5), torch.empty(0), torch.randn(4, 6).T]
    raw = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    assert digest(parts) == hashlib.sha256(raw).hexdigest()


def test_the_sum_of_squares_is_exact_to_float64_and_ignores_threads() -> None:
    flat = torch.randn(700_001, generator=torch.Generator().manual_seed(1))
    exact = float(np.square(flat.numpy().astype(np.longdouble)).sum())
    assert sum_of_squares(flat) == pytest.approx(exact, rel=1e-13)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert sum_of_squares(flat) == sum_of_squares(flat.clone())
    finally:
        torch.set_num_threads(before)
