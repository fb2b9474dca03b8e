"""What a model's shape means in parameters, bytes of KV cache and operations; without torch.

A rank's share of a model is a ModelConfig too (`distributed.partition`): all of this holds for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from nano_vllm.config import ModelConfig

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
"""Bytes of an element, by the names that dtype and kv_cache_dtype have."""


def bytes_per_block(config: ModelConfig, block_size: int, itemsize: int) -> int:
    """Bytes of keys and values, in all layers, of block_size tokens; itemsize of the cache."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_dim * itemsize


def activation_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of a token in a step, weights and cache aside: the residual stream, a layer's input and
    output, and its widest intermediate (queries, keys, values and attention output, or gate, up and
    their product).
    """
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest = max(attention, 3 * config.intermediate_size)
    return (4 * config.hidden_size + widest) * itemsize


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Products of a layer -> in_features, out_features."""
    c = config
    heads = c.num_heads * c.head_dim
    return {
        "qkv": (c.hidden_size, heads + 2 * c.num_kv_heads * c.head_dim),
        "o": (heads, c.hidden_size),
        "gate_up" if c.gated_mlp else "up": (
            c.hidden_size,
            (2 if c.gated_mlp else 1) * c.intermediate_size,
        ),
        "down": (c.intermediate_size, c.hidden_size),
    }


def matrix_elements(config: ModelConfig) -> int:
    """Elements of a layer's matrices."""
    return sum(rows * columns for rows, columns in layer_matrices(config).values())


def layer_elements(config: ModelConfig) -> int:
    """Parameters of a layer: matrices, biases and norms."""
    c = config
    qkv, o, up, down = (columns for _, columns in layer_matrices(c).values())
    biases = c.attention_bias * qkv + c.attention_output_bias * o + c.mlp_bias * (up + down)
    head_norms = 0
    if c.qk_norm:
        head_norms = c.head_dim * (c.num_heads + c.num_kv_heads if c.qk_norm_over_heads else 2)
    names = c.norms
    norms = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
    num_norms = sum(name is not None for name in norms)
    return matrix_elements(c) + biases + head_norms + num_norms * norm_elements(c)


def norm_elements(config: ModelConfig) -> int:
    """Parameters of a norm of the residual stream."""
    return config.hidden_size * (2 if config.layer_norm else 1)


def head_elements(config: ModelConfig) -> int:
    """Elements of the language-model head, and of the token embedding, which it may be."""
    return config.vocab_size * config.hidden_size


def embedding_elements(config: ModelConfig) -> int:
    """Elements of the embeddings of tokens and, where they are learned, of positions."""
    positions = config.max_position if config.learned_positions else 0
    return head_elements(config) + positions * config.hidden_size


def rotary_table_bytes(config: ModelConfig, max_model_len: int) -> int:
    """Cosines and sines of every position, in float32, once for each way to rotate."""
    ropes = {config.rope(layer) for layer in range(config.num_layers)} - {None}
    return len(ropes) * max_model_len * (config.rotary_dim or config.head_dim) * 4


def layer_flops(config: ModelConfig, query_lens: Iterable[int], seq_lens: Iterable[int]) -> int:
    """Operations of all layers for the last query_lens tokens of sequences of seq_lens: the
    products, and attention over what the causal mask leaves.
    """
    products = 2 * config.num_layers * matrix_elements(config)
    total = 0
    for queries, length in zip(query_lens, seq_lens, strict=True):
        total += products * queries + attention_flops(config, queries, length)
    return total


def attention_flops(config: ModelConfig, queries: int, length: int) -> int:
    """The attention's part of it, of one sequence."""
    seen = attended(config, length) - attended(config, length - queries)
    return 4 * config.num_heads * config.head_dim * seen


def attended(config: ModelConfig, length: int) -> int:
    """Tokens that the queries at all positions below `length` see, themselves included, in all
    layers.
    """
    total = 0
    for window in windows(config):
        seen = min(length, window or length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def windows(config: ModelConfig) -> list[int]:
    """Of each layer; 0 for one that sees all tokens."""
    return [config.window(layer) for layer in range(config.num_layers)]
