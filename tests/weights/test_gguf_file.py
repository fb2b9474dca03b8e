from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from nano_vllm.weights.gguf_file import TENSOR_TYPES, GGUFFile


def test_agrees_with_the_reference_reader(write_gguf: Callable[..., Path]) -> None:
    metadata = {
        "general.alignment": 64,
        "a.strings": ["x", "", "äöü", "👍"],
        "a.integers": [1, -2, 3],
        "a.floats": [0.5, 1.5],
        "a.flag": True,
        "a.text": "some text",
    }
    path = write_gguf(metadata)
    file, reference = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (list(value) if isinstance(value, tuple) else value) == field.contents(), key
    assert list(file.tensors) == [t.name for t in reference.tensors]
    for expected in reference.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert (tensor.offset, tensor.num_bytes) == (expected.data_offset, expected.n_bytes)
        assert tensor.type_name == expected.tensor_type.name


def test_type_table_agrees_with_the_package() -> None:
    for kind, (name, elements, num_bytes) in TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType(kind).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (elements, num_bytes)


def test_every_truncation_is_noticed(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    data = write_gguf().read_bytes()
    cut = tmp_path / "cut.gguf"
    header = GGUFFile(tmp_path / "model.gguf").tensors["token_embd.weight"].offset
    for length in [*range(0, header, 7), header, header + 1, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf (is truncated or corrupt|is not a GGUF)"):
            GGUFFile(cut)


def test_flipped_bytes_never_escape(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Any header is read or refused with a ValueError, quickly and without much memory."""
    data = bytearray(write_gguf().read_bytes())
    header = GGUFFile(tmp_path / "model.gguf").tensors["token_embd.weight"].offset
    rng = random.Random(0)
    flipped = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(500):
        copy = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            copy[rng.randrange(4, header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        flipped.write_bytes(copy)
        try:
            GGUFFile(flipped)
        except ValueError:
            refused += 1
    assert refused > 100


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data, message in (
        (b"", "not a GGUF file: 0 bytes"),
        (b"PK\x03\x04" + bytes(40), r"it starts with b'PK"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1 is not supported"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "GGUF version 50331648 is not supported"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            GGUFFile(path)


def test_unsupported_tensor_type(write_gguf: Callable[..., Path]) -> None:
    raw = np.zeros((4, 292), dtype=np.uint8)
    path = write_gguf(tensors={"extra": raw}, types={"extra": gguf.GGMLQuantizationType.Q8_K})
    with pytest.raises(ValueError, match=r"tensor 'extra' has ggml type 15; supported: F32, F16"):
        GGUFFile(path)


def test_split_model(write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="one part of a split model"):
        GGUFFile(write_gguf({"split.count": 3}))
