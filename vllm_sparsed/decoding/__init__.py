"""Decoding strategies by the name that `diffusion_alg` gives them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from vllm_sparsed.decoding.entropy import Entropy
from vllm_sparsed.decoding.low_confidence import LowConfidence
from vllm_sparsed.decoding.maskgit_plus import MaskgitPlus
from vllm_sparsed.decoding.origin import Origin
from vllm_sparsed.decoding.protocol import Decoder
from vllm_sparsed.decoding.random_order import RandomOrder
from vllm_sparsed.decoding.topk_margin import TopkMargin

_ALL: Final[tuple[Decoder, ...]] = (
    LowConfidence(),
    RandomOrder(),
    Origin(),
    MaskgitPlus(),
    TopkMargin(),
    Entropy(),
)

DECODERS: Final[Mapping[str, Decoder]] = MappingProxyType(
    {decoder.name: decoder for decoder in _ALL}
)
