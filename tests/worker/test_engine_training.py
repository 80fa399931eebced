"""Training with engines: equal to a plain loop, and bit-equal wherever the slots are."""

from pathlib import Path

import pytest
import torch
from engine_swarm import LLAMA, PLACEMENTS, TIED, WIDE, Swarm, make_manifest, plain_run

from swarmnode.domain import PeerId
from swarmnode.manifest import CodecConfig
from swarmnode.worker.training import groups


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_every_placement_equals_a_plain_loop_and_each_other_bit_for_bit(
    config: dict[str, object], tmp_path: Path
) -> None:
    manifest = make_manifest(tmp_path, config)
    plain_losses, plain_weights = plain_run(manifest, tmp_path)
    hashes = {}
    for name, slots in PLACEMENTS.items():
        swarm = Swarm(manifest, slots, tmp_path, shuffle=len(hashes))
        swarm.configure()
        steps = [swarm.step(step) for step in range(10)]
        assert [s.loss for s in steps] == pytest.approx(plain_losses, abs=1e-5)
        assert all(s.norm > 0.5 for s in steps[:5]), "clipping must be active"
        weights = swarm.weights()
        assert set(plain_weights) <= set(weights)
        for key, value in plain_weights.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5)
        hashes[name] = [s.hashes for s in steps]
        assert swarm.dropped() == {}
        assert (swarm.num_frames == 0) == (name == "one")
        if config is TIED:
            assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert hashes["four"] == hashes["one"] == hashes["three"]
    assert steps[-1].loss < steps[0].loss - 0.3


@pytest.mark.parametrize(
    ("activation", "activation_gradient", "gradient"),
    [
        ("int8", "int8", "int8"),
        ("int4/32+hadamard", "int8", "topk64of1024/int4"),
        ("int8", "int8", "topk64of1024/int4+ef"),
        ("int2/32", "powersgd/r4", "cocktail/p0.5/k0.2/int4"),
    ],
)
def test_three_stages_with_codecs_are_bit_equal_on_every_placement(
    tmp_path: Path, activation: str, activation_gradient: str, gradient: str
) -> None:
    codecs = CodecConfig(
        activation=activation, activation_gradient=activation_gradient, gradient=gradient
    )
    config = {**WIDE, "tie_word_embeddings": True}
    manifest = make_manifest(tmp_path, config, codecs=codecs, stages=3, slots=2)
    layers = ((0, 1), (1, 3), (3, 4))
    results = []
    for slots in ([["a", "b"], ["c", "d"], ["e", "f"]], [["a", "b"], ["b", "a"], ["a", "a"]]):
        swarm = Swarm(manifest, slots, tmp_path, layers, shuffle=len(results))
        swarm.configure()
        results.append([(s.losses, s.hashes) for s in map(swarm.step, range(4))])
    assert results[0] == results[1]


def test_microbatches_ahead_change_no_bit(tmp_path: Path) -> None:
    results = []
    for ahead in (0, 2):
        manifest = make_manifest(tmp_path, stages=3, slots=1)
        manifest = manifest.model_copy(
            update={"run": manifest.run.model_copy(update={"ahead": ahead})}
        )
        swarm = Swarm(manifest, [["a"], ["b"], ["c"]], tmp_path, ((0, 1), (1, 3), (3, 4)))
        swarm.configure()
        results.append([(s.losses, s.hashes) for s in map(swarm.step, range(3))])
    assert results[0] == results[1]


def test_a_node_between_the_ends_needs_no_data(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, stages=3, slots=1)
    layers, held_out = ((0, 1), (1, 3), (3, 4)), []
    for slots in ([["a"], ["b"], ["c"]], [["a"], ["a"], ["a"]]):
        swarm = Swarm(manifest, slots, tmp_path, layers, without_data=frozenset("b"))
        swarm.configure()
        held_out.append([swarm.evaluate(0), swarm.evaluate(0)])
        held_out[-1].append([swarm.step(0).loss, *swarm.evaluate(1)])
        assert swarm.dropped() == {}
    assert held_out[0] == held_out[1]
    assert [len(losses) for losses in held_out[0]] == [5, 5, 6]


