"""What the routes share: the engine, the gate, and whether anything may come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from nano_vllm.config import EngineConfig
from nano_vllm.engine.output_stream import EngineError, OutputStream
from nano_vllm.engine.replicas import Replicas
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.server.answer import Answer
from nano_vllm.server.errors import ApiError
from nano_vllm.server.metrics import ServerMetrics
from nano_vllm.server.server_config import ServerConfig
from nano_vllm.server.validation import Gate
from nano_vllm.tokenizer.tokenizer import Tokenizer
from nano_vllm.weights.json_file import read_json_object
from nano_vllm.weights.resolve import resolve_model

GATE_THREADS = 4
DEFAULT_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling options that a generation_config.json may set."""
T = TypeVar("T")


class Service:
    """One model behind the API.

    Args:
        engine_config: the engine's options.
        config: the server's.
    """

    def __init__(self, engine_config: EngineConfig, config: ServerConfig) -> None:
        self.config = config
        self.engine_config = engine_config
        self.model_name = config.served_model_name or engine_config.model
        self.llm = Replicas(engine_config, config.data_parallel_size, config.step_timeout)
        self.metrics = ServerMetrics(self.model_name, config.data_parallel_size)
        self.tokenizer: Tokenizer | None = None
        self.gate: Gate | None = None
        """None while the model loads."""
        self.defaults: dict[str, Any] = {}
        """Of the model's generation_config.json."""
        self.is_draining = False
        self._loading: list[asyncio.Task[Any]] = []
        self._num_gated = 0
        """Requests on their way through the gate."""
        self._threads = ThreadPoolExecutor(GATE_THREADS, thread_name_prefix="gate")

    async def start(self) -> None:
        """Load model and tokenizer; ValueError says in one line why they cannot be."""
        engine = asyncio.create_task(self.llm.start())
        self._loading = [engine, asyncio.create_task(asyncio.to_thread(self._load_tokenizer))]
        await asyncio.gather(*self._loading)
        self.gate = Gate(self.tokenizer, engine.result(), self.engine_config, self.defaults)

    def _load_tokenizer(self) -> None:
        config = self.engine_config
        path = resolve_model(config.model, config.load_format)
        self.defaults = read_defaults(path)
        if not config.skip_tokenizer_init:
            own = Path(config.tokenizer).expanduser() if config.tokenizer else path
            if config.tokenizer and not own.exists():
                own = resolve_model(config.tokenizer)
            self.tokenizer = Tokenizer.from_path(own)

    @property
    def status(self) -> str:
        """ready, or why nothing is served."""
        if self.llm.death is not None and self.llm.death.done():
            return "the engine ended"
        if self.is_draining:
            return "shutting down"
        if self.gate is None:
            return "loading"
        return "the engine is stuck" if self.llm.is_stuck else "ready"

    @property
    def num_unfinished(self) -> int:
        """Prompts under way, those at the gate included."""
        return self.llm.num_unfinished + self._num_gated

    def check_open(self) -> Gate:
        """The gate; ApiError where no request can be taken in."""
        status = self.status
        if status != "ready" or self.gate is None:
            raise ApiError(503, f"not ready: {status}")
        if self.num_unfinished >= self.capacity:
            self.metrics.refused.inc()
            raise ApiError(429, "too many requests are waiting; try again later")
        return self.gate

    def check_model(self, name: str | None) -> None:
        """ApiError where a client wants another model."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist", "model", "model_not_found"
            )

    @property
    def capacity(self) -> int:
        """Prompts that may be under way."""
        return self.llm.num_engines * self.engine_config.max_num_seqs + self.config.max_queue

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Do what takes long beside the event loop; it counts as a request under way."""
        self._num_gated += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        finally:
            self._num_gated -= 1

    def submit(self, answer: Answer) -> OutputStream:
        """Queue an answer's prompts; ApiError where there is no room for them all, or no engine."""
        request = answer.request
        prompts = [(p.token_ids, p.beams or p.params) for p in answer.prompts if p.needs_engine]
        if self.llm.num_unfinished and self.llm.num_unfinished + len(prompts) > self.capacity:
            self.metrics.refused.inc()
            raise ApiError(429, "too many requests are waiting; try again later")
        try:
            return self.llm.submit(
                prompts, bool(request.stream), request.priority or 0, request.cache_salt
            )
        except EngineError as error:
            raise ApiError(503, str(error)) from None

    async def close(self) -> None:
        for task in self._loading:
            task.cancel()
        await self.llm.close()
        await asyncio.gather(*self._loading, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)


def read_defaults(path: Path) -> dict[str, Any]:
    """The sampling defaults that a model's folder brings; {} where there are none. ValueError for
    what nobody could be served with.
    """
    file = path / "generation_config.json"
    if not path.is_dir() or not file.exists():
        return {}
    values = read_json_object(file)
    defaults = {name: values[name] for name in DEFAULT_NAMES if values.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return defaults
