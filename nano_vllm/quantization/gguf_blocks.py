"""GGUF's block formats of 32 elements as quantized weights, without loss.

Source: ggml-common.h (block_q4_0 and so on); an element is scale * quant + minimum in all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from nano_vllm.quantization.packed_weight import GROUP_SIZE, QuantizedWeight

Bytes = npt.NDArray[np.uint8]
"""[rows, blocks, bytes of a block]."""


def quantized_weight(blocks: Bytes, type_name: str) -> QuantizedWeight:
    """The weight that a tensor's blocks hold; `type_name` is one of FORMATS."""
    bits, offset, read = FORMATS[type_name]
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if offset is None:
        minima = blocks[..., 2:4].copy().view(np.float16)[..., 0]
    else:
        # A power of two times a float16: exact, but for scales near the largest float16.
        minima = scales * np.float16(-offset)
    return QuantizedWeight(
        bits,
        torch.from_numpy(read(blocks)).view(blocks.shape[0], blocks.shape[1] * GROUP_SIZE),
        torch.from_numpy(scales),
        torch.from_numpy(minima),
    )


def _halves(quants: Bytes) -> Bytes:
    """Low halves of 16 bytes, then high halves."""
    return np.concatenate((quants & 15, quants >> 4), axis=-1)


def _fifth_bits(quants: Bytes) -> Bytes:
    """[..., 4] -> [..., 32]; the fifth bit of each element, in its place."""
    return np.unpackbits(quants, axis=-1, bitorder="little") << np.uint8(4)


FORMATS: dict[str, tuple[int, int | None, Callable[[Bytes], Bytes]]] = {
    "Q4_0": (4, 8, lambda blocks: _halves(blocks[..., 2:18])),
    "Q4_1": (4, None, lambda blocks: _halves(blocks[..., 4:20])),
    "Q5_0": (8, 16, lambda blocks: _halves(blocks[..., 6:22]) | _fifth_bits(blocks[..., 2:6])),
    "Q5_1": (8, None, lambda blocks: _halves(blocks[..., 8:24]) | _fifth_bits(blocks[..., 4:8])),
    "Q8_0": (8, 128, lambda blocks: blocks[..., 2:34] ^ np.uint8(128)),
}
"""ggml type -> bits of a quant; what is taken off it, or None where a block has a minimum of its
own; the quants of its blocks.
"""
