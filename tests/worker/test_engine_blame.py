"""Whose fault it is when a step cannot be computed, as the engine tells it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_swarm import PLACEMENTS, WIDE, Swarm, make_manifest

from swarmnode.compression.codec import get_codec
from swarmnode.domain import PeerId, SlotId
from swarmnode.manifest import CodecConfig
from swarmnode.messages import Failed, Frame, Ready
from swarmnode.wire import pack, unpack_local


def swarm_of(blobs: Path, codec: str) -> Swarm:
    codecs = CodecConfig(activation=codec, activation_gradient=codec, gradient=codec)
    swarm = Swarm(make_manifest(blobs, WIDE, codecs=codecs), PLACEMENTS["four"], blobs)
    swarm.configure()
    return swarm


def spoil(payload: bytes) -> bytes:
    """A code that is none."""
    return payload[:-1] + b"\x80"


def poison(payload: bytes) -> bytes:
    values = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    values[0] = float("nan")
    return values.numpy().tobytes()


@pytest.mark.parametrize("kind", ["activation", "activation_gradient", "gradient", "reduced"])
def test_what_does_not_decode_is_the_fault_of_whose_slot_sent_it(tmp_path: Path, kind: str) -> None:
    swarm = swarm_of(tmp_path, "int8")
    source = change_one(swarm, kind, spoil)
    failed = swarm.take(Failed)
    assert {each.blames for each in failed} == {source}
    assert not any(each.is_diverged or each.is_mismatch for each in failed)


@pytest.mark.parametrize("kind", ["activation", "activation_gradient"])
def test_so_is_a_value_that_is_not_finite(tmp_path: Path, kind: str) -> None:
    swarm = swarm_of(tmp_path, "none")
    source = change_one(swarm, kind, poison)
    (failed,) = swarm.take(Failed)
    assert failed.blames == source
    assert failed.is_diverged


def change_one(swarm: Swarm, kind: str, change: Callable[[bytes], bytes]) -> SlotId:
    """Let one tensor of that kind arrive changed, and all that follows happen; who sent it."""
    group = 0 if "activation" in kind else 1  # matrices of the last stage, not norms
    swarm.begin(0)
    while True:
        for number, (sender, data) in enumerate(swarm.network):
            message, payload = unpack_local(data)
            if isinstance(message, Frame) and (message.kind, message.group) == (kind, group):
                swarm.network[number] = (sender, pack(message) + change(bytes(payload)))
                swarm.pump()
                return message.source
        swarm.pump(max_units=1)


@pytest.mark.parametrize(
    ("dense", "gradient"), [("int8", "int8"), ("none", "none"), ("powersgd/r4", "none")]
)
def test_who_cannot_go_on_as_values_are_not_finite_says_so(
    tmp_path: Path, dense: str, gradient: str
) -> None:
    """On one of two slots. Where it happens to all, and nothing is coded, READY tells it."""
    codecs = CodecConfig(activation=dense, activation_gradient=dense, gradient=gradient)
    swarm = Swarm(make_manifest(tmp_path, codecs=codecs), PLACEMENTS["four"], tmp_path)
    swarm.configure()
    last = swarm.engines[PeerId("c")]._held[1]
    with torch.no_grad():
        last.module.parameters_by_name()["lm_head.weight"].fill_(3e38)
    swarm.begin(0)
    swarm.pump()
    failed, ready = swarm.take(Failed), swarm.take(Ready)
    assert failed
    assert all(each.is_diverged for each in failed), failed
    assert not ready


def test_a_codec_that_cannot_code_it_says_why() -> None:
    for name in ("int8", "int4/32", "topk64of4096/int4"):
        with pytest.raises(Exception, match="not finite") as caught:
            get_codec(name).encode(torch.full((8192,), float("inf")))
        assert type(caught.value).__name__ == "NotFiniteError"
