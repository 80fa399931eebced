"""Payloads that say what they are: exact headers, every damage noticed, any bytes survived."""

import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from swarmnode.codec_specs import parse_spec
from swarmnode.compression.codec import get_codec
from swarmnode.compression.payload import (
    MAX_STATE_VERSION,
    UNPACK_BYTES_PER_ELEMENT,
    header_bytes,
    pack,
    unpack,
)
from swarmnode.errors import CodecError

SPECS = [
    "none", "bf16", "int8", "int7/16", "int4/32", "int3/32", "int2/32", "int4/32+hadamard",
    "int2/16+hadamard", "topk64of4096/int4", "topk3of7/int2", "stride0.1/int4",
    "cocktail/p0.1/k0.2/int4", "cocktail/p0.5/k0.9/none", "powersgd/r2",
]  # fmt: skip
MAX_ELEMENTS = 4096


def tensor_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_checksum(data: bytes | bytearray) -> bytes:
    """The same bytes under the checksum that makes a receiver look at them."""
    crc = zlib.crc32(data[14:], zlib.crc32(data[:10] + bytes(4)))
    return bytes(data[:10]) + struct.pack("<I", crc) + bytes(data[14:])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (3, 20, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_payload_says_what_it_is(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codec, tensor = get_codec(spec), tensor_of(shape).to(dtype)
    data = pack(codec, tensor, 123_456_789)
    assert len(data) == header_bytes(codec, shape) + codec.wire_bytes(shape, dtype)
    assert header_bytes(codec, shape) == 14 + 4 * len(shape) + len(spec)
    found = unpack(data, tensor.numel())
    assert (found.state_version, found.spec) == (123_456_789, spec)
    assert (found.tensor.shape, found.tensor.dtype) == (tensor.shape, dtype)
    codec = codec.at(123_456_789)
    assert torch.equal(found.tensor, codec.decode(codec.encode(tensor), shape, dtype))


def test_the_header_is_as_documented() -> None:
    data = pack(get_codec("int8"), torch.zeros(2, 3), 7)
    assert data[:10] == b"SP\x01\x00\x02\x04\x07\x00\x00\x00"
    assert data[14:26] == b"\x02\x00\x00\x00\x03\x00\x00\x00int8"
    assert data[26:] == bytes(2 + 6)
    assert with_checksum(data) == data


def test_the_state_version_is_the_phase_of_a_stride() -> None:
    tensor = torch.arange(1.0, 7.0)
    data = pack(get_codec("stride0.333333/none"), tensor, 4)
    assert unpack(data, 6).tensor.tolist() == [0, 2, 0, 0, 5, 0]


@pytest.mark.parametrize("spec", SPECS)
def test_every_flipped_bit_and_every_missing_or_added_byte_is_noticed(spec: str) -> None:
    data = bytes(pack(get_codec(spec), tensor_of((3, 20)), 3))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            unpack(damaged, MAX_ELEMENTS)
    for length in range(len(data)):
        with pytest.raises(CodecError):
            unpack(data[:length], MAX_ELEMENTS)
    with pytest.raises(CodecError):
        unpack(data + b"\0", MAX_ELEMENTS)
    unpack(data, MAX_ELEMENTS)


@pytest.mark.parametrize(
    "name", [b"int9/32", b"int8/128", b"int4/32+ef", b"aq/int4/32", b"\xff\xfe", b"", b"none\0"]
)
def test_a_codec_that_is_unknown_or_has_another_name_is_refused(name: bytes) -> None:
    header = struct.pack("<2sBBBBIII", b"SP", 1, 0, 1, len(name), 0, 0, 0) + name
    with pytest.raises(CodecError, match="codec"):
        unpack(with_checksum(header), MAX_ELEMENTS)
    good = struct.pack("<2sBBBBIII", b"SP", 1, 0, 1, 4, 0, 0, 0) + b"int8"
    assert unpack(with_checksum(good), MAX_ELEMENTS).tensor.numel() == 0


def test_more_elements_than_allowed_are_refused_whatever_the_body() -> None:
    data = pack(get_codec("topk1of65536/int4"), torch.zeros(1 << 20))
    assert len(data) < 100
    with pytest.raises(CodecError, match="more than 1048575"):
        unpack(data, (1 << 20) - 1)
    unpack(data, 1 << 20)
    for sizes in [(1 << 31, 1 << 31), (1 << 20, 1 << 20, 1), (0xFFFFFFFF,) * 8]:
        name = b"topk1of65536/int4"
        header = struct.pack("<2sBBBBII", b"SP", 1, 0, len(sizes), len(name), 0, 0)
        header += struct.pack(f"<{len(sizes)}I", *sizes) + name
        with pytest.raises(CodecError):
            unpack(with_checksum(header), 1 << 40)


def test_what_has_no_header_is_refused_by_the_sender() -> None:
    for state in (-1, MAX_STATE_VERSION + 1):
        with pytest.raises(CodecError, match="version"):
            pack(get_codec("int8"), torch.zeros(3), state)
    with pytest.raises(CodecError, match=r"not torch\.float16"):
        pack(get_codec("int8"), torch.zeros(3, dtype=torch.float16))


# ---- strangers -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_tensor(data: bytes) -> None:
    for candidate in (data, b"SP\x01" + data, with_checksum(b"SP\x01\0\x01\x04" + data + bytes(9))):
        try:
            unpack(candidate, MAX_ELEMENTS)
        except CodecError:
            continue


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that torch and Python (numpy included) held at once for `action`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.start()
        try:
            action()
            _, python_peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    held, torch_peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            torch_peak = max(torch_peak, held)
    return torch_peak + python_peak


@pytest.mark.parametrize("num_values", [1 << 12, 1 << 18])
@pytest.mark.parametrize(
    "spec",
    [*SPECS, "int2/1024+hadamard", "topk2of2/none", "topk4096of4096/int8", "powersgd/r28"],
)
def test_unpacking_needs_no_more_memory_than_stated(spec: str, num_values: int) -> None:
    data = pack(get_codec(spec), tensor_of((64, num_values // 64)))
    unpack(data, num_values)  # what is made once and kept
    peak = peak_bytes(lambda: unpack(data, num_values))
    assert 4 * num_values <= peak <= UNPACK_BYTES_PER_ELEMENT * num_values + (1 << 20)


def mutate(rng: random.Random, originals: list[bytes]) -> bytes:
    """Random bytes, or a good payload with some of its bytes changed, cut, moved or grown."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(120))
    data = bytearray(rng.choice(originals))
    for _ in range(rng.choice([0, 1, 1, 2, 5, 30])):
        place = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place : place + rng.randrange(4)] = b""
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(4))
            case 4:
                data[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\0\0\1\0"])
            case _:
                other = rng.choice(originals)
                data[place:] = other[rng.randrange(len(other)) :]
        if not data:
            return b""
    if rng.random() < 0.8 and len(data) >= 14:
        return with_checksum(data)
    return bytes(data)


def unpack_or_none(data: bytes) -> object:
    try:
        return unpack(data, MAX_ELEMENTS)
    except CodecError:
        return None


def survive(count: int, seed: int) -> tuple[int, int]:
    """(tensors, refusals) of so many payloads; anything else that happens is a failure.

    So is more memory than `unpack` states, which is looked at for every 500th of them.
    """
    rng = random.Random(seed)
    shapes = [(5,), (3, 20), (40, 50), (129,), (2, 3, 4)]
    originals = [
        bytes(pack(get_codec(spec), tensor_of(shape, seed).to(dtype), 7))
        for spec in SPECS
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    tensors = refusals = 0
    for number in range(count):
        data = mutate(rng, originals)
        if number % 500 == 0:
            peak = peak_bytes(lambda data=data: unpack_or_none(data))  # type: ignore[misc]
            assert peak <= UNPACK_BYTES_PER_ELEMENT * MAX_ELEMENTS + (1 << 20), (seed, number)
        try:
            found = unpack(data, MAX_ELEMENTS)
        except CodecError:
            refusals += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, payload {number}: {data!r}") from error
        assert found.tensor.numel() <= MAX_ELEMENTS
        if str(parse_spec(found.spec).code) not in ("none", "bf16"):
            assert bool(found.tensor.isfinite().all())
        tensors += 1
    return tensors, refusals


def test_mutated_payloads_are_tensors_or_refused() -> None:
    tensors, refusals = survive(4000, seed=1)
    assert tensors > 400, "mutations must also get past all the checks of the header"
    assert refusals > 400


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_200000_mutated_payloads_are_tensors_or_refused(seed: int) -> None:
    tensors, refusals = survive(20_000, seed=100 + seed)
    assert min(tensors, refusals) > 2000
