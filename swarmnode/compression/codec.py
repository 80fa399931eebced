"""How the name of a codec in a manifest becomes one."""

from dataclasses import replace
from functools import lru_cache

from swarmnode.codec_specs import CodecSpec, IntCode, stateless_spec
from swarmnode.compression.blocks import IntCodec
from swarmnode.compression.lowrank import LowRankCodec
from swarmnode.compression.protocol import Codec
from swarmnode.compression.quantize import Bfloat16Codec, RawCodec
from swarmnode.compression.sparsify import StrideCodec, TopCodec
from swarmnode.compression.tensors import Payload

__all__ = ["Codec", "Payload", "codec_of", "get_codec"]


@lru_cache(maxsize=256)
def get_codec(spec: str) -> Codec:
    """The codec that `spec` names.

    Raises: ManifestError that lists what there is, if there is no such codec; or if it keeps a
    memory, which belongs to whoever encodes (`feedback`).
    """
    return codec_of(stateless_spec(spec))


@lru_cache(maxsize=256)
def codec_of(form: CodecSpec) -> Codec:
    """The codec of a spec, without its memory."""
    form = form.stateless
    if form.rank:
        return LowRankCodec(form)
    if form.period > 1:
        return StrideCodec(form, codec_of(replace(form, period=1)))
    if form.top is not None:
        return TopCodec(form, codec_of(replace(form, top=None)))
    if isinstance(form.code, IntCode):
        return IntCodec(form)
    return RawCodec(form) if form.code == "none" else Bfloat16Codec(form)
