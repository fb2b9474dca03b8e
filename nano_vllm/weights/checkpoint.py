"""What the loader needs of a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from nano_vllm.config import ModelConfig
from nano_vllm.quantization.packed_weight import QuantizedWeight


class Region(NamedTuple):
    """Consecutive rows and columns of a tensor."""

    rows: slice = slice(None)
    columns: slice = slice(None)

    def of(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What to index a tensor of the shape with."""
        return (self.rows, self.columns)[: len(shape)]


WHOLE = Region()


class Checkpoint(Protocol):
    """Tensors by their Hugging Face names; shapes are known at once, contents are read when asked
    for.
    """

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor on the CPU, in `dtype` or in the dtype it is stored in."""
        ...

    def read_into(self, name: str, destination: torch.Tensor, part: Region = WHOLE) -> None:
        """Fill a tensor of the part's shape, of any dtype, on any device, without holding a second
        copy, and without reading more than it has to. It is full behind `finish`.
        """
        ...

    def finish(self) -> None:
        """Wait until all tensors are full that `read_into` was given."""
        ...

    def read_quantized(self, name: str, part: Region = WHOLE) -> QuantizedWeight | None:
        """The part as it is stored, where that is in groups of few bits, which it does not cut."""
        ...

    def sample(self, name: str) -> bytes:
        """A vector, or the middle row of a matrix, as it is stored: it tells models apart, and is
        read quickly.
        """
        ...

    def close(self) -> None: ...


def open_checkpoint(source: Path, config: ModelConfig, load_format: str) -> Checkpoint:
    """Open a folder of safetensors or a .gguf file; `load_format` auto takes what `source` is."""
    found = "gguf" if source.suffix == ".gguf" else "safetensors"
    if load_format not in ("auto", found):
        raise ValueError(f"load_format must be auto or {found} for {source}, got {load_format!r}")
    if found == "gguf":
        from nano_vllm.weights.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(source, config)
    from nano_vllm.weights.safetensors_checkpoint import SafetensorsCheckpoint

    return SafetensorsCheckpoint(source)
