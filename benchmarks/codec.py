"""How fast codecs are on one core, next to a copy and to the obvious way of writing them.

    python benchmarks/codec.py [SPEC...] [--device cuda] [--threads 1] [--num-runs 9]
                               [--num-rows 4096]

The obvious way ("eager"): whole-tensor torch operations, one after the other, for int8/128 and
int4/32; same grid, same bits a value, even | odd packing. One JSON line for each dtype.

Rows are of 4096 values. With 1024 of them all that the eager way puts aside fits into memory that
the allocator keeps; with 4096 it is fresh from the kernel each time, and so is what is decoded.
"fresh" is the rate at which zeros are written to such memory: no decoder that returns a new
tensor is faster. "decode_into" fills a tensor that is there, as reduced gradients are taken.
"""

import argparse
import json
from dataclasses import asdict

import torch
from _environment import environment
from torch import Tensor

from swarmnode.compression.measure import (
    DEFAULT_SPECS,
    DTYPES,
    ROW_VALUES,
    Rate,
    measure,
    rate,
)


def eager_encode(tensor: Tensor, bits: int, block: int) -> bytes:
    top = (1 << bits - 1) - 1
    x_RG = tensor.float().view(-1, block)
    scale_R1 = x_RG.abs().amax(dim=1, keepdim=True).to(torch.bfloat16)
    codes_N = (x_RG * (top / scale_R1.float())).round().clamp(-top, top).to(torch.int8).view(-1)
    if bits == 4:
        fields_N = (codes_N + 8).to(torch.uint8)
        codes_N = fields_N[::2] | fields_N[1::2] << 4
    return bytes(
        torch.cat([scale_R1.view(-1).view(torch.uint8), codes_N.view(torch.uint8)]).numpy(
            force=True
        )
    )


def eager_decode(
    payload: bytes, like: Tensor, bits: int, block: int, out: Tensor | None = None
) -> Tensor:
    top = (1 << bits - 1) - 1
    num_scale_bytes = 2 * like.numel() // block
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(like.device)
    scale_R1 = data[:num_scale_bytes].view(torch.bfloat16).float().unsqueeze(1)
    codes = data[num_scale_bytes:]
    if bits == 4:
        codes_N = torch.stack([codes & 15, codes >> 4], dim=1).to(torch.int8) - 8
    else:
        codes_N = codes.view(torch.int8)
    values_RG = codes_N.view(-1, block).float() * (scale_R1 / top)
    return (values_RG.to(like.dtype) if out is None else out.copy_(values_RG)).view(like.shape)


def sample(dtype: str, device: str, num_rows: int) -> Tensor:
    tensor = torch.randn((num_rows, ROW_VALUES), generator=torch.Generator().manual_seed(0))
    return tensor.to(DTYPES[dtype]).to(device)


def eager_rates(tensor: Tensor, device: str, num_runs: int) -> dict[str, dict[str, Rate]]:
    """Rates of the eager way, after a check that it does the work."""
    found, target = {}, torch.empty_like(tensor)
    for spec, bits, block in (("int8", 8, 128), ("int4/32", 4, 32)):
        payload = eager_encode(tensor, bits, block)
        decoded = eager_decode(payload, tensor, bits, block)
        error = (decoded - tensor).float().square().sum() / tensor.float().square().sum()
        assert float(error) < 0.02, f"the eager {spec} loses {float(error):.3f}"
        found[spec] = {
            "encode": rate(
                lambda bits=bits, block=block: eager_encode(tensor, bits, block),
                tensor.numel(), num_runs, device,
            ),
            "decode": rate(
                lambda bits=bits, block=block, payload=payload: eager_decode(
                    payload, tensor, bits, block
                ),
                tensor.numel(), num_runs, device,
            ),
            "decode_into": rate(
                lambda bits=bits, block=block, payload=payload: eager_decode(
                    payload, tensor, bits, block, target.view(-1, block)
                ),
                tensor.numel(), num_runs, device,
            ),
        }  # fmt: skip
    return found


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", default=list(DEFAULT_SPECS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-runs", type=int, default=9)
    parser.add_argument("--num-rows", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in DTYPES:
        device, num_runs = options.device, options.num_runs
        report = measure(
            options.specs, device=device, dtype=dtype, num_rows=options.num_rows, num_runs=num_runs
        )
        tensor = sample(dtype, device, options.num_rows)
        eager = eager_rates(tensor, device, num_runs)
        fresh = rate(lambda x=tensor: torch.empty_like(x).zero_(), tensor.numel(), num_runs, device)
        times_eager = {
            each.spec: {
                "encode": each.encode.median / eager[each.spec]["encode"].median,
                "decode": each.decode.median / eager[each.spec]["decode"].median,
                "decode_into": each.decode_into.median / eager[each.spec]["decode_into"].median,
            }
            for each in report.codecs
            if each.spec in eager
        }
        slow = {
            spec: {way: asdict(each) for way, each in ways.items()} for spec, ways in eager.items()
        }
        figures = {
            **asdict(report), "fresh": asdict(fresh), "eager": slow, "times_eager": times_eager,
        }  # fmt: skip
        line = {"bench": "codec", "seed": 0, **figures, **environment(["torch", "numpy"])}
        print(json.dumps(rounded(line)))


if __name__ == "__main__":
    main()
