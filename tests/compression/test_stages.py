"""The stages of the pipeline by themselves: packing, rotation, selection, factors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmnode.compression.bitpack import pack_fields, packed_bytes, unpack_fields
from swarmnode.compression.codec import get_codec
from swarmnode.compression.hadamard import rotate, unrotate
from swarmnode.compression.measure import samples, squared_error
from swarmnode.compression.tensors import TILE, sign_bits
from swarmnode.errors import CodecError, NotFiniteError


def through(spec: str, tensor: Tensor, phase: int = 0) -> Tensor:
    codec = get_codec(spec).at(phase)
    return codec.decode(codec.encode(tensor), tensor.shape, tensor.dtype)


def loss(spec: str, tensor: Tensor) -> float:
    return squared_error(get_codec(spec), tensor)


# ---- packing -------------------------------------------------------------------------------------


def packed(fields: Tensor, bits: int) -> Tensor:
    out = torch.full((packed_bytes(fields.numel(), bits),), 0xAA, dtype=torch.uint8)
    pack_fields(fields, bits, out)
    return out


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("num_fields", [0, 1, 7, 8, 9, 4095, TILE - 1, TILE, 2 * TILE + 13])
def test_packed_fields_come_back(bits: int, num_fields: int) -> None:
    fields = np.random.default_rng(bits).integers(0, 1 << bits, num_fields)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    sent = torch.from_numpy(fields).to(dtype)
    received = torch.full((num_fields,), 1, dtype=dtype)
    unpack_fields(packed(sent, bits), bits, received)
    assert torch.equal(received, sent)


def test_four_bits_are_the_low_half_and_the_high_half_of_a_tile() -> None:
    fields = torch.arange(16, dtype=torch.uint8)
    assert packed(fields, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]
    tile = torch.randint(0, 16, (TILE,), dtype=torch.uint8)
    both = packed(torch.cat([tile, fields]), 4)
    assert torch.equal(both[: TILE // 2], tile[: TILE // 2] | tile[TILE // 2 :] << 4)
    assert torch.equal(both[TILE // 2 :], packed(fields, 4))


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    fields = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 6], dtype=torch.uint8)
    low = [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert packed(fields, 3).tolist() == [*low, 0b11110000, 5 | 6 << 3]


@given(st.integers(1, 7), st.integers(1, 12), st.data())
def test_bits_after_the_last_field_must_be_zero(
    num_fields: int, bits: int, data: st.DataObject
) -> None:
    spare = 8 * packed_bytes(num_fields, bits) - num_fields * bits
    wire = packed(torch.zeros(num_fields, dtype=torch.int32), bits)
    if not spare:
        return
    wire[-1] |= 1 << 8 - data.draw(st.integers(1, spare))
    with pytest.raises(CodecError, match="after the last"):
        unpack_fields(wire, bits, torch.zeros(num_fields, dtype=torch.int32))


# ---- rotation ------------------------------------------------------------------------------------


def sylvester(block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 512, 1024])
def test_a_rotation_keeps_lengths_and_has_an_inverse(block: int) -> None:
    x_RG = torch.randn(50, block, generator=torch.Generator().manual_seed(block))
    y_RG = rotate(x_RG.clone())
    torch.testing.assert_close(y_RG.norm(dim=1), x_RG.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(unrotate(y_RG), x_RG, rtol=0, atol=2e-6)
    assert (y_RG - x_RG).norm() > 0.5 * x_RG.norm()
    signs = torch.where(torch.from_numpy(sign_bits(block, 0x5EED)), 1.0, -1.0).double()
    exact = x_RG.double() * signs @ sylvester(block) / math.sqrt(block)
    torch.testing.assert_close(y_RG.double(), exact, rtol=0, atol=2e-6)


def test_the_signs_are_part_of_the_format() -> None:
    assert np.packbits(sign_bits(64, 0x5EED)).tobytes().hex() == "79e6a3204a7609dc"
    assert abs(int(sign_bits(1 << 16, 1).sum()) - (1 << 15)) < 1000
    assert (sign_bits(1 << 16, 1) != sign_bits(1 << 16, 2)).any()


@pytest.mark.parametrize("plain", ["int4/32", "int4/128", "int3/64", "int8", "int5/1024"])
def test_rotating_where_it_helps_never_loses_more(plain: str) -> None:
    spread = 0
    for tensor in samples().values():
        without, with_it = loss(plain, tensor), loss(f"{plain}+hadamard", tensor)
        assert with_it <= without * (1 + 1e-5)
        spread += with_it < 0.6 * without
    assert spread >= 1, "it must help somewhere"


def test_a_block_is_rotated_only_where_that_is_better() -> None:
    noise = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    lonely, mixed = torch.zeros(64), noise.clone()
    lonely[5] = mixed[5] = 8.0
    for tensor, is_rotated in ((lonely, False), (mixed, True)):
        payload = get_codec("int8/64+hadamard").encode(tensor)
        assert (payload[1] >> 7 == 1) == is_rotated
    assert torch.equal(through("int4/64+hadamard", lonely), lonely)
    short = get_codec("int8/64+hadamard").encode(mixed[:63])
    assert short == get_codec("int8/64").encode(mixed[:63])


# ---- blocks --------------------------------------------------------------------------------------


def test_two_bits_have_four_levels_where_that_is_better_and_three_elsewhere() -> None:
    dense = torch.tensor([-1.0, -0.75, -0.25, 0.25, 0.75, 1.0, 0.3, -0.8] * 4)
    assert set(through("int2/32", dense).tolist()) == {-0.75, -0.25, 0.25, 0.75}
    sparse = torch.zeros(32)
    sparse[3], sparse[9] = 1.0, -1.0
    assert torch.equal(through("int2/32", sparse), sparse)


def test_two_bits_lose_a_third_of_what_three_levels_would() -> None:
    """Three levels, -s, 0 and s, lose 0.43 of Gaussian energy in blocks of 32."""
    gaussian = samples()["gaussian"]
    assert loss("int2/32", gaussian) < 0.14
    scale = gaussian.view(-1, 32).abs().amax(1, keepdim=True)
    ternary = (gaussian.view(-1, 32) / scale).round() * scale
    assert (ternary.view_as(gaussian) - gaussian).square().sum() > 0.4 * gaussian.square().sum()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_energy_bound_is_not_idle(bits: int) -> None:
    """A block at half steps under one large value comes near to it."""
    top, block = 2 ** (bits - 1) - 1, 64
    values = torch.full((block,), 0.499 / top)
    values[0] = 1.0
    codec = get_codec(f"int{bits}/{block}" if bits != 8 else "int8/64")
    lost = loss(codec.spec, values)
    assert 0.2 * codec.energy_bound < lost <= codec.energy_bound


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_is_coded_alike_wherever_it_lies(bits: int, dtype: torch.dtype) -> None:
    num_values = 5 * TILE + 48 * 32 + 11
    tensor = torch.randn(num_values, generator=torch.Generator().manual_seed(bits)).to(dtype)
    spec = f"int{bits}/32"
    decoded = through(spec, tensor)
    for start in (0, TILE - 32, TILE, 4 * TILE - 32, 4 * TILE, num_values // 32 * 32):
        part = slice(start, min(start + 32, num_values))
        assert torch.equal(through(spec, tensor[part]), decoded[part])


# ---- selection -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_the_largest_are_sent_exactly_and_of_equal_ones_the_first(
    numbers: list[int], data: st.DataObject
) -> None:
    chunk = data.draw(st.integers(2, 16))
    count = data.draw(st.integers(1, chunk))
    expected = [0.0] * len(numbers)
    for start in range(0, len(numbers), chunk):
        places = range(start, min(start + chunk, len(numbers)))
        kept = sorted(places, key=lambda i: (-abs(numbers[i]), i))
        for place in kept[: math.ceil(len(places) * count / chunk)]:
            expected[place] = numbers[place]
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor(numbers).to(dtype)
        assert through(f"topk{count}of{chunk}/none", tensor).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.integers(0, 7))
def test_cocktail_sends_the_largest_share_of_every_other_value(
    numbers: list[int], phase: int
) -> None:
    padded = [*numbers, 0][phase % 2 :: 2][: -(-len(numbers) // 2)]
    padded += [0] * (-(-len(numbers) // 2) - len(padded))
    kept = sorted(range(len(padded)), key=lambda i: (-abs(padded[i]), i))
    kept = kept[: math.ceil(len(padded) * 0.3 - 1e-9)]
    expected = [0.0] * len(numbers)
    for place in kept:
        if 2 * place + phase % 2 < len(numbers):
            expected[2 * place + phase % 2] = padded[place]
    tensor = torch.tensor(numbers, dtype=torch.float32)
    assert through("cocktail/p0.5/k0.3/none", tensor, phase).tolist() == expected


def test_the_largest_of_many_are_the_largest() -> None:
    tensor = samples((300, 1000))["student_t3"].flatten()
    sent = through("cocktail/p0.5/k0.05/none", tensor)[::2]
    least = tensor[::2].abs().topk(7500).values.min()
    assert int((sent != 0).sum()) == 7500
    assert sent[sent != 0].abs().min() == least


@pytest.mark.parametrize("num_values", [0, 1, 7, 10, 1003])
def test_a_stride_sends_each_value_once_in_a_period(num_values: int) -> None:
    tensor = torch.randn(num_values)
    codec = get_codec("stride0.1/none")
    sizes = {len(codec.at(phase).encode(tensor)) for phase in range(10)}
    assert sizes == {codec.wire_bytes((num_values,))}
    total = sum((through("stride0.1/none", tensor, phase) for phase in range(3, 13)), 0 * tensor)
    assert torch.equal(total, tensor)
    assert torch.equal(through("stride0.1/none", tensor, 2), through("stride0.1/none", tensor, 12))


def test_a_stride_at_another_phase_puts_values_elsewhere() -> None:
    codec, tensor = get_codec("stride0.5/none"), torch.arange(1.0, 11.0)
    payload = codec.at(0).encode(tensor)
    assert codec.at(1).decode(payload, (10,)).tolist() == [0, 1, 0, 3, 0, 5, 0, 7, 0, 9]


@pytest.mark.parametrize("spec", ["topk2of64/int4", "cocktail/p0.5/k0.2/int4"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_selection_refuses_what_is_not_finite(spec: str, value: float) -> None:
    tensor = torch.zeros(1000)
    tensor[500] = value
    with pytest.raises(CodecError, match="not finite"):
        get_codec(spec).encode(tensor)


@pytest.mark.parametrize(
    ("fields", "is_good"),
    [([1, 2, 0, 3, 1], True), ([2, 1, 0, 3, 1], False), ([1, 1, 0, 3, 1], False),
     ([1, 5, 0, 3, 1], False), ([1, 2, 0, 3, 2], False)],
)  # fmt: skip
def test_positions_must_be_in_order_and_inside(fields: list[int], is_good: bool) -> None:
    codec = get_codec("topk2of5/none")  # of 12 values: two chunks, and one of the last two
    index = packed(torch.tensor(fields, dtype=torch.int32), 3).numpy().tobytes()
    payload = index + np.arange(1, 6, dtype=np.float32).tobytes()
    if is_good:
        assert codec.decode(payload, (12,)).tolist() == [0, 1, 2, 0, 0, 3, 0, 0, 4, 0, 0, 5]
    else:
        with pytest.raises(CodecError, match="positions"):
            codec.decode(payload, (12,))


def test_a_bitmap_must_mark_as_many_as_were_sent() -> None:
    codec = get_codec("cocktail/p0.5/k0.25/none")
    values = np.float32([1, 2]).tobytes()
    assert codec.decode(b"\x12" + values, (16,)).nonzero().flatten().tolist() == [2, 8]
    for bitmap in (b"\x13", b"\x02", b"\x00"):
        with pytest.raises(CodecError, match="marks"):
            codec.decode(bitmap + values, (16,))


# ---- factors -------------------------------------------------------------------------------------


def test_a_matrix_of_low_rank_comes_back() -> None:
    generator = torch.Generator().manual_seed(8)
    left, right = (torch.randn(n, 4, generator=generator) for n in (300, 200))
    matrix = left @ right.t()
    assert loss("powersgd/r4", matrix) < 2.0**-14
    assert loss("powersgd/r3", matrix) > 0.01
    for scale in (1e-30, 1e-38, 1e28):
        assert loss("powersgd/r4", matrix * scale) < 2.0**-14


def test_a_product_is_a_projection() -> None:
    matrix = samples()["student_t3"]
    losses = [loss(f"powersgd/r{rank}", matrix) for rank in (1, 8, 64)]
    assert 1 > losses[0] > losses[1] > losses[2] > 0.1
    decoded = through("powersgd/r8", matrix)
    assert abs(float(((matrix - decoded) * decoded).sum())) < 0.01 * float(decoded.square().sum())


def test_factors_are_taken_only_of_matrices_that_they_make_smaller() -> None:
    codec = get_codec("powersgd/r8")
    assert codec.wire_bytes((1000,)) == 2000
    assert codec.wire_bytes((16, 16)) == 512
    assert codec.wire_bytes((17, 17)) == 2 * 8 * 34
    assert codec.wire_bytes((2, 50, 100)) == 2 * 8 * 200
    cube = torch.randn(2, 50, 100)
    assert torch.equal(
        through("powersgd/r8", cube), through("powersgd/r8", cube.view(100, 100)).view_as(cube)
    )


def test_what_no_product_can_hold_is_refused() -> None:
    codec = get_codec("powersgd/r1")
    for value in (math.nan, math.inf):
        with pytest.raises(NotFiniteError):
            codec.encode(torch.full((50, 50), value))
    with pytest.raises(CodecError, match="over") as caught:
        codec.encode(torch.full((50, 50), 1e31))
    assert not isinstance(caught.value, NotFiniteError)
    size = get_codec("powersgd/r1").wire_bytes((50, 50))
    huge = torch.full((size // 2,), 3e38).bfloat16().view(torch.uint8).numpy().tobytes()
    with pytest.raises(CodecError, match="not finite"):
        get_codec("powersgd/r1").decode(huge, (50, 50))
