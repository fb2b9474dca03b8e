"""The engine's options: one frozen dataclass is the only list, command-line flags included."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MOST = {"max_num_seqs": 2**16, "max_num_batched_tokens": 2**24}
"""Beyond what any device has room for, of options that buffers are made by."""
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""Head dimensions the attention kernels are built for."""


@dataclass(frozen=True)
class EngineConfig:
    """What to load and how much of the machine to use.

    Raises ValueError, naming the value and what is allowed, for anything out of range.
    """

    model: str = DEFAULT_MODEL
    """A Hugging Face folder, a .gguf file or a hub id; with load_format dummy also qwen3-0.6b,
    qwen3-8b, llama-3.2-1b or llama-3.1-8b.
    """
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    skip_tokenizer_init: bool = False
    """Run on token ids alone."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where a GPU and the CUDA kernels are there."""
    dtype: str = "auto"
    """float32, float16, bfloat16, or auto: the checkpoint's own; for a GGUF float32 on a CPU,
    float16 on CUDA.
    """
    load_format: str = "auto"
    """auto, safetensors, gguf, or dummy: random weights, for benchmarks."""
    quantization: str | None = None
    """None: weights are dequantized as they are loaded. gguf: linear layers keep those of a GGUF
    file in 4 or 8 bits and round their input to 8 bits; on a CPU, faster and less exact.
    """
    seed: int = 0
    """Of the draws of requests without a seed of their own."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and KV cache may fill; in (0, 1]."""
    kv_cache_dtype: str = "auto"
    """auto: that of the model. fp8 (or fp8_e4m3): one byte an element, times a scale for each head
    that the checkpoint may bring; twice the tokens in the memory of 16 bits, read in half the time.
    """
    kv_cache_memory: int | None = None
    """Bytes of KV cache; by default what is left on a GPU, a few full contexts on a CPU."""
    num_blocks: int | None = None
    """Blocks of KV cache; overrides kv_cache_memory."""
    host_cache_memory: int | None = None
    """Bytes of host memory for blocks that are evicted from the KV cache: what was computed once, a
    preempted sequence's tokens too, comes back by a copy where that is quicker than to compute it
    again. None for none.
    """
    block_size: int = 16
    """Tokens per block: a multiple of 8 in [8, 256]."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; by default the model's own limit."""
    max_num_seqs: int = 256
    """Sequences that run at the same time."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step; by default 2048 on a CPU, and as many as keep a GPU's arithmetic
    busy: 8192 on an H100 or H200, 4096 on an A100.
    """
    enable_prefix_caching: bool = True
    """Reuse the blocks of prompts that begin alike."""
    enable_cascade_attention: bool = True
    """On CUDA, read a prefix that many running sequences share once a step for all of them, where
    that pays. Their outputs then round differently from those of a sequence that runs alone.
    """
    enable_chunked_prefill: bool = True
    """Split long prompts over steps, so that they do not stall running sequences."""
    scheduling_policy: str = "fcfs"
    """fcfs: first come, first served. priority: requests of the lowest priority number first; one
    that has waited long goes before all.
    """
    itl_slo: float | None = None
    """Milliseconds between two tokens of a stream (inter-token latency) that prompts beside it are
    held to, by what steps were measured to take; by default twice what it is without prompts. 0 for
    no promise: prompts fill max_num_batched_tokens, as they do where nobody streams.
    """
    tensor_parallel_size: int = 1
    """GPUs that share every layer's heads, features and vocabulary; processes that torchrun starts,
    or, on one host, the server.
    """
    pipeline_parallel_size: int = 1
    """Groups of such GPUs that share the layers."""
    enforce_eager: bool = False
    """Launch every kernel by itself, also where a step could be one CUDA graph."""
    async_scheduling: bool = True
    """On a GPU, launch a decode step while the one before is still computed, where its tokens
    cannot change what is launched. Outputs are the same.
    """
    record: str | None = None
    """A file that gets what is scheduled, step by step, with the prompts' token ids, for `python -m
    nano_vllm.bench replay`.
    """

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "record"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        check_types(self)
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "fp8_e4m3"))
        _check_choice("load_format", self.load_format, ("auto", "safetensors", "gguf", "dummy"))
        _check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, ("gguf",))
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}"
            )
        if self.block_size % 8 or not 8 <= self.block_size <= 256:
            raise ValueError(
                f"block_size must be a multiple of 8 in [8, 256], got {self.block_size!r}"
            )
        if self.itl_slo is not None and not 0.0 <= self.itl_slo < math.inf:
            raise ValueError(f"itl_slo must be milliseconds, 0 or more, got {self.itl_slo!r}")
        if self.itl_slo and not self.enable_chunked_prefill:
            raise ValueError(f"itl_slo = {self.itl_slo!r} needs enable_chunked_prefill")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [-2^63, 2^63), got {self.seed!r}")
        for name in (
            "kv_cache_memory",
            "host_cache_memory",
            "num_blocks",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "tensor_parallel_size",
            "pipeline_parallel_size",
        ):
            value, most = getattr(self, name), _MOST.get(name, 2**63 - 1)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value!r}")

    @classmethod
    def from_options(cls, options: dict) -> EngineConfig:
        """Build from a mapping; an unknown name raises ValueError with the nearest known one."""
        reject_unknown(options, [f.name for f in fields(cls)])
        return cls(**options)


