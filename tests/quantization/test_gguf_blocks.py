"""GGUF's blocks keep their values as quantized weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from nano_vllm.quantization.gguf_blocks import FORMATS, quantized_weight
from nano_vllm.quantization.packed_weight import GROUP_SIZE


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_file(name: str, seed: int) -> None:
    kind = gguf.GGMLQuantizationType[name]
    matrix = np.random.default_rng(seed).standard_normal((7, 5 * GROUP_SIZE), dtype=np.float32)
    data = quantize(matrix, kind)
    weight = quantized_weight(data.reshape(7, 5, -1), name)
    assert weight.bits == FORMATS[name][0]
    assert int(weight.quants.max()) < 2**weight.bits
    expected = torch.from_numpy(dequantize(data, kind))
    torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-6, atol=1e-6)
