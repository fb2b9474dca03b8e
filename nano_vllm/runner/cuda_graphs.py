"""Steps as CUDA graphs: one launch in place of several hundred."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from nano_vllm.batch import Batch
from nano_vllm.runner.graph_shapes import (
    StepShape,
    decode_sizes,
    sequence_sizes,
    token_sizes,
    usual_shapes,
)
from nano_vllm.runner.input_batch import ModelInput

Forward = Callable[[ModelInput], torch.Tensor]
"""Inputs of a step -> what the model makes of each of its tokens."""


class Padding(NamedTuple):
    """What a step is padded to."""

    num_tokens: int
    num_seqs: int


class StepGraphs:
    """Graphs of padded steps. The first step of a size runs without, which also loads what a
    capture cannot; the second one is captured, in the time that its launches would have taken. Both
    take some tens of milliseconds: `missing` says which sizes had better be seen before they are
    wanted.

    Lengths and block tables are read from the inputs' own memory, which stays where it is: a graph
    serves any lengths.

    Args:
        max_num_tokens: tokens of a step at the most.
        max_num_seqs: sequences of a step at the most.
        shares_prefixes: whether prefixes may be read once for all who share them.
        spreads_chunks: whether tokens of a prompt may be rows of their own.
    """

    def __init__(
        self,
        max_num_tokens: int,
        max_num_seqs: int,
        shares_prefixes: bool = False,
        spreads_chunks: bool = False,
    ) -> None:
        self._decode_sizes = decode_sizes(min(max_num_tokens, max_num_seqs))
        self.token_sizes = token_sizes(max_num_tokens)
        """That steps with prompts are padded to."""
        self._sequence_sizes = sequence_sizes(max_num_seqs)
        self._seen: set[StepShape] = set()
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._usual = usual_shapes(max_num_tokens, max_num_seqs, shares_prefixes, spreads_chunks)
        self._pool: Any = None
        """Memory of all graphs: they run one after the other."""
        self._stream: torch.cuda.Stream | None = None

    def padding_for(self, batch: Batch, num_rows: int) -> Padding | None:
        """What the step is to be padded to; None if it cannot be a graph.

        Args:
            batch: the step.
            num_rows: that attention has.
        """
        if batch.is_decode:
            size = _at_least(num_rows, self._decode_sizes)
            return None if size is None else Padding(size, size)
        num_tokens = _at_least(batch.num_tokens, self.token_sizes)
        padded_seqs = _at_least(num_rows, self._sequence_sizes)
        if num_tokens is None or padded_seqs is None:
            return None
        if num_rows == batch.num_tokens and num_tokens <= self._sequence_sizes[-1]:
            padded_seqs = num_tokens  # a row for each token: one graph for each size
        return Padding(num_tokens, padded_seqs)

    def run(self, forward: Forward, inputs: ModelInput) -> torch.Tensor:
        """What forward returns; valid until the next call.

        Args:
            forward: what is captured, one for steps of decodes and one for others. It must not wait
                for the device.
            inputs: padded as `padding_for` says.
        """
        attention = inputs.attention
        shape = StepShape(
            is_decode=inputs.sampled is None,
            max_query_len=attention.max_query_len,
            num_tokens=len(inputs.input_ids),
            num_seqs=len(attention.seq_lens),
            is_shared=attention.shared_prefix is not None,
        )
        if shape not in self._graphs:
            if shape not in self._seen:
                self._seen.add(shape)
                return forward(inputs)
            self._graphs[shape] = self._capture(forward, inputs)
        graph, out = self._graphs[shape]
        graph.replay()
        return out

    def missing(self) -> StepShape | None:
        """The next usual shape that has no graph yet; None once all have."""
        return next((shape for shape in self._usual if shape not in self._graphs), None)

    def _capture(
        self, forward: Forward, inputs: ModelInput
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Not by torch.cuda.graph, which waits for the device and gives its free memory back.
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = forward(inputs)
            finally:
                graph.capture_end()
        # Not kept alive: the graphs' outputs lie in the same memory, as all else of them does.
        return graph, _view_of_memory(out)


def _view_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which may be given to others once the tensor itself is gone."""

    class Memory:
        __cuda_array_interface__: ClassVar[dict[str, Any]] = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }

    assert tensor.is_contiguous()
    memory = torch.as_tensor(Memory(), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)


def _at_least(count: int, sizes: list[int]) -> int | None:
    """The smallest size that is no less."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None
