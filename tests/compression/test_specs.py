"""Names of codecs: they parse and print back, and say exactly what goes on the wire."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.codec_specs import (
    PRESETS,
    CodecSpec,
    IntCode,
    for_size,
    parse_spec,
    stateless_spec,
    wire_share,
)
from swarmnode.compression.codec import get_codec
from swarmnode.errors import ManifestError
from swarmnode.manifest import CodecConfig, JobFile, check

MATRIX = (4096, 4096)
WIRE_BITS = {
    "none": 32,
    "bf16": 16,
    "int8": 8.125,
    "int4/32": 4.5,
    "int4/64": 4.25,
    "int4/128": 4.125,
    "int3/32": 3.5,
    "int2/32": 2.5,
    "int6/16": 7,
    "int5/1024": 5 + 1 / 64,
    "int4/32+hadamard": 4.5,
    "int4/128+hadamard": 4.125,
    "topk64of4096/int4": 64 / 4096 * (4.125 + 12),
    "topk64of4096/int2": 64 / 4096 * (2.125 + 12),
    "topk64of4096/int4/64": 64 / 4096 * (4.25 + 12),
    "topk32of1024/bf16": 32 / 1024 * (16 + 10),
    "stride0.1/int4": 0.1 * 4.125,
    "stride0.5/none": 16,
    "cocktail/p0.1/k0.2/int4": 0.1825,
    "cocktail/p0.1/k0.2/int8": 0.1 * (1 + 0.2 * 8.125),
    "powersgd/r32": 0.25,
    "powersgd/r64": 0.5,
}
"""The design's table, for 4096 x 4096 float32. The stride does not divide it: 1e-5 more."""


@pytest.mark.parametrize(("spec", "bits"), WIRE_BITS.items())
def test_a_codec_sends_what_the_table_says(spec: str, bits: float) -> None:
    wire_bits = 8 * get_codec(spec).wire_bytes(MATRIX) / math.prod(MATRIX)
    assert wire_bits == pytest.approx(bits, rel=2e-5, abs=0)
    if "0.1" not in spec:
        assert wire_bits == bits


@given(st.integers(0, 5000), st.integers(2, 8), st.sampled_from([16, 32, 64, 128, 256, 512, 1024]))
def test_int_codes_leave_no_bit_unused(num_values: int, bits: int, block: int) -> None:
    expected = 2 * math.ceil(num_values / block) + math.ceil(num_values * bits / 8)
    assert get_codec(f"int{bits}/{block}").wire_bytes((num_values,)) == expected


codes = st.one_of(
    st.sampled_from(["none", "bf16", "int8"]),
    st.builds("int{}/{}".format, st.integers(2, 8), st.sampled_from([16, 32, 64, 256, 512, 1024])),
)
values = st.one_of(codes, st.builds("int{}".format, st.integers(2, 8)))
shares = st.integers(1, 999).map(lambda share: f"{share / 1000:g}")
strides = st.integers(2, 1000).map(lambda period: f"{1 / period:g}")
tops = st.integers(2, 65536).flatmap(
    lambda chunk: st.builds("topk{}of{}".format, st.integers(1, chunk), st.just(chunk))
)
stateless = st.one_of(
    codes,
    st.builds("int{}/64+hadamard".format, st.integers(2, 8)),
    st.builds("{}/{}".format, tops, values),
    st.builds("stride{}/{}".format, strides, values),
    st.builds("cocktail/p{}/k{}/{}".format, strides, shares, values),
    st.builds("powersgd/r{}".format, st.integers(1, 1024)),
)


@given(stateless)
def test_a_name_prints_back_and_belongs_to_a_codec(text: str) -> None:
    spec = parse_spec(text)
    assert str(spec) == text
    assert get_codec(text).spec == text
    assert get_codec(text).at(12345).spec == text
    assert parse_spec(f"{text}+ef").stateless == spec
    assert str(parse_spec(f"{text}+ef")) == f"{text}+ef"