def test_bfloat16_trains_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, compute="bfloat16", steps=12)
    swarm = Swarm(manifest, PLACEMENTS["three"], tmp_path)
    swarm.configure()
    losses = [swarm.step(step).loss for step in range(12)]
    assert losses[-1] < losses[0] - 0.3
    assert {p.dtype for p in swarm.weights().values()} == {torch.float32}


def test_int8_runs_converge_like_uncoded_ones(tmp_path: Path) -> None:
    final = {}
    for codec in ("none", "int8"):
        codecs = CodecConfig(activation=codec, activation_gradient=codec, gradient=codec)
        manifest = make_manifest(tmp_path, codecs=codecs, steps=40)
        swarm = Swarm(manifest, PLACEMENTS["three"], tmp_path)
        swarm.configure()
        losses = [swarm.step(step).loss for step in range(40)]
        assert losses[-1] < losses[0] - 1.0
        final[codec] = sum(losses[-5:]) / 5
    assert final["int8"] == pytest.approx(final["none"], abs=0.1)
    assert final["int8"] != final["none"], "the codec must have been in use"


def test_a_stride_moves_on_with_every_step(tmp_path: Path) -> None:
    """Half of the weights may move in a step, the other half in the next."""
    codecs = CodecConfig(activation="none", activation_gradient="none", gradient="stride0.5/none")
    swarm = Swarm(make_manifest(tmp_path, WIDE, codecs=codecs), PLACEMENTS["three"], tmp_path)
    swarm.configure()
    moved = []
    for step in range(2):
        swarm.step(step)
        setup = swarm.engines[PeerId("a")]._setup
        assert setup is not None
        large = [index for index, group in setup.expected.groups.items() if not group.is_small]
        assert len(large) < len(setup.expected.groups), "norms have a group of their own"
        moved.append(torch.cat([setup.reduced[index].flat for index in large]) != 0)
    assert not bool((moved[0] & moved[1]).any())
    shares = [float(each.float().mean()) for each in (*moved, moved[0] | moved[1])]
    assert 0.4 < min(shares[:2]) <= max(shares[:2]) <= 0.51
    assert shares[2] > 0.9


def test_large_gradients_travel_in_more_shards_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(tmp_path, TIED)
    found = []
    for most in (groups.MAX_SHARD_VALUES, 500):
        monkeypatch.setattr(groups, "MAX_SHARD_VALUES", most)
        swarm = Swarm(manifest, PLACEMENTS["three"], tmp_path)
        swarm.configure()
        found.append(([swarm.step(step).hashes for step in range(2)], swarm.num_frames))
    assert found[0][0] == found[1][0]
    assert found[1][1] > 2 * found[0][1]


def test_one_stage_and_one_slot_work_too(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, TIED, stages=1, slots=1, num_microbatches=3)
    plain_losses, _ = plain_run(manifest, tmp_path)
    swarm = Swarm(manifest, [["a"]], tmp_path, layers=((0, 4),))
    swarm.configure()
    assert [swarm.step(s).loss for s in range(10)] == pytest.approx(plain_losses, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_cuda_is_bit_equal_on_every_placement_and_near_the_cpu(
    compute: str, tmp_path: Path
) -> None:
    manifest = make_manifest(tmp_path, TIED, compute=compute)
    results = {}
    for device, name in (("cpu", "one"), ("cuda", "one"), ("cuda", "three")):
        swarm = Swarm(manifest, PLACEMENTS[name], tmp_path, device=device)
        swarm.configure()
        results[device, name] = [swarm.step(step) for step in range(5)]
    torch.use_deterministic_algorithms(False)
    one, three = results["cuda", "one"], results["cuda", "three"]
    assert [s.hashes for s in one] == [s.hashes for s in three]
    tolerance = 1e-4 if compute == "float32" else 0.05
    assert [s.loss for s in one] == pytest.approx(
        [s.loss for s in results["cpu", "one"]], abs=tolerance
    )
