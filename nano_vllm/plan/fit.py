"""What of a GPU's memory goes where, and how many tokens the rest holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nano_vllm.config import ModelConfig
from nano_vllm.distributed import stages
from nano_vllm.distributed.partition import parameter_shard, stage_elements
from nano_vllm.model_size import bytes_per_block
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.runner.memory import DeviceMemory, fixed_bytes, kv_pool_bytes, step_memory

CUDA_CONTEXT = 512 << 20
"""Of the driver and the libraries; assumed."""
NCCL_BUFFERS = 512 << 20
"""Of communicators, where there are several GPUs; assumed: with the context, 1.06 GB were reported
of 8 H100 (NVIDIA/nccl issue 1685).
"""


@dataclass(frozen=True)
class Stage:
    """Memory of each GPU of a pipeline stage, in bytes."""

    shape: ModelConfig
    """Of what one GPU holds of its layers."""
    place: stages.Stage
    """Which of the model's layers these are."""
    context: int
    weights: int
    fixed: int
    """Rotary tables, inputs and workspaces."""
    activations: int
    graphs: int
    pool: int
    """What is left for keys and values; below 0 by what is missing."""
    block_bytes: int


@dataclass(frozen=True)
class Fit:
    """A model on a layout of GPUs."""

    layout: Layout
    stages: list[Stage]
    num_blocks: int
    """Of the pool of every GPU; 0 where none fits."""
    num_tokens: int
    """In these blocks."""
    max_concurrency: int
    """Sequences of the context that was asked for, held at the same time."""
    missing: int
    """Bytes that the GPU worst off lacks for the sequences that were asked for; 0 if it fits."""

    @property
    def fits(self) -> bool:
        return self.missing == 0

    @property
    def fullest(self) -> Stage:
        """The stage that has least room for blocks."""
        return min(self.stages, key=lambda stage: stage.pool / stage.block_bytes)


def fit(setup: Setup, layout: Layout, context: int, num_seqs: int = 1) -> Fit:
    """Where the memory goes.

    Args:
        setup: model, options and GPU.
        layout: ValueError where the model does not divide by it.
        context: tokens of a sequence.
        num_seqs: sequences of so many tokens that are to fit at the same time.
    """
    places = stages.split_layers(setup.model, layout.pp)
    held = [_stage(setup, layout, place) for place in places]
    config = setup.config
    told = config.num_blocks
    if told is None and config.kv_cache_memory is not None:
        told = min(config.kv_cache_memory // stage.block_bytes for stage in held)
    num_blocks = told
    if num_blocks is None:
        num_blocks = min(max(0, stage.pool) // stage.block_bytes for stage in held)
    per_seq = -(-context // config.block_size)
    wanted = num_seqs * per_seq
    missing = [max(wanted, num_blocks) * s.block_bytes - s.pool for s in held]
    if told is not None:
        missing += [(wanted - told) * s.block_bytes for s in held]
    return Fit(
        layout,
        held,
        num_blocks,
        num_blocks * config.block_size,
        num_blocks // per_seq,
        max(0, *missing),
    )


def layouts(setup: Setup, max_gpus: int) -> Iterator[Layout]:
    """All that the model divides by: tensor parallel within a host, stages by powers of two."""
    pp = 1
    while pp <= min(setup.model.num_layers, max_gpus):
        for tp in range(1, min(setup.gpus_per_host, max_gpus // pp) + 1):
            try:
                setup.model.shard(tp)
            except ValueError:
                continue
            yield Layout(tp, pp)
        pp *= 2


def _stage(setup: Setup, layout: Layout, place: stages.Stage) -> Stage:
    config = setup.config
    shape = parameter_shard(setup.model, layout.tp, place.layers)
    weights = stage_elements(shape, place) * setup.itemsize
    weights += 2 * 4 * shape.num_layers * shape.num_kv_heads  # scales of a float8 cache, in float32
    context = CUDA_CONTEXT + (NCCL_BUFFERS if layout.num_gpus > 1 else 0)
    fixed = fixed_bytes(config, shape, setup.max_model_len, setup.max_num_batched_tokens)
    if not place.is_first:  # what the stage before sends
        fixed += setup.max_num_batched_tokens * shape.hidden_size * setup.itemsize
    # The first rank gathers whole rows.
    rows = replace(shape, vocab_size=setup.model.vocab_size)
    step = step_memory(
        config, rows, setup.max_model_len, setup.max_num_batched_tokens, setup.itemsize
    )
    memory = DeviceMemory(setup.gpu.memory - context - weights - fixed, setup.gpu.memory)
    return Stage(
        shape,
        place,
        context,
        weights,
        fixed,
        step.activations,
        step.graphs,
        kv_pool_bytes(config, memory, sum(step)),
        bytes_per_block(shape, config.block_size, setup.cache_itemsize),
    )
