"""What every rank does: its part of the model over a step's tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from nano_vllm import ops
from nano_vllm.cache.host_cache import HostCache
from nano_vllm.cache.kv_cache import KVCache
from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.distributed.launch import ALONE, Launch
from nano_vllm.distributed.process_groups import ParallelState, join
from nano_vllm.distributed.stages import split_layers
from nano_vllm.gpus import GPU, gpu_of
from nano_vllm.layers.attention import LastTokens
from nano_vllm.metrics import LapTimer
from nano_vllm.models.decoder import CausalLM
from nano_vllm.models.registry import model_class
from nano_vllm.runner.cuda_graphs import StepGraphs
from nano_vllm.runner.input_batch import (
    MAX_SPREAD_TOKENS,
    MIN_SPREAD_CONTEXT,
    InputBatch,
    ModelInput,
)
from nano_vllm.runner.limits import (
    LEAST_SKIPPED_TOKENS,
    check_head_dim,
    choose_dtype_name,
    choose_max_model_len,
    choose_max_num_batched_tokens,
)
from nano_vllm.runner.memory import DeviceMemory, num_host_blocks, num_kv_blocks
from nano_vllm.runner.same_everywhere import facts_of
from nano_vllm.runner.step_message import Step, most_bytes
from nano_vllm.sampling.candidates import gather_candidates
from nano_vllm.sampling.gathering import WHOLE
from nano_vllm.sampling.greedy import likeliest_tokens
from nano_vllm.weights.loader import load_model_config, load_weights
from nano_vllm.weights.resolve import resolve_model

READ_BEHIND_WINDOW = 128
"""kReadBehindWindow in csrc/attention/paged_attention.h."""
TILE_ROWS = 128
"""Tokens times query heads of a tile of a prompt."""


class ModelWorker:
    """Weights, KV cache and step buffers of one rank on its device.

    Ranks do the same in the same order, as steps tell them; nothing here depends on what one rank
    alone knows.

    Raises ValueError for a model that is not supported or a machine that cannot hold it.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
        launch: Launch = ALONE,
    ) -> None:
        launch.check(config)
        self.device = _choose_device(config.device, launch)
        self.parallel: ParallelState = join(
            launch, self.device, config.tensor_parallel_size, config.pipeline_parallel_size
        )
        self.clock = clock
        try:
            self._load(config, progress)
        except BaseException as error:
            self.parallel.fail(error)
            raise

    def _load(self, config: EngineConfig, progress: bool) -> None:
        timer = LapTimer(self.clock)
        self.model_path: Path = resolve_model(config.model, config.load_format)
        self.model_config: ModelConfig = load_model_config(self.model_path, model_class)
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype, self.device)
        self.cache_dtype = self.dtype if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn
        self.block_size = config.block_size
        self.max_model_len = choose_max_model_len(config, self.model_config)
        _check_quantization(config, self.model_path, self.device)
        pipeline = self.parallel.pipeline
        self.stage = split_layers(self.model_config, pipeline.num_stages)[pipeline.stage]
        shard = self.model_config.shard(config.tensor_parallel_size, self.stage.layers)
        self.num_host_blocks = num_host_blocks(config, shard, self.cache_dtype.itemsize)
        cls = model_class(self.model_config.architecture)
        check_head_dim(self.model_config, self.device.type)
        if self.parallel.size > 1:
            self.parallel.compare(facts_of(config, self.model_path, self.model_config, self.dtype))
        (self.max_num_batched_tokens,) = self.parallel.agree(
            choose_max_num_batched_tokens(
                config,
                self.max_model_len,
                self.model_config,
                self.dtype.itemsize,
                _gpu(self.device),
            )
        )
        timer.lap("config")

        with torch.no_grad():
            self.model = self._build(cls)
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
                shard,
                self.max_num_batched_tokens,
                config.max_num_seqs,
                max_blocks_per_seq,
                self.block_size,
                self.device,
                config.enable_cascade_attention and self.device.type == "cuda",
                spreads_chunks=_reads_prefixes_once(self.device),
                num_slots=pipeline.num_stages,
            )
            num_blocks = num_kv_blocks(
                config,
                shard,
                self.max_model_len,
                self.max_num_batched_tokens,
                self.dtype.itemsize,
                self.cache_dtype.itemsize,
                _device_memory(self.device),
            )
            self.num_blocks, self.num_host_blocks = self.parallel.agree(
                num_blocks, self.num_host_blocks
            )
            self.kv_cache: KVCache | None = KVCache(
                shard, self.num_blocks, self.block_size, self.cache_dtype, self.device
            )
            self.host_cache: HostCache | None = None
            self.host_block_seconds: float | None = None
            """To copy a block back from host memory."""
            if self.num_host_blocks:
                self.host_cache = HostCache(self.kv_cache, self.num_host_blocks)
                self.host_block_seconds = self.host_cache.measure_copy_in()
            self.freed_window = self.model_config.widest_window
            """Tokens behind which no kernel looks for blocks; 0 for none. Those for CUDA read tiles
            whose first tokens may lie behind the window, and would multiply what others have there
            by zero: NaN may be among it.
            """
            if self.device.type == "cuda" and self.freed_window:
                self.freed_window += READ_BEHIND_WINDOW
            self.saturating_tokens = _saturating_tokens(shard, self.device)
            """Of a prompt; see StepCost."""
            self.spread = (
                (MIN_SPREAD_CONTEXT, MAX_SPREAD_TOKENS) if self.input_batch.spreads_chunks else None
            )
            """Of a prompt; see PrefillPace."""
            self.graphs: StepGraphs | None = None
            has_graphs = self.parallel.are_capturable and not config.enforce_eager
            if self.device.type == "cuda" and has_graphs:
                self.graphs = StepGraphs(
                    self.max_num_batched_tokens,
                    config.max_num_seqs,
                    shares_prefixes=config.enable_cascade_attention,
                    spreads_chunks=self.input_batch.spreads_chunks,
                )
            self.padded_tokens = () if self.graphs is None else tuple(self.graphs.token_sizes)
            """Of steps with prompts; see PrefillPace."""
        self._received = torch.empty(
            0 if self.stage.is_first else self.max_num_batched_tokens,
            self.model_config.hidden_size,
            dtype=self.dtype,
            device=self.device,
        )
        """Hidden states of the stage before; graphs read them where they are."""
        num_rows = self.max_num_batched_tokens + config.max_num_seqs
        self.channel = self.parallel.step_channel(
            most_bytes(self.input_batch.slots[0].staging, self.num_blocks, num_rows)
        )
        self._token_ids = torch.empty(0, dtype=torch.int64, device=self.device)
        """What the last step sampled."""
        timer.lap("KV cache")
        self.load_laps = timer.laps
        """Seconds by phase."""

    def prepare(self, step: Step, begin: Callable[[], None] | None = None) -> ModelInput:
        """Move blocks, and bring what the staging buffer holds to the device.

        Args:
            step: what to do.
            begin: called where the host's part is done and the device's begins; behind another
                stage, `forward` calls it.
        """
        assert self.kv_cache is not None, "the runner is closed"
        if self.host_cache is not None:
            self.host_cache.copy_out(step.swap_outs)
            self.host_cache.copy_in(step.swap_ins)
        if step.block_copies:
            mapping = torch.tensor(step.block_copies, dtype=torch.int64)
            ops.copy_blocks(self.kv_cache.pool, mapping.to(self.device, non_blocking=True))
        inputs = self.input_batch.load(step.staged, begin if self.stage.is_first else None)
        if step.fed_rows:
            self._feed_tokens(inputs, step.fed_rows)
        return inputs

    def forward(
        self, step: Step, inputs: ModelInput, begin: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """What this rank's layers make of the step's tokens, which goes to the stage behind if
        there is one; on the last stage, of a step of decodes their logits already, of others that
        `skips` the hidden states of each sequence's last token.

        Args:
            step: what to do.
            inputs: from `prepare`.
            begin: called where there is something to compute: what comes before is the pipeline's
                bubble.
        """
        num_tokens = len(inputs.input_ids)
        if not self.stage.is_first:
            self.parallel.pipeline.receive(self._received[:num_tokens])
            if begin is not None:
                begin()
        forward: Callable[[ModelInput], torch.Tensor] = self._forward
        if self.stage.is_last and step.staged.is_decode:
            forward = self._decode
        elif self.skips(step):
            forward = self._forward_last
        if self.is_graph(step):
            assert self.graphs is not None
            out = self.graphs.run(forward, inputs)
        else:
            out = forward(inputs)
        if not self.stage.is_last:
            self.parallel.pipeline.send(out)
        return out

    def sampled_logits(self, step: Step, inputs: ModelInput, out: torch.Tensor) -> torch.Tensor:
        """Of the rows that sample, on the last stage; of this rank's part of the vocabulary.

        Args:
            out: from `forward`.
        """
        if inputs.sampled is None:
            return out[: step.staged.num_sampled]
        rows, tokens = inputs.sampled
        return self.model.compute_logits(out.index_select(0, rows if self.skips(step) else tokens))

    def is_graph(self, step: Step) -> bool:
        """Whether it runs as one. They are told apart by their shapes, and of those that skip have
        nothing for logprobs of a prompt.
        """
        return self.graphs is not None and step.staged.is_padded and not step.logit_ranges

    def skips(self, step: Step) -> bool:
        """Whether the last layer makes nothing but keys and values of tokens that don't sample."""
        staged = step.staged
        return (
            self.stage.is_last
            and not staged.is_decode
            and not step.logit_ranges
            and staged.num_tokens - staged.num_seqs >= LEAST_SKIPPED_TOKENS
        )

    def gather(self, logits: torch.Tensor, num_candidates: int = WHOLE) -> torch.Tensor | None:
        """Whole rows, on the deciding rank alone.

        Args:
            logits: of this rank's part of the vocabulary.
            num_candidates: tokens of each rank that are to be there; WHOLE for all.
        """
        vocab_size, ranks = self.model_config.vocab_size, self.parallel.tp
        if num_candidates == WHOLE:
            return ranks.gather_columns(logits, vocab_size)
        assert self.model.lm_head is not None
        return gather_candidates(logits, self.model.lm_head.held, num_candidates, ranks, vocab_size)

    def likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """The token of each row that is sampled greedily; the same on all ranks."""
        assert self.model.lm_head is not None
        return likeliest_tokens(logits, self.model.lm_head.held, self.parallel.tp)

    def _feed_tokens(self, inputs: ModelInput, rows: list[int]) -> None:
        """Take these of the tokens that the step before has sampled."""
        token_ids = self._token_ids
        if rows != list(range(len(token_ids))):
            index = torch.tensor(rows).to(self.device, non_blocking=True)
            token_ids = token_ids.index_select(0, index)
        # A row that failed has a number below 0, and is computed in vain.
        torch.clamp(token_ids, min=0, out=inputs.input_ids[: len(rows)])

    def _forward(self, inputs: ModelInput, last: LastTokens | None = None) -> torch.Tensor:
        assert self.kv_cache is not None
        self.input_batch.plan(inputs.attention)
        num_tokens = len(inputs.input_ids)
        return self.model(
            inputs.input_ids,
            inputs.positions,
            self.kv_cache.layers,
            inputs.attention,
            None if self.stage.is_first else self._received[:num_tokens],
            last,
        )

    def _forward_last(self, inputs: ModelInput) -> torch.Tensor:
        return self._forward(inputs, self.input_batch.last_tokens(inputs.attention))

    def _decode(self, inputs: ModelInput) -> torch.Tensor:
        return self.model.compute_logits(self._forward(inputs))

    def _build(self, cls: type[CausalLM]) -> CausalLM:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return cls(
                    self.model_config,
                    self.max_model_len,
                    self.device,
                    self.parallel.tp,
                    self.stage,
                )
        finally:
            torch.set_default_dtype(previous)

    def close(self) -> None:
        """Give all memory back; nothing can be computed any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.kv_cache = self.host_cache = None
        self.graphs = None
        del self.model, self.input_batch
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.parallel.close()


def _reads_prefixes_once(device: torch.device) -> bool:
    """Whether there are kernels that do so for all who share one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _saturating_tokens(model: ModelConfig, device: torch.device) -> int:
    """Of a prompt. Where few tokens are spread over the GPU, those of a tile of rows; else as many
    as make a tile for each multiprocessor.
    """
    if device.type != "cuda":
        return 1
    if _reads_prefixes_once(device) and model.windows() == (0,):
        return TILE_ROWS * model.num_kv_heads // model.num_heads
    num_tiles = torch.cuda.get_device_properties(device).multi_processor_count
    return num_tiles * TILE_ROWS // model.num_heads


def _choose_device(name: str, launch: Launch) -> torch.device:
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
    if not usable:
        return torch.device("cpu")
    place = launch.local_rank
    if launch.shares_gpus:
        place %= torch.cuda.device_count()
    elif place >= torch.cuda.device_count():
        raise ValueError(
            f"each rank of a host needs a GPU: LOCAL_RANK is {place}, torch sees "
            f"{torch.cuda.device_count()} (NANO_VLLM_SHARE_GPUS=1 has them share, to try it out)"
        )
    if place:
        torch.cuda.set_device(place)
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for by name; for auto the checkpoint's own, if it names one."""
    return getattr(torch, choose_dtype_name(name, stored, device.type))


def _gpu(device: torch.device) -> GPU | None:
    if device.type != "cuda":
        return None
    return gpu_of(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1])


def _device_memory(device: torch.device) -> DeviceMemory | None:
    return DeviceMemory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else None


def _check_quantization(config: EngineConfig, path: Path, device: torch.device) -> None:
    if config.quantization is None:
        return
    if device.type != "cpu":
        raise ValueError(f"quantization 'gguf' runs on device cpu alone, got {device.type}")
    if path.suffix != ".gguf" or config.load_format == "dummy":
        raise ValueError(f"quantization 'gguf' needs the weights of a .gguf file, got {path}")
