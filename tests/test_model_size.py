"""Parameters and bytes that follow from a configuration are those of the model that is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nano_vllm import ops
from nano_vllm.cache.kv_cache import KVCache
from nano_vllm.config import EngineConfig, LayerNorms, ModelConfig, Rope
from nano_vllm.distributed.partition import stage_elements
from nano_vllm.distributed.stages import whole
from nano_vllm.model_size import bytes_per_block, rotary_table_bytes
from nano_vllm.models.decoder import CausalLM
from nano_vllm.runner.input_batch import InputBatch
from nano_vllm.runner.memory import attention_workspace_numel, fixed_bytes

LLAMA = ModelConfig("LlamaForCausalLM", 200, 64, 96, 3, 4, 2, 16, 128, 1e-6, 1e4)
SHAPES = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_word_embeddings=True),
    "biases": replace(LLAMA, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "qkv biases": replace(LLAMA, attention_bias=True),
    "norms of heads": replace(LLAMA, qk_norm=True),
    "norms over heads": replace(LLAMA, qk_norm=True, qk_norm_over_heads=True),
    "four norms": replace(LLAMA, norms=LayerNorms("a", "b", "c", "d")),
    "norms behind": replace(LLAMA, norms=LayerNorms(None, "b", None, "d")),
    "gpt2": replace(
        LLAMA,
        layer_norm=True,
        learned_positions=True,
        gated_mlp=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        num_kv_heads=4,
        tie_word_embeddings=True,
    ),
    "two ways to rotate": replace(
        LLAMA,
        sliding_window=8,
        full_attention_layers=frozenset({1}),
        sliding_rope=Rope(5e3),
        rotary_dim=8,
    ),
    "no rotation": replace(LLAMA, nope_layers=frozenset({0, 1, 2})),
}


def build(config: ModelConfig) -> CausalLM:
    with torch.device("meta") as meta:
        return CausalLM(config, 32, meta)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = SHAPES[name]
    parameters = sum(p.numel() for p in build(config).parameters())
    assert stage_elements(config, whole(config)) == parameters


@pytest.mark.parametrize("name", SHAPES)
def test_rotary_tables_are_those_of_the_model(name: str) -> None:
    config = SHAPES[name]
    tables = {id(t): t.nbytes for t in build(config).model.cos_sin if t is not None}
    assert rotary_table_bytes(config, 32) == sum(tables.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_have_the_bytes_of_the_pool(dtype: torch.dtype) -> None:
    pool = KVCache(LLAMA, 5, 8, dtype, torch.device("cpu")).pool
    assert bytes_per_block(LLAMA, 8, dtype.itemsize) * 5 == pool.nbytes


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (4, 9, 64), (256, 32, 128), (300, 31, 192), (2048, 64, 256)]
)
def test_workspace_is_that_of_the_kernel(shape: tuple[int, int, int]) -> None:
    assert attention_workspace_numel(*shape) == ops.paged_attention_workspace_numel(*shape)


@pytest.mark.parametrize(
    ("tokens", "seqs", "length"), [(64, 8, 128), (8192, 4, 100), (32, 32, 8192), (16, 1, 8)]
)
def test_step_inputs_have_the_bytes_of_the_buffers(tokens: int, seqs: int, length: int) -> None:
    """On a CPU, which has no workspaces."""
    options = EngineConfig(max_num_seqs=seqs, block_size=8)
    batch = InputBatch(LLAMA, tokens, seqs, -(-length // 8), 8, torch.device("cpu"))
    buffers = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    buffers += [slot.buffer for slot in batch.slots]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in buffers}
    workspaces = attention_workspace_numel(seqs, LLAMA.num_heads, LLAMA.head_dim) * 4
    beside = rotary_table_bytes(LLAMA, length) + workspaces
    assert fixed_bytes(options, LLAMA, length, tokens) - beside == sum(storages.values())
