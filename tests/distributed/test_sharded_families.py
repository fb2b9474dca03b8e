"""Every family's model, cut in shares and computed by threads, against the same model whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from nano_vllm.cache.kv_cache import KVCache
from nano_vllm.check import logits_of_all_positions
from nano_vllm.config import ModelConfig
from nano_vllm.distributed.collectives import ALONE, Collectives
from nano_vllm.distributed.stages import Stage
from nano_vllm.models.registry import model_class
from nano_vllm.runner.input_batch import InputBatch
from nano_vllm.weights.loader import load_model_config, load_weights
from nano_vllm.weights.parallel_reader import ParallelReader
from nano_vllm.weights.safetensors_checkpoint import SafetensorsCheckpoint
from tests.distributed.thread_ranks import thread_ranks
from tests.models.checkpoints import SETTINGS, make_checkpoint, write_gguf

BLOCK_SIZE, MAX_LEN, CHUNK = 8, 64, 13
FAMILIES = [
    "grouped queries",
    "multi-query",
    "multi-head, tied",
    "biases",
    "mistral, sliding window",
    "qwen2",
    "qwen3, tied, wide",
    "ministral",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "olmo2, yarn scaling",
    "olmo3",
    "glm4",
    "granite, biases",
    "gpt2",
]
IN_GGUF = ["grouped queries", "phi3", "gpt2", "gemma3"]


def logits_of(
    path: Path, prompts: list[list[int]], ranks: Collectives, **options: Any
) -> list[torch.Tensor]:
    """Of every position, of the rank's part of the vocabulary."""
    config = load_model_config(path, model_class)
    shard = config.shard(ranks.size)
    cpu = torch.device("cpu")
    with torch.no_grad():
        model = model_class(config.architecture)(config, MAX_LEN, cpu, ranks)
        load_weights(model, path, config, **options)
    return logits_by(model, shard, prompts)


def logits_by(model: Any, shard: ModelConfig, prompts: list[list[int]]) -> list[torch.Tensor]:
    cpu = torch.device("cpu")
    num_blocks = 2 * len(prompts) * MAX_LEN // BLOCK_SIZE
    runner: Any = SimpleNamespace(
        kv_cache=KVCache(shard, num_blocks, BLOCK_SIZE, torch.float32, cpu),
        input_batch=InputBatch(shard, 128, 8, MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, cpu),
        block_size=BLOCK_SIZE,
        model=model,
    )
    return logits_of_all_positions(runner, prompts, CHUNK)


def compare(path: Path, size: int, **options: Any) -> None:
    for found, wanted in shared_and_alone(path, size, **options):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def shared_and_alone(
    path: Path, size: int, **options: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of each prompt's tokens, of so many ranks and of one."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 199) for _ in range(n)] for n in (30, 7)]
    expected = logits_of(path, prompts, ALONE, **options)
    with ThreadPoolExecutor(size) as threads:
        shares = list(
            threads.map(lambda r: logits_of(path, prompts, r, **options), thread_ranks(size))
        )
    for parts, wanted in zip(zip(*shares, strict=True), expected, strict=True):
        yield torch.cat(parts, dim=1)[:, : wanted.shape[1]], wanted


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, **SETTINGS[name])
    compare(tmp_path, 2)


def test_a_rank_reads_no_more_than_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, vocab_size=208)
    config = load_model_config(tmp_path, model_class)
    unmap, read_rows = SafetensorsCheckpoint._unmap, ParallelReader.read
    read: list[int] = []

    def counted(checkpoint: SafetensorsCheckpoint) -> None:
        read.append(checkpoint._bytes_read)
        unmap(checkpoint)

    def counted_rows(reader: ParallelReader, path: Path, *args: Any) -> None:
        _, dtype, destination = args
        read.append(destination.numel() * dtype.itemsize)
        read_rows(reader, path, *args)

    monkeypatch.setattr(SafetensorsCheckpoint, "_unmap", counted)
    monkeypatch.setattr(ParallelReader, "read", counted_rows)
    for ranks in thread_ranks(2):
        read.clear()
        model = model_class(config.architecture)(config, MAX_LEN, torch.device("cpu"), ranks)
        load_weights(model, tmp_path, config)
        assert sum(read) == sum(parameter.nbytes for parameter in model.parameters())


class Chain:
    """Two stages, one behind the other."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        middle = config.num_layers // 2
        stages = (
            Stage(range(middle), is_last=False),
            Stage(range(middle, config.num_layers), is_first=False),
        )
        self.stages = []
        for stage in stages:
            model = model_class(config.architecture)(
                config, MAX_LEN, torch.device("cpu"), stage=stage
            )
            load_weights(model, path, config)
            self.stages.append((stage, model))

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, caches: list[Any], metadata: Any
    ) -> torch.Tensor:
        x: torch.Tensor | None = None
        for stage, model in self.stages:
            held = caches[stage.layers.start : stage.layers.stop]
            x = model(ids, positions, held, metadata, x)
        assert x is not None
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.stages[-1][1].compute_logits(hidden)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, **SETTINGS[name])
    prompts = [list(range(3, 33)), [5, 6, 7]]
    expected = logits_of(tmp_path, prompts, ALONE)
    config = load_model_config(tmp_path, model_class)
    found = logits_by(Chain(tmp_path, config), config, prompts)
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_more_ranks_than_key_heads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, num_key_value_heads=2)
    compare(tmp_path, 4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", IN_GGUF)
def test_two_ranks_from_a_gguf(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path, **SETTINGS[name])
    write_gguf(model, tmp_path / "m.gguf")
    compare(tmp_path / "m.gguf", 2)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_of_quantized_weights(tmp_path: Path) -> None:
    """Columns are cut between groups of 32, whose inputs are rounded to 8 bits: a sum in another
    order may round one of them to the next number, and then its token's logits differ by more than
    sums do. That is seldom, and little.
    """
    model = make_checkpoint(tmp_path, intermediate_size=192, vocab_size=208)
    write_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    errors = [
        (found - wanted).abs().amax(dim=1)
        for found, wanted in shared_and_alone(tmp_path / "m.gguf", 2, keep_quantized=True)
    ]
    of_tokens = torch.cat(errors)
    assert len(of_tokens) == 37
    assert int((of_tokens <= 1e-5).sum()) >= 34
    assert float(of_tokens.max()) <= 0.1


@pytest.mark.usefixtures("one_thread")
def test_dummy_weights_are_shares_of_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, attention_bias=True, mlp_bias=True)
    compare(tmp_path, 2, load_format="dummy", seed=3)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({}, 3, "must divide num_heads = 4, got 3"),
        ({"intermediate_size": 90}, 4, "must divide intermediate_size = 90, got 4"),
        (
            {"num_heads": 12, "num_kv_heads": 6},
            4,
            "must divide num_kv_heads = 6 or be a multiple of it, got 4",
        ),
    ],
)
def test_uneven_shapes_are_refused(settings: dict[str, int], size: int, message: str) -> None:
    config = ModelConfig("X", 199, 128, 176, 2, 4, 2, 64, 64, 1e-5, 1e4)
    with pytest.raises(ValueError, match=message):
        replace(config, **settings).shard(size)
