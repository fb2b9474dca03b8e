"""A runner without a model, whose tokens depend on what it finds through the block tables."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nano_vllm.batch import Batch, StepResult
from nano_vllm.config import EngineConfig
from nano_vllm.engine.engine import Engine
from nano_vllm.logprob import Logprob
from nano_vllm.sampling.beam_search import BeamSearch, Hypothesis
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence
from nano_vllm.tokenizer.chat_template import ChatTemplate
from nano_vllm.tokenizer.detokenizer import byte_level_alphabet
from nano_vllm.tokenizer.tokenizer import Tokenizer

EMPTY = -1
"""What a slot holds that nobody has written to."""
VOCAB_SIZE = 300
EOS = 299


def digest(*parts: int) -> int:
    """The same in every process: hashes of integers are not salted."""
    return hash(parts) & (2**63 - 1)


def next_token(cached: list[int], params: SamplingParams, index: int, num_output: int) -> int:
    """A token made of everything the cache holds of a sequence, and of its sampling."""
    seed = -1 if params.seed is None else params.seed + index
    ends = num_output >= params.min_tokens and not params.ignore_eos
    return digest(*cached, seed) % (VOCAB_SIZE if ends else EOS)


def cached_values(token_ids: Iterable[int]) -> list[int]:
    """What the cache must hold: like keys and values, each entry depends on all tokens before."""
    values: list[int] = []
    for token_id in token_ids:
        values.append(digest(values[-1] if values else EMPTY, token_id))
    return values


def reference_tokens(
    prompt: list[int], params: SamplingParams, index: int, max_model_len: int, window: int = 0
) -> list[int]:
    """The output of a sequence that is alone in the world, and sees `window` tokens; 0 for all."""
    tokens = list(prompt)
    values = cached_values(prompt)
    while True:
        tokens.append(next_token(values[-window:], params, index, len(tokens) - len(prompt)))
        values.append(digest(values[-1], tokens[-1]))
        num_output = len(tokens) - len(prompt)
        if tokens[-1] == EOS or num_output == params.max_tokens or len(tokens) == max_model_len:
            return tokens[len(prompt) :]


def likeliest_tokens(cached: list[int], count: int) -> list[tuple[int, float]]:
    """As many tokens, the end of the sequence often among them, and their log-probabilities."""
    draw = random.Random(digest(*cached))
    tokens = draw.sample(range(EOS), count)
    if draw.random() < 0.4:
        tokens[draw.randrange(count)] = EOS
    logprobs = sorted((-5 * draw.random() for _ in tokens), reverse=True)
    return list(zip(tokens, logprobs, strict=True))


def reference_beams(
    prompt: list[int], params: BeamSearchParams, max_model_len: int, window: int = 0
) -> list[Hypothesis]:
    """What a search finds that is alone in the world."""
    ends = frozenset(() if params.ignore_eos else (EOS,))
    search = BeamSearch(params, ends, min(params.max_tokens, max_model_len - len(prompt)))
    beams = [prompt]
    while beams:
        candidates = [
            likeliest_tokens(cached_values(beam)[-window:], search.num_candidates) for beam in beams
        ]
        steps = search.advance(candidates)
        beams = [[*beams[step.parent], step.token_id] for step in steps]
    return search.hypotheses(params.n)


class StepBroke(RuntimeError):
    """What a step raises that was told to."""


class FakeRunner:
    """Keeps one number per cache slot, as a real one keeps keys and values.

    Args:
        num_blocks, block_size, max_model_len, max_num_batched_tokens: as the real runner's.
        script: tokens to give out instead, by request and completion; for tests of what follows.
        failing: requests whose logits are not finite.
        num_host_blocks: as the real runner's.
        window: tokens that a query sees, two at least; 0 for all.
        runs_ahead: whether steps may be launched before the tokens of the one before are known.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 8,
        max_model_len: int = 128,
        max_num_batched_tokens: int = 64,
        script: dict[tuple[str, int], list[int]] | None = None,
        failing: Iterable[str] = (),
        runs_ahead: bool = True,
        num_host_blocks: int = 0,
        window: int = 0,
    ) -> None:
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        self.window = self.freed_window = window
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.script = script or {}
        self.failing = set(failing)
        self.runs_ahead = runs_ahead
        self.batches: list[Batch] = []
        self._sampled: list[int] = []
        self.breaks: str | None = None
        """The next step raises: "before" it computes, "after" that, or "late", when its result is
        waited for, and another may have been launched behind it; so does one that is "lost", and
        computes nothing.
        """
        self.is_closed = False
        self.num_host_blocks = num_host_blocks
        self.host_block_seconds = None
        self.saturating_tokens = 1
        self.spread = None
        self.padded_tokens = ()
        self._slots = [EMPTY] * (num_blocks * block_size)
        self._host_blocks: dict[int, list[int]] = {}

    def launch(self, batch: Batch) -> SimpleNamespace:
        """Computes at once, as if by a device that takes one step after the other."""
        breaks, self.breaks = self.breaks, None
        if breaks == "before":
            raise StepBroke
        if breaks == "lost":
            self._sampled = [0 for scheduled in batch.scheduled if scheduled.samples]
            return SimpleNamespace(result=_break)
        result = self._execute(batch)
        if breaks == "after":
            raise StepBroke
        rows = zip(batch.scheduled, result.token_ids, strict=True)
        self._sampled = [token for scheduled, token in rows if scheduled.samples]
        if breaks == "late":
            return SimpleNamespace(result=_break)
        return SimpleNamespace(result=lambda: result)

    def _execute(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        known = [s.sequence.token_ids for s in batch.scheduled]
        for row, sampled in enumerate(batch.ahead_rows or ()):
            known[row] = [*known[row], max(self._sampled[sampled], 0)]
        size = self.block_size
        for block, host_block in batch.swap_outs:
            self._host_blocks[host_block] = self._slots[block * size : (block + 1) * size]
        for host_block, block in batch.swap_ins:
            self._slots[block * size : (block + 1) * size] = self._host_blocks[host_block]
        sources = {source for source, _ in batch.block_copies}
        destinations = [destination for _, destination in batch.block_copies]
        loaded = [block for _, block in batch.swap_ins]
        assert len({*loaded, *destinations}) == len(loaded) + len(destinations)
        assert len(set(destinations)) == len(destinations)
        assert not sources & set(destinations)
        for source, destination in batch.block_copies:
            self._slots[destination * size : (destination + 1) * size] = self._slots[
                source * size : (source + 1) * size
            ]
        # All rows write before any reads, as in a layer of the model.
        for row, (scheduled, token_ids) in enumerate(zip(batch.scheduled, known, strict=True)):
            sequence, first = scheduled.sequence, batch.start(row)
            for position in range(first, first + scheduled.num_tokens):
                before = self._slots[self._slot(sequence, position - 1)] if position else EMPTY
                slot = self._slot(sequence, position)
                self._slots[slot] = digest(before, token_ids[position])
        result = StepResult([-1] * len(batch.scheduled))
        for row, scheduled in enumerate(batch.scheduled):
            sequence = scheduled.sequence
            if not scheduled.samples:
                continue
            if sequence.request_id in self.failing:
                result.failures[row] = "not finite"
                continue
            result.token_ids[row] = self._sample(
                sequence, batch.lead if row < batch.num_decodes else 0
            )
            if sequence.params.logprobs:
                cached = self._cached(sequence, 0)
                result.logprobs[row] = {
                    token: Logprob(logprob)
                    for token, logprob in likeliest_tokens(cached, sequence.params.logprobs)
                }
        return result

    def prepare_graph(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True

    def _sample(self, sequence: Sequence, lead: int) -> int:
        num_output = sequence.num_output_tokens + lead
        script = self.script.get((sequence.request_id, sequence.index))
        if script is not None:
            return script[num_output] if num_output < len(script) else 0
        cached = self._cached(sequence, lead)
        return next_token(cached, sequence.params, sequence.index, num_output)

    def _cached(self, sequence: Sequence, lead: int) -> list[int]:
        """What the last token sees."""
        end = sequence.num_tokens + lead
        begin = max(end - self.window, 0) if self.window else 0
        first = begin // self.block_size
        assert first >= sequence.num_freed_blocks
        cached: list[int] = []
        for block in sequence.block_table[first:]:
            cached += self._slots[block * self.block_size : (block + 1) * self.block_size]
        return cached[begin - first * self.block_size : end - first * self.block_size]

    def _slot(self, sequence: Sequence, position: int) -> int:
        block, row = divmod(position, self.block_size)
        assert block >= sequence.num_freed_blocks
        return sequence.block_table[block] * self.block_size + row


def _break() -> StepResult:
    raise StepBroke


def make_engine(
    runner: FakeRunner,
    tokenizer: Tokenizer | None = None,
    clock: Callable[[], float] | None = None,
    **options: Any,
) -> Engine:
    """An engine whose clock, if none is given, counts its own readings."""
    ticks = itertools.count()
    clock = clock or (lambda: float(next(ticks)))
    return Engine(EngineConfig(**options), runner, tokenizer, clock=clock)


def make_tokenizer(*words: str, chat_template: str | None = None) -> Tokenizer:
    """One token per byte, then the words, and an end-of-sequence token."""
    vocabulary = {piece: i for i, piece in enumerate(byte_level_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(words))
    fill = [f"<unused{i}>" for i in range(EOS - 256 - len(words))]
    backend.add_special_tokens([*fill, "<eos>"])
    assert backend.token_to_id("<eos>") == EOS
    template = ChatTemplate(chat_template, {}, "the model") if chat_template else None
    return Tokenizer(backend, eos_token_ids=(EOS,), chat_template=template)


def check_invariants(engine: Engine) -> None:
    """What holds between steps, of blocks and of queues."""
    scheduler = engine.scheduler
    allocator = scheduler.block_manager.allocator
    allocator.check_integrity()
    held: dict[int, int] = {}
    for sequence in scheduler.running:
        for block in sequence.held_blocks:
            held[block] = held.get(block, 0) + 1
    for pinned in scheduler.block_manager.pins.values():
        for block in pinned:
            held[block] = held.get(block, 0) + 1
    assert allocator.num_active == len(held)
    host = scheduler.block_manager.host_allocator
    if host is not None:
        host.check_integrity()
        assert host.num_active == 0
    assert all(allocator.ref_count(block) == count for block, count in held.items())
    for sequence in scheduler.waiting:
        assert not sequence.block_table
        assert not sequence.num_computed_tokens
    size = allocator.block_size
    for sequence in scheduler.running:
        assert sequence.num_computed_tokens <= len(sequence.block_table) * size
    assert not scheduler.reclaim_leaks()
    assert len(scheduler.running) <= scheduler.max_num_seqs
