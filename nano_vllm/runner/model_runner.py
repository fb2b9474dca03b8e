"""Runs the model over a batch and samples from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.batch import Batch, ScheduledSequence, StepResult
from nano_vllm.cache.host_cache import HostCache
from nano_vllm.cache.kv_cache import KVCache
from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.metrics import LapTimer
from nano_vllm.models.decoder import CausalLM
from nano_vllm.models.registry import model_class
from nano_vllm.outputs import Logprob
from nano_vllm.runner.cuda_graphs import StepGraphs
from nano_vllm.runner.input_batch import InputBatch, ModelInput
from nano_vllm.runner.limits import (
    check_head_dim,
    choose_dtype_name,
    choose_max_model_len,
    choose_max_num_batched_tokens,
)
from nano_vllm.runner.memory import DeviceMemory, num_host_blocks, num_kv_blocks
from nano_vllm.sampling.logprob_rows import PROMPT_ROWS
from nano_vllm.sampling.logprobs import logprob_entries, logprob_table
from nano_vllm.sampling.sampler import Sampler, describe
from nano_vllm.sequence import Sequence
from nano_vllm.step_record import StepRecorder, step_range
from nano_vllm.weights.loader import load_model_config, load_weights
from nano_vllm.weights.resolve import resolve_model


class ModelRunner:
    """Weights, KV cache and step buffers on one device.

    Raises ValueError for a model that is not supported or a machine that cannot hold it.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        timer = LapTimer(clock)
        self.model_path: Path = resolve_model(config.model, config.load_format)
        self.model_config: ModelConfig = load_model_config(self.model_path, model_class)
        self.device = _choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype, self.device)
        self.cache_dtype = self.dtype if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn
        self.block_size = config.block_size
        self.max_model_len = choose_max_model_len(config, self.model_config)
        self.max_num_batched_tokens = choose_max_num_batched_tokens(
            config, self.device.type, self.max_model_len
        )
        _check_quantization(config, self.model_path, self.device)
        self.num_host_blocks = num_host_blocks(config, self.model_config, self.cache_dtype.itemsize)
        cls = model_class(self.model_config.architecture)
        check_head_dim(self.model_config, self.device.type)
        timer.lap("config")

        with torch.no_grad():
            self.model = _build(cls, self.model_config, self.max_model_len, self.device, self.dtype)
            timer.lap("build")
            load_weights(
                self.model,
                self.model_path,
                self.model_config,
                load_format=config.load_format,
                keep_quantized=config.quantization is not None,
                seed=config.seed,
                progress=progress,
            )
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            timer.lap("weights")
            max_blocks_per_seq = -(-self.max_model_len // self.block_size)
            self.input_batch = InputBatch(
                self.model_config,
                self.max_num_batched_tokens,
                config.max_num_seqs,
                max_blocks_per_seq,
                self.block_size,
                self.device,
                config.enable_cascade_attention and self.device.type == "cuda",
            )
            self.num_blocks = num_kv_blocks(
                config,
                self.model_config,
                self.max_model_len,
                self.max_num_batched_tokens,
                self.dtype.itemsize,
                self.cache_dtype.itemsize,
                _device_memory(self.device),
            )
            self.kv_cache: KVCache | None = KVCache(
                self.model_config, self.num_blocks, self.block_size, self.cache_dtype, self.device
            )
            self.host_cache: HostCache | None = None
            self.host_block_seconds: float | None = None
            """To copy a block back from host memory."""
            if self.num_host_blocks:
                self.host_cache = HostCache(self.kv_cache, self.num_host_blocks)
                self.host_block_seconds = self.host_cache.measure_copy_in()
            self.graphs: StepGraphs | None = None
            if self.device.type == "cuda" and not config.enforce_eager:
                self.graphs = StepGraphs(self.max_num_batched_tokens, config.max_num_seqs)
        self.sampler = Sampler(self.max_model_len, config.seed)
        self._token_ids = torch.empty(0, dtype=torch.int64, device=self.device)
        """What the last step sampled."""
        self._scheduled: list[ScheduledSequence] = []
        self._sequences: list[Sequence] = []
        """Those that sample of what was scheduled last: often the same as in the next step."""
        self.recorder: StepRecorder | None = None
        """Set by Engine.record_steps."""
        timer.lap("KV cache")
        self.load_laps = timer.laps
        """Seconds by phase."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the step behind one that is still computed may be launched."""
        return self.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedStep:
        """Advance every scheduled sequence; sample where the last known token was computed. On a
        GPU this returns while it computes.
        """
        assert self.kv_cache is not None, "the runner is closed"
        recorder = self.recorder
        with step_range("prepare", recorder):
            if self.host_cache is not None:
                self.host_cache.copy_out(batch.swap_outs)
                self.host_cache.copy_in(batch.swap_ins)
            if batch.block_copies:
                mapping = torch.tensor(batch.block_copies, dtype=torch.int64)
                ops.copy_blocks(self.kv_cache.pool, mapping.to(self.device, non_blocking=True))
            padding = self.graphs.padding_for(batch) if self.graphs is not None else None
            begin = None if recorder is None else recorder.begin
            inputs = self.input_batch.prepare(batch, padding, begin)
            if batch.ahead_rows:
                self._feed_tokens(inputs, batch.ahead_rows)
        with step_range("forward", recorder):
            prompt_logprobs: list[PromptLogprobs] = []
            forward = self._decode if batch.is_decode else self._forward
            if self.graphs is not None and padding is not None:
                out = self.graphs.run(forward, inputs)
            else:
                out = forward(inputs)
            if batch.is_decode:
                count = len(batch.scheduled)
                rows = list(range(count))
                logits = out[:count]
                seq_lens, token_ids = inputs.attention.seq_lens[:count], inputs.input_ids[:count]
            else:
                rows, at, last = self._sampling_rows(batch)
                logits = self.model.compute_logits(out.index_select(0, last))
                seq_lens = inputs.attention.seq_lens.index_select(0, at)
                token_ids = inputs.input_ids.index_select(0, last)
                prompt_logprobs = self._prompt_logprobs(batch, out)
        with step_range("sample", recorder):
            if batch.scheduled is not self._scheduled or not batch.is_decode:
                self._scheduled = batch.scheduled
                self._sequences = [batch.scheduled[row].sequence for row in rows]
            sequences = self._sequences
            self._token_ids = self.sampler.choose(
                logits, sequences, seq_lens, token_ids, batch.num_decodes * batch.lead
            )
            logprobs = self.sampler.logprobs(logits, self._token_ids, sequences)
            launched = LaunchedStep(
                batch,
                rows,
                sequences,
                HostCopy(self._token_ids),
                None if logprobs is None else HostCopy(logprobs),
                prompt_logprobs,
            )
        if recorder is not None:
            recorder.end(batch, padding is not None)
        return launched

    def _feed_tokens(self, inputs: ModelInput, rows: list[int]) -> None:
        """Take these of the tokens that the step before has sampled."""
        token_ids = self._token_ids
        if rows != list(range(len(token_ids))):
            index = torch.tensor(rows).to(self.device, non_blocking=True)
            token_ids = token_ids.index_select(0, index)
        # A row that failed has a number below 0, and is computed in vain.
        torch.clamp(token_ids, min=0, out=inputs.input_ids[: len(rows)])

    def _forward(self, inputs: ModelInput) -> torch.Tensor:
        assert self.kv_cache is not None
        self.input_batch.plan(inputs.attention)
        return self.model(
            inputs.input_ids, inputs.positions, self.kv_cache.layers, inputs.attention
        )

    def _decode(self, inputs: ModelInput) -> torch.Tensor:
        return self.model.compute_logits(self._forward(inputs))

    def _sampling_rows(self, batch: Batch) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The batch's rows that sample; on the device the same, and the last token of each among
        the step's tokens.
        """
        rows, last = [], []
        end = 0
        for row, scheduled in enumerate(batch.scheduled):
            end += scheduled.num_tokens
            if scheduled.samples:
                rows.append(row)
                last.append(end - 1)
        index = torch.tensor([rows, last], dtype=torch.int64).to(self.device, non_blocking=True)
        return rows, index[0], index[1]

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> list[PromptLogprobs]:
        result = []
        start = 0
        for row, scheduled in enumerate(batch.scheduled):
            sequence, begin = scheduled.sequence, start
            start += scheduled.num_tokens
            num_logprobs = sequence.params.prompt_logprobs
            first = scheduled.start + 1
            last = min(first + scheduled.num_tokens, sequence.num_prompt_tokens)
            if num_logprobs is None or first >= last:
                continue
            tables = []
            for low in range(first, last, PROMPT_ROWS):
                targets = sequence.token_ids[low : min(low + PROMPT_ROWS, last)]
                offset = begin + low - first
                logits = self.model.compute_logits(hidden[offset : offset + len(targets)])
                index = torch.tensor(targets).to(self.device, non_blocking=True)
                tables.append(HostCopy(logprob_table(logits, index, num_logprobs)))
            result.append(PromptLogprobs(row, sequence.token_ids[first:last], num_logprobs, tables))
        return result

    def close(self) -> None:
        """Give all memory back; the runner cannot execute any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.kv_cache = self.host_cache = None
        self.graphs = None
        del self.model, self.input_batch
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class HostCopy:
    """A tensor's values on their way to the host; on a CPU, there already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Waits for what was launched before the copy, and for nothing that came later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.tolist()


@dataclass(slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens, on their way to the host."""

    row: int
    """Of the batch."""
    token_ids: list[int]
    num_logprobs: int
    tables: list[HostCopy]
    """`logprob_table` of the tokens, in parts."""

    def entries(self) -> list[dict[int, Logprob]]:
        """Waits for the step."""
        table = [row for part in self.tables for row in part.tolist()]
        return logprob_entries(table, self.token_ids, [self.num_logprobs] * len(table))


@dataclass(slots=True)
class LaunchedStep:
    """A step that the device computes."""

    batch: Batch
    rows: list[int]
    """Of the batch, those that sample."""
    sequences: list[Sequence]
    """Of these rows."""
    token_ids: HostCopy
    logprobs: HostCopy | None
    """From `Sampler.logprobs`."""
    prompt_logprobs: list[PromptLogprobs]

    def result(self) -> StepResult:
        """Waits for the step."""
        token_ids = self.token_ids.tolist()
        table = None if self.logprobs is None else self.logprobs.tolist()
        logprobs, failures = describe(token_ids, table, self.sequences)
        if len(self.rows) < len(self.batch.scheduled):
            by_row = dict(zip(self.rows, token_ids, strict=True))
            token_ids = [by_row.get(row, -1) for row in range(len(self.batch.scheduled))]
        return StepResult(
            token_ids,
            {self.rows[i]: reason for i, reason in failures.items()},
            {self.rows[i]: entry for i, entry in logprobs.items()},
            {prompt.row: prompt.entries() for prompt in self.prompt_logprobs},
        )


def _choose_device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    usable = torch.cuda.is_available() and ops.has_cuda()
    if name == "cuda" and not usable:
        why = (
            "this build has no CUDA kernels; rebuild with NANO_VLLM_BUILD=cuda"
            if torch.cuda.is_available()
            else "torch sees no NVIDIA GPU"
        )
        raise ValueError(f"device 'cuda' cannot be used: {why}")
    return torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")


def choose_dtype(name: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for by name; for auto the checkpoint's own, if it names one."""
    return getattr(torch, choose_dtype_name(name, stored, device.type))


def _device_memory(device: torch.device) -> DeviceMemory | None:
    return DeviceMemory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else None


def _check_quantization(config: EngineConfig, path: Path, device: torch.device) -> None:
    if config.quantization is None:
        return
    if device.type != "cpu":
        raise ValueError(f"quantization 'gguf' runs on device cpu alone, got {device.type}")
    if path.suffix != ".gguf" or config.load_format == "dummy":
        raise ValueError(f"quantization 'gguf' needs the weights of a .gguf file, got {path}")


def _build(
    cls: type[CausalLM],
    model: ModelConfig,
    max_position: int,
    device: torch.device,
    dtype: torch.dtype,
) -> CausalLM:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return cls(model, max_position, device)
    finally:
        torch.set_default_dtype(previous)
