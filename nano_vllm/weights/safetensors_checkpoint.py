"""Tensors of a Hugging Face folder, single or sharded. The library checks the files; consecutive
rows are read past it, by several threads, the rest from a mapping of one shard at a time.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nano_vllm.weights.checkpoint import WHOLE, Region
from nano_vllm.weights.parallel_reader import ParallelReader
from nano_vllm.weights.safetensors_index import INDEX, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_REMAP_BYTES = 64 << 20
"""Pages that were read stay in resident memory until the mapping goes; it is renewed after this
many bytes.
"""


class _Place(NamedTuple):
    path: Path
    offset: int
    """Of its first byte."""
    dtype: torch.dtype


class SafetensorsCheckpoint:
    """A folder with model.safetensors, or shards with an index; ValueError names what is missing or
    corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        self._reader = ParallelReader()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open_path: Path | None = None
        self._handle: Any = None
        self._bytes_read = 0
        try:
            for path, expected in weight_files(folder).items():
                self._read_header(path, expected)
        except BaseException:
            self.close()
            raise

    def _read_header(self, path: Path, expected: list[str] | None) -> None:
        handle = self._open(path)
        present = set(handle.keys())
        missing = [name for name in expected or () if name not in present]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors that {INDEX} places there, "
                f"such as {missing[0]!r}"
            )
        offsets = _offsets(path)
        for name in expected or sorted(present):
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: tensor {name!r} has dtype {view.get_dtype()}; "
                    f"supported: {', '.join(_DTYPES)}"
                )
            self._places[name] = _Place(path, offsets[name], _DTYPES[view.get_dtype()])
            self.shapes[name] = tuple(view.get_shape())

    def _open(self, path: Path) -> Any:
        if path != self._open_path or self._bytes_read >= _REMAP_BYTES:
            self._unmap()
            try:
                self._handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or corrupt: {error}") from None
            self._open_path = path
        return self._handle

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._open(self._places[name].path).get_tensor(name)
        self._bytes_read += prod(tensor.shape) * tensor.element_size()
        return tensor

    def read_into(self, name: str, destination: torch.Tensor, part: Region = WHOLE) -> None:
        shape = self.shapes[name]
        if part.columns == slice(None) and shape and destination.is_contiguous():
            place = self._places[name]
            first = part.rows.indices(shape[0])[0] * prod(shape[1:]) * place.dtype.itemsize
            self._reader.read(place.path, place.offset + first, place.dtype, destination)
            return
        if part == WHOLE:
            destination.copy_(self.read(name, destination.dtype))
            return
        view = self._open(self._places[name].path).get_slice(name)
        tensor = view[part.of(self.shapes[name])]
        self._bytes_read += prod(tensor.shape) * tensor.element_size()
        destination.copy_(tensor)

    def finish(self) -> None:
        self._reader.finish()

    def read_quantized(self, name: str, part: Region = WHOLE) -> None:
        return None

    def sample(self, name: str) -> bytes:
        shape, handle = self.shapes[name], self._open(self._places[name].path)
        if len(shape) < 2:
            tensor = handle.get_tensor(name)
        else:
            tensor = handle.get_slice(name)[shape[0] // 2 : shape[0] // 2 + 1]
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    def close(self) -> None:
        self._reader.close()
        self._unmap()

    def _unmap(self) -> None:
        self._handle = None
        self._open_path = None
        self._bytes_read = 0


def _offsets(path: Path) -> dict[str, int]:
    """By name, where tensors begin in a file whose header the library has found valid."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
