"""The rank that decides: a batch becomes a step for all ranks, and what it samples a result."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nano_vllm.batch import Batch, ScheduledSequence, StepResult
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import ALONE, Launch
from nano_vllm.logprob import Logprob
from nano_vllm.runner.model_worker import ModelWorker, choose_dtype
from nano_vllm.runner.step_message import Step, StepSender
from nano_vllm.sampling.gathering import LIKELIEST, WHOLE, quickest
from nano_vllm.sampling.logprob_rows import PROMPT_ROWS
from nano_vllm.sampling.logprobs import logprob_entries, logprob_table
from nano_vllm.sampling.sampler import Sampler, describe
from nano_vllm.sequence import Sequence
from nano_vllm.step_record import StepRecorder, step_range

__all__ = ["LaunchedStep", "ModelRunner", "choose_dtype"]

SPARE_BYTES = 1 << 30
"""Free on the device where a graph is captured ahead of need: each takes about 1 MB, and kernels
that are loaded on the way some hundred.
"""


class ModelRunner(ModelWorker):
    """A worker that is told what to compute by the engine, tells the other ranks, and samples."""

    def __init__(
        self,
        config: EngineConfig,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
        launch: Launch = ALONE,
    ) -> None:
        super().__init__(config, progress, clock, launch)
        self._others = None if self.channel is None else StepSender(self.channel)
        self.sampler = Sampler(self.max_model_len, config.seed)
        self._scheduled: list[ScheduledSequence] = []
        self._sequences: list[Sequence] = []
        """Those that sample of what was scheduled last: often the same as in the next step."""
        self.recorder: StepRecorder | None = None
        """Set by Engine.record_steps."""
        if self._others is not None:
            atexit.register(self.close)  # the others wait for the last message

    @property
    def runs_ahead(self) -> bool:
        """Whether the step behind one that is still computed may be launched."""
        return self.device.type == "cuda" and self.parallel.pipeline.num_stages == 1

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedStep:
        """Advance every scheduled sequence; sample where the last known token was computed. On a
        GPU this returns while it computes.
        """
        try:
            return self._launch(batch)
        except BaseException as error:
            self.parallel.fail(error)  # what the others have done of the step is not known
            raise

    def _launch(self, batch: Batch) -> LaunchedStep:
        recorder = self.recorder
        with step_range("prepare", recorder):
            step, rows, wanted = self._decide(batch)
            begin = None if recorder is None else recorder.begin
            inputs = self.prepare(step, begin)
        with step_range("forward", recorder):
            out = self.forward(step, inputs, begin)
            logits = self.sampled_logits(step, inputs, out)
            seq_lens, token_ids = inputs.attention.seq_lens, inputs.input_ids
            if inputs.sampled is None:
                seq_lens, token_ids = seq_lens[: len(rows)], token_ids[: len(rows)]
            else:
                at, last = inputs.sampled
                seq_lens, token_ids = seq_lens.index_select(0, at), token_ids.index_select(0, last)
            prompt_logprobs = [self._prompt_logprobs(prompt, out) for prompt in wanted]
        with step_range("sample", recorder):
            logprobs = None
            if step.num_candidates == LIKELIEST:
                self._token_ids = self.likeliest(logits)
            else:
                gathered = self.gather(logits, step.num_candidates)
                assert gathered is not None
                self._token_ids = self.parallel.tp.broadcast(
                    self.sampler.choose(
                        gathered,
                        self._sequences,
                        seq_lens,
                        token_ids,
                        batch.num_decodes * batch.lead,
                    )
                )
                logprobs = self.sampler.logprobs(gathered, self._token_ids, self._sequences)
            launched = LaunchedStep(
                batch,
                rows,
                self._sequences,
                HostCopy(self._token_ids),
                None if logprobs is None else HostCopy(logprobs),
                prompt_logprobs,
            )
        if recorder is not None:
            recorder.end(batch, self.is_graph(step))
        return launched

    @torch.inference_mode()
    def prepare_graph(self) -> bool:
        """Run the next of the steps that usually come and have no CUDA graph yet, with nothing to
        do: the second time it is captured. Not while a step is under way.

        Returns:
            whether there was one, and memory to spare.
        """
        shape = None if self.graphs is None else self.graphs.missing()
        if shape is None or self._free_bytes() < SPARE_BYTES:
            return False
        try:
            step = Step(self.input_batch.write_nothing(shape), LIKELIEST)
            if self._others is not None:
                self.parallel.progress.step += 1
                self._others.send(step, self.input_batch.slots[step.staged.slot].staging)
            inputs = self.prepare(step)
            logits = self.sampled_logits(step, inputs, self.forward(step, inputs))
            self._token_ids = self.likeliest(logits)
        except BaseException as error:
            self.parallel.fail(error)
            raise
        return True

    def _free_bytes(self) -> float:
        """Of the device, as the driver tells."""
        if self.device.type != "cuda":
            return math.inf
        return torch.cuda.mem_get_info(self.device)[0]

    def _decide(self, batch: Batch) -> tuple[Step, list[int], list[_WantedLogprobs]]:
        """Write the step, and tell the other ranks of it.

        Returns:
            the step; the batch's rows that sample; what is asked for of its prompts.
        """
        prompt_rows = self.input_batch.prompt_rows(batch)
        padding = None
        if self.graphs is not None:
            padding = self.graphs.padding_for(batch, batch.num_decodes + len(prompt_rows))
        staged = self.input_batch.write(batch, prompt_rows, padding)
        rows = list(range(len(batch.scheduled))) if batch.is_decode else batch.sampling_rows
        if batch.scheduled is not self._scheduled or not batch.is_decode:
            self._scheduled = batch.scheduled
            self._sequences = [batch.scheduled[row].sequence for row in rows]
        wanted = [] if batch.is_decode else _wanted_logprobs(batch)
        step = Step(
            staged,
            WHOLE,
            batch.block_copies,
            batch.swap_outs,
            batch.swap_ins,
            [span for prompt in wanted for span in prompt.spans],
            batch.ahead_rows,
        )
        if self._others is not None:
            if self.parallel.tp.size > 1:
                enough = self.sampler.num_candidates(
                    self._sequences, batch.num_decodes * batch.lead, self.device
                )
                step.num_candidates = quickest(
                    enough,
                    len(rows),
                    self.model_config.vocab_size,
                    self.dtype.itemsize,
                    self.parallel.tp.size,
                )
            self.parallel.progress.step += 1
            self._others.send(step, self.input_batch.slots[staged.slot].staging)
        return step, rows, wanted

    def _prompt_logprobs(self, wanted: _WantedLogprobs, hidden: torch.Tensor) -> PromptLogprobs:
        tables = []
        done = 0
        for first, last in wanted.spans:
            logits = self.gather(self.model.compute_logits(hidden[first:last]))
            assert logits is not None
            targets = wanted.token_ids[done : done + last - first]
            done += len(targets)
            index = torch.tensor(targets).to(self.device, non_blocking=True)
            tables.append(HostCopy(logprob_table(logits, index, wanted.num_logprobs)))
        return PromptLogprobs(wanted.row, wanted.token_ids, wanted.num_logprobs, tables)

    def close(self) -> None:
        """Give all memory back, on all ranks; nothing can be computed any more."""
        atexit.unregister(self.close)
        if self._others is not None and not self.parallel.has_failed:
            self._others.stop()
        super().close()


@dataclass(slots=True)
class _WantedLogprobs:
    """Of tokens of a prompt, those that a step's logits predict."""

    row: int
    """Of the batch."""
    token_ids: list[int]
    num_logprobs: int
    spans: list[tuple[int, int]]
    """First and last + 1 of the step's tokens whose logits these are, in parts."""


def _wanted_logprobs(batch: Batch) -> list[_WantedLogprobs]:
    result = []
    start = 0
    for row, scheduled in enumerate(batch.scheduled):
        sequence, begin = scheduled.sequence, start
        start += scheduled.num_tokens
        num_logprobs = sequence.params.prompt_logprobs
        if num_logprobs is None:
            continue
        first = batch.start(row) + 1
        last = min(first + scheduled.num_tokens, sequence.num_prompt_tokens)
        if first >= last:
            continue
        end = begin + last - first
        spans = [(low, min(low + PROMPT_ROWS, end)) for low in range(begin, end, PROMPT_ROWS)]
        token_ids = sequence.token_ids[first:last]
        result.append(_WantedLogprobs(row, token_ids, num_logprobs, spans))
    return result


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