def reject_unknown(options: Iterable[str], known: list[str]) -> None:
    """Raise ValueError for the first option that is not known, suggesting the nearest one."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown option {name!r}; {hint}")


def check_types(options: Any) -> None:
    """Raise ValueError for the first field of a dataclass of options that is not of its type."""
    for field in fields(options):
        kind, _, optional = str(field.type).partition(" | ")
        value = getattr(options, field.name)
        types, name = _TYPES[kind]
        # type(), as True is an int
        if type(value) not in types and not (optional and value is None):
            raise ValueError(f"{field.name} must be {name}, got {value!r:.100}")


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "an integer"),
    "float": ((float, int), "a number"),
    "bool": ((bool,), "True or False"),
}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched past the trained context.

    Sources: linear and dynamic NTK as in transformers; yarn, arXiv 2309.00071; longrope, arXiv
        2402.13753; llama3, the Llama 3.1 release.
    """

    kind: str
    """linear, dynamic, yarn, longrope, llama3 or frequency_factors."""
    factor: float
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    attention_factor: float | None = None
    """yarn, longrope."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    mscale: float | None = None
    """yarn."""
    mscale_all_dim: float | None = None
    """yarn."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""
    frequency_factors: tuple[float, ...] | None = None
    """frequency_factors: divisor of each frequency, [rotary_dim / 2], as GGUF stores them."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency within the trained context, [rotary_dim / 2]."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same beyond it."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class LayerNorms:
    """Which norms a layer has, by the names they have in its checkpoint; None where there is none.

    Those before a block read the residual stream, those after it what the block adds to it.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, from a Hugging Face config.json or from GGUF metadata."""

    architecture: str
    """As in config.json's `architectures`, e.g. LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Rotated part of a head; None for all of it."""
    rope_is_neox: bool = True
    hidden_act: str = "silu"
    """silu, gelu or gelu_pytorch_tanh."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """A bias on the query, key and value projections."""
    attention_output_bias: bool = False
    """A bias on the projection behind attention."""
    qk_norm: bool = False
    """Query and key heads are RMS-normalised before they are rotated."""
    qk_norm_over_heads: bool = False
    """These norms are over all heads of a token together."""
    mlp_bias: bool = False
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)); else down(act(up(x)))."""
    norms: LayerNorms = LayerNorms()
    norm_offset: float = 0.0
    """Added to the RMSNorm weights of the checkpoint."""
    layer_norm: bool = False
    """LayerNorm with a bias in place of RMSNorm, with the same eps."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included, but for full_attention_layers; None for all."""
    full_attention_layers: frozenset[int] = frozenset()
    """Layers without the sliding window."""
    sliding_rope: Rope | None = None
    """Of the layers with the sliding window, where it differs from that of the others."""
    nope_layers: frozenset[int] = frozenset()
    """Layers that rotate nothing (NoPE, arXiv 2305.19466)."""
    learned_positions: bool = False
    """An embedding of each position is added to the token's; no layer rotates."""
    attention_scale: float | None = None
    """Multiplies query . key; None for 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Scores become cap * tanh(score / cap); 0 for off."""
    logits_softcap: float = 0.0
    """The same of the logits."""
    embedding_multiplier: float = 1.0
    """Of the token embeddings, rounded to the model's dtype."""
    residual_multiplier: float = 1.0
    """Of what attention and MLP add to the residual stream."""
    logits_divisor: float = 1.0
    dtype: str | None = None
    """The checkpoint's own; None where it has none (GGUF)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def shard(self, num_ranks: int, layers: range | None = None) -> ModelConfig:
        """The shape of what each of so many tensor-parallel ranks computes, of some consecutive
        layers or all; ValueError for a shape that they cannot share evenly.
        """
        held = range(self.num_layers) if layers is None else layers
        for name in ("num_heads", "intermediate_size"):
            if getattr(self, name) % num_ranks:
                raise ValueError(
                    f"tensor_parallel_size must divide {name} = {getattr(self, name)}, "
                    f"got {num_ranks}"
                )
        if self.num_kv_heads % num_ranks and num_ranks % self.num_kv_heads:
            raise ValueError(
                f"tensor_parallel_size must divide num_kv_heads = {self.num_kv_heads} or be a "
                f"multiple of it, got {num_ranks}"
            )
        return replace(
            self,
            num_layers=len(held),
            full_attention_layers=_renumbered(self.full_attention_layers, held),
            nope_layers=_renumbered(self.nope_layers, held),
            num_heads=self.num_heads // num_ranks,
            num_kv_heads=max(1, self.num_kv_heads // num_ranks),
            intermediate_size=self.intermediate_size // num_ranks,
        )

    def window(self, layer: int) -> int:
        """Tokens that a query of the layer sees, itself included; 0 for all."""
        return 0 if layer in self.full_attention_layers else self.sliding_window or 0

    def windows(self) -> tuple[int, ...]:
        """Those of all layers, each once."""
        return tuple(sorted({self.window(layer) for layer in range(self.num_layers)}))

    @property
    def widest_window(self) -> int:
        """Tokens that a query sees in any layer, itself included; 0 for all."""
        windows = self.windows()
        return 0 if 0 in windows else windows[-1]

    def rope(self, layer: int) -> Rope | None:
        """How the layer rotates queries and keys; None for not at all."""
        if self.learned_positions or layer in self.nope_layers:
            return None
        if self.sliding_rope is not None and self.window(layer):
            return self.sliding_rope
        return Rope(self.rope_theta, self.rope_scaling)


def _renumbered(layers: frozenset[int], held: range) -> frozenset[int]:
    """Those of the layers that are held, counted from the first one held."""
    return frozenset(layer - held.start for layer in layers if layer in held)
