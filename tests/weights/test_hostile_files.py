"""Files made to harm: each ends soon, with one line that names the file, and no code of it runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nano_vllm.config import EngineConfig
from nano_vllm.runner.model_runner import ModelRunner
from nano_vllm.tokenizer.hf_tokenizer import load_hf_tokenizer
from tests.weights.test_hf_config import BASE

SECONDS = 10.0
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WriteGGUF = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    return tmp_path


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def fails(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModelRunner(EngineConfig(model=str(path), device="cpu", num_blocks=8))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def write_safetensors(path: Path, header: dict[str, Any], data: bytes = bytes(64)) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        {"a": entry([2], 0, 8), "b": entry([2], 16, 24)},
        {"a": entry([2], 8, 0)},
        {"a": entry([1 << 38], 0, 1 << 40)},
        {"a": entry([1 << 40, 1 << 40], 0, 64)},
        {"a": entry([1 << 62, 4], 0, 64)},
        {"a": entry([-1], 0, 64)},
        {"a": entry([15], 0, 64)},
        {"a": entry([16], 0, 64, "F31")},
        {"a": [1, 2, 3]},
    ],
)
def test_offsets_and_shapes_of_safetensors(folder: Path, header: dict[str, Any]) -> None:
    write_safetensors(folder / SINGLE, header)
    fails(folder, "truncated or corrupt")


def test_a_header_beyond_the_file(folder: Path) -> None:
    for length in (1 << 62, (1 << 64) - 1, 1000, 99_000_000):
        (folder / SINGLE).write_bytes(struct.pack("<Q", length) + bytes(100))
        fails(folder, "truncated or corrupt")


def test_a_hundred_thousand_tensors(folder: Path) -> None:
    count = 100_000
    header = {f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(count)}
    write_safetensors(folder / SINGLE, header, bytes(4 * count))
    fails(folder, "lacks tensors: .* and .* more")


def test_an_index_that_points_at_itself(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": INDEX}}))
    fails(folder, "truncated or corrupt")
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(INDEX)
    fails(folder, "has no weights")


def test_shards_of_other_lengths_and_kinds(folder: Path) -> None:
    for change in (lambda data: data[:-1], lambda data: data[:20], lambda data: data + b"x"):
        save_file({"a": torch.zeros(8)}, folder / "1.safetensors")
        save_file({"b": torch.zeros(8)}, folder / "2.safetensors")
        places = {"a": "1.safetensors", "b": "2.safetensors"}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        shard = folder / "2.safetensors"
        shard.write_bytes(change(shard.read_bytes()))
        fails(folder, r"2\.safetensors is truncated or corrupt")
    save_file({"b": torch.zeros(8, dtype=torch.int64)}, shard)
    fails(folder, "tensor 'b' has dtype I64; supported: F64, F32, F16, BF16")


def test_a_shard_that_is_a_loop_of_links(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    (folder / SINGLE).symlink_to("other.safetensors")
    (folder / "other.safetensors").symlink_to(SINGLE)
    fails(folder, "is missing")


class Harmful:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles(folder: Path) -> None:
    mark = folder / "it ran"
    data = pickle.dumps(Harmful(mark))
    (folder / "pytorch_model.bin").write_bytes(data)
    fails(folder, "only pickled weights, which are never loaded")
    (folder / SINGLE).write_bytes(data)
    fails(folder, "truncated or corrupt")
    torch.save({"a": Harmful(mark)}, folder / SINGLE)
    fails(folder, "truncated or corrupt")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    fails(folder, "truncated or corrupt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"vocab_size": -1},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**18, "head_dim": 64},
        {"vocab_size": 10**15},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [0] * 8, "long_factor": []}},
        {"max_position_embeddings": 10**15},
    ],
)
def test_numbers_of_a_config(folder: Path, change: dict[str, Any]) -> None:
    save_file({"a": torch.zeros(1)}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps({**BASE, **change}))
    fails(folder, "config.json")


def test_files_of_a_gigabyte(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        with (folder / name).open("wb") as file:
            file.truncate(1 << 30)
    fails(folder, r"config.json must have at most 134217728 bytes, got 1073741824")
    (folder / "config.json").unlink()
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model", "x.tiktoken"):
        with (folder / name).open("wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(ValueError, match=rf"{name} must have at most 134217728 bytes"):
            load_hf_tokenizer(folder)
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(b"\n")
    os.truncate(folder / "tokenizer.model", 1 << 30)
    with pytest.raises(ValueError, match=r"tokenizer.model must have at most 134217728 bytes"):
        load_hf_tokenizer(folder)


def gguf_header(num_tensors: int, num_fields: int, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_fields) + rest


KEY = struct.pack("<Q", 1) + b"k"
ARRAY_OF_STRINGS, ARRAY_OF_BYTES = struct.pack("<II", 9, 8), struct.pack("<II", 9, 0)
TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2)


@pytest.mark.parametrize(
    "data",
    [
        gguf_header(1 << 60, 0),
        gguf_header(0, 1 << 60),
        gguf_header(0, 1, struct.pack("<Q", 1 << 63) + b"k"),
        gguf_header(0, 1, KEY + ARRAY_OF_STRINGS + struct.pack("<Q", 1 << 60)),
        gguf_header(0, 1, KEY + ARRAY_OF_BYTES + struct.pack("<Q", 1 << 60)),
        gguf_header(0, 1, KEY + struct.pack("<IIQ", 9, 9, 1)),
        gguf_header(1, 0, TENSOR + struct.pack("<QQIQ", 1 << 63, 1 << 63, 0, 0)),
        gguf_header(1, 0, TENSOR + struct.pack("<QQIQ", 4, 4, 0, 1 << 63)),
        gguf_header(1, 0, TENSOR + struct.pack("<QQIQ", 0, 4, 0, 0)),
    ],
)
def test_numbers_of_a_gguf_header(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data + bytes(64))
    fails(path, "truncated or corrupt")


@pytest.mark.parametrize("element", [8, 0], ids=["strings", "bytes"])
def test_a_vocabulary_of_a_gigabyte_in_a_gguf(tmp_path: Path, element: int) -> None:
    path = tmp_path / "model.gguf"
    count = (1 << 30) // (8 if element == 8 else 1)
    name = b"tokenizer.ggml.tokens"
    key = struct.pack("<Q", len(name)) + name
    path.write_bytes(gguf_header(0, 1, key + struct.pack("<IIQ", 9, element, count)))
    os.truncate(path, (1 << 30) + 1000)  # empty strings, or zeros
    fails(path, "the header must have at most 67108864 bytes")


def test_a_hundred_thousand_tensors_of_a_gguf(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    count = 100_000
    path = tmp_path / "model.gguf"
    names = [f"t{i}".encode() for i in range(count)]
    table = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names
    )
    path.write_bytes(gguf_header(count, 0, table) + bytes(64))
    fails(path, "general.architecture")
