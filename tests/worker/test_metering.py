"""What coding came to: counted where it happens, told to the coordinator, shown to people."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_swarm import WIDE, Swarm, make_manifest
from worker_node import GOOD, STRANGER, SUBMITTER, answer, assign, node

from swarmnode.cli.show import coding_lines
from swarmnode.codings import Coding, total
from swarmnode.compression.codec import get_codec
from swarmnode.coordinator.progress import Progress
from swarmnode.engine_messages import Busy, Coded
from swarmnode.manifest import CodecConfig
from swarmnode.messages import Failed, Traffic
from swarmnode.wire import pack
from swarmnode.worker import fetching
from swarmnode.worker.reports import REPORT_S
from swarmnode.worker.training.meter import MEASURE_EVERY, CodingMeter

ONE = Coding("gradient", "int8", 400, 100, 0.5, 4.0, 0.04)


def test_codings_add_up_by_kind_and_codec() -> None:
    other = Coding("activation", "int8", 10, 5, 0.25, 0.0, 0.0)
    both, again = total([ONE, other, ONE])
    assert both == other
    assert (both.error, both.ratio) == (None, 2.0)
    assert again == Coding("gradient", "int8", 800, 200, 1.0, 8.0, 0.08)
    assert again.error == pytest.approx(0.1)
    assert again.ratio == 4.0
    assert total([]) == ()


def ticks() -> Iterator[float]:
    now_s = 0.0
    while True:
        yield now_s
        now_s += 0.5


def test_the_meter_measures_the_error_of_a_few_and_the_bytes_and_seconds_of_all() -> None:
    meter, codec, values = CodingMeter(ticks().__next__), get_codec("int8"), torch.ones(256)
    measured = 0

    def error_of(_payload: object) -> torch.Tensor:
        nonlocal measured
        measured += 1
        return values / 4

    for _ in range(MEASURE_EVERY + 1):
        payload = meter.encode("gradient", "int8", values, lambda: codec.encode(values), error_of)
    meter.decode("gradient", "int8", lambda: codec.decode(payload, (256,)))
    (found,) = meter.take()
    assert measured == 2
    assert found.error == 0.25
    assert found.raw_bytes == 1024 * (MEASURE_EVERY + 1)
    assert found.coded_bytes == len(payload) * (MEASURE_EVERY + 1)
    assert found.seconds == 0.5 * (MEASURE_EVERY + 2)
    assert meter.take() == ()


def test_what_is_not_finite_is_counted_but_has_no_error() -> None:
    meter, values = CodingMeter(), torch.tensor([torch.nan])
    meter.encode("activation", "none", values, lambda: b"1234", lambda _: values)
    (found,) = meter.take()
    assert (found.coded_bytes, found.error) == (4, None)


def test_training_tells_what_its_coding_came_to(tmp_path: Path) -> None:
    codecs = CodecConfig(activation="aq/int4/32", gradient="topk64of4096/int4+ef")
    manifest = make_manifest(tmp_path, WIDE, codecs=codecs, num_tokens=16 * 24 + 1)
    swarm = Swarm(manifest, [["a", "b"], ["c", "d"]], tmp_path)
    swarm.configure()
    for step in range(6):
        swarm.step(step)
    swarm.evaluate(6)
    told = swarm.take(Coded)
    assert {each.job for each in told} == {manifest.job}
    rest = [coding for engine in swarm.engines.values() for coding in engine._meter.take()]
    codings = total([*rest, *(coding for each in told for coding in each.codings)])
    found = {(coding.kind, coding.codec): coding for coding in codings}
    assert found.keys() == {
        ("activation", "aq/int4/32"), ("activation", "bf16"), ("activation_gradient", "int8"),
        ("gradient", "topk64of4096/int4+ef"), ("gradient", "bf16+ef"),
        ("reduced", "topk64of4096/int4+ef"), ("reduced", "bf16+ef"),
    }  # fmt: skip
    hidden_bytes = 4 * 2 * 16 * 64
    changes, in_full = found["activation", "aq/int4/32"], found["activation", "bf16"]
    assert changes.raw_bytes == 3 * 4 * hidden_bytes, "all samples come a second time"
    assert in_full.raw_bytes == (3 * 4 + 4) * hidden_bytes, "at first, and to evaluate"
    header = 61 * 8 / (16 * 64)  # bits a value
    assert changes.ratio == pytest.approx(32 / (4.5 + header), rel=0.01)
    assert 1.9 < in_full.ratio < 2.0
    assert found["activation_gradient", "int8"].ratio == pytest.approx(32 / 8.125)
    assert found["reduced", "topk64of4096/int4+ef"].ratio > 100
    errors = {key: each.error for key, each in found.items()}
    assert all(error is not None for error in errors.values())
    assert 0 < errors["activation", "bf16"] < 0.003 < errors["activation", "aq/int4/32"] < 0.1
    assert errors["gradient", "topk64of4096/int4+ef"] > 0.1
    assert all(each.seconds > 0 for each in found.values())


async def test_the_coordinator_is_told_all_that_a_node_has_coded_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RETRY_S", ())
    seen: list[Coding] = []
    async with node(tmp_path, on_coded=seen.extend) as n:
        stream = await n.stream()
        await stream.send(pack(assign()), GOOD.canonical())
        assert isinstance(await answer(stream), Failed)
        (host,) = n.service.hosts()
        for _ in range(2):
            await host._work._from_child(Coded(GOOD.job, (ONE,)), memoryview(b""))
            await host._work._from_child(Busy(GOOD.job, REPORT_S + 1), memoryview(b""))
            traffic = await answer(stream)
        assert isinstance(traffic, Traffic)
        assert traffic.codings == total([ONE, ONE])
        assert seen == [ONE, ONE], "the node's own metrics get what is new"


def test_a_job_shows_the_codings_of_all_its_workers() -> None:
    progress = Progress(GOOD, 0.0)
    for peer in (SUBMITTER.peer, STRANGER.peer):
        for codings in ((ONE,), total([ONE, ONE])):
            progress.traffic(peer, Traffic(GOOD.job, {}, 0.0, (), codings))
    (found,) = progress.codings
    assert found.raw_bytes == 4 * ONE.raw_bytes
    assert (
        coding_lines(progress.codings)
        == "gradient in int8: 400 B, float32 / 4.0, 2.0 s, error 10.00%"
    )
    assert coding_lines(()) == "-"


@pytest.mark.parametrize(("is_new_life", "times"), [(True, 6), (False, 5)])
def test_what_a_lost_worker_did_counts_once(is_new_life: bool, times: int) -> None:
    """Who was killed counts from nothing when it is back; who was cut off goes on counting."""
    progress = Progress(GOOD, 0.0)
    counters = (1, 3, 5) if not is_new_life else (1, 3, 1, 3)
    for number, count in enumerate(counters):
        if number == 2:
            progress.lost(STRANGER.peer, 1.0)
        told = Traffic(GOOD.job, {"gradient": 10 * count}, 0.0, (), total([ONE] * count))
        progress.traffic(STRANGER.peer, told)
    (found,) = progress.codings
    assert found.raw_bytes == times * ONE.raw_bytes
    assert progress.bytes_by_kind == {"gradient": 10 * times}
