"""The engine: requests in, one step at a time, results out."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nano_vllm.batch import Batch
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from nano_vllm.engine.event_log import RecordedScheduler, record_to_file
from nano_vllm.engine.output_processor import OutputProcessor
from nano_vllm.engine.prefill_pace import PrefillPace
from nano_vllm.engine.request import Request
from nano_vllm.engine.request_factory import RequestFactory
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.engine.validation import RequestLimits
from nano_vllm.metrics import EngineMetrics
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence
from nano_vllm.step_record import StepRecorder, step_range
from nano_vllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nano_vllm.runner.model_runner import LaunchedStep, ModelRunner

_log = logging.getLogger(__name__)


class Engine:
    """Owns a model on its device, its KV blocks and all requests under way. Not thread-safe.

    Args:
        config: the options.
        runner: computes the steps.
        tokenizer: None to run on token ids alone.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_pool(runner)
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        scheduler = Scheduler(
            BlockManager(
                runner.num_blocks,
                runner.block_size,
                config.enable_prefix_caching,
                hash_key=secrets.randbits(64),
                num_host_blocks=runner.num_host_blocks,
                sliding_window=runner.freed_window,
            ),
            config.max_num_seqs,
            runner.max_num_batched_tokens,
            runner.max_model_len,
            config.enable_chunked_prefill,
            by_priority=config.scheduling_policy == "priority",
            prefill_pace=_prefill_pace(config, runner),
            host_block_seconds=runner.host_block_seconds,
            num_stages=config.pipeline_parallel_size,
        )
        self.scheduler: Scheduler | RecordedScheduler = scheduler
        if config.record is not None:
            self.scheduler = record_to_file(scheduler, config.record, clock)
        vocab_size = runner.model_config.vocab_size
        eos = {*runner.model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        self._factory = RequestFactory(
            RequestLimits(vocab_size, runner.max_model_len, tokenizer is not None),
            scheduler,
            frozenset(i for i in eos if i < vocab_size),
            tokenizer,
        )
        self._processor = OutputProcessor(tokenizer)
        self._requests: dict[str, Request] = {}
        self._next_seq_id = 0
        self._clock = clock
        self._metrics = EngineMetrics()
        self._closed = False
        self._launched: deque[tuple[Batch, LaunchedStep]] = deque()
        """Steps whose results were not waited for yet, in their order."""
        self._launch_time = 0.0
        self._result_time: float | None = None
        """Of the last step, where the next one follows at once."""
        self._recorder: StepRecorder | None = None

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> Engine:
        """Load model and tokenizer. Of torchrun's processes the first gets an engine; the others
        compute for it, and end by SystemExit when it is closed.

        Args:
            config: the options.
            progress: show a bar while the weights load.
            clock: seconds, from any start.
        """
        launch = Launch.from_environment()
        launch.check(config)
        if launch.rank != 0:
            from nano_vllm.runner.follower import Follower

            Follower(config, launch).run()
            raise SystemExit(0)
        from nano_vllm.runner.model_runner import ModelRunner

        tokenizer = None
        if not config.skip_tokenizer_init:
            # Ahead of the weights: what is wrong with it is said at once.
            tokenizer = Tokenizer.from_path(_tokenizer_path(config))
        if config.record is not None:
            open(config.record, "a").close()  # ahead of the weights too
        runner = ModelRunner(config, progress, clock, launch)
        try:
            return cls(config, runner, tokenizer, clock)
        except BaseException:
            runner.close()
            raise

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def number_from(self, seq_id: int) -> None:
        """Number the sequences from here on. Engines of one seed that answer together need numbers
        of their own: else equal requests draw the same tokens in each.
        """
        self._next_seq_id = seq_id

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """A request that passed the gate; nothing is queued yet. `add_request` says what it takes.

        Raises ValueError, with the value and what is allowed, for one that cannot be served.
        """
        return self._factory.make(
            request_id, prompt_token_ids, params, prompt, stream, priority, cache_salt
        )

    def make_beam_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: BeamSearchParams,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """The same for a beam search: one result, with the best completions first."""
        return self._factory.make_beams(
            request_id, prompt_token_ids, params, prompt, priority, cache_salt
        )

    def add(self, request: Request, arrival_time: float | None = None) -> None:
        """Queue a request; ValueError if one of the same id is under way.

        Args:
            request: of `make_request`.
            arrival_time: when it came, by the engine's clock; None for this moment.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use already")
        # Numbered here, so that requests made but never queued leave no trace: without a seed, the
        # draws go by these numbers.
        for sequence in request.sequences:
            sequence.seq_id = self._next_seq_id
            self._next_seq_id += 1
            sequence.is_streamed = request.stream
        if not self.has_work:
            self._result_time = None
        self.scheduler.add(request.sequences, request.beams)
        request.metrics.arrival_time = self._clock() if arrival_time is None else arrival_time
        self._requests[request.request_id] = request

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Check a request and queue it.

        Args:
            request_id: unique among the requests under way.
            prompt_token_ids: each in [0, vocab_size).
            params: how to sample.
            prompt: the text the tokens come from, for the result.
            stream: report the progress of every step, not the final result alone.
            priority: the lowest goes first, under scheduling_policy priority.
            cache_salt: prompts find the cached blocks of others with the same salt alone.
        """
        self.add(
            self.make_request(
                request_id, prompt_token_ids, params, prompt, stream, priority, cache_salt
            )
        )

    def step(self) -> list[RequestOutput]:
        """Advance the requests under way by one step; what is to be reported of them."""
        requests: list[Request] = []
        self.advance(requests.extend)
        return [self._processor.output(request) for request in requests]

    def advance(self, report: Callable[[list[Request]], None]) -> None:
        """The same, for who reports by other means.

        Args:
            report: called with the requests that ended, and those that are streamed and gained a
                token. Those of a first token come first, in a call of their own: they are waited
                for, and all others' text takes a while.
        """
        start, self._result_time = self._result_time, None
        if not self._launched:
            if not self._launch():
                return
            start = self._launch_time if start is None else start
        # else: behind a pause it has been ready for who knows how long: there is no start.
        while len(self._launched) < self.config.pipeline_parallel_size and self._launch():
            pass
        batch, step = self._launched[0]
        try:
            if self.config.async_scheduling and self.runner.runs_ahead:
                self._launch(behind=batch)
            with step_range("wait", self._recorder):
                result = step.result()
        except BaseException:
            # What came behind it is computed again, with the step itself.
            while self._launched:
                self.scheduler.retract(self._launched.pop()[0])
            raise
        self._launched.popleft()
        with step_range("update", self._recorder):
            now = self._result_time = self._clock()
            if start is not None:
                self.scheduler.observe(batch, now - start)
            noticed = self.scheduler.update(batch, result)
            self._metrics.num_steps += 1
            self._reclaim_leaks()
            begun: list[Sequence] = []
            others: list[Sequence] = []
            for sequence in noticed:
                metrics = self._requests[sequence.request_id].metrics
                (begun if metrics.first_token_time is None else others).append(sequence)
            for group in (begun, others):
                if group:
                    report(self._reported(group, now))

    def prepare_graph(self) -> bool:
        """Capture one of the CUDA graphs that steps to come will want, some 20 ms of work; for an
        engine that has nothing else to do. RuntimeError where it has.

        Returns:
            whether there was one to be captured.
        """
        if self.has_work:
            raise RuntimeError("graphs are prepared while nothing is under way")
        return self.runner.prepare_graph()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request where it is; None if there is none of that id."""
        self.scheduler.abort(request_id)
        request = self._requests.get(request_id)
        if request is None:
            return None
        for completion in request.completions:
            self._processor.advance(completion)
        self._finish(request, self._clock())
        return self._processor.output(request)

    def pin(self, token_ids: list[int], cache_salt: str | None = None) -> int:
        """Keep the full blocks that hold these tokens, as far as they are computed, from eviction.

        Returns:
            a number for `unpin`. ValueError without prefix caching, and where a sequence of
            max_model_len would not fit beside what is pinned.
        """
        if not self.config.enable_prefix_caching:
            raise ValueError("to pin blocks needs enable_prefix_caching")
        root = self.scheduler.block_manager.cache_root(cache_salt)
        return self.scheduler.pin(token_ids, root)

    def unpin(self, pin: int) -> None:
        """Leave a pin's blocks to eviction again."""
        self.scheduler.unpin(pin)

    def get_metrics(self) -> EngineMetrics:
        """Counters since the start, and how full the engine is now."""
        manager = self.scheduler.block_manager
        return replace(
            self._metrics,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_blocks=manager.num_blocks,
            num_free_blocks=manager.num_free_blocks,
            num_loaded_tokens=manager.num_loaded_tokens,
        )

    def record_steps(self, recorder: StepRecorder | None) -> None:
        """Keep what each step does from here on; None ends that. RuntimeError while a step is under
        way.
        """
        if self._launched:
            raise RuntimeError("a step is under way")
        self._recorder = self.runner.recorder = recorder

    def close(self) -> None:
        """Abort what is under way and give the memory back."""
        if self._closed:
            return
        self._closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        self._launched.clear()
        self.runner.close()
        if isinstance(self.scheduler, RecordedScheduler):
            self.scheduler.close()

    def _launch(self, behind: Batch | None = None) -> bool:
        """Start the next step, if there is one: one behind a batch that is still computed, unless
        its tokens must be known first; or else any that those under way leave.
        """
        with step_range("schedule", self._recorder):
            scheduler = self.scheduler
            if behind is None:
                self._reclaim_leaks()  # which may be all that there is room in
            batch = scheduler.schedule() if behind is None else scheduler.schedule_ahead(behind)
        if batch is None:
            return False
        self._note_start(batch)
        try:
            self._launched.append((batch, self.runner.launch(batch)))
        except BaseException:
            self.scheduler.retract(batch)
            raise
        return True

    def _reclaim_leaks(self) -> None:
        leaks = self.scheduler.reclaim_leaks()
        self._metrics.num_leaked_blocks += len(leaks)
        for leak in leaks:
            _log.warning("%s were lost, and are taken back", leak)

    def _note_start(self, batch: Batch) -> None:
        now = self._launch_time = self._clock()
        for scheduled in batch.scheduled[batch.num_decodes :]:
            metrics = self._requests[scheduled.sequence.request_id].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now

    def _reported(self, noticed: list[Sequence], now: float) -> list[Request]:
        touched: dict[str, Request] = {}
        for sequence in noticed:
            request = touched[sequence.request_id] = self._requests[sequence.request_id]
            if request.metrics.first_token_time is None and sequence.num_output_tokens:
                request.metrics.first_token_time = now
            stop = self._processor.advance(request.completions[sequence.index])
            if stop is not None:
                self._stop(sequence, stop)
        reported = []
        for request in touched.values():
            if request.is_finished:
                self._finish(request, now)
                reported.append(request)
            elif request.stream:
                reported.append(request)
        return reported

    def _stop(self, sequence: Sequence, stop: str) -> None:
        """A stop string ends the sequence, and counts before any other end in the same step."""
        if not sequence.is_finished:
            self.scheduler.finish(sequence, "stop", stop)
        sequence.finish_reason, sequence.stop_reason = "stop", stop

    def _finish(self, request: Request, now: float) -> None:
        del self._requests[request.request_id]
        request.metrics.finished_time = now
        request.metrics.num_preemptions = request.num_preemptions
        results = [completion.sequence for completion in request.results]
        metrics = self._metrics
        metrics.num_finished_requests += 1
        metrics.num_aborted_requests += any(s.finish_reason == "abort" for s in results)
        metrics.num_prompt_tokens += len(request.prompt_token_ids)
        metrics.num_cached_tokens += request.num_cached_tokens
        metrics.num_output_tokens += sum(s.num_output_tokens for s in results)
        metrics.num_preemptions += request.num_preemptions


def _check_pool(runner: ModelRunner) -> None:
    capacity = runner.num_blocks * runner.block_size
    if capacity < runner.max_model_len:
        raise ValueError(
            f"the KV cache of {runner.num_blocks} blocks of {runner.block_size} = {capacity} "
            f"tokens cannot hold one sequence of max_model_len = {runner.max_model_len}: lower "
            f"max_model_len or give the cache more memory"
        )


def _prefill_pace(config: EngineConfig, runner: ModelRunner) -> PrefillPace:
    if not config.enable_chunked_prefill:
        return PrefillPace(0.0)
    limit = None if config.itl_slo is None else config.itl_slo / 1e3
    return PrefillPace(limit, runner.saturating_tokens, runner.spread, runner.padded_tokens)


def _tokenizer_path(config: EngineConfig) -> Path:
    from nano_vllm.weights.resolve import resolve_model

    if config.tokenizer is None:
        return resolve_model(config.model, config.load_format)
    path = Path(config.tokenizer).expanduser()
    return path if path.exists() else resolve_model(config.tokenizer)
