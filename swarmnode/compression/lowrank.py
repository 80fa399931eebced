"""A matrix as the product of two thin ones.

Source: PowerSGD (Vogels, Karimireddy and Jaggi, 2019): one power iteration; here the start is
always the same signs, because the codec has no memory, and both factors go in one message.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmnode.codec_specs import CodecSpec
from swarmnode.compression.quantize import Bfloat16Codec
from swarmnode.compression.tensors import (
    TILE,
    Payload,
    SpecCodec,
    checked,
    flat,
    from_bytes,
    num_elements,
    sign_bits,
    to_bytes,
)
from swarmnode.errors import CodecError, NotFiniteError

SEED = 0x10A
"""Of the signs that the iteration starts from."""
_LARGEST = 2.0**100
"""Of what can be coded: sums of products stay finite."""
_LOWEST_EXPONENT = -60
"""Of the first factor: what is smaller goes into the second."""
_BFLOAT16 = Bfloat16Codec(CodecSpec("bf16"))


@dataclass(frozen=True)
class LowRankCodec(SpecCodec):
    """A matrix of m rows (all dimensions but the last) and n columns as P Q^T, of rank r.

    P is an orthonormal basis of M S, where S are r fixed columns of signs; Q = M^T P, so that
    P Q^T is M projected on that basis: no further from M than 0 is, and equal to M up to rounding
    where its rank is at most r. Both factors travel as bfloat16: P by columns, then Q by columns.
    A tensor with fewer dimensions, or whose factors are not smaller, travels as bfloat16.

    The same bytes decode to the same bits everywhere, by r additions in order of products that
    are exact. Encoding uses matrix products: its bytes differ from one kind of device to another.

    Raises: at encode NotFiniteError if a value is not finite, CodecError if one is over 2^100; at
            decode CodecError if the product is not finite.
    """

    def encode(self, tensor: Tensor) -> bytearray:
        flat(tensor)
        if not self.form.factor_values(tensor.shape):
            return _BFLOAT16.encode(tensor)
        x_MN = tensor.detach().reshape(-1, tensor.shape[-1]).float()
        absmax = float(x_MN.abs().amax())
        shape = tuple(tensor.shape)
        if not math.isfinite(absmax):
            raise NotFiniteError(f"{self.spec} cannot code {shape}: a value is not finite")
        if absmax > _LARGEST:
            raise CodecError(f"{self.spec} cannot code {shape}: a value is over {_LARGEST:.3g}")
        # Powers of two that keep both factors, and all products on the way, in range.
        exponent = math.frexp(absmax)[1] if absmax else 0
        half = exponent // 2
        x_MN = torch.ldexp(torch.ldexp(x_MN, torch.tensor(-half)), torch.tensor(half - exponent))
        signs = torch.from_numpy(sign_bits(x_MN.shape[1] * self.form.rank, SEED))
        start_NR = torch.where(signs, 1.0, -1.0).view(-1, self.form.rank).to(x_MN.device)
        p_MR = torch.linalg.qr(x_MN @ start_NR).Q.to(torch.bfloat16)
        q_NR = x_MN.t() @ p_MR.float()
        of_p = max(exponent, _LOWEST_EXPONENT)
        p_MR = torch.ldexp(p_MR.float(), torch.tensor(of_p))
        q_NR = torch.ldexp(q_NR, torch.tensor(exponent - of_p))
        factors = torch.cat([p_MR.t().reshape(-1), q_NR.t().reshape(-1)]).to(torch.bfloat16)
        return to_bytes(factors.view(torch.uint8))

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        data = checked(payload, self.wire_bytes(shape, dtype))
        num_elements(shape)
        if not self.form.factor_values(shape):
            return _BFLOAT16.decode(payload, shape, dtype, device)
        num_rows, num_columns = math.prod(shape[:-1]), shape[-1]
        factors = from_bytes(data, torch.bfloat16).to(device)
        split = num_rows * self.form.rank
        p_RM = factors[:split].view(self.form.rank, num_rows).float()
        q_RN = factors[split:].view(self.form.rank, num_columns).float()
        out_MN = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        step = max(1, TILE // num_columns) if out_MN.device.type == "cpu" else num_rows
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            sum_MN = torch.zeros(rows.stop - start, num_columns, device=device)
            for p_M, q_N in zip(p_RM, q_RN, strict=True):
                sum_MN.addcmul_(p_M[rows].unsqueeze(1), q_N)
            if not bool(sum_MN.isfinite().all()):
                raise CodecError(f"{self.spec} payload has a product that is not finite")
            out_MN[rows] = sum_MN
        return out_MN.view(tuple(shape))

    def error_bound(self, absmax: float, dtype: torch.dtype = torch.float32) -> float:
        """None: how far one value is off depends on all the others."""
        del absmax, dtype
        return math.inf

    @property
    def energy_bound(self) -> float:
        """A projection loses at most everything; rounding the factors adds a little."""
        return 1 + 2.0**-6
