"""Measures codecs on this machine: what they send, how fast they are, what they lose.

Rates are in values per second, medians of several runs after a warm-up, next to the rate at which
the same machine in the same run copies the same tensor: the most that a single pass could reach.
Encoding ends with bytes on the host and decoding begins there, whatever the device.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from swarmnode.compression.codec import get_codec
from swarmnode.compression.protocol import Codec
from swarmnode.errors import UserError

DEFAULT_SPECS = (
    "none", "bf16", "int8", "int4/32", "int4/64", "int3/32", "int2/32", "int4/32+hadamard",
    "topk64of4096/int4", "topk64of4096/int2", "stride0.1/int4", "cocktail/p0.1/k0.2/int4",
    "powersgd/r32",
)  # fmt: skip
NUM_ROWS = 1024
ROW_VALUES = 4096
ERROR_SHAPE = (256, 1024)
SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rate:
    """Values per second: the median of the runs, and both ends."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class CodecFigures:
    """What was measured of one codec."""

    spec: str
    wire_bits: float
    """For each value of a tensor of the shape that was timed."""
    encode: Rate
    decode: Rate
    decode_into: Rate
    """Into a tensor that is there: what `decode` does without fresh memory."""
    encode_share: float
    """Of the rate of a copy."""
    decode_share: float
    squared_error: dict[str, float]
    """Of float32 values of each distribution, relative to their squared norm."""
    energy_bound: float


@dataclass(frozen=True)
class Report:
    """What was measured on one device in one run."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    num_threads: int
    num_runs: int
    copy: Rate
    codecs: tuple[CodecFigures, ...]


def samples(shape: Sequence[int] = ERROR_SHAPE, seed: int = SEED) -> dict[str, Tensor]:
    """float32 tensors by the name of their distribution, the same for a seed.

    gaussian; student_t3: tails as t^-3; outlier: Gaussian with three columns 50 times as large.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian() -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    t3 = gaussian() / torch.stack([gaussian().square() for _ in range(3)]).mean(dim=0).sqrt()
    outlier = gaussian()
    columns = torch.randperm(shape[-1], generator=generator)[:3]
    outlier[..., columns] *= 50
    return {"gaussian": gaussian(), "student_t3": t3, "outlier": outlier}


def squared_error(codec: Codec, tensor: Tensor) -> float:
    """Squared norm of what coding changes, relative to the tensor's. Shape and dtype stay."""
    decoded = codec.decode(codec.encode(tensor), tensor.shape, tensor.dtype, tensor.device)
    error = (decoded.double() - tensor.double()).square().sum()
    return float(error / tensor.double().square().sum())


def rate(action: Callable[[], object], num_values: int, num_runs: int, device: str) -> Rate:
    """How many values per second `action` does, which does `num_values` of them."""
    runs_s = []
    for _ in range(num_runs + 1):
        _synchronize(device)
        started_s = time.perf_counter()
        action()
        _synchronize(device)
        runs_s.append(time.perf_counter() - started_s)
    rates = [num_values / run_s for run_s in runs_s[1:]]
    return Rate(median(rates), min(rates), max(rates))


def measure(
    specs: Sequence[str] = DEFAULT_SPECS,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    num_rows: int = NUM_ROWS,
    num_runs: int = 9,
) -> Report:
    """Measure every codec on one Gaussian tensor, and its error on each distribution.

    Raises: ManifestError for an unknown codec, UserError if there is no such device.
    """
    codecs = [get_codec(spec) for spec in specs]
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; leave --device away to measure the CPU")
    generator = torch.Generator().manual_seed(SEED)
    shape = (num_rows, ROW_VALUES)
    tensor = torch.randn(shape, generator=generator).to(DTYPES[dtype]).to(device)
    target = torch.empty_like(tensor)
    copy = rate(lambda: target.copy_(tensor), tensor.numel(), num_runs, device)
    found = tuple(_figures(codec, tensor, copy, num_runs, device) for codec in codecs)
    return Report(device, dtype, shape, torch.get_num_threads(), num_runs, copy, found)


def _figures(codec: Codec, tensor: Tensor, copy: Rate, num_runs: int, device: str) -> CodecFigures:
    num_values = tensor.numel()
    payload = codec.encode(tensor)
    encode = rate(lambda: codec.encode(tensor), num_values, num_runs, device)
    decode = rate(
        lambda: codec.decode(payload, tensor.shape, tensor.dtype, device),
        num_values, num_runs, device,
    )  # fmt: skip
    target = torch.empty_like(tensor)
    decode_into = rate(lambda: codec.decode_into(payload, target), num_values, num_runs, device)
    return CodecFigures(
        spec=codec.spec,
        wire_bits=8 * len(payload) / num_values,
        encode=encode,
        decode=decode,
        decode_into=decode_into,
        encode_share=encode.median / copy.median,
        decode_share=decode.median / copy.median,
        squared_error={name: squared_error(codec, x) for name, x in samples().items()},
        energy_bound=codec.energy_bound,
    )


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
