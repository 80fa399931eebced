"""A sync's text parses and prints; what does not go together is refused with a reason."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.errors import ManifestError
from swarmnode.sync_specs import SYNC_PRESETS, Outer, Sync, parse_sync


@pytest.mark.parametrize("name", sorted(SYNC_PRESETS))
def test_every_preset_parses_by_name_and_by_its_text(name: str) -> None:
    assert parse_sync(name) == SYNC_PRESETS[name]
    assert parse_sync(str(SYNC_PRESETS[name])) == SYNC_PRESETS[name]


@pytest.mark.parametrize(
    "text",
    [
        "sparseloco,outer=sgd0.00005",
        "diloco,outer=nesterov0.7/0.99999999",
        "sparseloco,decay=0.9999999",
        "diloco,outer=momentum1e-05/0.5/clip1e-07",
    ],
)
def test_no_digit_of_a_number_is_lost(text: str) -> None:
    sync = parse_sync(text)
    assert parse_sync(str(sync)) == sync
    assert sync != parse_sync(text.partition(",")[0])


def test_a_preset_may_be_changed_in_some_fields() -> None:
    sync = parse_sync("sparseloco,every=15,codec=topk32of4096/int4,outer=momentum0.8/0.5/clip2")
    assert sync == replace(
        SYNC_PRESETS["sparseloco"],
        every=15,
        codec="topk32of4096/int4",
        outer=Outer(0.8, 0.5, clip=2),
    )
    assert parse_sync(str(sync)) == sync


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "characters"),
        ("gossip", "unknown sync"),
        ("allreduce,speed=9", "no 'speed'"),
        ("allreduce,every=x", "a number"),
        ("allreduce,every=2", "every step"),
        ("allreduce,codec=int9", "unknown codec"),
        ("allreduce,codec=int8+ef", "keeps a memory"),
        ("allreduce,codec=topk64of4096/int4", "needs a memory"),
        ("allreduce,outer=sgd0.5", "outer step"),
        ("allreduce,memory=weights", "stay in the weights"),
        ("allreduce,topology=neighbours", "weights go to neighbours"),
        ("diloco,outer=sgd0.5/0.9", "unknown outer step"),
        ("diloco,outer=sgd0", "rate"),
        ("diloco,outer=sgd.5.5", "unknown outer step"),
        ("diloco,decay=0.9", "decay"),
        ("diloco,blend=0.5", "late fragments"),
        ("diloco,fragments=7", "divide"),
        ("diloco,staleness=2", "0 or 1"),
        ("diloco,warmup=3", "warm-up"),
        ("decentralised,staleness=1", "at once"),
        ("sparseloco,reply=int8", "only owners"),
        ("sparseloco," * 40 + "every=1", "characters"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        parse_sync(text)


@given(st.text(st.sampled_from("sgdnesterovmul,=/0123456789.-allreduce"), max_size=60))
def test_any_text_is_a_sync_or_a_manifest_error(text: str) -> None:
    try:
        sync = parse_sync(text)
    except ManifestError:
        return
    assert isinstance(sync, Sync)
    assert parse_sync(str(sync)) == sync
