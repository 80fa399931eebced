"""Weights of cut models in and out of files that the library writes and reads."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
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

from swarmnode.errors import DataError
from swarmnode.presets import byte_llama_config
from swarmnode.tensorfiles import read_header
from swarmnode.tokenizer import load_tokenizer, write_byte_tokenizer
from swarmnode.worker.models import (
    build_stage,
    check_vocabulary,
    export_folder,
    initialize,
    load_tensors,
    needed_tensors,
    save_tensors,
    sources_for,
    stage_shapes,
)


def test_a_saved_folder_fills_stages_tensor_by_tensor(config: Config, tmp_path: Path) -> None:
    whole = whole_model(config)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    spans = read_header(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    stages = [build_stage(config, layers=layers) for layers in pairwise((0, 2, 5))]
    for stage in stages:
        sources = sources_for(config, stage.layers, spans)
        assert tuple(sources) == needed_tensors(config, stage.layers)
        wanted = {name for names in sources.values() for name in names}
        load_tensors(stage, {name: spans[name] for name in wanted})
    with torch.no_grad():
        expected_BSV = whole(input_ids=some_tokens()).logits
        assert torch.equal(run(stages, some_tokens()), expected_BSV)


def test_a_folder_without_the_base_models_prefix_fills_stages(
    configs: Configs, tmp_path: Path
) -> None:
    config = configs["gpt2"]
    whole = whole_model(config)
    whole.base_model.save_pretrained(tmp_path)
    spans = read_header(tmp_path)
    assert "wte.weight" in spans
    stages = [build_stage(config, layers=layers) for layers in pairwise((0, 2, 5))]
    for stage in stages:
        load_tensors(stage, spans)
        for name, parameter in stage.parameters_by_name().items():
            assert torch.equal(parameter, whole.get_parameter(stage.tied.get(name, name)))


def test_a_tied_model_stored_by_its_head_alone_fills_both_ends(
    configs: Configs, tmp_path: Path
) -> None:
    config = configs["llama-tied"]
    tensors = dict(whole_model(config).named_parameters())
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_tensors(tmp_path / "model.safetensors", tensors)
    for layers in pairwise((0, 2, 5)):
        stage = build_stage(config, layers=layers)
        load_tensors(stage, read_header(tmp_path))
        end = "model.embed_tokens.weight" if layers[0] == 0 else "lm_head.weight"
        assert torch.equal(stage.parameters_by_name()[end], tensors["lm_head.weight"])


def test_an_exported_folder_loads_with_the_library(config: Config, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    stages = cut_model(config, (0, 2, 5))
    for stage in stages:
        tensors.update(stage.tensors_by_name())
    folder = tmp_path / "model"
    for _ in range(2):  # the second export replaces the first
        export_folder(folder, config, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits_BSV = loaded.eval()(input_ids=some_tokens()).logits
        assert largest_difference(run(stages, some_tokens()), logits_BSV) <= MAX_ERROR


def test_the_demo_model_and_the_byte_tokenizer_make_one_folder(tmp_path: Path) -> None:
    config = byte_llama_config()
    num_parameters = sum(t.numel() for t in stage_shapes(config, (0, 6)).values())
    assert 1_200_000 <= num_parameters <= 2_000_000
    write_byte_tokenizer(tmp_path / "tokenizer")
    check_vocabulary(config, load_tokenizer(tmp_path / "tokenizer").num_tokens)
    stage = build_stage(config, layers=(0, 6), dtype=torch.bfloat16)
    initialize(stage, 0)
    export_folder(tmp_path / "out", config, stage.tensors_by_name(), tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    text = "na\u00efve \U0001f600\n  x"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == 256
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits_BSV = model.eval()(input_ids=torch.tensor([ids])).logits
        assert torch.equal(logits_BSV, stage(torch.tensor([ids])))


def test_saving_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shared = torch.arange(6.0)
    save_tensors(path, {"a": shared[2:5], "b": shared, "c": shared})
    before = path.read_bytes()
    assert {n: s.shape for n, s in read_header(path).items()} == {"a": (3,), "b": (6,), "c": (6,)}
    with pytest.raises(DataError, match="cannot write"):
        save_tensors(tmp_path / "missing" / "a.safetensors", {"a": shared})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_do_not_fit_are_refused(configs: Configs, tmp_path: Path) -> None:
    config = configs["llama"]
    tensors = dict(whole_model(config).named_parameters())
    name = "model.layers.3.mlp.up_proj.weight"

    def saved(**changes: Tensor) -> Path:
        kept = {k: v for k, v in tensors.items() if k != name} | changes
        save_tensors(tmp_path / "model.safetensors", kept)
        return tmp_path

    stage = build_stage(config, layers=(3, 5))
    with pytest.raises(DataError, match=f"lack tensor {name}"):
        load_tensors(stage, read_header(saved()))
    with pytest.raises(DataError, match=f"lack tensor {name}"):
        sources_for(config, (3, 5), read_header(saved()))
    with pytest.raises(DataError, match=rf"{name} is \(48, 31\)"):
        load_tensors(stage, read_header(saved(**{name: torch.ones(48, 31)})))
    with pytest.raises(DataError, match="several stored tensors"):
        load_tensors(stage, read_header(saved(**{name: tensors[name], name[6:]: tensors[name]})))
    without = {k: v for k, v in tensors.items() if k != name}
    for changes, message in (
        ({}, "lack tensor"),
        ({name: tensors[name].T}, r"is \(32, 48\)"),
        ({name: tensors[name], "x": torch.ones(1)}, "no tensor x"),
    ):
        with pytest.raises(DataError, match=message):
            export_folder(tmp_path / "out", config, {**without, **changes})
    assert not (tmp_path / "out").exists()
