"""Codecs: exact sizes, stated error bounds, the same bytes every time, and hostile payloads."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmnode.codec_specs import IntCode, parse_spec
from swarmnode.compression.codec import get_codec
from swarmnode.errors import CodecError, ManifestError, UserError

BLOCK = 128
DENSE = [
    "none", "bf16", "int8", "int7/16", "int6/1024", "int5/64", "int4/32", "int4/64", "int3/32",
    "int2/32", "int4/32+hadamard", "int8+hadamard", "int2/16+hadamard",
]  # fmt: skip
SPECS = [
    *DENSE, "topk64of4096/int4", "topk64of4096/int2", "topk3of7/none", "topk1of16/bf16",
    "stride0.1/int4", "stride0.333333/bf16", "cocktail/p0.1/k0.2/int4",
    "cocktail/p0.5/k0.01/int8/16", "powersgd/r1", "powersgd/r32",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


def block_absmax(values_N: Tensor, block: int = BLOCK) -> Tensor:
    """Per value: the largest magnitude of its block, in float64."""
    padded = torch.zeros(-(-values_N.numel() // block) * block, dtype=torch.float64)
    padded[: values_N.numel()] = values_N.double().abs()
    return padded.view(-1, block).amax(1).repeat_interleave(block)[: values_N.numel()]


def scale_absmax(spec: str, values_N: Tensor) -> Tensor:
    """Per value: the largest magnitude among those that it may share a scale with."""
    form = parse_spec(spec)
    if form.is_dense and isinstance(form.code, IntCode):
        return block_absmax(values_N, form.code.block)
    if form.is_dense:
        return values_N.double().abs()
    return values_N.double().abs().amax().expand(values_N.shape) if len(values_N) else values_N


def check_bound(spec: str, tensor: Tensor) -> None:
    codec = get_codec(spec)
    payload = codec.encode(tensor)
    assert len(payload) == codec.wire_bytes(tensor.shape, tensor.dtype)
    assert payload == codec.encode(tensor.clone())
    decoded = codec.decode(payload, tensor.shape, tensor.dtype)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == tensor.dtype
    values_N = tensor.flatten()
    absmax_N = scale_absmax(spec, values_N)
    error_N = (decoded.flatten().double() - values_N.double()).abs()
    for absmax, error in zip(absmax_N.tolist(), error_N.tolist(), strict=True):
        assert error <= codec.error_bound(absmax, tensor.dtype)
    energy = float(values_N.double().square().sum())
    if 1e-50 < energy < 1e70 and tensor.dtype == torch.float32:
        exact = codec.decode(payload, tensor.shape).double()
        assert (exact - tensor.double()).square().sum() <= codec.energy_bound * energy


def special(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    gauss = torch.randn(1000, generator=generator)
    uniform = torch.rand(1000, generator=generator)
    return {
        "gaussian": gauss,
        "heavy tailed": torch.tan(math.pi * (uniform - 0.5)),
        "outlier": torch.cat([gauss, torch.tensor([3e4]), gauss]),
        "constant": torch.full((300,), -0.3),
        "zeros": torch.zeros(257),
        "tiny": gauss * 1e-30,
        "tinier": gauss * 1e-38,
        "subnormal": gauss * 1e-42,
        "huge": gauss.clamp(-3, 3) * 1e38,
        "largest": torch.tensor([torch.finfo(torch.float32).max, 1.0, -2e38, 0.0]),
        "mixed scales": gauss * torch.logspace(-38, 37, 1000),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(2.5),
        "one short block": gauss[:3],
        "strided": gauss.view(40, 25).t()[::2, 1::3],
        "expanded": gauss[:7].unsqueeze(1).expand(7, 50),
    }[name]


CASES = [
    "gaussian", "heavy tailed", "outlier", "constant", "zeros", "tiny", "tinier", "subnormal",
    "huge", "largest", "mixed scales", "empty", "scalar", "one short block", "strided", "expanded",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_value_is_within_the_stated_bound(spec: str, dtype: torch.dtype, case: str) -> None:
    tensor = special(case).to(dtype)
    if case == "largest" and dtype == torch.bfloat16:
        tensor = tensor.clamp(-3.3e38, 3.3e38)
    check_bound(spec, tensor)


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=60)
@given(values=st.lists(float32s, max_size=300))
def test_the_bound_holds_for_any_finite_values(spec: str, values: list[float]) -> None:
    check_bound(spec, torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("num_values", [BLOCK * 1024 - 1, BLOCK * 1024, BLOCK * 2500 + 77])
def test_tiles_do_not_change_the_bytes_of_a_block(num_values: int) -> None:
    codec = get_codec("int8")
    tensor = torch.randn(num_values, generator=torch.Generator().manual_seed(num_values))
    payload = codec.encode(tensor)
    num_blocks = -(-num_values // BLOCK)
    for block in {0, 1023, 1024, num_blocks - 2, num_blocks - 1} & set(range(num_blocks)):
        alone = codec.encode(tensor[block * BLOCK : (block + 1) * BLOCK])
        codes_at = 2 * num_blocks + block * BLOCK
        assert alone[:2] == payload[2 * block : 2 * block + 2]
        assert alone[2:] == payload[codes_at : codes_at + len(alone) - 2]
    decoded = codec.decode(payload, (num_values,))
    assert (decoded - tensor).abs().max() <= codec.error_bound(float(tensor.abs().max()))


def integers(num_values: int, exponent: int) -> Tensor:
    """Values of all magnitudes under 2^(31 + exponent), the same on every machine."""
    hashed = np.arange(num_values, dtype=np.int64) * 2654435761 % (1 << 32) - (1 << 31)
    values = torch.from_numpy(hashed.astype(np.float32))
    for half in (exponent // 2, exponent - exponent // 2):
        values = torch.ldexp(values, torch.tensor(float(half)))
    return values


@pytest.mark.parametrize(
    ("num_values", "exponent", "dtype", "digest"),
    [
        (1, -20, torch.float32, "cc66edc7fdea27a7"),
        (127, -30, torch.bfloat16, "c9ecb48622dc31e4"),
        (70000, -20, torch.float32, "7dc58751950ab8cf"),
        (70000, -20, torch.bfloat16, "6f76521a6350a175"),
        (200001, -140, torch.float32, "84b8c89c47f8e6ac"),
        (131077, 90, torch.float32, "7f0c4bd2c271229c"),
    ],
)
def test_int8_writes_the_bytes_that_it_always_wrote(
    num_values: int, exponent: int, dtype: torch.dtype, digest: str
) -> None:
    payload = get_codec("int8").encode(integers(num_values, exponent).to(dtype))
    assert hashlib.sha256(payload).hexdigest()[:16] == digest


def test_int8_costs_8_and_an_eighth_bits_a_value() -> None:
    assert get_codec("int8").wire_bytes((4096, 4096)) * 8 == 8.125 * 4096 * 4096
    assert get_codec("int8").wire_bytes((129,)) == 129 + 4
    assert get_codec("bf16").wire_bytes((3, 5)) == 30
    assert get_codec("none").wire_bytes((3, 5)) == 60
    assert get_codec("none").wire_bytes((3, 5), torch.bfloat16) == 30


def test_int8_loses_little_energy_and_raw_loses_nothing() -> None:
    tensor = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    codec = get_codec("int8")
    error = codec.decode(codec.encode(tensor), tensor.shape) - tensor
    assert 2e-5 < float(error.square().sum() / tensor.square().sum()) < 6e-5
    raw = get_codec("none")
    assert torch.equal(raw.decode(raw.encode(tensor), tensor.shape), tensor)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-38, 1e-39])
def test_tiny_blocks_keep_their_resolution(magnitude: float) -> None:
    tensor = torch.linspace(-1, 1, 400) * magnitude
    codec = get_codec("int8")
    payload = codec.encode(tensor)
    codes = np.frombuffer(payload, np.int8)[8:]
    assert len(set(codes.tolist())) > 200
    decoded = codec.decode(payload, tensor.shape)
    assert (decoded - tensor).abs().max() <= 0.0047 * magnitude


def test_int8_is_symmetric_under_a_change_of_sign() -> None:
    tensor = special("heavy tailed")
    codec = get_codec("int8")
    plus = codec.decode(codec.encode(tensor), tensor.shape)
    minus = codec.decode(codec.encode(-tensor), tensor.shape)
    assert torch.equal(plus, -minus)


def test_decoding_to_another_dtype_rounds_the_same_values() -> None:
    tensor = special("gaussian")
    for spec in ("bf16", "int8"):
        codec = get_codec(spec)
        payload = codec.encode(tensor)
        exact = codec.decode(payload, tensor.shape)
        narrow = codec.decode(payload, tensor.shape, torch.bfloat16)
        assert torch.equal(exact.to(torch.bfloat16), narrow)


def test_gradients_and_aliasing_stay_behind() -> None:
    tensor = torch.ones(200, requires_grad=True)
    for spec in DENSE:
        codec = get_codec(spec)
        payload = codec.encode(tensor)
        decoded = codec.decode(payload, (200,))
        assert not decoded.requires_grad
        payload[:] = bytes(len(payload))
        assert torch.allclose(decoded, tensor.detach(), atol=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 127, 128, 131071, 131072, 131200])
def test_int8_refuses_what_is_not_finite(value: float, position: int) -> None:
    tensor = torch.zeros(131201)
    tensor[position] = value
    with pytest.raises(CodecError, match="not finite"):
        get_codec("int8").encode(tensor)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 129), (70_000,), (0,), (1,)])
def test_decoding_into_a_tensor_gives_the_same_bits_and_touches_nothing_else(
    spec: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    codec, tensor = get_codec(spec), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    payload = codec.encode(tensor.to(dtype))
    around = torch.full((tensor.numel() + 2,), 7.0, dtype=dtype)
    place = around[1:-1].view(shape)
    codec.decode_into(payload, place)
    assert torch.equal(place, codec.decode(payload, shape, dtype))
    assert around[0] == around[-1] == 7
    with pytest.raises(CodecError):
        codec.decode_into(payload + b"x", place)


@pytest.mark.parametrize("spec", ["none", "bf16"])
def test_other_codecs_pass_on_what_is_not_finite(spec: str) -> None:
    codec = get_codec(spec)
    decoded = codec.decode(codec.encode(torch.tensor([math.nan, math.inf, -math.inf])), (3,))
    assert decoded[0].isnan()
    assert decoded[1:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("spec", SPECS)
def test_other_dtypes_are_refused(spec: str) -> None:
    with pytest.raises(CodecError, match=r"not torch\.int64"):
        get_codec(spec).encode(torch.arange(3))
    with pytest.raises(CodecError, match=r"not torch\.float16"):
        get_codec(spec).decode(b"1234", (1,), torch.float16)


def test_an_unknown_codec_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"unknown codec 'int7'; use one of: none, bf16, int8"):
        get_codec("int7")
    with pytest.raises(ManifestError):
        get_codec("")


# ---- hostile payloads ---------------------------------------------------------------------------

shapes = st.lists(st.integers(-2, 300) | st.integers(), max_size=9).map(tuple)


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=150)
@given(payload=st.binary(max_size=600), shape=shapes, dtype=st.sampled_from(DTYPES))
def test_any_bytes_decode_to_the_shape_or_to_a_codec_error(
    spec: str, payload: bytes, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    try:
        decoded = get_codec(spec).decode(payload, shape, dtype)
    except CodecError:
        return
    assert tuple(decoded.shape) == shape
    assert decoded.dtype == dtype


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_values=st.integers(1, 300))
def test_a_mutated_payload_of_the_right_size_gives_finite_values_or_an_error(
    data: st.DataObject, num_values: int
) -> None:
    codec = get_codec("int8")
    size = codec.wire_bytes((num_values,))
    payload = data.draw(st.binary(min_size=size, max_size=size))
    try:
        decoded = codec.decode(payload, (num_values,))
    except CodecError:
        scales = np.frombuffer(payload, "<u2", count=-(-num_values // BLOCK))
        codes = np.frombuffer(payload, np.int8, offset=scales.nbytes)
        assert scales.max() > 0x7F7F or codes.min() == -128
        return
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xBF80, 0x8000, 0xFFFF])
def test_a_scale_that_is_not_a_magnitude_is_refused(bits: int) -> None:
    payload = bytes([bits & 255, bits >> 8]) + bytes(16)
    with pytest.raises(CodecError, match="scale"):
        get_codec("int8").decode(payload, (16,))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 30, 1 << 30), (0, 1 << 62, 1 << 62), (-1,)])
def test_absurd_shapes_are_refused_before_anything_is_allocated(
    spec: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(CodecError):
        get_codec(spec).decode(b"", shape)
    with pytest.raises(CodecError):
        get_codec(spec).decode(bytes(64), shape)


@pytest.mark.parametrize("spec", SPECS)
def test_read_only_and_unaligned_payloads_decode_without_a_warning(spec: str) -> None:
    codec = get_codec(spec)
    tensor = special("gaussian")
    payload = codec.encode(tensor)
    expected = codec.decode(payload, tensor.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shifted = memoryview(b"x" + bytes(payload))[1:]
        assert torch.equal(codec.decode(bytes(payload), tensor.shape), expected)
        assert torch.equal(codec.decode(shifted, tensor.shape), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_writes_and_reads_the_same_bytes_as_a_cpu(spec: str, case: str) -> None:
    codec = get_codec(spec)
    tensor = special(case)
    payload = codec.encode(tensor)
    if not spec.startswith("powersgd"):  # its factors come from matrix products
        assert codec.encode(tensor.cuda()) == payload
    on_gpu = codec.decode(payload, tensor.shape, device="cuda")
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), codec.decode(payload, tensor.shape))
