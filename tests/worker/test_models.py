"""Cut models against whole ones: logits, gradients, cache, initial weights.

The whole model is the library's own, in eval mode; comparisons are in float32 on one thread.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import (
    MAX_ERROR,
    Config,
    Configs,
    cut_model,
    largest_difference,
    run,
    some_tokens,
    whole_model,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swarmnode.errors import DataError
from swarmnode.presets import byte_llama_config
from swarmnode.worker.models import (
    VERIFIED_FAMILIES,
    build_stage,
    check_vocabulary,
    initialize,
)

CUTS = ((0, 5), (0, 2, 5), (0, 1, 3, 5))


def test_every_verified_family_is_tested(configs: Configs) -> None:
    assert {c["model_type"] for c in configs.values()} == VERIFIED_FAMILIES


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_model_has_the_whole_models_logits_and_gradients(
    config: Config, cut: tuple[int, ...]
) -> None:
    whole, stages, tokens_BS = whole_model(config), cut_model(config, cut), some_tokens()
    labels_N = some_tokens(seed=2).flatten()
    logits_BSV = whole(input_ids=tokens_BS).logits
    assert float(logits_BSV.detach().std()) > 0.1  # the comparison below means something
    torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_N).backward()
    cut_logits_BSV = run(stages, tokens_BS)
    assert largest_difference(cut_logits_BSV, logits_BSV) <= MAX_ERROR
    torch.nn.functional.cross_entropy(cut_logits_BSV.flatten(0, 1), labels_N).backward()
    summed: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.parameters_by_name().items():
            assert parameter.grad is not None, name
            canonical = stage.tied.get(name, name)
            summed[canonical] = summed.get(canonical, torch.zeros(())) + parameter.grad
    expected = {name: p.grad for name, p in whole.named_parameters()}
    assert summed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert largest_difference(summed[name], gradient) <= MAX_ERROR, name


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_decoding_through_stages_gives_the_tokens_of_generate(
    config: Config, cut: tuple[int, ...]
) -> None:
    whole, stages, tokens_BS = whole_model(config), cut_model(config, cut), some_tokens(2, 11)
    assert whole.generation_config is not None
    whole.generation_config.eos_token_id = None
    whole.generation_config.pad_token_id = 0
    expected = whole.generate(
        tokens_BS,
        attention_mask=torch.ones_like(tokens_BS),
        do_sample=False,
        max_new_tokens=12,
    )
    caches = [stage.new_cache() for stage in stages]
    made_BS = tokens_BS
    position = 0
    with torch.no_grad():
        for num_new in (7, 4, *[1] * 11):  # a prefill in two chunks, then token by token
            inputs = made_BS[:, position : position + num_new]
            for stage, cache in zip(stages, caches, strict=True):
                inputs = stage(inputs, cache=cache, position=position, num_logits=stage.is_last)
            position += num_new
            if position == made_BS.shape[1]:
                assert inputs.shape == (2, 1, stages[-1].vocab_size)
                made_BS = torch.cat([made_BS, inputs[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert made_BS.tolist() == expected.tolist()


def test_a_left_padded_batch_gives_the_logits_of_each_sequence_alone(config: Config) -> None:
    stages = cut_model(config, (0, 3, 5))
    short_BS, long_BS = some_tokens(1, 4, seed=3), some_tokens(1, 9, seed=4)
    padded_BS = torch.cat([torch.full((1, 5), 3), short_BS], dim=1)
    tokens_BS = torch.cat([padded_BS, long_BS])
    mask_BT = torch.ones_like(tokens_BS)
    mask_BT[0, :5] = 0
    positions_BS = (mask_BT.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        both_BSV = run(stages, tokens_BS, mask_BT=mask_BT, positions_BS=positions_BS)
        assert largest_difference(both_BSV[:1, 5:], run(stages, short_BS)) <= MAX_ERROR
        assert largest_difference(both_BSV[1:], run(stages, long_BS)) <= MAX_ERROR


def test_eager_attention_agrees_with_the_whole_model(configs: Configs) -> None:
    config = configs["mistral"]
    stages = cut_model(config, (0, 2, 5), attention="eager")
    whole = whole_model(config, attention="eager")
    with torch.no_grad():
        logits_BSV = whole(input_ids=some_tokens()).logits
        assert largest_difference(run(stages, some_tokens()), logits_BSV) <= MAX_ERROR


def test_a_stage_uses_no_chance_even_in_train_mode(config: Config) -> None:
    stages = [stage.train() for stage in cut_model(config, (0, 2, 5))]
    with torch.no_grad():
        torch.manual_seed(1)
        first_BSV = run(stages, some_tokens())
        torch.manual_seed(2)
        assert torch.equal(run(stages, some_tokens()), first_BSV)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_initial_weights_do_not_depend_on_the_cut(config: Config, cut: tuple[int, ...]) -> None:
    expected = dict(whole_model(config).named_parameters())
    seen = set()
    for stage in cut_model(config, cut):
        for name, parameter in stage.parameters_by_name().items():
            canonical = stage.tied.get(name, name)
            assert torch.equal(parameter, expected[canonical]), name
            seen.add(canonical)
    assert seen == expected.keys()


def test_initial_weights_are_the_familys_own_and_follow_the_seed(configs: Configs) -> None:
    config = {**configs["gpt2"], "n_embd": 128, "initializer_range": 0.05}
    stage = build_stage(config, layers=(0, 5))
    state = torch.get_rng_state()
    initialize(stage, 7)
    assert torch.equal(torch.get_rng_state(), state)
    values = stage.parameters_by_name()
    before = {name: parameter.detach().clone() for name, parameter in values.items()}
    assert bool((values["transformer.h.3.ln_1.weight"] == 1).all())
    assert bool((values["transformer.h.3.mlp.c_fc.bias"] == 0).all())
    assert float(values["transformer.h.3.mlp.c_fc.weight"].detach().std()) == pytest.approx(
        0.05, rel=0.02
    )
    scaled = 0.05 / (2 * 5) ** 0.5  # GPT-2 shrinks what writes to the residual path
    assert float(values["transformer.h.3.mlp.c_proj.weight"].detach().std()) == pytest.approx(
        scaled, rel=0.02
    )
    name = "transformer.h.3.mlp.c_fc.weight"
    assert not torch.equal(before[name], before["transformer.h.2.mlp.c_fc.weight"])
    assert not torch.equal(before[name].T, before["transformer.h.3.mlp.c_proj.weight"] * 10**0.5)
    initialize(stage, 8)
    assert not torch.equal(values[name], before[name])
    initialize(stage, 7)
    assert torch.equal(values[name], before[name])


def test_only_the_stages_tensors_are_ever_allocated(configs: Configs) -> None:
    allocated: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # noqa: ANN204
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.device.type != "meta":
                allocated.append(made.untyped_storage().nbytes())
            return made

    config = {**configs["llama-tied"], "vocab_size": 50_000, "hidden_size": 64}
    with Watch():
        stage = build_stage(config, layers=(2, 4))
    parameters = stage.parameters_by_name()
    stage_bytes = sum(p.nbytes for p in parameters.values())
    assert {p.device.type for p in stage.model.parameters()} == {"cpu"}
    assert {b.device.type for b in stage.model.buffers()} == {"cpu"}
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in parameters)
    assert stage_bytes <= sum(allocated) <= 2 * stage_bytes
    assert max(allocated) <= max(p.nbytes for p in parameters.values())
    assert sum(allocated) < 50_000 * 64 * 4 / 10  # nothing of the embedding's size


def test_a_stage_in_bfloat16_keeps_its_rotary_frequencies_in_float32(configs: Configs) -> None:
    stage = build_stage(configs["llama-tied"], layers=(1, 3), dtype=torch.bfloat16)
    buffers = dict(stage.model.named_buffers())
    expected = dict(whole_model(configs["llama-tied"]).named_buffers())
    assert {p.dtype for p in stage.parameters()} == {torch.bfloat16}
    assert (
        buffers.keys()
        == expected.keys()
        == {
            "model.rotary_emb.inv_freq",
            "model.rotary_emb.original_inv_freq",
        }
    )
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name])
    initialize(stage, 7)
    assert stage(torch.ones(1, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt"])
def test_the_ends_of_a_tied_model_know_each_others_copy(configs: Configs, family: str) -> None:
    first, middle, last = (build_stage(configs[family], layers=x) for x in pairwise((0, 1, 3, 5)))
    ((copy, canonical),) = last.tied.items()
    assert first.tied == last.tied
    assert middle.tied == {}
    assert copy in last.parameters_by_name()
    assert canonical in first.parameters_by_name()
    assert build_stage(configs[family], layers=(0, 5)).tied == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-model"}, "not a causal language model"),
        ({"model_type": None}, "not a causal language model"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": 31}, "config is not valid"),
        ({"hidden_act": "no-such-function"}, "can be built"),
        ({"model_type": "granite", "embedding_multiplier": 12.0}, "outside their layers"),
        ({"model_type": "bloom"}, "cannot be cut|can be cut"),
        ({"model_type": "mamba"}, "cannot be cut|can be cut"),
    ],
    ids=str,
)
def test_an_unusable_config_is_refused_in_one_line(
    configs: Configs, changes: Config, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_stage({**configs["llama"], **changes}, layers=(2, 5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [(0, 6), (3, 3), (4, 2), (-1, 2)], ids=str)
def test_layers_that_do_not_exist_are_refused(configs: Configs, layers: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="layers"):
        build_stage(configs["llama"], layers=layers)


def test_unfit_inputs_are_refused(configs: Configs) -> None:
    first, last = cut_model(configs["llama"], (0, 2, 5))
    with pytest.raises(DataError, match="vocabulary"):
        first(torch.tensor([[1, 67]]))
    with pytest.raises(DataError, match="vocabulary"):
        first(torch.tensor([[-1]]))
    with pytest.raises(DataError, match="int64"):
        first(torch.ones(1, 2))
    with pytest.raises(DataError, match="64 positions"):
        first(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(DataError, match="hidden states"):
        last(torch.ones(1, 2, 33))
    with pytest.raises(DataError, match="at least one token"):
        last(torch.ones(1, 0, 32))
    with pytest.raises(DataError, match="320"):
        check_vocabulary(byte_llama_config(), 321)
