"""The header of a GGUF file: metadata and where each tensor lies.

Source: the GGUF specification (ggml/docs/gguf.md). Read here and not with the gguf package's
GGUFReader, which makes a numpy array of every string: for a vocabulary of 49,152, 3 s against 0.1.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Metadata type id -> its struct format."""
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_MAX_HEADER_BYTES = 64 << 20
"""The largest vocabularies of well-known models have 15 MB."""

TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
"""ggml type id -> name, elements per block, bytes per block; of the types that can be loaded."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch."""
    type_name: str
    offset: int
    """In bytes, from the start of the file."""
    num_bytes: int


class GGUFFile:
    """Metadata and tensor table of a GGUF file; ValueError names the file and what is wrong.

    Every length in the header is checked against the file's size before it is used, and every
    tensor is known to lie inside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        """Scalars, strings, tuples of scalars and lists of strings."""
        self.tensors: dict[str, GGUFTensor] = {}
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            self._header_end = min(self._size, _MAX_HEADER_BYTES)
            if self._size < 24:
                raise ValueError(f"{path} is not a GGUF file: {self._size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self._read_header(data)
                except (struct.error, UnicodeDecodeError):
                    raise self._corrupt("its header ends early or holds invalid text") from None

    def _read_header(self, data: mmap.mmap) -> None:
        magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it starts with {magic!r}")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path}: GGUF version {version} is not supported; supported: 2, 3"
            )
        position = 24
        for _ in range(num_fields):
            key, position = self._read_string(data, position)
            (kind,) = struct.unpack_from("<I", data, position)
            value, position = self._read_value(data, position + 4, kind, key)
            if key in self.metadata:
                raise self._corrupt(f"metadata key {key!r} appears twice")
            self.metadata[key] = value
        if self.metadata.get("split.count") not in (None, 0, 1):
            raise ValueError(
                f"{self.path} is one part of a split model: merge them first (llama-gguf-split)"
            )
        self._read_tensor_table(data, position, num_tensors)

    def _read_string(self, data: mmap.mmap, position: int) -> tuple[str, int]:
        (length,) = _LENGTH.unpack_from(data, position)
        start = position + 8
        end = start + length
        if end > self._header_end:
            raise self._too_long("a string")
        return data[start:end].decode(), end

    def _read_value(self, data: mmap.mmap, position: int, kind: int, key: str) -> tuple[Any, int]:
        if kind == _STRING:
            return self._read_string(data, position)
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            return struct.unpack_from(code, data, position)[0], position + struct.calcsize(code)
        if kind != _ARRAY:
            raise self._corrupt(f"metadata key {key!r} has unknown type {kind}")
        kind, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if kind == _STRING:
            if position + 8 * count > self._header_end:  # without any text
                raise self._too_long(f"metadata key {key!r}")
            strings = []
            for _ in range(count):
                string, position = self._read_string(data, position)
                strings.append(string)
            return strings, position
        if kind not in _SCALARS:
            raise self._corrupt(f"metadata key {key!r} is an array of unknown type {kind}")
        end = position + count * struct.calcsize("<" + _SCALARS[kind])
        if end > self._header_end:
            raise self._too_long(f"metadata key {key!r}")
        return struct.unpack_from(f"<{count}{_SCALARS[kind]}", data, position), end

    def _read_tensor_table(self, data: mmap.mmap, position: int, num_tensors: int) -> None:
        entries = []
        for _ in range(num_tensors):
            name, position = self._read_string(data, position)
            (num_dims,) = struct.unpack_from("<I", data, position)
            if not 1 <= num_dims <= _MAX_DIMENSIONS:
                raise self._corrupt(f"tensor {name!r} has {num_dims} dimensions")
            *dims, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", data, position + 4)
            position += 4 + 8 * num_dims + 12
            entries.append((name, tuple(reversed(dims)), kind, offset))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self._corrupt(f"general.alignment is {alignment!r}")
        data_start = -(-position // alignment) * alignment
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise self._corrupt(f"tensor {name!r} appears twice")
            self.tensors[name] = self._locate(name, shape, kind, data_start + offset)

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in TENSOR_TYPES:
            supported = ", ".join(type_name for type_name, _, _ in TENSOR_TYPES.values())
            raise ValueError(
                f"{self.path}: tensor {name!r} has ggml type {kind}; supported: {supported}"
            )
        type_name, block_elements, block_bytes = TENSOR_TYPES[kind]
        if 0 in shape or shape[-1] % block_elements or (len(shape) == 1 and block_elements > 1):
            raise self._corrupt(f"tensor {name!r} of type {type_name} has shape {list(shape)}")
        num_bytes = prod(shape) // block_elements * block_bytes
        if offset + num_bytes > self._size:
            raise self._corrupt(
                f"tensor {name!r} ends at byte {offset + num_bytes} of {self._size}"
            )
        return GGUFTensor(name, shape, type_name, offset, num_bytes)

    def _too_long(self, what: str) -> ValueError:
        if self._header_end == self._size:
            return self._corrupt(f"{what} runs past its end")
        return ValueError(
            f"{self.path}: the header must have at most {_MAX_HEADER_BYTES} bytes, which {what} "
            "goes beyond"
        )

    def _corrupt(self, problem: str) -> ValueError:
        return ValueError(f"{self.path} is truncated or corrupt: {problem}")
