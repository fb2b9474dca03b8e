"""Tensors of a Hugging Face folder, single or sharded, mapped one shard at a time."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nano_vllm.weights.checkpoint import WHOLE, Region
from nano_vllm.weights.safetensors_index import INDEX, weight_files

_DTYPES = ("F64", "F32", "F16", "BF16")
_REMAP_BYTES = 64 << 20
"""Pages that were read stay in resident memory until the mapping goes; it is renewed after this
many bytes.
"""


class SafetensorsCheckpoint:
    """A folder with model.safetensors, or shards with an index; ValueError names what is missing or
    corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open_path: Path | None = None
        self._handle: Any = None
        self._bytes_read = 0
        for path, expected in weight_files(folder).items():
            self._read_header(path, expected)

    def _read_header(self, path: Path, expected: list[str] | None) -> None:
        handle = self._open(path)
        present = set(handle.keys())
        missing = [name for name in expected or () if name not in present]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors that {INDEX} places there, "
                f"such as {missing[0]!r}"
            )
        for name in expected or sorted(present):
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: tensor {name!r} has dtype {view.get_dtype()}; "
                    f"supported: {', '.join(_DTYPES)}"
                )
            self._files[name] = path
            self.shapes[name] = tuple(view.get_shape())

    def _open(self, path: Path) -> Any:
        if path != self._open_path or self._bytes_read >= _REMAP_BYTES:
            self.close()
            try:
                self._handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or corrupt: {error}") from None
            self._open_path = path
        return self._handle

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._open(self._files[name]).get_tensor(name)
        self._bytes_read += prod(tensor.shape) * tensor.element_size()
        return tensor

    def read_into(self, name: str, destination: torch.Tensor, part: Region = WHOLE) -> None:
        if part == WHOLE:
            destination.copy_(self.read(name, destination.dtype))
            return
        view = self._open(self._files[name]).get_slice(name)
        tensor = view[part.of(self.shapes[name])]
        self._bytes_read += prod(tensor.shape) * tensor.element_size()
        destination.copy_(tensor)

    def read_quantized(self, name: str, part: Region = WHOLE) -> None:
        return None

    def sample(self, name: str) -> bytes:
        shape, handle = self.shapes[name], self._open(self._files[name])
        if len(shape) < 2:
            tensor = handle.get_tensor(name)
        else:
            tensor = handle.get_slice(name)[shape[0] // 2 : shape[0] // 2 + 1]
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    def close(self) -> None:
        self._handle = None
        self._open_path = None
        self._bytes_read = 0