@given(st.one_of(codes, st.just("int4/32+hadamard")))
def test_a_delta_names_the_codec_inside(text: str) -> None:
    spec = parse_spec(f"aq/{text}")
    assert spec.memory == "delta"
    assert str(spec) == f"aq/{text}"
    assert str(spec.stateless) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int8/128", "int8"),
        ("topk2of4/int4/128", "topk2of4/int4"),
        ("int8/128+hadamard+ef", "int8+hadamard+ef"),
    ],
)
def test_one_codec_has_one_name(text: str, name: str) -> None:
    assert str(parse_spec(text)) == name
    assert parse_spec(text) == parse_spec(name)


@pytest.mark.parametrize(
    "text",
    [
        "", "int", "int1/32", "int9/32", "int4", "int4/", "int4/33", "int4/8", "int4/2048",
        "int4/032", "INT8", " int8", "int8\n", "int8 ", "bf16/32", "none+hadamard",
        "bf16+hadamard", "int4/32+hadamard+hadamard", "int4/32+ef+hadamard", "int4/32+ef+ef",
        "aq/aq/int4/32", "aq/int4/32+ef", "aq/topk1of2/int4", "aq/powersgd/r1", "topk0of4/int4",
        "topk5of4/int4", "topk1of1/int4", "topk1of65537/int4", "topk64of4096", "topk64of4096/",
        "topk2of4/int4+hadamard", "stride0/int4", "stride1/int4", "stride0.3/int4",
        "stride0.10/int4", "stride.1/int4", "stride0.0001/int4", "cocktail/p0.1/k0/int4",
        "cocktail/p0.1/k0.20/int4", "cocktail/p0.1/int4", "cocktail/k0.2/p0.1/int4", "powersgd",
        "powersgd/r0", "powersgd/r1025", "powersgd/r1/int4", "powersgd/r1+hadamard", "\u0661nt8",
        "int\u0664/32", "topk\u0661of4/int4", "x" * 100, "zip",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_the_forms_that_there_are(text: str) -> None:
    with pytest.raises(ManifestError, match="use one of: none, bf16, int8, ") as caught:
        parse_spec(text)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_a_manifest_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except ManifestError:
        return
    assert parse_spec(str(spec)) == spec


# ---- in jobs -------------------------------------------------------------------------------------


def test_a_job_may_name_any_codec_and_a_memory_where_it_is_of_use() -> None:
    job = CodecConfig(
        activation="int4/32", activation_gradient="int8/128", gradient="stride0.1/int4"
    )
    assert (job.activation, job.activation_gradient) == ("int4/32", "int8")
    assert CodecConfig(activation="powersgd/r4").activation == "powersgd/r4"
    raw = {"name": "j", "model": {"config": "c"}, "data": {"path": "d"}}
    assert CodecConfig(gradient="topk64of4096/int4/128+ef").gradient == "topk64of4096/int4+ef"
    for key, codec, says in [
        ("gradient", "int4", "unknown codec 'int4'"),
        ("gradient", "aq/int4/32", "use 'int4/32'"),
        ("gradient", "powersgd/r8", "'powersgd/r8' codes matrices, .* flat shards"),
        ("gradient", "powersgd/r8+ef", "codes matrices, .* use another"),
        ("sync", "diloco,codec=powersgd/r8,memory=feedback", "its codec codes matrices"),
        ("activation", "int4/32+ef", "use 'int4/32'"),
        ("activation_gradient", "int4/32+ef", "use 'int4/32'"),
        ("activation_gradient", "aq/int4/32", "use 'int4/32'"),
    ]:
        with pytest.raises(ManifestError, match=f"codecs.{key}: .*{says}"):
            check(JobFile, {**raw, "codecs": {key: codec}}, "job.toml")
    with pytest.raises(ManifestError, match="memory"):
        stateless_spec("aq/int4/32")
    with pytest.raises(ManifestError, match="memory"):
        get_codec("int4/32+ef")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_the_codecs_that_are_not_named(name: str) -> None:
    preset = PRESETS[name]
    job = CodecConfig.model_validate({"preset": name, "gradient": "int4/32+ef"})
    assert job.activation == preset.activation
    assert job.activation_gradient == preset.activation_gradient
    assert job.gradient == "int4/32+ef"
    plain = CodecConfig(
        activation=preset.activation,
        activation_gradient=preset.activation_gradient,
        gradient="int4/32+ef",
        follow_links=name in ("lan", "home"),
    )
    assert job == plain, "the same job has the same id, however its codecs were named"
    assert "preset" not in job.model_dump(mode="json")


def test_a_job_follows_its_links_where_a_preset_names_its_codecs_and_it_may() -> None:
    raw = {"name": "j", "model": {"config": "c"}, "data": {"path": "d"}}
    strict = {"run": {"deterministic": True}, "placement": {"slots": 1, "layers": [1, 1]}}

    def follows(codecs: dict[str, object], **more: object) -> bool:
        job = check(JobFile, {**raw, "codecs": codecs, **more}, "job.toml")
        return job.codecs.follow_links

    assert follows({"preset": "home"})
    assert follows({"activation": "int8", "follow_links": True})
    assert not follows({"preset": "home", "follow_links": False})
    assert not follows({"preset": "fidelity"})
    assert not follows({"activation": "int8"})
    assert not follows({"preset": "home", "activation": "aq/int4/32"})
    assert not follows({"preset": "home"}, **strict)
    with pytest.raises(ManifestError, match=r"aq/ does not go with codecs.follow_links"):
        follows({"activation": "aq/int4/32", "follow_links": True})
    with pytest.raises(ManifestError, match=r"run.deterministic does not go with codecs.follow"):
        follows({"preset": "home", "follow_links": True}, **strict)


def test_a_job_that_follows_no_links_keeps_its_id() -> None:
    assert "follow_links" not in CodecConfig().model_dump(mode="json")
    assert CodecConfig(follow_links=True).model_dump(mode="json")["follow_links"] is True


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    raw = {"name": "j", "model": {"config": "c"}, "data": {"path": "d"}}
    with pytest.raises(ManifestError, match=r"codecs.preset: .*'home', 'slow', 'lan'"):
        check(JobFile, {**raw, "codecs": {"preset": "moon"}}, "job.toml")


def test_the_share_of_a_long_vector_is_that_of_the_wire() -> None:
    assert wire_share("none") == 1
    assert wire_share("int8") == 8.125 / 32
    assert wire_share("int4/32") == 4.5 / 32
    assert wire_share("powersgd/r32") == 0.5  # a vector is no matrix
    assert wire_share("powersgd/r32", MATRIX) == 0.25 / 32


def test_presets_name_codecs_that_send_less_on_slower_links() -> None:
    costs = {}
    for name, preset in PRESETS.items():
        each = (preset.activation, preset.activation_gradient, preset.gradient)
        assert [str(parse_spec(text)) for text in each] == list(each)
        costs[name] = sum(wire_share(text) for text in each)
    assert costs["slow"] < costs["home"] < costs["lan"] < costs["fidelity"]


def test_small_tensors_travel_as_bf16_where_the_codec_loses_more_than_int8() -> None:
    plain = CodecSpec("bf16")
    for text in ("int4/32", "int7/16", "topk64of4096/int8", "stride0.5/none", "powersgd/r1"):
        assert for_size(parse_spec(text), 4095) == plain
        assert for_size(parse_spec(text), 4096) == parse_spec(text)
    assert for_size(parse_spec("int4/32+ef"), 10) == CodecSpec("bf16", memory="feedback")
    for text in ("none", "bf16", "int8", "int8+hadamard", "int8/16"):
        assert for_size(parse_spec(text), 10) == parse_spec(text)


def test_wire_bytes_know_the_dtype_only_where_it_is_kept() -> None:
    assert get_codec("stride0.5/none").wire_bytes((10,), torch.bfloat16) == 10
    assert get_codec("stride0.5/none").wire_bytes((10,), torch.float32) == 20
    assert get_codec("int4/32").wire_bytes((64,), torch.bfloat16) == 36
    assert isinstance(parse_spec("int4/32").code, IntCode)
